"""Densities of masks: soft and exact ones agree, padding and weights outside of all units count as they should."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from jpq.compression.usage import Densities, straight_through
from jpq.methods.structures import mask_encoding
from jpq.plan import MaskPlan
from jpq.tracing.sites import masks
from jpq.tracing.trace import trace

SIZES = {"elementwise": (6, 10), "block:4x1": (6, 10), "2:4": (6, 10), "pattern": (6, 4, 3, 3)}


def densities(structure):
    """(densities of a network of one layer with masks of this structure, the layer's name, sizes of the units)."""
    size = SIZES[structure]
    if len(size) == 2:
        model, x = nn.Sequential(nn.Linear(10, 6)), torch.randn(2, 10)
    else:
        model, x = nn.Sequential(nn.Conv2d(4, 6, 3)), torch.randn(2, 4, 6, 6)
    network = trace(model.eval(), x)
    sites = masks(network, structure, ())
    return Densities(network, sites), "0", sites[0].taps[0].structure


@pytest.mark.parametrize("structure", SIZES)
def test_a_density_is_the_share_of_ones_in_the_expanded_mask(structure):
    found, name, own = densities(structure)
    size = torch.Size(SIZES[structure])
    real = own.sizes(size) > 0
    draw = torch.Generator().manual_seed(3)
    keep = (torch.rand(real.shape, generator=draw) < 0.5) & real
    if structure == "pattern":  # at most one of a kernel's patterns
        keep = nn.functional.one_hot(torch.randint(0, real.shape[1], (len(real),), generator=draw), real.shape[1]) > 0
    ones = int((own.expand(keep.float(), size) != 0).sum())
    (exact,) = found.exact_densities({name: MaskPlan.of(keep)}).values()
    assert exact.share == Fraction(ones, size.numel())
    (soft,) = found.soft_densities([keep.double()]).values()
    assert float(soft.share) == pytest.approx(ones / size.numel())
    assert (soft.bits, soft.regular, soft.scheme) == (exact.bits, exact.regular, exact.scheme)
    kept = (keep & real).sum(1).numpy()
    assert exact.bits == mask_encoding.choose(keep.shape[1], real.sum(1).numpy(), kept).bits
    assert exact.scheme == own.spec()


@pytest.mark.parametrize("structure", SIZES)
def test_a_units_gradient_is_its_share_of_the_weights(structure):
    found, name, own = densities(structure)
    size = torch.Size(SIZES[structure])
    sizes = own.sizes(size).double()
    probabilities = torch.full(sizes.shape, 0.5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(found.soft_densities([probabilities])[name].share, probabilities)
    assert torch.allclose(slope, sizes / size.numel())


def test_padding_needs_no_bits_and_a_whole_mask_none_at_all():
    found, name, own = densities("block:4x1")  # six rows in blocks of four: the lower ones are half as large
    real = own.sizes(torch.Size(SIZES["block:4x1"])) > 0
    assert found.exact_densities({name: MaskPlan.of(torch.ones_like(real))})[name].bits == 0
    assert found.exact_densities({name: MaskPlan.of(torch.ones_like(real))})[name].share == 1
    assert found.exact_densities({name: MaskPlan.of(torch.zeros_like(real))})[name].share == 0


def test_hard_decisions_have_the_gradient_of_their_probability():
    raw = torch.tensor([-1.0, 2.0], requires_grad=True)
    probability = torch.sigmoid(raw)
    found = straight_through((raw > 0).float().detach(), probability)
    assert found.tolist() == [0.0, 1.0]
    found.sum().backward()
    assert torch.allclose(raw.grad, (probability * (1 - probability)).detach())
