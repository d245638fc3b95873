"""Signals that ask a run to stop: Ctrl-C (SIGINT), and the SIGTERM that clusters send before they kill."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """The error of a run that a signal asked to stop; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interruption:
    """A context that turns signals into Interrupted: at once, or at the end of an `uninterrupted` stretch.

    Only the main thread receives signals, and only those that still have their default handler are taken over (one that
    is ignored, as under nohup, stays so); an Interruption inside another one handles signals in its stead. A second
    Ctrl-C does not wait, a second SIGTERM changes nothing.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal that was received; 0: none
        self.cut = False  # whether an uninterrupted stretch was left before its end
        self._waits = self._ignores = False
        self._former_handlers: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        if threading.current_thread() is threading.main_thread():
            for number, default in defaults.items():
                handler = signal.getsignal(number)
                if handler is default or isinstance(getattr(handler, "__self__", None), Interruption):
                    self._former_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        self._former_handlers.clear()

    def end(self, for_good: bool) -> None:
        """Ignore further signals, while the run reports that it stopped; with `for_good` also after the context."""
        self._ignores = True
        if for_good:
            self._former_handlers = dict.fromkeys(self._former_handlers, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ignores:
            return
        is_first, self.number = not self.number, self.number or number
        postponed = self._waits if is_first else number == signal.SIGTERM
        if not postponed:
            raise Interrupted(number)

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """A context at whose end a signal that came meanwhile takes effect."""
        self._waits = self.cut = True
        yield
        self._waits = self.cut = False
        if self.number:
            raise Interrupted(self.number)
