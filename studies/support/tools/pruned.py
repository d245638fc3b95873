"""What tools that only prune share: shortcuts they can prune, bits for the rest, and training of these bits.

The usual pipeline of practice in two stages of half the epochs each: the pruned float network is trained, then the same
network with brevitas's layers (plain_brevitas.py).
"""

from __future__ import annotations

import torch
from brevitas.graph.calibrate import calibration_mode
from torch import Tensor, nn
from torch.nn import functional as F

from jpq.tracing import PadChannels
from support.tools.job import Job, Small, Widths, count_macs, layer_names
from support.tools.plain_brevitas import quantized

END_BITS = 8  # inputs of both ends; their weights have those of the body, and 4 at least


class Route(nn.Module):
    """Channels of the input, or zeros, by number: [B, C, ...] -> [B, outputs, ...]."""

    source: Tensor

    def __init__(self, source: Tensor, channels: int) -> None:
        """`source` [outputs] holds for each output channel the input channel, or -1 for zeros, of `channels`."""
        super().__init__()
        self.register_buffer("source", torch.where(source < 0, channels, source))

    def forward(self, x: Tensor) -> Tensor:
        """Pick channels of `x`."""
        return F.pad(x, [0, 0] * (x.dim() - 2) + [0, 1]).index_select(1, self.source)


def open_shortcuts(net: nn.Module) -> nn.Module:
    """Shortcuts that pad channels as 1x1 convolutions of zeros and ones, in place: these every tool can prune.

    Tools take the padding for an elementwise operation, so they would couple channels that the shortcut does not.
    """
    for name, module in list(net.named_modules()):
        if isinstance(module, PadChannels):
            rows = reader(net, name).in_channels
            conv = nn.Conv2d(rows, module.before + rows + module.after, 1, bias=False)
            eye = F.pad(torch.eye(rows), [0, 0, module.before, module.after])
            conv.weight = nn.Parameter(eye[:, :, None, None])
            net.set_submodule(name, conv)
    return net


def close_shortcuts(net: nn.Module, names: list[str]) -> nn.Module:
    """The convolutions of `open_shortcuts` as what is left of the paddings, which costs no multiplication; in place."""
    for name in names:
        conv = net.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        picks = conv.weight.detach()[:, :, 0, 0] > 0.5
        source = torch.where(picks.any(1), picks.float().argmax(1), -1)
        net.set_submodule(name, Route(source, conv.in_channels))
    return net


def shortcut_names(net: nn.Module) -> list[str]:
    """Names of the shortcuts that pad channels."""
    return [name for name, module in net.named_modules() if isinstance(module, PadChannels)]


def reader(net: nn.Module, shortcut: str) -> nn.Conv2d:
    """The first convolution of a shortcut's block, which reads what the shortcut reads."""
    parent = net.get_submodule(shortcut.rpartition(".")[0])
    conv = next(m for m in parent.children() if isinstance(m, nn.Conv2d))
    return conv


def body_widths(job: Job, bits: int) -> Widths:
    """So many bits in weights and inputs of the body."""
    names = layer_names(job.float_net)
    return dict.fromkeys(names, (bits, bits)) | dict.fromkeys((names[0], names[-1]), (max(bits, 4), END_BITS))


def count_bops(net: nn.Module, widths: Widths, x: Tensor) -> int:
    """Bit-operations of a network of these widths on one image [1, C, H, W]; layers without width are free."""
    macs = count_macs(net, x)
    return sum(macs[n] * w * a for n, (w, a) in widths.items())


def choose_bits(job: Job) -> int:
    """Bits of the body: the fewest with which something must be pruned; fewer would be brevitas alone."""
    for bits in range(2, 9):
        if count_bops(job.float_net, body_widths(job, bits), job.sample()) > job.target * job.full_bops:
            return bits
    return 8


def train_bits(job: Job, net: nn.Module, widths: Widths, first_epoch: int) -> nn.Module:
    """Quantize a trained network with brevitas, and train it for the epochs that are left."""
    net = quantized(net, widths, frozenset(layer_names(job.float_net)[:1]))
    net.eval()
    with torch.no_grad(), calibration_mode(net):
        for x in job.calibration():
            net(x)
    return job.fit(net, job.epochs - first_epoch, first_epoch=first_epoch)


def finish(job: Job, net: nn.Module, bits: int, first_epoch: int, how: str) -> Small:
    """The second stage, and a word on what is left of each layer."""
    widths = body_widths(job, bits)
    net = train_bits(job, net, widths, first_epoch)
    left = "-".join(str(m.out_channels) for m in net.modules() if isinstance(m, nn.Conv2d))
    return Small(net, widths, f"body {bits}/{bits} bits; {how}; channels {left}")
