"""Removing channels from a float model, and finding channels that its code cannot lose by running smaller copies."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from jpq.tracing.call_sizes import CallSizes, is_call_size, parse_size, resize_calls
from jpq.tracing.copy_model import copy_model
from jpq.tracing.forward import collect_tensors
from jpq.tracing.model_checks import unwrap_model
from jpq.tracing.network import Network
from jpq.tracing.open_norms import NormsWithoutStatistics
from jpq.tracing.sites import Site, channels
from jpq.types import JpqError, Labels

FIXED_SIZE_REASON = "the model's code has fixed sizes there, computes with their number, or lets them follow others"

UNTRIED_REASON = "a copy of the model could not be tried with fewer channels there"

TOLERANCE = 1e-6  # relative difference in float64; a wrong head size or shuffle differs by far more

FEW = 8  # sites of which each is tried once more without rewritten sizes; more are tried together only

LEFT = 2  # units of every site in the smallest copy that is tried

_NUMBER_TYPES = ("Tensor", "number", "Optional[number]", "float", "Optional[float]")  # of arguments, in schemas

_SIZE_TYPES = ("int", "SymInt", "List[int]", "List[SymInt]", "Optional[int]", "Optional[SymInt]")

_FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)

_NUMBERS_ELSEWHERE = ("aten.constant_pad_nd",)  # the filling that a smaller copy adds of itself

_SHAPED = (  # operators whose sizes follow the channels, and those that a copy may need or not, by its strides
    *("view", "_unsafe_view", "reshape", "expand", "as_strided", "clone", "contiguous", "t", "transpose", "permute"),
    *("squeeze", "unsqueeze", "alias", "detach", "split", "split_with_sizes", "convolution", "empty"),
    *("native_group_norm", "native_layer_norm", "_fused_rms_norm", "_to_copy"),
)

Slices = Mapping[str, Mapping[int, list[int]]]  # parameter, buffer or counting attribute -> dim -> kept indices


def remove_channels(model: nn.Module, network: Network, dropped: Collection[int]) -> nn.Module:
    """A deep copy of the float `model` without the channels whose label class is in `dropped`.

    It computes what `model` computes when every weight that reads a dropped channel is zero. Modules and parameters
    that are shared stay shared; DataParallel and torch.compile are taken off.
    """
    model = unwrap_model(model)
    tensors = [t for t in [*model.parameters(), *model.buffers()] if type(t) in (nn.Parameter, Tensor)]
    views = [t.detach() if type(t) is Tensor else nn.Parameter(t.detach(), t.requires_grad) for t in tensors]
    copied = copy_model(model, dict(zip(map(id, tensors), views, strict=True)))
    small = apply_slices(copied, compute_slices(network, dropped))
    for original, view in zip(tensors, views, strict=True):
        if view.data_ptr() == original.data_ptr():  # not sliced: copied only now, so that wide weights never are
            view.data = view.data.clone()
    return small


def freeze_unshrinkable(
    model: nn.Module,
    network: Network,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    suspects: Collection[int],
    sizes: CallSizes | None = None,
) -> Network:
    """The network with those sites frozen whose units the model's code cannot lose.

    Shapes are tried for every site, on the meta device, with about two thirds of its units and with LEFT of them, and
    so are numbers that the code computes with: of channels whose count is one (`x / x.shape[1]`), none can go. Sites
    with suspect classes (whose sizes a reshape or split names) are also computed, on random weights: masked and shrunk
    must agree, apart from norms that were opened. So are sites without whose units the code calls other operators
    (`if x.shape[1] > 4`), or makes other tensors from numbers (`torch.arange(x.shape[1])`), and all sites of a model
    whose code asks for values, which the meta device has not.

    Where that fails, sizes that the code's calls name are rewritten to follow the kept channels; those with which
    more sites pass become `Network.attributes`.
    """
    sites = [site for site in channels(network) if site.n > 1]
    sizes = sizes or CallSizes()
    trial = _Trial(model, network, args, kwargs)
    conditional = [site for site in sites if _classes([site]) & set(sizes.needed)]
    if not conditional and trial.accepts(sites, suspects):
        return network
    if sizes.labels:
        network, passed, reason = _follow_sizes(trial, sites, conditional, suspects, sizes)
    else:
        passed, reason = _shrinkable(trial, [site for site in sites if site not in conditional], suspects)
    frozen = dict(network.frozen)
    for site in sites:
        if site not in passed:
            frozen |= {c: sizes.needed.get(c, reason) for c in site.labels.tolist()}
    return replace(network, frozen=frozen)


def _follow_sizes(
    trial: _Trial, sites: list[Site], conditional: list[Site], suspects: Collection[int], sizes: CallSizes
) -> tuple[Network, list[Site], str]:
    """(network with the sizes that are needed, sites that pass with them, reason why the others do not)."""
    counted = {c for labels in sizes.labels.values() for c in labels.tolist()}
    uncertain = {*suspects, *counted}
    everything = trial.with_sizes(sizes.labels)
    passed, reason = _shrinkable(everything, sites, uncertain)
    left = [site for site in sites if site not in passed]
    kept = {n: labels for n, labels in sizes.touching(_classes(passed)).items() if not _classes(left) & {*labels}}
    if left:  # a size that is wrong for a site may be right as the code has it
        some = trial.with_sizes(kept)
        passed = _passing(lambda tried: some.accepts(tried, uncertain), passed)
        plain = [site for site in left if site not in conditional and sizes.touching(_classes([site]))]
        if plain and (len(plain) <= FEW or some.accepts([*passed, *plain], uncertain)):
            passed += _passing(lambda tried: some.accepts([*passed, *tried], uncertain), plain)
    optional = {name: labels for name, labels in kept.items() if not set(sizes.needed) & set(labels.tolist())}
    needed = _needed_sizes(trial, kept, optional, passed, uncertain)
    return trial.with_sizes(needed).network, passed, reason


def _needed_sizes(
    trial: _Trial,
    sizes: Mapping[str, Labels],
    optional: Collection[str],
    sites: list[Site],
    uncertain: Collection[int],
) -> Mapping[str, Labels]:
    """The sizes but for optional ones without which sites pass, too; by call, alike in all modules of a class."""
    groups: dict[tuple[type, str], list[str]] = {}
    for name in optional:
        path, key = parse_size(name)[0] if is_call_size(name) else (name.rpartition(".")[0], name.rpartition(".")[2])
        groups.setdefault((type(trial.model.get_submodule(path)), key), []).append(name)
    needed = dict(sizes)
    for names in groups.values():
        fewer = {name: labels for name, labels in needed.items() if name not in names}
        if trial.with_sizes(fewer).shapes_fit(sites):
            needed = fewer
    return needed if trial.with_sizes(needed).accepts(sites, uncertain) else sizes


def _classes(sites: Sequence[Site]) -> set[int]:
    """All label classes of some sites."""
    return {c for site in sites for c in site.labels.tolist()}


def _shrinkable(trial: _Trial, sites: list[Site], suspects: Collection[int]) -> tuple[list[Site], str]:
    """The sites whose units the model's code can lose, and the reason why it cannot lose the others."""
    uncertain = [site for site in sites if _classes([site]) & set(suspects)]
    passed = _passing(trial.outputs_agree, _passing(trial.shapes_fit, uncertain))
    passed = _passing(trial.shapes_fit, [site for site in sites if site in passed or site not in uncertain])
    if len(passed) < len(sites) and not trial.meta_works:  # the meta device says nothing about this model
        passed = _passing(trial.outputs_agree, sites)
        if len(passed) < len(sites) and not trial.outputs_agree(()):
            return passed, UNTRIED_REASON
    return passed, FIXED_SIZE_REASON


def _passing(test: Callable[[Sequence[Site]], bool], sites: list[Site]) -> list[Site]:
    """All sites if they pass together; else those that pass alone, if they pass together; else none."""
    for _ in range(2):
        if not sites or test(sites):
            return sites
        sites = _passing_alone(test, sites)
    return sites if sites and test(sites) else []


def _passing_alone(test: Callable[[Sequence[Site]], bool], failing: list[Site]) -> list[Site]:
    """Those of some sites, which fail together, that pass alone: found by halving, in about 2 k log(n / k) tests.

    A half that passes together is taken to pass alone, so that k culprits among n sites do not cost n tests.
    """
    if len(failing) == 1:
        return []
    middle = len(failing) // 2
    halves = failing[:middle], failing[middle:]
    return [site for half in halves for site in (half if test(half) else _passing_alone(test, half))]


def _drop_third(sites: Sequence[Site]) -> list[int]:
    """A third of every site's units, and 0 to 3 more: sites that the code wants equally large must not stay so.

    They lie irregularly: parts that the code cuts at wrong places must not be right by chance.
    """
    dropped: list[int] = []
    for k, site in enumerate(sites):
        n = len(site.labels)
        count = min((n + 1) // 3 + k % 4, n - 1)
        dropped += site.labels[np.random.default_rng(n).permutation(n)[:count]].tolist()
    return dropped


def _drop_most(sites: Sequence[Site]) -> list[int]:
    """All but LEFT of every site's units (of two, one): the code may ask for the number of channels."""
    dropped: list[int] = []
    for site in sites:
        n = len(site.labels)
        dropped += site.labels[np.random.default_rng(n).permutation(n)[: max(n - LEFT, min(n - 1, 1))]].tolist()
    return dropped


@dataclass
class _Calls:
    """What the code of a model calls in one run: how often each number is computed with, and each operator called."""

    numbers: Counter[tuple[str, str, Any]] = field(default_factory=Counter)  # operator, argument, value: factors
    others: Counter[tuple[str, ...]] = field(default_factory=Counter)  # operator, its places, sizes of new tensors


Drop = Callable[[Sequence[Site]], list[int]]  # the classes that a smaller copy is without


@dataclass(frozen=True)
class _Trial:
    """Runs of copies of a model from which some units of some sites were removed."""

    model: nn.Module
    network: Network
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def with_sizes(self, sizes: Mapping[str, Labels]) -> _Trial:
        """The same trial with sizes in calls that follow the channels that they count."""
        trial = replace(self, network=replace(self.network, attributes={**self.network.attributes, **sizes}))
        vars(trial)["whole"] = self.whole  # where no size changes
        return trial

    def accepts(self, sites: Sequence[Site], uncertain: Collection[int]) -> bool:
        """Whether all these sites pass together: shapes, and outputs of those with uncertain classes."""
        computed = [site for site in sites if _classes([site]) & set(uncertain)]
        if self.shapes_fit(sites):
            return not computed or self.outputs_agree(computed)
        return not self.meta_works and self.outputs_agree(sites)

    @cached_property
    def meta_works(self) -> bool:
        """Whether the meta device says anything about this model."""
        return self.whole is not None

    def shapes_fit(self, sites: Sequence[Site]) -> bool:
        """Whether smaller copies run on the meta device, which computes shapes only, and compute what the model does.

        They must compute with no number of their own; where they call other operators, the outputs decide.
        """
        for drop in (_drop_third, _drop_most):
            calls = self._calls_without(sites, drop)
            if calls is None or self.whole is None or not calls.numbers <= self.whole.numbers:
                return False
            if calls.others != self.whole.others and not self.outputs_agree(sites, drop):
                return False
        return True

    @cached_property
    def whole(self) -> _Calls | None:
        """What the whole model calls; None where it does not run on the meta device."""
        return self._calls_without(())

    def _calls_without(self, sites: Sequence[Site], drop: Drop = _drop_third) -> _Calls | None:
        """What the smaller copy calls; None where it does not run on the meta device."""
        small, calls = _copy_with(self.model, lambda t: torch.empty_like(t, device="meta")), _Calls()
        try:
            with torch.no_grad(), torch.device("meta"):  # where tensors that the model makes for itself belong too
                apply_slices(small, compute_slices(self.network, drop(sites)))
                with _OperatorRecord(calls), _TensorsOfNumbers(calls):
                    small(*tree_map(_to_meta, self.args), **tree_map(_to_meta, self.kwargs))
        except Exception:
            return None
        return calls

    def outputs_agree(self, sites: Sequence[Site], drop: Drop = _drop_third) -> bool:
        """Whether masked and smaller copy have equal outputs in float64, on random weights."""
        dropped = set(drop(sites))
        masked = _copy_with(self.model, lambda t: _random_like(t).double() if t.is_floating_point() else t.clone())
        small = copy.deepcopy(masked)
        try:
            with torch.no_grad():
                self._mask_weights(masked, sites, dropped)
                apply_slices(small, compute_slices(self.network, dropped))
                with NormsWithoutStatistics() if self.network.opened else nullcontext():
                    outputs = [
                        m(*tree_map(_widen, self.args), **tree_map(_widen, self.kwargs)) for m in (masked, small)
                    ]
                tensors = [collect_tensors(output) for output in outputs]
        except Exception:
            return False
        if len(tensors[0]) != len(tensors[1]):
            return False
        return all(a.shape == b.shape and _are_close(a, b) for a, b in zip(*tensors, strict=True))

    def _mask_weights(self, model: nn.Module, sites: Sequence[Site], dropped: Collection[int]) -> None:
        """Set all weights that read a dropped class to zero."""
        for site in sites:
            keep = torch.tensor([[float(c not in dropped) for c in site.labels.tolist()]], dtype=torch.double)
            for tap in site.taps:
                weight = model.get_parameter(self.network.layer(tap.layer).weight)
                weight.mul_(tap.structure.expand(keep.to(weight.device), weight.shape))


class _OperatorRecord(TorchDispatchMode):
    """Notes the operators that are called, with the numbers that they compute with, such as factors and exponents.

    Sizes are noted of tensors that are made from numbers alone (`torch.ones(8)`), and of operators that cut or move at
    a place; other sizes follow the channels.
    """

    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, places = kwargs or {}, str(func).rpartition(".")[0], list[str]()
        short = name.partition(".")[2]
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if isinstance(value, Tensor) and value.dim() == 0 and value.device.type != "meta":
                value = value.item()  # of a tensor that the model holds, or makes of numbers out of torch's sight
            kind = str(argument.type)
            if kind in _SIZE_TYPES or short in ("arange", "linspace"):
                places.append(f"{argument.name} {value}")
            elif type(value) in (int, float) and kind in _NUMBER_TYPES and name not in _NUMBERS_ELSEWHERE:
                self._calls.numbers[str(func), argument.name, value] += 1
        if short not in _SHAPED:
            self._calls.others.update([(name, *places)])
        return func(*args, **kwargs)


class _TensorsOfNumbers(TorchFunctionMode):
    """Notes the numbers that the code makes tensors of (`torch.tensor(x.shape[1])`), which operators do not see.

    Of a range of places, as indices are, a smaller copy's are among those of the whole model.
    """

    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FROM_NUMBERS:
            data = [*args, *kwargs.values()][1 if func is Tensor.new_tensor else 0]
            if not isinstance(data, Tensor):
                array = np.asarray(data)
                values = np.unique(array)
                self._calls.numbers.update(("tensor", "data", v) for v in values[values == values].tolist())  # no NaN
                self._calls.others["tensor", str(array.shape)] += 1
        return func(*args, **kwargs)


def _to_meta(value: Any) -> Any:
    """A tensor's shape and type without its numbers; any other value unchanged."""
    return value.to("meta") if isinstance(value, Tensor) else value


def _widen(value: Any) -> Any:
    """A tensor in float64 (a copy, as some models write into their input); any other value unchanged."""
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.double, copy=True) if value.is_floating_point() else value.clone()


def _are_close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are finite and equal up to TOLERANCE."""
    a, b = a.double(), b.double()
    return bool((a - b).norm() <= TOLERANCE * a.norm()) and bool(a.isfinite().all())


def _random_like(t: Tensor) -> Tensor:
    """Random weights that let every channel through, also zero-initialised ones; buffers and vectors hardly change."""
    generator = torch.Generator(device=t.device).manual_seed(t.numel())
    noise = torch.rand(t.shape, generator=generator, device=t.device, dtype=torch.float32)
    if isinstance(t, nn.Parameter) and t.dim() > 1:
        return (noise - 0.5) * (12 / max(t[0].numel(), 1)) ** 0.5
    return t.detach() + 0.1 * noise


def _copy_with(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy whose parameters and buffers went through `change`; shared ones stay shared."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(change(p).detach(), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = change(b)
    return copy_model(model, memo)


def compute_slices(
    network: Network, dropped: Collection[int], places: Callable[[Labels], Labels] | None = None
) -> dict[str, dict[int, list[int]]]:
    """The kept indices of every parameter, buffer and counting attribute that loses entries or changes their order.

    A name that ends in a counting attribute ("shortcut.pad.before", "attention.heads", "norm.normalized_shape") has
    a single dim, 0; the attribute becomes the number of kept entries. `places` gives the positions of an axis in their
    new order. Raises JpqError where nothing would be left of a parameter's dim.
    """
    above = max(dropped, default=0) + 1
    is_dropped = np.zeros(above + 2, bool)  # the last two entries stand for larger classes and for NONE
    is_dropped[list(dropped)] = True
    slices: dict[str, dict[int, list[int]]] = {}
    untouched: dict[str, dict[int, list[int]]] = {}  # sizes in calls, which the code may compute from what is sliced
    attributes = {name: {0: labels} for name, labels in network.attributes.items()}
    for name, axes in [*network.axes.items(), *attributes.items()]:
        for dim, labels in axes.items():
            lost = is_dropped[np.minimum(labels, above)]
            if lost.all() and name in network.axes:
                raise JpqError(f"Nothing would be left of dim {dim} of '{name}'. Keep at least one of its channels.")
            natural = np.arange(len(labels))
            order = places(labels) if places else natural
            if lost.any() or (order != natural).any():
                slices.setdefault(name, {})[int(dim)] = order[~lost[order]].tolist()
            elif is_call_size(name):
                untouched[name] = {int(dim): natural.tolist()}
    return slices | untouched if slices else slices


@torch.no_grad()
def apply_slices(model: nn.Module, slices: Slices) -> nn.Module:
    """Slice `model` in place and set its modules' sizes to match. Dims may be strings, as keys of JSON are.

    Raises JpqError for a plan that does not fit the model.
    """
    owners: dict[str, nn.Module] = {}
    sizes = {name: len(next(iter(axes.values()))) for name, axes in slices.items() if is_call_size(name) and axes}
    resize_calls(model, sizes)
    for name, axes in slices.items():
        if name in sizes:
            continue
        path, _, attribute = name.rpartition(".")
        try:
            module = model.get_submodule(path)
            value = getattr(module, attribute)
            if isinstance(value, bool) or not isinstance(value, int | tuple | Tensor):
                raise AttributeError(f"{name} is a {type(value).__name__}")
        except AttributeError as e:
            raise JpqError(
                f"The plan slices '{name}', which this {type(model).__name__} has not. Load the plan "
                "into the model that it was made from."
            ) from e
        if isinstance(value, int | tuple):  # a count, or the shape of a normalisation over one dim
            count = len(axes[next(iter(axes))])
            setattr(module, attribute, count if isinstance(value, int) else (count,))
            continue
        owners[path] = module
        _slice_tensor(name, value, {int(dim): kept for dim, kept in axes.items()})
    for module in set(owners.values()):
        _update_sizes(module)
    if slices:
        _clear_caches(model)
    return model


def _clear_caches(model: nn.Module) -> None:
    """Let modules forget what they computed from their former weights (LeViT's biases), as training makes them."""
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        if type(module).train is not nn.Module.train:
            with suppress(NotImplementedError):  # such as a graph of torch.export, which caches nothing
                module.train(True)
    for module, training in modes.items():
        module.training = training


def _slice_tensor(name: str, value: Tensor, axes: dict[int, list[int]]) -> None:
    """Keep these indices of each dim of a tensor, in place. Raises JpqError where there is no such index."""
    data = value.data
    for dim, kept in axes.items():
        if not kept or dim >= data.dim():
            raise JpqError(
                f"The plan keeps {len(kept)} entries of dim {dim} of '{name}', a tensor of {data.dim()} dims."
            )
        if max(kept) >= data.shape[dim]:
            raise JpqError(
                f"The plan keeps index {max(kept)} of dim {dim} of '{name}', which has only "
                f"{data.shape[dim]}. Load the plan into the model that it was made from, once."
            )
        data = data.index_select(dim, torch.tensor(kept, dtype=torch.long, device=data.device))
    value.data = data  # in place, so parameters and modules that are shared stay shared
    value.grad = None


def _update_sizes(module: nn.Module) -> None:
    """Set the size attributes of a torch module to the sizes of its sliced tensors."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        _update_conv_sizes(module)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        vector = weight if weight is not None else module.running_mean
        module.num_features = vector.shape[0] if vector is not None else module.num_features
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]


def _update_conv_sizes(module: nn.modules.conv._ConvNd) -> None:
    """Set groups, in_channels and out_channels of a convolution to the sizes of its sliced weight."""
    rows, columns = module.weight.shape[:2]
    depthwise = module.groups == module.in_channels and module.groups > 1
    if module.transposed:
        module.groups = rows if depthwise else module.groups
        module.in_channels, module.out_channels = rows, columns * module.groups
    else:
        module.groups = module.groups * rows // module.out_channels if depthwise else module.groups
        module.in_channels, module.out_channels = columns * module.groups, rows
