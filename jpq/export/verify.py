"""Checks that masked, rebuilt and exported model compute the same."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from jpq.compression.model import CompressedModel
from jpq.export.runtimes import Session
from jpq.tasks import CLASSIFICATION, Classification
from jpq.tasks.base import Task, sample_difference
from jpq.tracing.double_casts import in_double
from jpq.tracing.forward import batch_size, call_model, call_on_copies, collect_tensors, eval_mode, register_dataclasses
from jpq.types import JpqError

OPENED = "masked_vs_rebuilt_at_landing_with_open_norms"  # key of the difference where the models cannot be equal

EXACT = 1e-9  # largest relative difference in float64 of two models that compute the same

# What may differ between the rebuilt model and its file run as written: limits that are fixed for every network. Of 140
# runs in studies/results 138 differ in at most 0.06 % of the decisions, and 139 at a boundary in at most 17.3 % of the
# samples.
RARE = 0.005  # share of decisions that may come out differently: it bounds what the metric can lose in the file

WRONG = 0.05  # share of decisions beyond which no rounding of an unstable network explains it: the file is refused

CROSSED = 0.2  # share of samples that may have a value at a rounding boundary

NEARLY_ALL = 0.9  # share of samples beyond which the file is refused, where decisions differ or outputs are far off too

FAR_OFF = 0.1  # largest difference, as a share of the outputs' range, that boundaries explain where no decision differs

FEW = 2  # samples or decisions that may differ however few there are

METRIC_DIFFERS = 0.001  # share of the metric's range by which file and model may differ, or one sample's share

KEPT_BYTES = 2**29  # of a network's outputs that are kept for the next comparison over the same batches

CLOSE = 1e-3  # relative difference in float32 below which no rounding boundary was crossed

Pair = tuple[Any, Any]  # (a batch: a tensor, a tuple or a dict; its targets, which are not read here)


def verify(
    masked: nn.Module,
    small: nn.Module,
    path: str | Path,
    batches: Iterable[Pair],
    example: Any,
    task: Task | None = None,
) -> dict[str, Any]:
    """Differences between masked, rebuilt and exported model. Raises JpqError where they are not equal.

    Where channels inside opened averages (`--open-norms`) were removed, masked and rebuilt model cannot be equal: their
    difference then stands under the key `OPENED`, however large it is.

    Models may take several tensors and give several: batches and example are what `jpq.trace` takes.

    Args:
        masked: the network with its final plan; small: the rebuilt model; path: its ONNX file.
        batches: samples for the comparison in float32 and onnxruntime; example: a batch for float64.
        task: says which outputs are the same decision; None where it is unknown (see `compare`).
    """
    return rebuilt(masked, small, example) | exported(small, path, batches, task)


def rebuilt(masked: nn.Module, small: nn.Module, example: Any) -> dict[str, Any]:
    """Difference between masked and rebuilt model in float64, as `verify` has it. Raises JpqError as it does."""
    small.eval()
    exact = difference(masked, small, example)
    opened = isinstance(masked, CompressedModel) and masked.opened > 0
    if not opened and not exact <= EXACT:
        raise JpqError(
            f"The rebuilt model is not the masked one: they differ by {exact:.2e} in float64. This is a bug in jpq."
        )
    return {OPENED if opened else "masked_vs_rebuilt_float64": exact}


def exported(small: nn.Module, path: str | Path, batches: Iterable[Pair], task: Task | None = None) -> dict[str, Any]:
    """Differences between the rebuilt model and its ONNX file in onnxruntime. Raises JpqError beyond rounding.

    The file is run as written, without onnxruntime's optimisations. At most the share `RARE` of the decisions may come
    out differently, and at most the share `CROSSED` of the samples may have a value at a rounding boundary: limits that
    are the same for every network. Beyond them the record holds a "warning" (unstable networks); beyond `WRONG` the
    file is refused, and beyond `NEARLY_ALL` where decisions differ beyond their limit as well, or an output by more
    than `FAR_OFF`: in a large network some value of every sample may lie at a boundary without any harm. How often the
    rebuilt model crosses boundaries by itself, in float64 instead of float32 on the first batch, is reported beside
    them and decides nothing. onnxruntime's default optimisations replace layers by integer kernels and round biases to
    32-bit integers for them; their effect is reported as well.
    `batches` are read three times. Sessions have as many threads as PyTorch has.
    """
    return _compare_file(small, KeptOutputs(small), _default_session(path), path, batches, task)


def exported_with_metric(small: nn.Module, path: str | Path, batches: Any, task: Task) -> dict[str, Any]:
    """What `exported` gives, and under "metric" what `compare_metrics` gives; each network runs once over the batches.

    `batches` have their number of samples as `size`, and are read five times.
    """
    model, default = KeptOutputs(small), KeptOutputs(_default_session(path))
    record = _compare_file(small, model, default, path, batches, task)
    return record | {"metric": _compare_metrics(model, default, path, batches, task)}


class KeptOutputs:
    """A network or session whose outputs for batches that it has seen are kept: it runs once for each of them.

    Batches are known by their numbers, in whatever order they come. Nothing is kept of batches with parts that have no
    numbers to know them by, nor beyond `KEPT_BYTES` in all.
    """

    def __init__(self, net: Callable[..., Any]):
        self.net = net
        self._outputs: dict[str, Any] = {}
        self._bytes = 0

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs for one batch, in evaluation mode; the caller may change them."""
        key = _fingerprint((args, kwargs))
        if key in self._outputs:
            return copy.deepcopy(self._outputs[key])
        with eval_mode(self.net) if isinstance(self.net, nn.Module) else nullcontext():
            output = call_on_copies(self.net, args, kwargs)
        size = sum(t.numel() * t.element_size() for t in collect_tensors(output))
        if key and self._bytes + size <= KEPT_BYTES:
            with suppress(RuntimeError, TypeError):  # what cannot be copied is not kept
                self._outputs[key] = copy.deepcopy(output)
                self._bytes += size
        return output


def _fingerprint(inputs: Any) -> str:
    """A digest of the numbers, types and structure of nested inputs; "" where they hold something else."""
    register_dataclasses(inputs)
    leaves, structure = tree_flatten(inputs)
    digest = hashlib.sha256(repr(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            digest.update(repr(leaf).encode())
        else:
            return ""
    return digest.hexdigest()


def _default_session(path: str | Path) -> Session:
    """A session as users open it, with as many threads as PyTorch has."""
    return Session(path, threads=torch.get_num_threads())


def _compare_file(
    small: nn.Module,
    model: Callable[..., Any],
    default: Callable[..., Any],
    path: str | Path,
    batches: Iterable[Pair],
    task: Task | None,
) -> dict[str, Any]:
    """What `exported` gives; `model` and `default`: the rebuilt model and a default session, as they are to be run."""
    outside = compare(model, Session(path, torch.get_num_threads(), optimised=False), batches, task)
    precise = copy.deepcopy(small).double()
    first_batch = [next(iter(batches))]

    rounding = compare(
        model,
        lambda *args, **kwargs: in_double(lambda: precise(*_widen(args), **_widen(kwargs))),
        first_batch,
        task,
    )
    itself = (
        f"The rebuilt model itself, in float64 instead of float32, changes {rounding['argmax_differs']} of "
        f"{rounding['decisions']} decisions and the numbers of {rounding['at_a_rounding_boundary']} of "
        f"{rounding['images']} samples."
    )
    warning = _beyond_limits(outside, itself)
    return {
        "rebuilt_vs_onnxruntime": outside,
        "rebuilt_vs_onnxruntime_optimised": compare(model, default, batches, task),
        "rebuilt_float32_vs_float64": rounding,
        **({"warning": warning} if warning else {}),
    }


def compare_metrics(small: nn.Module, path: Path, batches: Any, task: Task) -> dict[str, Any]:
    """The task's metric of an ONNX file in a default session of onnxruntime, as users open it, and of its model.

    "file" and "model"; and a "warning" where they differ by more than `METRIC_DIFFERS` of the metric's range (of the
    model's metric, where the range has no ends) and by more than one of the samples.

    Args:
        small: the rebuilt model; path: its ONNX file.
        batches: (inputs, targets) pairs with their number of samples as `size`.
        task: gives the metric.
    """
    return _compare_metrics(small, _default_session(path), path, batches, task)


def _compare_metrics(
    model: Callable[..., Any], default: Callable[..., Any], path: str | Path, batches: Any, task: Task
) -> dict[str, Any]:
    """What `compare_metrics` gives; `model` and `default` as in `_compare_file`."""
    file, score = task.evaluate(_OnDevice(default), batches), task.evaluate(model, batches)
    low, high = task.score_bounds
    span = high - low if math.isfinite(high - low) else max(1.0, abs(score))
    record: dict[str, Any] = {"file": file, "model": score}
    if not abs(file - score) <= span * max(METRIC_DIFFERS, 1 / batches.size) * (1 + 1e-6):
        record["warning"] = (
            f"{Path(path).name} in a default onnxruntime session has {task.metric_name} {task.score(file):.4g}, the "
            f"PyTorch model {task.score(score):.4g}."
        )
    return record


class _OnDevice:
    """A session whose outputs lie where its inputs do."""

    def __init__(self, session: Any):
        self.session = session

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs for one batch."""
        device = collect_tensors((args, kwargs))[0].device
        return tree_map(lambda t: t.to(device), self.session(*args, **kwargs))


def _beyond_limits(outside: dict[str, Any], itself: str) -> str:
    """The warning of a file that differs by more than the fixed limits, "" within them; JpqError for a wrong file."""
    decisions = (
        f"onnxruntime and the rebuilt model differ: {outside['argmax_differs']} of {outside['decisions']} decisions "
        "come out differently, more than {:.1%}. "
    )
    samples = (
        f"onnxruntime and the rebuilt model differ on {outside['at_a_rounding_boundary']} of {outside['images']} "
        "samples, more than {:.0%}: this is more than rounding. "
    )
    differing, crossing = outside["argmax_differs"], outside["at_a_rounding_boundary"]
    many_differ = differing > max(FEW, RARE * outside["decisions"])
    far_off = outside["largest_relative_difference"] > FAR_OFF
    warnings = []
    if differing > max(FEW, WRONG * outside["decisions"]):
        raise JpqError(decisions.format(WRONG) + itself)
    if (many_differ or far_off) and crossing > max(FEW, NEARLY_ALL * outside["images"]):
        raise JpqError(samples.format(NEARLY_ALL) + itself)
    if many_differ:
        warnings.append(decisions.format(RARE))
    if crossing > max(FEW, CROSSED * outside["images"]):
        warnings.append(samples.format(CROSSED))
    return "".join(warnings) + itself if warnings else ""


def difference(reference: nn.Module, model: nn.Module, x: Any) -> float:
    """Largest relative difference of two models' outputs in float64, evaluation mode; neither is changed."""
    return largest_difference(*outputs_in_double([reference, model], x))


@torch.no_grad()
def outputs_in_double(models: Sequence[nn.Module], x: Any) -> list[list[Tensor]]:
    """Every model's outputs in float64 and evaluation mode; the models themselves stay as they are."""
    return [run_in_double(copy.deepcopy(net).double().eval(), x) for net in models]


@torch.no_grad()
def run_in_double(model: nn.Module, x: Any) -> list[Tensor]:
    """The outputs of a model that is in float64 and evaluation mode already."""
    return in_double(lambda: collect_tensors(call_model(model, _widen(x))))


def largest_difference(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Largest difference of outputs from those of a reference, relative to the reference's spread."""
    pairs = zip(reference, outputs, strict=True)
    return max(float(sample_difference(_with_rows(a), _with_rows(b)).amax()) for a, b in pairs)


def _widen(x: Any) -> Any:
    """Every floating-point tensor of a nested input in float64."""
    return tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, x)


def _with_rows(output: Tensor) -> Tensor:
    """An output with a first dim: a loss, which is a scalar, becomes the only entry of a vector."""
    return output if output.dim() else output.reshape(1)


def _per_sample(differences: Sequence[Tensor], samples: int) -> Tensor:
    """Largest difference of each sample over all outputs; outputs without a row per sample count for every sample."""
    rows = samples if any(len(d) == samples for d in differences) else len(differences[0])
    return torch.stack([d if len(d) == rows else d.amax().expand(rows) for d in differences]).amax(0)


class _Distance(Classification):
    """Judge of outputs without classes: each sample is one decision, by the distance of its outputs."""

    same_decision, decision_gap = Task.same_decision, Task.decision_gap


def _guess_task(output: Tensor) -> Task:
    """The judge of outputs of an unknown task, by their shape."""
    return CLASSIFICATION if output.dim() == 2 and output.shape[1] > 1 else _Distance()


@torch.no_grad()
def compare(
    reference: Callable[..., Any], model: Callable[..., Any], batches: Iterable[Pair], task: Task | None = None
) -> dict[str, Any]:
    """Difference of two models' outputs over batches of samples, in float32: numbers of samples and decisions.

    A sample differs "at a boundary" where its outputs are further apart than rounding of sums explains: somewhere a
    value sat so near to the middle of two quantization levels that the order of a sum decided between them. What is a
    decision, and when two agree, says the task (`Task.same_decision`); of several output tensors each is compared.
    Without a task, rows of several scores are taken for classes, and outputs of other shapes (images, sequences, boxes)
    agree where they lie within a tenth of their range.
    """
    images = decisions = agree = boundary = 0
    largest = widest_gap = 0.0
    for x, _ in batches:
        outputs = [
            [_with_rows(t.detach().cpu().float()) for t in collect_tensors(call_model(net, x))]
            for net in (reference, model)
        ]
        pairs = list(zip(*outputs, strict=True))
        apart = _per_sample([sample_difference(a, b) for a, b in pairs], batch_size(x))
        images, boundary = images + len(apart), boundary + int((apart > CLOSE).sum())
        largest = max(largest, float(apart.max()))
        for a, b in pairs:
            judge = task or _guess_task(a)
            same = judge.same_decision(a, b)
            decisions, agree = decisions + same.numel(), agree + int(same.sum())
            if not bool(same.all()):
                widest_gap = max(widest_gap, float(judge.decision_gap(a, b)[~same].max()))
    return {
        "images": images,
        "decisions": decisions,
        "argmax_agreement": agree / max(1, decisions),
        "argmax_differs": decisions - agree,
        "at_a_rounding_boundary": boundary,
        "largest_relative_difference": largest,
        "largest_gap_where_argmax_differs": widest_gap,
    }
