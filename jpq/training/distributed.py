"""Data-parallel training by several processes, on one machine or many (started by torchrun).

Each process takes its rows of every batch; the batch, its order and every random draw are those of a single process, so
the result is the same to rounding:

- gradients of weights and decisions are averaged over the processes after the backward pass. The task's loss has been
  weighted by the rows of each process; the budget's pressure is the same everywhere and counts once;
- batch normalisation uses the statistics of the whole batch, reduced over the processes (`Split`; torch's own
  SyncBatchNorm needs GPUs);
- noise per sample is drawn for the whole batch everywhere, and each process takes its rows of it;
- decisions between epochs (discretization, allocators) are computed everywhere from the same state, and checked to
  agree;
- only the first process writes files.

DistributedDataParallel does not fit: it hooks into one forward pass, and here the loss asks the network for its costs
outside of that (accelerate wraps it). In a single process every function here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.utils._pytree import tree_map

from jpq.tracing.forward import batch_size
from jpq.types import JpqError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # longest wait for the first process, which verifies and exports

LOST_PROCESS = "Another process of this run ended or cannot be reached. See its message, then go on with --resume."

_STORES: list[Any] = []  # the store where the first failure is noted, while processes work together


def count() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return count() == 1 or dist.get_rank() == 0


def begin(device: str) -> None:
    """Join the processes that torchrun started, if it did; each takes one GPU of its machine where there are some.

    Raises JpqError where the others cannot be reached, or a GPU is missing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    if device.startswith("cuda:"):
        raise JpqError(
            f"--device {device} is one GPU, and each process takes its own. Leave --device out, or give cuda."
        )
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), 0 if device == "cpu" else torch.cuda.device_count()
    if gpus and local_rank >= gpus:
        raise JpqError(
            f"This machine has {gpus} GPUs, fewer than the processes that torchrun started. Start as many "
            "processes as GPUs, or give --device cpu."
        )
    if gpus:
        torch.cuda.set_device(local_rank)
    try:
        store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
        store.set_timeout(TIMEOUT)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise JpqError(f"The processes cannot find each other ({error}). Start them all with torchrun.") from error
    _STORES.append(PrefixStore("jpq", store))


def end() -> None:
    """Leave the process group."""
    if _STORES:
        _STORES.clear()
        dist.destroy_process_group()


def should_report() -> bool:
    """Whether this failing process prints its error: only the first one to fail does."""
    try:
        return not _STORES or int(_STORES[0].add("failed", 1)) == 1
    except RuntimeError:  # the process that held the store is gone
        return True


@contextmanager
def _lost_process_as_error() -> Iterator[None]:
    """Turn torch's error about a process that cannot be reached into a JpqError."""
    try:
        yield
    except RuntimeError as error:
        raise JpqError(LOST_PROCESS) from error


def run_on_first(work: Callable[[], T]) -> T:
    """Do `work` in the first process and return its result in all; its JpqError or OSError is raised in all."""
    if count() == 1:
        return work()
    outcome: list[Any] = [None, None]  # result, error
    if is_first():
        try:
            outcome[0] = work()
        except (JpqError, OSError) as error:
            outcome[1] = error if isinstance(error, JpqError) else JpqError(_system_error_text(error))
    with _lost_process_as_error():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _system_error_text(error: OSError) -> str:
    """An error of the system as a sentence; some name no file, and have no text of the system's."""
    return f"{error.filename or 'A file'}: {error.strerror or error}."


def first_then_others(work: Callable[[], T]) -> T:
    """Do `work` in each process, after the first one has done it (it may have to download something)."""
    results: list[T] = []
    run_on_first(lambda: results.append(work()))
    return results[0] if results else work()


def check_same(value: str, what: str) -> None:
    """Raise JpqError in all processes where their values differ; `what` names the value with its article."""
    if count() == 1:
        return
    values: list[Any] = [None] * count()
    with _lost_process_as_error():
        dist.all_gather_object(values, value)
    if len(set(values)) > 1:
        rank = next(rank for rank, process_value in enumerate(values) if process_value != values[0])
        raise JpqError(
            f"Process {rank} has {what} that differs from the first one's. All need the same code, versions, "
            "data and settings."
        )


def check_rows(batch_size: int) -> None:
    """Raise JpqError where a batch has fewer samples than there are processes."""
    if batch_size < count():
        raise JpqError(f"--batch-size {batch_size} is shared by {count()} processes: give at least one sample each.")


@torch.no_grad()
def share_state(module: nn.Module) -> None:
    """Give every process the first one's parameters, buffers and state of the random draws."""
    if count() == 1:
        return
    tensors = list(module.state_dict().values())
    device = tensors[0].device if tensors else torch.device("cpu")
    draws = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device.type == "cuda" else [])]
    parts = [t.detach().contiguous().reshape(-1).view(torch.uint8).to(device) for t in (*tensors, *draws)]
    flat = torch.cat(parts)
    with _lost_process_as_error():
        dist.broadcast(flat, src=0)
    received = [part.clone() for part in flat.split([len(part) for part in parts])]  # clones are aligned
    for tensor, raw in zip(tensors, received, strict=False):
        tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))
    torch.set_rng_state(received[len(tensors)].cpu())
    if len(draws) > 1:
        torch.cuda.set_rng_state(received[-1].cpu())


def mean(value: Tensor) -> float:
    """The mean of a scalar over the processes."""
    if count() == 1:
        return float(value.detach())
    total = value.detach().double()
    with _lost_process_as_error():
        dist.all_reduce(total)
    return float(total) / count()


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """Replace every gradient by its mean over the processes."""
    if count() == 1:
        return
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in module.parameters():
        if p.grad is not None:
            groups.setdefault((p.grad.dtype, p.grad.device), []).append(p.grad)
    for grads in groups.values():
        flat = torch.cat([g.reshape(-1) for g in grads])
        with _lost_process_as_error():
            dist.all_reduce(flat)
        flat /= count()
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))


class Split:
    """Split of the training batches among processes, as a context: this process's rows.

    Args:
        net: its batch normalisations use the statistics of whole batches meanwhile, in training mode.
        draws: sources of noise per sample (`jpq.compression.masking.GateSample`), told the rows of this process.
    """

    def __init__(self, net: nn.Module, draws: Sequence[Any] = ()):
        kinds = nn.modules.batchnorm._BatchNorm
        self.norms = [m for m in net.modules() if isinstance(m, kinds)] if count() > 1 else []
        self.draws = draws
        self.share = 1.0  # of the batch's samples that are here
        self.samples = 0  # of the batch
        self.local_samples = 0  # of them here

    def __enter__(self) -> Split:
        for norm in self.norms:
            norm.forward = partial(self._normalise, norm)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for norm in self.norms:
            del norm.forward
        for draw in self.draws:
            draw.part = None

    @property
    def weight(self) -> float:
        """Factor of the mean loss over these rows, so that the mean over the processes is the mean over the batch."""
        return self.share * count()

    def take(self, x: Any, y: Any) -> tuple[Any, Any]:
        """This process's rows of a batch; of a batch with fewer samples than processes, all rows."""
        if count() == 1:
            return x, y
        n, rank = batch_size(x), dist.get_rank()
        start, stop = (n * rank // count(), n * (rank + 1) // count()) if n >= count() else (0, n)
        self.samples, self.local_samples = n, stop - start
        self.share = self.local_samples / n if n >= count() else 1 / count()
        for draw in self.draws:
            draw.part = (n, start, stop)
        return _rows(x, start, stop), _rows(y, start, stop)

    def _normalise(self, norm: Any, x: Tensor) -> Tensor:
        """Batch normalisation by the mean and variance of the whole batch; running statistics as torch has them."""
        running: Tensor | None = norm.running_mean
        if not norm.training and running is not None:
            return F.batch_norm(x, running, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        mean: Tensor = _SumOverProcesses.apply(x.mean(dims) * self.share)
        centred = x - mean.view(shape)
        variance: Tensor = _SumOverProcesses.apply(centred.square().mean(dims) * self.share)
        if running is not None and norm.track_running_stats:
            norm.num_batches_tracked.add_(1)
            rate = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            n = x.numel() // x.shape[1] // self.local_samples * self.samples
            with torch.no_grad():
                running.lerp_(mean.detach().to(running), rate)
                norm.running_var.lerp_(variance.detach().to(running) * (n / max(1, n - 1)), rate)
        out = centred * torch.rsqrt(variance + norm.eps).view(shape)
        return out if norm.weight is None else out * norm.weight.view(shape) + norm.bias.view(shape)


def _rows(value: Any, start: int, stop: int) -> Any:
    """Samples of a batch: of its tensors, or of its list of dicts with one for each sample."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
        return value[start:stop]
    return tree_map(lambda leaf: leaf[start:stop] if isinstance(leaf, Tensor) else leaf, value)


class _SumOverProcesses(torch.autograd.Function):
    """The sum over all processes, forward and backward (torch.distributed.nn.functional.all_reduce is deprecated)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        with _lost_process_as_error():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total: Tensor = _SumOverProcesses.forward(ctx, grad.contiguous())
        return total
