"""Laws of a structure: the linear map between the units of a gate and the weights of a layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Size, Tensor

from jpq.methods.structures import Structure, parse_structure
from jpq.testing.expectation import close, expect
from jpq.types import JpqError, Units, Weight

# linear, 1d, 2d, pointwise and 3d weights of one group: outputs, inputs, kernel (a transposed layer: inputs, outputs)
SIZES = ((6, 10), (4, 6, 5), (6, 7, 3, 3), (5, 9, 1, 1), (3, 5, 2, 3, 2))


def check_structure(structure: Structure, sizes: Iterable[tuple[int, ...]] = ()) -> None:
    """Check the laws of structures on weights of these sizes (linear and convolution weights of its layout if empty).

    `pool` is the adjoint of `expand`, values and gradients; nothing kept leaves no weight of a unit, everything kept
    leaves all; 0/1 units give a 0/1 mask of as many weights as `sizes` says; padding stands for no weight; a quota
    leaves a choice; masks follow the dtype; `parse_structure` reads `spec` back. Sizes that the structure refuses are
    passed over.

    Raises AssertionError with the law that is broken, or where no size fits.
    """
    groups = structure.layout.groups
    candidates = [Size(size) for size in sizes] or [Size((groups * outputs, *rest)) for outputs, *rest in SIZES]
    fitting = [size for size in candidates if _fits(structure, size)]
    expect(fitting, f"{structure} fits none of the weights {[tuple(size) for size in candidates]}: give its `sizes`.")
    for size in fitting:
        for law in LAWS:
            law(structure, size, f"{structure} on a weight {tuple(size)}")


def _fits(structure: Structure, size: Size) -> bool:
    try:
        structure.shape(size)
    except JpqError:
        return False
    return True


def _draw(structure: Structure, size: Size, seed: int) -> tuple[Units, Weight]:
    """Random units and a random weight in float64."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(structure.shape(size), dtype=torch.float64, generator=generator)
    return z, torch.randn(size, dtype=torch.float64, generator=generator)


def random_decision(structure: Structure, size: Size, seed: int = 0) -> Units:
    """Random 0/1 units in float64, at most one in a row where units overlap."""
    z = (torch.rand(structure.shape(size), generator=torch.Generator().manual_seed(seed)) < 0.5).double()
    return z if structure.partition else z * (z.cumsum(1) <= 1)


def _pool_is_the_adjoint_of_expand(structure: Structure, size: Size, name: str) -> None:
    for seed in range(3):
        z, x = _draw(structure, size, seed)
        pooled = structure.pool(x)
        expect(pooled.shape == z.shape, f"{name}: pool gives {tuple(pooled.shape)}, not shape(): {tuple(z.shape)}.")
        linear = structure.expand(z, size) - structure.expand(torch.zeros_like(z), size)
        left, right = (linear.expand(size) * x).sum(), (z * pooled).sum()
        expect(
            close(left, right), f"{name}: pool is not the adjoint of expand, <expand(z), x> differs from <z, pool(x)>."
        )


def _nothing_kept_is_zero_and_all_kept_is_one(structure: Structure, size: Size, name: str) -> None:
    shape, sizes = structure.shape(size), structure.sizes(size)
    always = structure.expand(torch.zeros(shape), size).expand(size)  # weights that no unit holds
    expect(not structure.pool(always).any(), f"{name}: weights of a unit stay where no unit is kept.")
    if structure.partition:
        expect(structure.expand(torch.ones(shape), size) == 1, f"{name}: all units kept do not give a mask of ones.")
        free = size.numel() - always.sum()
        expect(sizes.sum() == free, f"{name}: units do not hold every weight once, though it is a partition.")
    expect(not structure.unit_is_weight or sizes.max() == 1, f"{name}: a unit is not one weight (unit_is_weight).")


def _binary_units_give_a_binary_mask(structure: Structure, size: Size, name: str) -> None:
    z = random_decision(structure, size)
    mask = structure.expand(z, size)
    expect(mask.dim() == len(size), f"{name}: the mask has {mask.dim()} dims and does not broadcast to the weight.")
    full = mask.expand(size)
    expect((full == 0) | (full == 1), f"{name}: units of 0 and 1 give a mask of other values.")
    always = structure.expand(torch.zeros_like(z), size).expand(size)
    due = always.sum() + (structure.sizes(size) * z).sum()
    expect(full.sum() == due, f"{name}: another number of weights stays than sizes() says.")


def _padding_stands_for_no_weight(structure: Structure, size: Size, name: str) -> None:
    valid, sizes = structure.valid(size), structure.sizes(size)
    real = torch.ones_like(sizes, dtype=torch.bool) if valid is None else valid
    expect(torch.equal(sizes > 0, real), f"{name}: valid() is not where sizes() is above 0.")
    if valid is not None:
        z, _ = _draw(structure, size, 0)
        padded = z.masked_fill(~valid, 99.0)
        expect(
            torch.equal(structure.expand(z, size), structure.expand(padded, size)), f"{name}: padding reaches weights."
        )


def _gradients_are_those_of_the_map(structure: Structure, size: Size, name: str) -> None:
    z, x = _draw(structure, size, 0)
    z.requires_grad_()
    (grad,) = torch.autograd.grad((structure.expand(z, size) * x).sum(), z)
    expect(close(grad, structure.pool(x)), f"{name}: the gradient of expand is not pool.")
    x.requires_grad_()
    (grad,) = torch.autograd.grad((structure.pool(x) * z.detach()).sum(), x)
    expect(close(grad, _mask(structure, z.detach(), size)), f"{name}: the gradient of pool is not expand.")


def _mask(structure: Structure, z: Units, size: Size) -> Tensor:
    """The part of the mask that depends on the units, of the weight's shape."""
    return (structure.expand(z, size) - structure.expand(torch.zeros_like(z), size)).expand(size)


def _quota_leaves_a_choice(structure: Structure, size: Size, name: str) -> None:
    quota, (_, n) = structure.quota(), structure.shape(size)
    expect(quota is None or quota >= 1, f"{name}: quota() says that {quota} units of a row stay.")
    expect(structure.partition or quota == 1, f"{name}: units overlap, so quota() must be 1.")
    expect(quota is None or quota <= n, f"{name}: quota() is {quota} of {n} units in a row.")


def _masks_follow_the_dtype(structure: Structure, size: Size, name: str) -> None:
    z = random_decision(structure, size)
    for dtype in (torch.float32, torch.float64, torch.uint8):
        mask = structure.expand(z.to(dtype), size)
        expect(mask.dtype == dtype, f"{name}: units of {dtype} give a mask of {mask.dtype}.")
        expect(torch.equal(mask.double(), structure.expand(z, size)), f"{name}: the mask in {dtype} is another one.")


def _spec_is_read_back(structure: Structure, size: Size, name: str) -> None:
    try:
        text = structure.spec()
    except JpqError:  # made from a traced network: no text names it
        return
    try:
        read = parse_structure(text, structure.layout)
    except JpqError as error:
        raise AssertionError(f"{name}: spec() writes '{text}', which parse does not read: {error}") from error
    expect(read == structure, f"{name}: spec() writes '{text}', which parse reads as {read}.")
    z = random_decision(structure, size)
    expect(torch.equal(read.expand(z, size), structure.expand(z, size)), f"{name}: '{text}' is read as another mask.")


LAWS = (
    _pool_is_the_adjoint_of_expand,
    _nothing_kept_is_zero_and_all_kept_is_one,
    _binary_units_give_a_binary_mask,
    _padding_stands_for_no_weight,
    _gradients_are_those_of_the_map,
    _quota_leaves_a_choice,
    _masks_follow_the_dtype,
    _spec_is_read_back,
)
