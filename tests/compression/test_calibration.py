"""Statistics from data: BatchNorm's running averages measured anew, and samples under the present decisions."""

import pytest
import torch
from torch import nn

from jpq.compression.calibration import reestimate_batchnorm
from jpq.types import JpqError


def two_norms():
    """Two BatchNorms, the second behind the first, with statistics of other data."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))
    for norm in (net[1], net[4]):
        norm.momentum = 0.3
        norm.running_mean.uniform_(-5, 5)
        norm.running_var.uniform_(2, 9)
        norm.num_batches_tracked.fill_(77)
    return net.double().train()


def batches(count):
    """Batches of different means and spreads, so that an average over them is none of them."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(count, 16, 3, 6, 6, generator=draw, dtype=torch.float64)
    return [(x[i] * (i + 1) + i, torch.zeros(16)) for i in range(count)]


@torch.no_grad()
def plain_averages(net, inputs):
    """(mean, unbiased variance) before each norm, averaged over the batches; each norms by its own batch."""
    sums = []
    for x, _ in inputs:
        first = net[0](x)
        m, v = first.mean((0, 2, 3)), first.var((0, 2, 3))
        biased = first.var((0, 2, 3), unbiased=False)
        normed = (first - m[:, None, None]) / (biased[:, None, None] + net[1].eps).sqrt()
        second = net[3]((normed * net[1].weight[:, None, None] + net[1].bias[:, None, None]).relu())
        sums.append((m, v, second.mean((0, 2, 3)), second.var((0, 2, 3))))
    return [torch.stack(parts).mean(0) for parts in zip(*sums, strict=True)]


@pytest.mark.parametrize("count", [6, 3])
def test_batchnorm_is_measured_anew_as_a_plain_average(count):
    net, inputs = two_norms(), batches(6)
    wanted = plain_averages(net, inputs[:count])
    reestimate_batchnorm(net, inputs, count)
    found = (net[1].running_mean, net[1].running_var, net[4].running_mean, net[4].running_var)
    for value, average in zip(found, wanted, strict=True):
        assert torch.allclose(value, average, rtol=1e-12, atol=1e-12)
    assert net[1].num_batches_tracked == count
    assert (net[1].momentum, net[4].momentum) == (0.3, 0.3)
    assert not any(module.training for module in net.modules())


def test_norms_without_running_statistics_and_nets_without_norms_stay_as_they_are():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).train()
    reestimate_batchnorm(net, batches(2))
    assert net.training
    assert net[1].running_mean is None


def test_without_a_batch_statistics_stay_and_an_error_says_so():
    net = two_norms()
    before = net[1].running_mean.clone()
    with pytest.raises(JpqError, match="there are none"):
        reestimate_batchnorm(net, iter(()))
    assert torch.equal(net[1].running_mean, before)
    with pytest.raises(RuntimeError):
        reestimate_batchnorm(net, [(torch.zeros(2, 1, 6, 6, dtype=torch.float64), None)])  # too few channels
    assert net[1].momentum == 0.3
