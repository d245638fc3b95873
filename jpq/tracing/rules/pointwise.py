"""Rules for ops that treat every channel alike: arithmetic, activations, pooling, reductions, normalisation."""

from __future__ import annotations

from torch.fx import Node

from jpq.tracing.call_sizes import COUNT
from jpq.tracing.handwritten_norms import REASON, is_norm_average
from jpq.tracing.op_call import Dims, OpCall, rule, shape_of

_POINTWISE = """abs acos acosh add addcdiv addcmul alias alpha_dropout __and__ asin asinh _assert_tensor_metadata atan
atan2 atanh bernoulli bitwise_and bitwise_not bitwise_or ceil celu clamp clamp_max clamp_min clone contiguous copy cos
detach div double dropout elu eq erf erfc erfinv exp exp2 expm1 feature_dropout fill float floor floor_divide fmax
fmin fmod frac full_like ge gelu gt half hardshrink hardsigmoid hardswish hardtanh hypot isfinite isinf isnan le
leaky_relu lerp lift_fresh lift_fresh_copy log log10 log1p log2 log_sigmoid logaddexp logical_and logical_not
logical_or logical_xor logit lt masked_fill maximum minimum mish mul nan_to_num ne neg ones_like __or__ pow rad2deg
reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sgn sigmoid sign silu sin sinc sinh softplus softshrink
softsign special_expit sqrt square sub tan tanh tanhshrink threshold _to_copy true_divide trunc where xlogy __xor__
zero zeros_like"""

_WINDOWED = """max_pool avg_pool adaptive_avg_pool adaptive_max_pool upsample_nearest upsample_bilinear upsample_linear
upsample_trilinear upsample_bicubic reflection_pad replication_pad lp_pool"""

_REDUCED = """mean sum prod amax amin max min argmax argmin all any var std norm linalg_vector_norm logsumexp median
var_mean std_mean"""


@rule(*(f"aten.{name}" for name in _POINTWISE.split()))
def pointwise(call: OpCall) -> Dims:
    """Elementwise ops: operands' labels are tied index by index."""
    return call.merge(call.tensors)


@rule("aten.to", "aten.type_as")
def convert(call: OpCall) -> Dims:
    """Conversion to another type or device, which a second tensor may name."""
    return call.dims(call["self"])


@rule(*(f"aten.{name}{n}d" for name in _WINDOWED.split() for n in (1, 2, 3)))
@rule("aten._upsample_bilinear2d_aa", "aten._upsample_bicubic2d_aa")
@rule(*(f"aten.max_pool{n}d_with_indices" for n in (1, 2, 3)))
def pool(call: OpCall) -> Dims | list[Dims]:
    """Pooling and interpolation over the last one, two or three dims; the dims before pass."""
    n = int(next(letter for letter in call.op if letter.isdigit()))
    dims = call.x
    for labels in dims[-n:]:
        call.freeze(labels, f"{call.op} mixes neighbouring channels")
    return call.for_each_output([*dims[:-n], *([None] * n)])


@rule("aten.max_unpool2d", "aten.max_unpool3d")
def unpool(call: OpCall) -> Dims:
    """Max-unpooling: values return to the places of the maxima; channels of values and places go together."""
    values, places = call["self"], call["indices"]
    n = int(call.op[-2])
    for node in (values, places):
        for labels in call.dims(node)[-n:]:
            call.freeze(labels, f"{call.op} mixes neighbouring channels")
    pairs = zip(call.dims(values)[:-n], call.dims(places)[:-n], strict=True)
    return [*(a if a is None and b is None else call.join(a, b) for a, b in pairs), *([None] * n)]


@rule(*(f"aten.{name}" for name in _REDUCED.split()))
def reduce(call: OpCall) -> Dims | list[Dims]:
    """Reductions: dims that are not reduced pass; a labelled dim that is reduced keeps all of its channels."""
    if len(call.tensors) > 1:
        return call.merge(call.tensors)
    dims, dim = call.x, call["dim"]
    over = range(len(dims)) if dim in (None, []) else [call.dim(d) for d in (dim if isinstance(dim, list) else [dim])]
    for d in over:
        if (labels := dims[d]) is not None and is_norm_average(call, labels):
            call.freeze_averaged(labels, REASON)
        else:
            call.freeze(labels, f"inside the average or extremum of {call.op}")
    if call["keepdim"]:
        return call.for_each_output([None if d in over else labels for d, labels in enumerate(dims)])
    return call.for_each_output([labels for d, labels in enumerate(dims) if d not in over])


@rule("aten.softmax", "aten.log_softmax", "aten._softmax", "aten._log_softmax", "aten.cumsum", "aten.sort")
@rule("aten.topk", "aten.argsort", "aten.cumprod", "aten.cummax", "aten.cummin", "aten.logcumsumexp")
def softmax(call: OpCall) -> Dims | list[Dims]:
    """Softmax, cumulative sums, sort and top k: one dim is mixed and keeps all of its channels, the others pass."""
    dims, d = call.x, call.dim(call["dim"])
    call.freeze(dims[d], f"inside {call.op}, which mixes all channels")
    return call.for_each_output([None if k == d else labels for k, labels in enumerate(dims)])


@rule("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")
def sample(call: OpCall) -> Dims:
    """Values of every channel at the places of a grid: the channels pass, positions are mixed."""
    dims = call.dims(call["input"])
    for labels in (*dims[2:], *call.dims(call["grid"])):
        call.freeze(labels, f"{call.op} mixes neighbouring channels")
    return [*dims[:2], *([None] * (len(dims) - 2))]


@rule("aten.outer")
def outer(call: OpCall) -> Dims:
    """Outer product of two vectors: a dim of each."""
    return [*call.dims(call["self"]), *call.dims(call["vec2"])]


@rule("aten.affine_grid_generator")
def affine_grid(call: OpCall) -> Dims:
    """The places that an affine map samples at: all numbers of the map are needed."""
    for labels in call.x:
        call.freeze(labels, f"a number of the map of {call.op}")
    return [None] * len(call.shape)


@rule("aten.ones", "aten.zeros", "aten.full", "aten.arange", "aten.empty", "aten.rand", "aten.randn", "aten.eye")
@rule("aten.scalar_tensor", "aten.linspace", "aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty")
def create(call: OpCall) -> Dims:
    """Tensors made from numbers: no labels; channels that meet one at full size are frozen there."""
    return [None] * len(call.shape)


@rule("aten.batch_norm", "aten.instance_norm", "aten._native_batch_norm_legit_no_training")
def batch_norm(call: OpCall) -> Dims | list[Dims]:
    """BatchNorm and InstanceNorm: in evaluation, one scale and shift per channel."""
    dims = call.x
    for name in ("weight", "bias", "running_mean", "running_var"):
        call.bind(call[name], 0, dims[1])
    if dims[1] is not None and call["weight"] is None and call["running_mean"] is None:
        call.add_attribute("num_features", len(dims[1]), dims[1])  # torch.nn's InstanceNorm warns of another number
    if call.op in ("aten.batch_norm", "aten.instance_norm"):
        return dims
    statistics: list[Dims] = [[None], [None]]
    return [dims, *statistics]


@rule("aten.prelu")
def prelu(call: OpCall) -> Dims:
    """PReLU: one slope for all channels, or one per channel."""
    weight: Node = call["weight"]
    dims = call.dims(call["self"])
    if shape_of(weight) != (1,) and shape_of(weight):
        call.bind(weight, 0, dims[min(1, len(dims) - 1)])
    return dims


@rule("aten.layer_norm", "aten.rms_norm", "aten._fused_rms_norm")
def layer_norm(call: OpCall) -> Dims:
    """LayerNorm and RMSNorm: averages over the last dims, so that without one channel the others would change."""
    dims, shape = call.dims(call["input"]), tuple(call["normalized_shape"])
    for k, labels in enumerate(dims[-len(shape) :]):
        (call.freeze_averaged if len(shape) == 1 else call.freeze)(labels, "inside LayerNorm's average")
        for name in ("weight", "bias"):
            call.bind(call[name], k, labels)
    if len(shape) == 1 and call.state.open_norms and not call.add_attribute("normalized_shape", shape, dims[-1]):
        call.add_size([COUNT], dims[-1])
    return dims


@rule("aten.group_norm")
def group_norm(call: OpCall) -> Dims:
    """GroupNorm: averages over groups of channels, so that only a whole group may be removed.

    With `open_norms`, all groups lose channels at the same places and stay equally large.
    """
    dims, groups = call.dims(call["input"]), call["num_groups"]
    labels = dims[1]
    for name in ("weight", "bias"):
        call.bind(call[name], 0, labels)
    if labels is None:
        return dims
    by_group = labels.reshape(groups, -1)
    if call.state.open_norms:
        call.tie(by_group)
        call.freeze_averaged(labels, "inside GroupNorm's average")
        call.add_attribute("num_channels", len(labels), labels)
    elif groups > 1 and call.add_attribute("num_groups", groups, by_group[:, 0].copy()):
        call.add_attribute("num_channels", len(labels), labels)
        call.tie(by_group.T)
    else:
        call.freeze(labels, "inside GroupNorm's average")
    return dims
