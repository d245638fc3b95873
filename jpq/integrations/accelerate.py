"""Compression in a loop with Hugging Face's accelerate: `prepare` hands a session to an Accelerator."""

from __future__ import annotations

from typing import Any

from jpq.session import CompressionSession
from jpq.types import JpqError

try:
    from accelerate import Accelerator
except ImportError as error:
    raise JpqError(
        'jpq.integrations.accelerate needs a package that is missing: pip install "jpq[accelerate]".'
    ) from error


def prepare(accelerator: Accelerator, session: CompressionSession, optimizer: Any, *others: Any) -> tuple[Any, ...]:
    """What `accelerator.prepare(session, optimizer, *others)` gives; steps of the optimizer advance the search.

    The loop adds `session.pressure()` to the loss and does not call `session.step()`: where gradients accumulate, only
    the steps that the optimizer takes count. `accelerator.save_state` and `load_state` resume the search.

    Raises JpqError for several processes, and where `session` is no session.
    """
    if not isinstance(session, CompressionSession):
        raise JpqError(f"prepare takes a session of jpq.compress first, and got {type(session).__name__}.")
    if accelerator.num_processes > 1:
        raise JpqError("jpq.integrations.accelerate trains in one process: launch it with --num_processes 1.")
    session.follow(optimizer)
    prepared: tuple[Any, ...] = tuple(accelerator.prepare(session, optimizer, *others))
    return prepared
