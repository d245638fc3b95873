"""ONNX files of a small model: QCDQ for runtimes, QONNX for FPGA flows, and plain float for comparison.

QCDQ stands for QuantizeLinear, Clip, DequantizeLinear: any ONNX runtime computes it, at any width up to 8 bits.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from brevitas.export import export_onnx_qcdq
from brevitas.export import export_qonnx as brevitas_qonnx
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from jpq.export.onnx.constant_inputs import read_constants_as_rows
from jpq.export.onnx.dynamic_sizes import add_sides, computes_other_size, is_image
from jpq.export.onnx.example_values import computes_example
from jpq.export.onnx.fold_norms import fold_norms
from jpq.export.onnx.free_batch import batch_is_free
from jpq.export.onnx.graph import (
    declare_unread_inputs,
    fold_constants,
    share_equal_weights,
    unlist_initializers,
    write_out_same_padding,
)
from jpq.export.onnx.grouped_queries import RepeatedHeads
from jpq.export.onnx.integer_kernels import prepare_integer_kernels
from jpq.export.onnx.metadata import Metadata, gather_metadata, store_metadata
from jpq.export.onnx.naming import name_nodes, unique_name
from jpq.export.onnx.narrow_weights import store_narrow_weights
from jpq.export.onnx.plain_norms import replace_norms
from jpq.export.onnx.reported_grids import report_weight_grid
from jpq.export.onnx.separate_additions import separate_additions
from jpq.export.onnx.twice_rounded_weights import round_weights_twice
from jpq.export.onnx.unsupported_ops import name_unsupported_op
from jpq.export.onnx.written_out_calls import WrittenOutCalls
from jpq.files.atomic import replace_file
from jpq.methods.quantizers import act_quantizer, is_quantized, result_quantizer, weight_quantizer
from jpq.tracing.checkpointing import without_reentrant_checkpoints
from jpq.tracing.forward import (
    as_plain_nest,
    batch_dim,
    batch_size,
    call_on_copies,
    collect_tensors,
    copy_tensors,
    first_samples,
    name_inputs,
    note_missing_batch_dims,
    plain_outputs,
    split_arguments,
)
from jpq.tracing.traced_lengths import traced_lengths
from jpq.types import JpqError

OPSET = 17

MAX_BITS = 8  # of QuantizeLinear's integers


def export_onnx(
    small: nn.Module,
    example: Any,
    path: str | Path,
    weights: str = "int8",
    metadata: Metadata | None = None,
    any_size: bool = False,
) -> bool:
    """Write a rebuilt model as QCDQ to `path`, with a dynamic batch dimension and norms folded into convolutions.

    Where the model's code fixes the number of samples (a loop over them), the file takes one at a time, and a warning
    says so. Another one says where the file does not compute what the model does for the example.

    Args:
        small: the rebuilt model.
        example: a batch: a tensor, a tuple of positional arguments, or a dict of keywords.
        path: the file.
        weights: type of stored weights: "int8" (as uint8 around 128, see integer_kernels.py), or "int4" or "int2" for
            the narrowest of those that holds a layer's integers (opset 21 or 25; see narrow_weights.py).
        metadata: text, numbers, lists and dicts that the file says of itself, beside what is known of the model, such
            as `mean`, `std`, `class_names` (see metadata.py).
        any_size: leave height and width of images free too, if the file then computes another size as the model does.

    Returns whether height and width are free in the file.

    A single input is called "input", a single output "output". Several inputs have the names that `forward` gives
    them, several outputs the keys of their dict, or output_0, output_1, ... A name that another has already gets a
    number: the output "mask" of a model with an input of that name is "mask_1".

    Raises JpqError for widths above 8 bits, for weights that are not float32, and for a file that onnx cannot store in
    narrower types.
    """

    def rewrite(model: onnx.ModelProto) -> onnx.ModelProto:
        fold_norms(model)
        fold_constants(model)
        prepare_integer_kernels(model)
        read_constants_as_rows(model)
        model = store_narrow_weights(model, weights)
        round_weights_twice(model)
        separate_additions(model)
        return model

    _check_single_precision(small)
    for layer in [m for m in small.modules() if is_quantized(m)]:
        bits = max(float(grid.width()) for grid in (weight_quantizer(layer), act_quantizer(layer)))
        if bits > MAX_BITS:
            raise JpqError(f"QCDQ export holds at most 8 bits; a layer has {bits:.0f}. Lower --w-bits or --a-bits.")
    write = partial(_write, small, example, Path(path), export_onnx_qcdq, rewrite, metadata=metadata)
    if any_size and is_image(example):
        with contextlib.suppress(Exception):  # what cannot be exported at all is said by the export below
            write(any_size=True)
            if computes_other_size(Path(path), small, example):
                return True
    write()
    return False


def export_qonnx(small: nn.Module, example: Any, path: str | Path) -> None:
    """Write a rebuilt model with QONNX's Quant nodes of any width, norms not folded: for FPGA flows and for netron.

    `qonnx.util.inference_cost` counts the same MACs and BOPs in it as jpq.measure, with `discount_sparsity=False`
    (otherwise a stored weight of zero costs it nothing, while jpq counts what a mask keeps). That tool and the flows
    accept no dynamic batch: the file holds one sample, the first of the example.
    """

    def rewrite(model: onnx.ModelProto) -> onnx.ModelProto:
        fold_constants(model)
        return model

    _check_single_precision(small)
    _write(small, example, Path(path), brevitas_qonnx, rewrite, dynamic=False)


def _check_single_precision(small: nn.Module) -> None:
    """Raise JpqError where weights are in another precision than QuantizeLinear takes."""
    for name, p in small.named_parameters():
        if p.is_floating_point() and p.dtype is not torch.float32:
            raise JpqError(
                f"Parameter '{name}' is in {p.dtype}, and ONNX quantizes float32 only. Export model.float() with "
                "float32 examples."
            )


def export_float(model: nn.Module, example: Any, path: str | Path) -> None:
    """Write a float model as ONNX, to compare a quantized one with."""
    _write(model, example, Path(path), torch.onnx.export, lambda exported: exported)


def _write(
    source: nn.Module,
    example: Any,
    path: Path,
    exporter: Callable[..., Any],
    rewrite: Callable[[onnx.ModelProto], onnx.ModelProto],
    dynamic: bool = True,
    metadata: Metadata | None = None,
    any_size: bool = False,
) -> None:
    """Export a copy of a model with one of the exporters, rewrite its graph, check it, and put the file in place.

    Without `dynamic` the file takes one sample.
    """
    texts = gather_metadata(source, metadata)
    model = _with_quant_tensors(source, exporter is brevitas_qonnx)
    args, kwargs = split_arguments(tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, example))
    with torch.no_grad(), note_missing_batch_dims(_layers(model)) as found:
        try:
            output = call_on_copies(model, args, kwargs)
        finally:  # brevitas' own error about a vector says nothing
            unbatched = _has_no_batch_dim(model, found)
    if not dynamic and not unbatched:
        args, kwargs = first_samples((args, kwargs), 1)
        with torch.no_grad():
            output = call_on_copies(model, args, kwargs)
    inputs = collect_tensors((args, kwargs))
    plain = len(inputs) == len(args) and isinstance(output, Tensor) and not _has_other_defaults(model, len(args))
    input_names, output_names = _distinct_names(_input_names(model, args, kwargs), _output_names(output))
    values = zip([*input_names, *output_names], [*inputs, *collect_tensors(output)], strict=True)
    dims = {name: batch_dim(t, batch_size(inputs)) for name, t in values}
    axes = {name: {dim: "batch"} for name, dim in dims.items() if dim is not None}
    if any_size:
        outputs = dict(zip(output_names, collect_tensors(output), strict=True))
        axes = add_sides(axes, dict(zip(input_names, inputs, strict=True)), outputs)
    free = axes if dynamic and not unbatched else {}
    path_argument = "f" if exporter is torch.onnx.export else "export_path"

    def write(part: Path) -> None:
        with (
            name_unsupported_op(),
            _quiet_exporters(),
            plain_outputs(model),
            RepeatedHeads(),
            WrittenOutCalls(),
            traced_lengths(),
            without_reentrant_checkpoints(),
        ):
            exporter(
                model if plain else _TensorsOnly(model, args, kwargs, output),
                args=tuple(copy_tensors(inputs)),
                dynamo=False,
                opset_version=OPSET,
                input_names=input_names,
                output_names=output_names,
                **{path_argument: str(part)},
                dynamic_axes=free or None,
            )
        exported = onnx.load(str(part))
        unlist_initializers(exported.graph)
        declare_unread_inputs(exported.graph, dict(zip(input_names, inputs, strict=True)), free)
        write_out_same_padding(exported.graph)
        rewritten = rewrite(exported)
        share_equal_weights(rewritten.graph)
        name_nodes(rewritten, model)
        store_metadata(rewritten, texts)
        onnx.save(rewritten, str(part))
        onnx.checker.check_model(str(part))

    replace_file(path, write)
    if dynamic and axes and not unbatched and not batch_is_free(path, model, args, kwargs):
        warnings.warn(
            f"{path.name} takes one sample at a time: the model's code loops over samples, or makes a number of their "
            "count, as int(x.shape[0]) does. With x.shape[0] and operations on the whole batch it takes any batch.",
            stacklevel=3,
        )
        _write(source, example, path, exporter, rewrite, dynamic=False, metadata=metadata)
    elif not any_size and not computes_example(path, model, args, kwargs):
        warnings.warn(
            f"{path.name} does not compute what the model does, not even for the example: torch.onnx loses a part of "
            "its code. Mostly that is a change in place of a tensor that shares memory with another: write "
            "y = x.relu(), not x.view(-1).relu_().",
            stacklevel=3,
        )


def _has_other_defaults(model: nn.Module, given: int) -> bool:
    """Whether `forward` has defaults beyond the given arguments: torch.onnx would make tensors of flags and numbers."""
    parameters = list(inspect.signature(model.forward).parameters.values())[given:]
    return any(p.default is not None and p.default is not p.empty for p in parameters)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and Linear layers of a model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}


def _has_no_batch_dim(model: nn.Module, found: Mapping[str, Tensor]) -> bool:
    """Whether an example is one sample without a batch dim, from what layers read without one.

    Raises JpqError for a quantized Linear layer that reads a vector.
    """
    for name, x in found.items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear) and is_quantized(layer):
            what = (
                "a parameter that is a vector, which brevitas cannot export. Let it read a matrix of one row (p[None])"
                if isinstance(x, nn.Parameter)
                else "a vector, a sample without a batch dim, which brevitas cannot export. Give an example with a "
                "batch dim (x[None])"
            )
            raise JpqError(f"Layer '{name}' reads {what}.")
    return any(not isinstance(x, nn.Parameter) for x in found.values())


def _with_quant_tensors(source: nn.Module, quant_nodes: bool) -> nn.Module:
    """A copy on the CPU, in evaluation mode, whose quantizers make the quantized tensors that brevitas exports.

    `quant_nodes`: whether that export is QONNX.
    """
    model = copy.deepcopy(source).cpu().eval()
    replace_norms(model)
    module: Any
    for module in model.modules():
        if is_quantized(module):
            report_weight_grid(module, quant_nodes)
            module.weight_quant.skip_create_quant_tensor = False
            module.input_quant.skip_create_quant_tensor = False
        if result_quantizer(module) is not None:
            module.results.act_quant.skip_create_quant_tensor = False
    return model


class _TensorsOnly(nn.Module):
    """A model as ONNX sees it: tensors in, tensors out. Arguments that are no tensors are those of the example.

    `output` is what the model gives: numbers in it, such as x.shape[0], are tensors while torch.onnx traces.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any):
        super().__init__()
        self.model = model
        self._leaves, self._spec = tree_flatten((args, kwargs))
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in tree_leaves(as_plain_nest(output))]
        self.train(model.training)  # the exporter leaves both in the wrapper's mode

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The output's tensors, alone or in order."""
        remaining = iter(inputs)
        leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        leaves = tree_leaves(as_plain_nest(self.model(*args, **kwargs)))
        outputs = [leaf for leaf, is_tensor in zip(leaves, self._is_tensor, strict=True) if is_tensor]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _input_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The names of the file's inputs."""
    counts = {name: len(collect_tensors(value)) for name, value in name_inputs(model, args, kwargs).items()}
    names = _numbered_names(counts)
    return names if len(names) > 1 else ["input"]


def _output_names(output: Any) -> list[str]:
    """The names of the file's outputs."""
    count = len(collect_tensors(output))
    if count == 1:
        return ["output"]
    counts = {str(k): len(collect_tensors(v)) for k, v in output.items()} if isinstance(output, Mapping) else {}
    return _numbered_names(counts or {"output": count})


def _distinct_names(inputs: list[str], outputs: list[str]) -> tuple[list[str], list[str]]:
    """Names of inputs and outputs with numbers where a name is there already: a tensor of a file has a name of its own.

    Args:
        inputs, outputs: the names that they would have.
    """
    taken: set[str] = set()
    for names in (inputs, outputs):
        for i, name in enumerate(names):
            names[i] = unique_name(name, taken)
            taken.add(names[i])
    return inputs, outputs


def _numbered_names(counts: Mapping[str, int]) -> list[str]:
    """One name for each tensor: the given one where it is the only tensor under that name, else with a number."""
    return [name if n == 1 else f"{name}_{i}" for name, n in counts.items() for i in range(n)]


@contextlib.contextmanager
def _quiet_exporters() -> Iterator[None]:
    """Silence torch's exporter and onnxoptimizer, which write to logs, warnings and streams; errors still raise."""
    level, print_graph = logging.root.manager.disable, torch._C._jit_onnx_log
    logging.disable(logging.WARNING)
    torch._C._jit_onnx_log = lambda *_: None  # of graphs that could not be exported; torch turns its own switch on
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        torch._C._jit_onnx_log = print_graph
