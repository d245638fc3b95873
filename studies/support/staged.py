"""A measurement in stages, in a process of its own with a limit of processor time; finished stages stay."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

Row = dict[str, Any]
Stages = Callable[[], Iterator[tuple[str, Row]]]  # yields (name of the stage that comes next, columns measured so far)

LONG_SENTENCE = 300


def run_stages(stages: Stages, limit: int) -> Row:
    """The columns of all stages; where one fails or takes too long, those before it, and "why_not".

    The process is forked, so that what this one has imported need not be imported again (Linux, macOS).

    Args:
        stages: a generator; it yields before every stage, with the columns of the stages before it.
        limit: processor seconds for all stages together.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_stages, args=(stages, limit, sender))
    child.start()
    sender.close()
    row: Row = {}
    stage = "start"
    try:
        while True:
            stage, columns = receiver.recv()
            row |= columns
    except EOFError:
        child.join()
    if stage:
        what = (
            f"exit code {child.exitcode}" if child.exitcode and child.exitcode != -24 else f"{limit} processor seconds"
        )
        row.setdefault("why_not", f"{stage}: no end after {what}")
    return row


def _send_stages(stages: Stages, limit: int, sender: Connection) -> None:
    """In the child: run the stages; the last message has an empty stage."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    stage = "start"
    start = time.process_time()
    try:
        for stage, columns in stages():
            sender.send((stage, columns))
        row: Row = {}
    except Exception as error:  # a row says what kind of error: jpq's own sentences, or others, which are faults
        sentence = " ".join(str(error).split())[:LONG_SENTENCE]
        row = {"why_not": f"{stage}: {type(error).__name__}: {sentence}"}
    sender.send(("", row | {"seconds": round(time.process_time() - start, 1)}))
