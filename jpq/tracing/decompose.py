"""Module decomposition: opaque modules (packed attention, weight norms) replaced by equivalent plain layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch.nn.utils.parametrize as parametrize
from torch import nn
from torch.nn.utils import remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from jpq.methods.quantizers import replace_everywhere
from jpq.tracing.attention import Attention, Decoder, Encoder
from jpq.tracing.copy_model import copy_model
from jpq.tracing.find_routes import route_products
from jpq.tracing.forward import Example
from jpq.tracing.model_checks import check_module, unwrap_model
from jpq.tracing.pruning_masks import fold_pruning_masks
from jpq.tracing.recurrent import PlainGRUCell, PlainLSTMCell, PlainRNNCell, Recurrent
from jpq.tracing.window_attention import ShiftedWindows, decompose_maxvit_attention

# exact class (a subclass may compute something else) -> the plain module, made from the original
DECOMPOSITIONS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.MultiheadAttention: Attention,
    nn.TransformerEncoder: Encoder,
    nn.TransformerDecoder: Decoder,
    ShiftedWindowAttention: ShiftedWindows,
    ShiftedWindowAttentionV2: ShiftedWindows,
    ShiftedWindowAttention3d: ShiftedWindows,
    RelativePositionalMultiHeadAttention: decompose_maxvit_attention,
    nn.RNN: Recurrent,
    nn.LSTM: Recurrent,
    nn.GRU: Recurrent,
    nn.RNNCell: PlainRNNCell,
    nn.LSTMCell: PlainLSTMCell,
    nn.GRUCell: PlainGRUCell,
}


def decompose(model: nn.Module, example: Example | None = None) -> nn.Module:
    """Copy `model` into plain layers that jpq can prune and quantize; outputs in evaluation are equal.

    - nn.MultiheadAttention and torchvision's attention of Swin and MaxViT become modules whose projections are
      nn.Linear layers and whose heads can go; nn.TransformerEncoder does without nested tensors (see `Encoder`).
    - nn.RNN, nn.LSTM, nn.GRU and their cells become steps of nn.Linear layers, whose hidden units can go.
    - weight_norm and spectral_norm as hooks, and every parametrization of torch.nn.utils.parametrize, are folded: the
      weight is what they compute in evaluation, and training goes on without them. So are the masks of
      torch.nn.utils.prune.
    - Where an example of the inputs is given, products that modules' own code makes of their parameters, such as
      `x @ self.w` or the standardised weight of a subclass of nn.Conv2d, are computed by new plain layers inside
      these modules (`jpq.tracing.find_routes`). A weight that is computed from parameters is folded to its value.

    A model that is a single convolution or Linear becomes an nn.Sequential of it.

    Load weights first: names of parameters change. A module with hooks, or one that shares a parameter with another
    module, stays as it is; what is not affected is copied.
    """
    check_module(unwrap_model(model))
    model = copy_model(model)
    owners = _parameter_owners(model)
    for module in list(model.modules()):
        if (_norm_hooks(module) or parametrize.is_parametrized(module)) and not _shares_parameters(module, owners):
            _fold_norm_hooks(module)
            _fold_parametrizations(module)
        fold_pruning_masks(module)
    owners = _parameter_owners(model)
    for module in list(model.modules()):
        make_plain = DECOMPOSITIONS.get(type(module))
        if make_plain is not None and not _has_hooks(module) and not _shares_parameters(module, owners):
            plain = make_plain(module)
            if module is model:
                model = plain
            replace_everywhere(model, module, plain)
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    if isinstance(model, (nn.Linear, nn.modules.conv._ConvNd)):
        model = nn.Sequential(model)  # a layer has a name only inside a model
    return model if example is None else route_products(model, example)


def _norm_hooks(module: nn.Module) -> list[WeightNorm | SpectralNorm]:
    """The hooks of weight_norm and spectral_norm, by which older code normalises a weight."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, (WeightNorm, SpectralNorm))]


def _fold_norm_hooks(module: nn.Module) -> None:
    """Replace a weight that a norm's hook computes by its value."""
    for hook in _norm_hooks(module):
        parts = dict(module.named_parameters(recurse=False))
        learns = any(p.requires_grad for name, p in parts.items() if name.startswith(f"{hook.name}_"))
        (remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm)(module, hook.name)
        for key, loading in list(module._load_state_dict_pre_hooks.items()):
            reader = getattr(loading, "hook", loading)
            if getattr(reader, "fn", None) is hook:  # remove_spectral_norm leaves it, and it asks for `weight_orig`
                del module._load_state_dict_pre_hooks[key]
        module.get_parameter(hook.name).requires_grad_(learns)


def _fold_parametrizations(module: nn.Module) -> None:
    """Replace parametrized weights and buffers by their values; those of a model under compression stay.

    Not by remove_parametrizations: a copy has its parametrized class in common with the model it was copied from.
    """
    if not parametrize.is_parametrized(module):
        return
    lists: Any = dict(module.parametrizations.items())  # type: ignore[operator,union-attr]
    if any(type(step).__module__.startswith("jpq.") for steps in lists.values() for step in steps):
        return
    values = {}
    for name, steps in lists.items():
        steps.eval()  # in training spectral_norm would take one more step
        learns = any(p.requires_grad for p in steps.parameters())
        value = getattr(module, name).detach().clone()
        values[name] = nn.Parameter(value, learns) if any(True for _ in steps.parameters()) else value
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        if isinstance(value, nn.Parameter):
            module.register_parameter(name, value)
        else:
            module.register_buffer(name, value)


def _parameter_owners(model: nn.Module) -> dict[int, set[nn.Module]]:
    """id of a parameter -> the modules of which it is a direct parameter."""
    owners = defaultdict(set)
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)].add(module)
    return owners


def _shares_parameters(module: nn.Module, owners: dict[int, set[nn.Module]]) -> bool:
    """Whether a parameter below `module` is also a parameter of some module elsewhere."""
    inside = set(module.modules())
    return any(not owners[id(p)] <= inside for p in module.parameters())


def _has_hooks(module: nn.Module) -> bool:
    """Whether the module or a part of it has hooks, which a replacement would lose."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(m, table) for m in module.modules() for table in tables)
