"""Functions of jpq wrapped wherever they are used, to time their calls or to act before and after them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

AnyFunction = Callable[..., Any]
PACKAGES = ("jpq", "torch.export")


def replace_function(function: AnyFunction, replacement: AnyFunction) -> None:
    """Put a replacement in the place of a function, in every loaded module of PACKAGES that has it by some name."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(PACKAGES) and module is not None:
            for name in [name for name, value in vars(module).items() if value is function]:
                setattr(module, name, replacement)


def wrap_function(
    function: AnyFunction, before: Callable[[], object] | None = None, after: Callable[[], object] | None = None
) -> None:
    """Call `before` at the start of every call of a function, and `after` once it has returned."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        result = function(*args, **kwargs)
        if after is not None:
            after()
        return result

    replace_function(function, wrapper)


@contextmanager
def time_calls(*functions: AnyFunction) -> Iterator[dict[str, float]]:
    """Processor seconds spent inside, by function name; inner functions are counted in outer ones too."""
    seconds = dict.fromkeys((function.__name__ for function in functions), 0.0)

    def timed(function: AnyFunction) -> AnyFunction:
        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[function.__name__] += time.process_time() - start

        return wrapper

    wrappers = {function: timed(function) for function in functions}
    for function, wrapper in wrappers.items():
        replace_function(function, wrapper)
    try:
        yield seconds
    finally:
        for function, wrapper in wrappers.items():
            replace_function(wrapper, function)
