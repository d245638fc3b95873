"""`measure`: the cost of a rebuilt model, counted while it runs: every product that torch computes, at its widths.

It sees neither plan nor trace, and so checks both. Products inside a quantized layer count at the widths of its
quantizers and the density of its mask, all others at 32 bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from jpq.compression.usage import FLOAT_BITS
from jpq.methods.quantizers import act_quantizer, is_quantized, weight_quantizer
from jpq.tracing.forward import batch_size, call_model, collect_tensors, eval_mode, hook_modules

Widths = tuple[int, int, Fraction]  # of weight and input, and the share of the weights that a mask keeps

_FLOAT: Widths = (FLOAT_BITS, FLOAT_BITS, Fraction(1))

_PLAIN_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@torch.no_grad()
def measure(small: nn.Module, example: Any) -> dict[str, int]:
    """Cost of a rebuilt model, counted by running it: BOPs and MACs of one sample, calls of quantized layers.

    "float_macs" is the part of the MACs that is computed at 32 bits: layers that are not quantized, and products of
    computed tensors, as attention has them. The example is a tensor, a tuple of positional arguments, or a dict of
    keywords.
    """
    samples = batch_size(example)
    counter = _MultiplicationCounter(collect_tensors(example), samples)
    unbatched: list[str] = []

    def look(name: str, layer: Any, x: Tensor | None, _: Any) -> None:
        if x is not None and x.dim() < layer.weight.dim() and counter.depends_on_inputs(x):
            unbatched.append(name)  # one sample without a batch dim

    layers = {n: m for n, m in small.named_modules() if is_quantized(m)}
    plain = {n: m for n, m in small.named_modules() if isinstance(m, _PLAIN_LAYERS)}
    hooks = hook_modules({**plain, **layers}, look, before=True)
    with eval_mode(small), hooks, _count_inside(layers, counter), _without_fused_attention(), counter:
        call_model(small, example)
    batch = 1 if unbatched else samples
    macs = {widths: Fraction(n, batch) * widths[2] for widths, n in counter.macs.items()}
    for widths, n in counter.constant_macs.items():
        macs[widths] = macs.get(widths, Fraction(0)) + n * widths[2]
    return {
        "bops": int(sum(n * w * a for (w, a, _), n in macs.items())),
        "macs": int(sum(macs.values())),
        "layers": counter.layer_calls,
        "float_macs": int(macs.get(_FLOAT, 0)),
    }


class _MultiplicationCounter(TorchDispatchMode):
    """Counts the multiply-accumulates of every op that torch runs, by the widths in force at that moment."""

    def __init__(self, inputs: list[Tensor], batch: int) -> None:
        super().__init__()
        self.widths = _FLOAT
        self.layer_calls = 0
        self.macs: Counter[Widths] = Counter()  # of the whole batch
        self.constant_macs: Counter[Widths] = Counter()  # of what depends on no input, and so not on the batch
        self._batch = batch
        self._varying = WeakTensorKeyDictionary()  # tensors that depend on the inputs
        self._made = WeakTensorKeyDictionary()  # others with sizes that code names (zeros, expand): is one a batch's?
        for tensor in inputs:
            self._varying[tensor] = True

    def depends_on_inputs(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the inputs, or is one of them."""
        return tensor in self._varying

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        if packet not in _MACS and packet not in flop_registry and isinstance(func, torch._ops.OpOverload):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        macs = _macs_of(packet, args, kwargs, out)
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        varying = any(x in self._varying for x in read)
        inherited = any(x in self._made for x in read)
        named = not read or packet in _SPREADING or (inherited and packet in _RESHAPING)
        for tensor in collect_tensors(out):
            if varying:
                self._varying[tensor] = True
            elif named or inherited:
                spread = (named and self._batch in tensor.shape) or any(self._made.get(x) for x in read)
                self._made[tensor] = spread
        if macs:
            per_sample = varying or any(self._made.get(x) for x in read)
            (self.macs if per_sample else self.constant_macs)[self.widths] += macs
        return out


def _macs_of(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Multiply-accumulates of one call of an op."""
    if packet in _MACS:
        return _MACS[packet](args, out)
    if str(packet) == "torchvision.deform_conv2d":
        return out.numel() // out.shape[1] * args[1].numel()
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out)) // 2
    return 0


@contextmanager
def _count_inside(layers: Mapping[str, nn.Module], counter: _MultiplicationCounter) -> Iterator[None]:
    """A context in which the counter counts what each quantized layer computes at the layer's own widths."""

    def enter(_: str, layer: Any, __: Any, ___: Any) -> None:
        w, a = (round(float(q.width())) for q in (weight_quantizer(layer), act_quantizer(layer)))
        mask = getattr(layer, "mask", None)
        counter.widths = w, a, Fraction(1) if mask is None else Fraction(int(mask.sum()), mask.numel())
        counter.layer_calls += 1

    def leave(*_: Any) -> None:
        counter.widths = _FLOAT

    with hook_modules(layers, enter, before=True), hook_modules(layers, leave):
        yield


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """A context in which torch's attention and transformer layers run their parts one by one."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _cell_macs(args: Any, weights: Any) -> int:
    """A recurrent layer: each of its matrices once for every token."""
    return prod(args[0].shape[:-1]) * sum(w.numel() for w in weights if w.dim() > 1)


_aten = torch.ops.aten

_SPREADING = (_aten.expand, _aten.repeat, _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.new_empty)

_RESHAPING = (_aten.view, _aten.reshape, _aten._unsafe_view)  # they name sizes too

_MACS: dict[Any, Callable[[Any, Any], int]] = {  # ops without a formula in torch.utils.flop_counter: (arguments, out)
    _aten.mv: lambda args, _: args[0].numel(),
    _aten.addmv: lambda args, _: args[1].numel(),
    _aten.dot: lambda args, _: args[0].numel(),
    _aten.vdot: lambda args, _: args[0].numel(),
    _aten.addbmm: lambda args, _: args[1].numel() * args[2].shape[-1],
    _aten.conv_tbc: lambda args, out: prod(out.shape[:2]) * args[1].numel(),
    _aten._euclidean_dist: lambda args, out: out.numel() * (args[0].shape[-1] + 2),
    _aten._trilinear: lambda args, out: out.numel() * (args[1].shape[-2] + 1) * args[1].shape[-1],
    _aten.mkldnn_rnn_layer: lambda args, _: _cell_macs(args, args[1:3]),
    _aten._cudnn_rnn: lambda args, _: _cell_macs(args, args[1]),
}
