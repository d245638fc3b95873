"""The computing environment of a run: device, CPU threads, versions of libraries, peak memory."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from jpq.types import JpqError

SMALL_BATCH_MACS = 5 * 10**8  # MACs per batch, below which one CPU thread is fastest

LIBRARIES = ("jpq", "torch", "torchvision", "brevitas", "numpy", "onnx", "onnxruntime")


def pick_device(name: str) -> torch.device:
    """The device that --device names. Raises JpqError for one that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available = {
        "cpu",
        *(["cuda"] if torch.cuda.is_available() else []),
        *(f"cuda:{i}" for i in range(torch.cuda.device_count())),
    }
    if name not in available:
        raise JpqError(f"--device {name} is not here. Use {', '.join(sorted(available))} or auto.")
    return torch.device(name)


def set_threads(threads: int, macs: int) -> None:
    """Set the number of CPU threads; with `threads` 0 one for a network of few MACs a batch, else it stays.

    Raises JpqError for a negative number.
    """
    if threads < 0:
        raise JpqError(f"--threads {threads}: give a positive number, or 0 to let jpq choose.")
    if threads:
        torch.set_num_threads(threads)
    elif macs < SMALL_BATCH_MACS:  # more threads would wait longer than they work
        torch.set_num_threads(1)


@contextmanager
def restored_threads() -> Iterator[None]:
    """A context, and a decorator, that restores the number of CPU threads: one run does not decide for the next."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def full_precision() -> Iterator[None]:
    """A context that restores TF32: the last step compares at full precision, the next budget trains as before."""
    parts: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [part.allow_tf32 for part in parts]
    try:
        yield
    finally:
        for part, allowed in zip(parts, before, strict=True):
            part.allow_tf32 = allowed


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on, and the number of CPU cores."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "cores": str(os.cpu_count()),
    }


def record_environment(device: torch.device) -> dict[str, Any]:
    """Platform, device, threads, and the peak memory of this process so far, in bytes."""
    record: dict[str, Any] = {
        "platform": platform.platform(),
        "device": str(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    if sys.platform != "win32":
        import resource  # Windows has none

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record["peak_memory_bytes"] = peak if sys.platform == "darwin" else 1024 * peak
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
        record["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return record
