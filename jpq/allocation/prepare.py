"""The set-up of a method on a model, shared by `optimize`, `compress`, studies and latency prediction: `prepare`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from jpq.allocation.allocators import check_allocator
from jpq.allocation.manual import float_layers
from jpq.allocation.procedures import PROCEDURES, Procedure, score_of
from jpq.allocation.structure_mapping import map_structures
from jpq.allocation.uniform_bits import start_bits
from jpq.compression import external_mask
from jpq.compression.attach import attach
from jpq.compression.build import fixed_share, gate_factory, method_sites, network_targets, width_factory
from jpq.compression.channel_counts import channel_multiple
from jpq.compression.external_mask import ExternalMask
from jpq.compression.model import CompressedModel
from jpq.config import MEASURED_START, Budget, Decide
from jpq.costs.latency_table import LatencyTable
from jpq.costs.target import Target
from jpq.methods.compatibility import compose_method
from jpq.methods.quantizers import Fixed
from jpq.methods.scores import Score
from jpq.methods.table import Method
from jpq.plan import ALL_LEVELS
from jpq.tracing.forward import collect_tensors
from jpq.tracing.network import Network, with_float_layers, with_layer_times
from jpq.tracing.open_norms import check_open_norms
from jpq.tracing.sites import Site
from jpq.tracing.trace import trace
from jpq.types import JpqError


@dataclass(frozen=True)
class Prepared:
    """A method set up on one network: pruning groups, targets, and how gates and quantizers are attached."""

    decide: Decide
    method: Method
    network: Network
    sites: tuple[Site, ...]
    targets: tuple[Target, ...]  # of the first budget, where a run has several
    structures: Mapping[str, str] | None = None  # layer -> mask structure, where layers have their own
    mask: ExternalMask | None = None
    starts: Mapping[tuple[str, str], float] | None = None  # (layer, "w" | "a") -> initial width, for --start measured

    @property
    def procedure(self) -> Procedure:
        """When and how the method takes its decisions."""
        return PROCEDURES[self.method.procedure]

    @property
    def score(self) -> Score:
        """The score that ranks channels, where the method ranks any."""
        return score_of(self.decide.method, self.decide)

    def attach(self, model: nn.Module, calibration: Iterable[Any]) -> CompressedModel:
        """A trainable copy of `model` with the method's gates and quantizers.

        Args:
            model: the traced model, or one of the same layers with other weights.
            calibration: batches of inputs to which the ranges of quantizers are fitted.
        """
        d, mask = self.decide, self.mask
        shares = mask.share_left(self.network, self.sites) if mask else fixed_share(self.sites, self.method, d.density)
        bits = start_bits(self.network, self.targets, d.w_bits, d.a_bits, d.image_bits, shares)
        net = attach(
            mask.start(model, self.sites) if mask else model,
            self.network,
            self.sites,
            gate_factory(self.method, d.density),
            width_factory(self.method, d.w_bits, d.a_bits, d.image_bits, bits, self.starts),
            calibration,
            d.method,
            d.output_bits,
            channel_multiple(d.method, self.method, d.channel_multiple),
            d.weight_levels == ALL_LEVELS,
        )
        return mask.put(net) if mask else net

    def with_structures(self, structures: Mapping[str, str]) -> Prepared:
        """A copy of the set-up with other mask structures of the layers."""
        sites = method_sites(self.method, self.network, self.decide.skip, structures)
        return replace(self, structures=structures, sites=sites)


def check_decide(decide: Decide) -> Method:
    """The method of these settings, checked without a model: names, what goes together, and the mask's file.

    Raises JpqError with what to choose instead.
    """
    method = compose_method(
        decide.method, decide.structure, decide.width, decide.score, decide.schedule, decide.classes
    )
    check_start(decide, method)
    check_allocator(decide.method, decide.allocator)
    channel_multiple(decide.method, method, decide.channel_multiple)
    if decide.mask:
        external_mask.read(decide.mask)
    return method


def check_example(example: Any) -> None:
    """Raise JpqError for example inputs without samples, or with NaN: ranges of quantizers are fitted to them."""
    tensors = collect_tensors(example)
    if tensors and tensors[0].dim() and not len(tensors[0]):
        raise JpqError(f"The example inputs {list(tensors[0].shape)} hold no samples: give a batch of real ones.")
    for tensor in tensors:
        if bool(tensor.isnan().any()):
            raise JpqError("The example inputs hold NaN: give a batch without.")


def check_start(decide: Decide, method: Method) -> None:
    """Raise JpqError where widths cannot start from measurements, or be solved for again."""
    procedure = PROCEDURES[method.procedure]
    if decide.resolve_at and not procedure.measures and (not procedure.searches or method.width is Fixed):
        raise JpqError(
            f"--resolve-at {decide.resolve_at}: --method {decide.method} does not choose bits one by one, so there is "
            "nothing to solve again. Leave --resolve-at out, or choose measured or a method that learns bits."
        )
    if decide.start == MEASURED_START and (not procedure.searches or method.width is Fixed):
        raise JpqError(
            f"--start {decide.start}: --method {decide.method} does not search for bits, so they start nowhere. Leave "
            "--start out, or choose a method that learns them, such as djpq."
        )


def prepare(
    model: nn.Module,
    example: Any,
    decide: Decide,
    budget: Budget,
    *,
    table: LatencyTable | None = None,
    structures: Mapping[str, str] | None = None,
) -> Prepared:
    """Set a method up on a model: compose it, trace the model, find its pruning groups and its targets.

    Args:
        model: float, decomposed (`jpq.decompose`); it is not changed.
        example: one batch of inputs (a tensor, a tuple of positional arguments, or a dict of keywords).
        decide: how decisions are taken; checked already (`Config.check`).
        budget: one value per target.
        table: measured times of layers, for targets of latency.
        structures: layer -> mask structure, for a mapping that is known; default: as the method says.

    Raises JpqError for names and combinations that make no sense, models that cannot be read, and targets that are no
    amounts.
    """
    method = check_decide(decide)
    check_example(example)
    mask = external_mask.read(decide.mask) if decide.mask else None
    network = trace(model, example, open_norms=decide.open_norms)
    if not network.layers:
        raise JpqError(
            f"{type(model).__name__} has no convolution and no Linear layer, so there is nothing to compress. Give the "
            "model that holds the layers."
        )
    network = with_float_layers(network, float_layers(network, decide))
    if decide.open_norms:
        check_open_norms(network, method.gate is not None)
    if table is not None:
        network = with_layer_times(network, table)
    if mask is not None:
        sites = mask.sites(network)
    else:
        structures = structures or map_structures(method, network, example, decide.density, decide.skip)
        sites = method_sites(method, network, decide.skip, structures)
    return Prepared(decide, method, network, sites, network_targets(network, budget), structures, mask)
