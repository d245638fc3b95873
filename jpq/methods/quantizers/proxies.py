"""Injectors of brevitas' proxies, and copies and pickles of proxies that hold our quantizers.

A proxy of brevitas keeps its injector, a class made while the program runs, which no pickle can name. A deep copy keeps
the injector of its source, and with it the source's quantizer, which `load_state_dict` would put into the copy. So in
copies and pickles the injector of a proxy is made anew, from the quantizer that the copy holds. Proxies made elsewhere
are copied as before. The classes stay brevitas' own, because its exporters look them up by class.
"""

from __future__ import annotations

import copyreg
from typing import Any

from brevitas.inject import ExtendedInjector, value
from brevitas.inject.enum import FloatToIntImplType, QuantType
from brevitas.proxy import ActQuantProxyFromInjector, BiasQuantProxyFromInjector, WeightQuantProxyFromInjector
from brevitas.quant.none import NoneActQuant, NoneBiasQuant


class WeightGrid(ExtendedInjector):
    """Injector of a weight's quantizer, given as the instance `tensor_quant`."""

    proxy_class = WeightQuantProxyFromInjector
    quant_type = QuantType.INT
    float_to_int_impl_type = FloatToIntImplType.ROUND
    signed = True

    @value
    def narrow_range(tensor_quant):  # type: ignore[no-untyped-def]
        """Whether the grid of the moment is symmetric: no channel uses all levels of its width."""
        low, high = tensor_quant.integers()
        return not bool((low != -high).any())


class ActGrid(ExtendedInjector):
    """Injector of an activation's quantizer, given as the instance `tensor_quant`."""

    proxy_class = ActQuantProxyFromInjector
    quant_type = QuantType.INT
    float_to_int_impl_type = FloatToIntImplType.ROUND


class NoActGrid(NoneActQuant):
    """Injector of an activation that is not quantized."""

    proxy_class = ActQuantProxyFromInjector


class NoBiasGrid(NoneBiasQuant):
    """Injector of a bias that is not quantized."""

    proxy_class = BiasQuantProxyFromInjector


_KINDS: tuple[Any, ...] = (WeightGrid, ActGrid, NoActGrid, NoBiasGrid)


def weight_injector(grid: Any) -> Any:
    """The injector of a weight's quantizer."""
    return WeightGrid.let(tensor_quant=grid)


def act_injector(grid: Any, signed: bool) -> Any:
    """The injector of an activation's quantizer: an unsigned grid is 0..N, a signed one -N..N."""
    return ActGrid.let(tensor_quant=grid, signed=signed, narrow_range=signed)


def no_grid_proxy(layer: Any) -> Any:
    """A proxy that leaves the input of `layer` as it is."""
    return ActQuantProxyFromInjector(layer, NoActGrid.let())


class _Injector:
    """Stand-in for a proxy's injector in copies and pickles; reading it makes the injector."""

    def __init__(self, kind: int, grid: Any, signed: bool):
        self.arguments = kind, grid, signed

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_injector, self.arguments


def _make_injector(kind: int, grid: Any, signed: bool) -> Any:
    """The injector of a kind (its place in `_KINDS`) for a quantizer."""
    if _KINDS[kind] is WeightGrid:
        return weight_injector(grid)
    return act_injector(grid, signed) if _KINDS[kind] is ActGrid else _KINDS[kind].let()


def _reduce_proxy(proxy: Any) -> Any:
    """How a proxy is copied and pickled: as any object, but with a stand-in for an injector of ours."""
    reduced: Any = object.__reduce_ex__(proxy, 4)
    made, arguments, state, *rest = reduced
    kinds = [i for i, kind in enumerate(_KINDS) if issubclass(proxy.quant_injector, kind)]
    if kinds:
        fused = getattr(proxy, "fused_activation_quant_proxy", None)
        grid = proxy.tensor_quant if _KINDS[kinds[0]] is WeightGrid else getattr(fused, "tensor_quant", None)
        state = {**state, "quant_injector": _Injector(kinds[0], grid, bool(proxy.is_signed))}
    return made, arguments, state, *rest


for _class in (WeightQuantProxyFromInjector, ActQuantProxyFromInjector, BiasQuantProxyFromInjector):
    copyreg.pickle(_class, _reduce_proxy)
