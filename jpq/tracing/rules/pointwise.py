"""Rules for ops that treat every channel alike: arithmetic, activations, pooling, reductions."""

from __future__ import annotations

from torch.fx import Node

from jpq.tracing.op_call import Dims, OpCall, rule, shape_of

_POINTWISE = """_assert_tensor_metadata _to_copy abs add addcdiv addcmul alias alpha_dropout atan bernoulli
bitwise_and bitwise_not bitwise_or ceil celu clamp clamp_max clamp_min clone contiguous copy cos detach div double
dropout elu eq erf exp expm1 feature_dropout fill float floor fmod full_like ge gelu gt half hardshrink hardsigmoid
hardswish hardtanh le leaky_relu lerp lift_fresh lift_fresh_copy log log1p log2 log_sigmoid logical_and logical_not
logical_or lt masked_fill maximum minimum mish mul ne neg ones_like pow rad2deg reciprocal relu relu6 remainder
round rsqrt rsub selu sigmoid sign silu sin softplus softshrink softsign sqrt square sub tan tanh tanhshrink
threshold true_divide where zero zeros_like"""

_WINDOWED = """max_pool avg_pool adaptive_avg_pool adaptive_max_pool upsample_nearest upsample_bilinear upsample_linear
upsample_trilinear upsample_bicubic reflection_pad replication_pad lp_pool"""

_REDUCED = """mean sum prod amax amin max min argmax argmin all any var std norm linalg_vector_norm logsumexp median
var_mean std_mean"""


@rule(*(f"aten.{name}" for name in _POINTWISE.split()))
def pointwise(call: OpCall) -> Dims:
    """Every output element depends on the elements at its own place: operands' labels are tied index by index."""
    return call.merge(call.tensors)


@rule("aten.to", "aten.type_as")
def converted(call: OpCall) -> Dims:
    """Another type or device; a second tensor only names it."""
    return call.dims(call["self"])


@rule(*(f"aten.{name}{n}d" for name in _WINDOWED.split() for n in (1, 2, 3)))
@rule("aten._upsample_bilinear2d_aa", "aten._upsample_bicubic2d_aa")
@rule(*(f"aten.max_pool{n}d_with_indices" for n in (1, 2, 3)))
def windowed(call: OpCall) -> Dims | list[Dims]:
    """Windows over the last one, two or three dims; the dims before pass."""
    n = int(next(letter for letter in call.op if letter.isdigit()))
    dims = call.x
    for labels in dims[-n:]:
        call.freeze(labels, f"{call.op} mixes neighbouring channels")
    out: Dims = [*dims[:-n], *([None] * n)]
    return call.each(out)


@rule(*(f"aten.{name}" for name in _REDUCED.split()))
def reduced(call: OpCall) -> Dims | list[Dims]:
    """Reducing an unlabelled dim passes the others; a labelled dim that is averaged keeps all of its channels."""
    if len(call.tensors) > 1:
        return call.merge(call.tensors)
    dims, dim = call.x, call["dim"]
    over = range(len(dims)) if dim in (None, []) else [call.dim(d) for d in (dim if isinstance(dim, list) else [dim])]
    for d in over:
        call.freeze(dims[d], f"inside the average or extremum of {call.op}")
    out: Dims
    if call["keepdim"]:
        out = [None if d in over else labels for d, labels in enumerate(dims)]
    else:
        out = [labels for d, labels in enumerate(dims) if d not in over]
    return call.each(out)


@rule("aten.softmax", "aten.log_softmax", "aten._softmax", "aten._log_softmax", "aten.cumsum", "aten.sort")
def along(call: OpCall) -> Dims | list[Dims]:
    """Mixes one dim, passes the others."""
    dims, d = call.x, call.dim(call["dim"])
    call.freeze(dims[d], f"inside {call.op}, which mixes all channels")
    out: Dims = [None if k == d else labels for k, labels in enumerate(dims)]
    return call.each(out)


@rule("aten.ones", "aten.zeros", "aten.full", "aten.arange", "aten.empty", "aten.rand", "aten.randn", "aten.eye")
@rule("aten.scalar_tensor", "aten.linspace", "aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty")
def made(call: OpCall) -> Dims:
    """A tensor made from numbers has no labels; what meets it at full size is frozen there."""
    return [None] * len(call.shape)


@rule("aten.batch_norm", "aten.instance_norm", "aten._native_batch_norm_legit_no_training")
def batch_norm(call: OpCall) -> Dims | list[Dims]:
    """In evaluation, one scale and shift per channel."""
    dims = call.x
    for name in ("weight", "bias", "running_mean", "running_var"):
        call.bind(call[name], 0, dims[1])
    if call.op in ("aten.batch_norm", "aten.instance_norm"):
        return dims
    extra: list[Dims] = [[None], [None]]
    return [dims, *extra]


@rule("aten.prelu")
def prelu(call: OpCall) -> Dims:
    """One slope for all, or one per channel."""
    weight: Node = call["weight"]
    dims = call.dims(call["self"])
    if shape_of(weight) != (1,) and shape_of(weight):
        call.bind(weight, 0, dims[min(1, len(dims) - 1)])
    return dims


@rule("aten.layer_norm", "aten.rms_norm", "aten._fused_rms_norm")
def layer_norm(call: OpCall) -> Dims:
    """Averages over the last dims: without one channel the others would change."""
    dims, shape = call.dims(call["input"]), tuple(call["normalized_shape"])
    for k, labels in enumerate(dims[-len(shape) :]):
        (call.average if len(shape) == 1 else call.freeze)(labels, "inside LayerNorm's average")
        for name in ("weight", "bias"):
            call.bind(call[name], k, labels)
    if len(shape) == 1 and call.book.open_norms:
        call.counts("normalized_shape", shape, dims[-1])
    return dims


@rule("aten.group_norm")
def group_norm(call: OpCall) -> Dims:
    """Averages over groups of channels: a whole group may go, and without one channel the rest of it would change.

    Where averages are opened, all groups lose channels at the same places and stay equally large.
    """
    dims, groups = call.dims(call["input"]), call["num_groups"]
    labels = dims[1]
    for name in ("weight", "bias"):
        call.bind(call[name], 0, labels)
    if labels is None:
        return dims
    by_group = labels.reshape(groups, -1)
    if call.book.open_norms:
        call.tie(by_group)
        call.average(labels, "inside GroupNorm's average")
        call.counts("num_channels", len(labels), labels)
    elif groups > 1 and call.counts("num_groups", groups, by_group[:, 0].copy()):
        call.counts("num_channels", len(labels), labels)
        call.tie(by_group.T)
    else:
        call.freeze(labels, "inside GroupNorm's average")
    return dims
