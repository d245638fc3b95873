"""Requests to stop a run: Ctrl-C (SIGINT), and the SIGTERM that clusters send before they kill."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Somebody asked the run to stop; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interruption:
    """Listens while it is entered, and raises Interrupted: at once, or at the end of what must stay `whole`.

    Only the main thread hears signals, and only those that nobody else listens to are taken over (one that is ignored,
    as under nohup, stays so); an Interruption inside another one listens in its stead. A second Ctrl-C does not wait, a
    second SIGTERM changes nothing.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal that asked; 0: nobody did
        self.cut = False  # whether something that must stay whole has been cut through
        self._busy = self._deaf = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        free = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        if threading.current_thread() is threading.main_thread():
            for number, usual in free.items():
                now = signal.getsignal(number)
                if now is usual or isinstance(getattr(now, "__self__", None), Interruption):
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def end(self, for_good: bool) -> None:
        """Hear no more: what is left is to say that it stopped. `for_good`: this process ends after that."""
        self._deaf = True
        if for_good:
            self._before = dict.fromkeys(self._before, signal.SIG_IGN)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._deaf:
            return
        first, self.number = not self.number, self.number or number
        waits = self._busy if first else number == signal.SIGTERM
        if not waits:
            raise Interrupted(number)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A stretch that is done wholly or not at all: a request waits for its end."""
        self._busy = self.cut = True
        yield
        self._busy = self.cut = False
        if self.number:
            raise Interrupted(self.number)
