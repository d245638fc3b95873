"""Tied weights: one parameter of several modules, such as an embedding and the projection back to the vocabulary.

Channels of a tied weight stay: a scale folded into one use would change the other. Layers that share a weight share its
quantizer; an embedding reads the weight at 32 bits. The tie itself is kept everywhere.
"""

from __future__ import annotations

from torch import nn

from jpq.tracing.op_call import TraceState


def parameter_names(model: nn.Module) -> dict[int, str]:
    """id of every parameter -> its name: of several the first in a convolution or Linear, else the first."""
    names: dict[int, str] = {}
    in_layer: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
        if isinstance(model.get_submodule(name.rpartition(".")[0]), (nn.Linear, nn.modules.conv._ConvNd)):
            in_layer.setdefault(id(parameter), name)
    return names | in_layer


def modules_sharing(model: nn.Module, weight: nn.Parameter) -> dict[str, nn.Module]:
    """The modules that have this parameter as their own, by name; more than one where it is tied."""
    return {
        name: module for name, module in model.named_modules() if any(p is weight for p in module._parameters.values())
    }


def layers_sharing(model: nn.Module, layer: nn.Module) -> dict[str, nn.Module]:
    """A convolution's or Linear's own name, and those of other layers that have its weight, with their modules.

    Empty where the weight is computed (parametrized), and so is no parameter that can be shared.
    """
    weight = layer._parameters.get("weight")
    return {} if weight is None else {n: m for n, m in modules_sharing(model, weight).items() if _is_layer(m, weight)}


def _is_layer(module: nn.Module, weight: nn.Parameter) -> bool:
    """Whether a module is a convolution or Linear with this weight."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return isinstance(module, kinds) and module._parameters.get("weight") is weight


class WeightOwners:
    """The modules that have each parameter of a model as their own, found in one walk."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._owners: dict[int, dict[str, nn.Module]] = {}
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._owners.setdefault(id(parameter), {})[name] = module

    def of(self, weight: str) -> dict[str, nn.Module]:
        """The modules that have the weight of this name, by name; a buffer's is the one that it is in."""
        owner, _, attribute = weight.rpartition(".")
        module = self.model.get_submodule(owner)
        parameter = module._parameters.get(attribute)
        return {owner: module} if parameter is None else self._owners[id(parameter)]

    def is_read_by_others(self, weight: str) -> bool:
        """Whether a layer's weight is also that of a module that is no convolution or Linear, such as an embedding."""
        owner, _, attribute = weight.rpartition(".")
        parameter = self.model.get_submodule(owner)._parameters.get(attribute)
        if parameter is None:
            return False
        layers = [_is_layer(module, parameter) for module in self._owners[id(parameter)].values()]
        return any(layers) and not all(layers)  # a bare weight of the model's own code has no layer


def freeze_tied(state: TraceState, owners_of_weights: WeightOwners) -> None:
    """Keep all channels of layers whose weight is also another module's."""
    for weight in dict.fromkeys(call.weight for call in state.calls if not call.float_reason):
        owners = list(owners_of_weights.of(weight))
        owner = weight.rpartition(".")[0]
        others = [name for name in owners if name != owner]
        if others:
            reason = f"'{owner}' and '{others[0]}' share one weight"
            for labels in state.axes.get(weight, {}).values():
                state.classes.freeze(labels, reason)
