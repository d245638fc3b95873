"""What a run works on: the device, and how many CPU threads."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from typing import Any

import torch

from jpq.types import JpqError

SMALL = 5 * 10**8  # MACs of a batch


def versions() -> dict[str, str]:
    """What this run was computed with."""
    names = ("jpq", "torch", "torchvision", "brevitas", "numpy", "onnx", "onnxruntime")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "cores": str(os.cpu_count()),
    }


def pick_device(name: str) -> torch.device:
    """The device that --device names."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = {
        "cpu",
        *(["cuda"] if torch.cuda.is_available() else []),
        *(f"cuda:{i}" for i in range(torch.cuda.device_count())),
    }
    if name not in here:
        raise JpqError(f"--device {name} is not here. Use {', '.join(sorted(here))} or auto.")
    return torch.device(name)


def set_threads(asked: int, macs: int) -> None:
    """CPU threads: as asked; else 1 for a net of few MACs a batch, where threads wait longer than they work."""
    if asked < 0:
        raise JpqError(f"--threads {asked}: give a positive number, or 0 to let jpq choose.")
    if asked:
        torch.set_num_threads(asked)
    elif macs < SMALL:
        torch.set_num_threads(1)


def record_environment(device: torch.device) -> dict[str, Any]:
    """What a run was computed on, and the most memory that its process had by now, in bytes."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "device": str(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    if sys.platform != "win32":
        import resource  # Windows has none

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["peak_memory_bytes"] = most if sys.platform == "darwin" else 1024 * most
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return found
