"""Several processes train one model, on the devices of one machine or of many (started by torchrun).

Each takes its rows of every batch; the batch, its order and every random draw are those of a single process, so what
comes out is the same to rounding:

- gradients of weights and decisions are averaged over the processes after the backward pass. The task's loss has been
  weighted by the rows that each one had; the budget's pressure is the same everywhere and counts once;
- batch normalisation uses the statistics of the whole batch, reduced over the processes (`Split`; torch's own
  SyncBatchNorm needs GPUs);
- noise per sample is drawn for the whole batch everywhere, and each process takes its rows of it;
- what decides between epochs (landing, allocators) is computed everywhere from the same state, and required to agree;
- only the first process writes files.

Plain torch.distributed: DistributedDataParallel hooks into one forward pass, and here the loss asks the network for its
costs outside of that; accelerate would wrap the same. Where nothing was started, everything here does nothing.
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

from jpq.types import JpqError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # the others wait as long while the first verifies and exports

LOST = "Another process of this run ended or cannot be reached. See its message, then go on with --resume."

_STORES: list[Any] = []  # where the first failure is noted, while processes work together


def count() -> int:
    """How many processes work on this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes and speaks."""
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
    here, gpus = int(os.environ.get("LOCAL_RANK", "0")), 0 if device == "cpu" else torch.cuda.device_count()
    if gpus and here >= gpus:
        raise JpqError(
            f"This machine has {gpus} GPUs, fewer than torchrun's --nproc-per-node. Start as many processes "
            "as GPUs, or give --device cpu."
        )
    if gpus:
        torch.cuda.set_device(here)
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
    """Leave the others."""
    if _STORES:
        _STORES.clear()
        dist.destroy_process_group()


def should_report() -> bool:
    """Whether this process, which fails, is the one to say so: the first of them to fail."""
    try:
        return not _STORES or int(_STORES[0].add("failed", 1)) == 1
    except RuntimeError:  # whoever held the store is gone
        return True


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise JpqError(LOST) from error


def run_on_first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, in all of them; its JpqError or OSError is raised in all of them."""
    if count() == 1:
        return work()
    box: list[Any] = [None, None]
    if is_first():
        try:
            box[0] = work()
        except (JpqError, OSError) as error:
            box[1] = error if isinstance(error, JpqError) else JpqError(f"{error.filename}: {error.strerror}.")
    with _reached():
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def first_then_others(work: Callable[[], T]) -> T:
    """What `work` gives in each process; the others wait for the first, which may have to download something."""
    done: list[T] = []
    run_on_first(lambda: done.append(work()))
    return done[0] if done else work()


def require_same(value: str, what: str) -> None:
    """Raise JpqError in all processes where they do not hold the same."""
    if count() == 1:
        return
    every: list[Any] = [None] * count()
    with _reached():
        dist.all_gather_object(every, value)
    if len(set(every)) > 1:
        odd = next(rank for rank, other in enumerate(every) if other != every[0])
        raise JpqError(
            f"Process {odd} has {what} that differs from the first one's. All need the same code, versions, "
            "data and settings."
        )


def require_rows(batch_size: int) -> None:
    """Raise JpqError where a batch has no sample for some process."""
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
    with _reached():
        dist.broadcast(flat, src=0)
    given = [part.clone() for part in flat.split([len(part) for part in parts])]  # clones are aligned
    for tensor, raw in zip(tensors, given, strict=False):
        tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))
    torch.set_rng_state(given[len(tensors)].cpu())
    if len(draws) > 1:
        torch.cuda.set_rng_state(given[-1].cpu())


def mean(value: Tensor) -> float:
    """The mean of a scalar over the processes."""
    if count() == 1:
        return float(value.detach())
    total = value.detach().double()
    with _reached():
        dist.all_reduce(total)
    return float(total) / count()


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """Replace every gradient by its mean over the processes."""
    if count() == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in module.parameters():
        if p.grad is not None:
            kinds.setdefault((p.grad.dtype, p.grad.device), []).append(p.grad)
    for grads in kinds.values():
        flat = torch.cat([g.reshape(-1) for g in grads])
        with _reached():
            dist.all_reduce(flat)
        flat /= count()
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))


class Split:
    """This process's rows of the batches that a network trains on; use it as a context.

    Args:
        net: its batch normalisations use whole batches meanwhile, in training mode.
        noisy: what draws noise per sample (`network.taps.Draw`): is told which rows of a batch are its own.
    """

    def __init__(self, net: nn.Module, noisy: Sequence[Any] = ()):
        kinds = nn.modules.batchnorm._BatchNorm
        self.norms = [m for m in net.modules() if isinstance(m, kinds)] if count() > 1 else []
        self.noisy = noisy
        self.share = 1.0  # of the batch's samples
        self.whole = 0  # samples of the batch
        self.own = 0  # of them here

    def __enter__(self) -> Split:
        for norm in self.norms:
            norm.forward = partial(self._normalised, norm)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for norm in self.norms:
            del norm.forward
        for one in self.noisy:
            one.part = None

    @property
    def weight(self) -> float:
        """What the mean loss over these rows counts, so that the mean over the processes is that over the batch."""
        return self.share * count()

    def take(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """These rows of one batch; of one with fewer samples than processes everybody takes all."""
        if count() == 1:
            return x, y
        n, rank = len(y), dist.get_rank()
        start, stop = (n * rank // count(), n * (rank + 1) // count()) if n >= count() else (0, n)
        self.whole, self.own = n, stop - start
        self.share = self.own / n if n >= count() else 1 / count()
        for one in self.noisy:
            one.part = (n, start, stop)
        return x[start:stop], y[start:stop]

    def _normalised(self, norm: Any, x: Tensor) -> Tensor:
        """Batch normalisation by the mean and variance of the whole batch; running statistics as torch has them."""
        running: Tensor | None = norm.running_mean
        if not norm.training and running is not None:
            return F.batch_norm(x, running, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        average: Tensor = _Sum.apply(x.mean(dims) * self.share)
        apart = x - average.view(shape)
        variance: Tensor = _Sum.apply(apart.square().mean(dims) * self.share)
        if running is not None and norm.track_running_stats:
            norm.num_batches_tracked.add_(1)
            rate = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            n = x.numel() // x.shape[1] // self.own * self.whole
            with torch.no_grad():
                running.lerp_(average.detach().to(running), rate)
                norm.running_var.lerp_(variance.detach().to(running) * (n / max(1, n - 1)), rate)
        out = apart * torch.rsqrt(variance + norm.eps).view(shape)
        return out if norm.weight is None else out * norm.weight.view(shape) + norm.bias.view(shape)


class _Sum(torch.autograd.Function):
    """The sum over all processes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        with _reached():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total: Tensor = _Sum.forward(ctx, grad.contiguous())
        return total
