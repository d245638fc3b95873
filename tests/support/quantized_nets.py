"""Two small quantized networks, with what their export has to cope with, and images for them."""

import torch
from torch import nn

import jpq

EXAMPLE = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
IMAGES = [(torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1)), None)]


class Residual(nn.Module):
    """A sum of two convolutions and of what came before, an average, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.b, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.ReLU()
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.norm(self.first(x)))
        return self.linear(self.relu(self.a(x) + self.b(x) + x).mean((2, 3)))


class Small(nn.Sequential):
    """ReLU6, depthwise, pooling of the maximum."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.ReLU6(),
            nn.Conv2d(8, 6, 1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 6, 1),
            nn.ReLU6(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 1),
            nn.Flatten(),
            nn.Linear(32, 4),
        )


def quantized(kind, bits, output_bits=0, **settings):
    """A session on one of the nets; by default at uniform bits."""
    torch.manual_seed(0)
    model = kind().eval()
    for p in model.parameters():
        p.data.mul_(2)  # ReLU6 has something to do
    settings = settings or {"method": "uniform", "bops": "100%", "w_bits": (bits, bits), "a_bits": (bits, bits)}
    return jpq.compress(model, EXAMPLE, output_bits=output_bits, **settings)
