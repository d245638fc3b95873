"""Tiny data sets and networks, one of each task: `jpq optimize --data tiny_tasks:NAME --model tiny_tasks:NAME_net`."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jpq.tasks import TASKS
from jpq.tasks.base import Task
from jpq.tasks.batches import ListColumn
from jpq.tasks.data import Batches, Data

SIZES = (160, 40, 40)  # samples of train, held-out, test
WORDS = 20  # token ids of the texts; 0 is padding


def _data(name: str, inputs: Tensor, targets: Tensor, classes: int, task: str) -> Data:
    parts = [
        Batches(x, y, batch_size=32, shuffle=i == 0)
        for i, (x, y) in enumerate(zip(inputs.split(SIZES), targets.split(SIZES), strict=True))
    ]
    shape = tuple(inputs.shape[1:])
    return Data(name, *parts, example=inputs[:2], classes=classes, shape=shape, checksum="", task=TASKS[task])


def _draws(*shape: int) -> Tensor:
    return torch.rand(sum(SIZES), *shape, generator=torch.Generator().manual_seed(0))


def labels() -> Data:
    """Images [1, 8, 8] of four quarters, each bright or dark; label k says that quarter k is bright."""
    bright = (_draws(4) > 0.5).float()
    noise = 0.2 * torch.randn(sum(SIZES), 1, 8, 8, generator=torch.Generator().manual_seed(1))
    images = F.interpolate(bright.reshape(-1, 1, 2, 2), scale_factor=4.0) + noise
    return _data("labels", images, bright, 4, "multi-label")


def maps() -> Data:
    """Images [1, 8, 8] with a brightness per pixel that says its class of three; the first row is void."""
    target = (3 * F.interpolate(_draws(1, 4, 4), scale_factor=2.0)[:, 0]).long().clamp_max(2)
    noise = 0.05 * torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    images = (target / 2 + noise)[:, None]
    target[:, 0] = 255
    return _data("maps", images, target, 3, "segmentation")


def table() -> Data:
    """Rows of 6 numbers and a smooth function of them, [1], of mean 0 and variance 1."""
    rows = _draws(6)
    target = rows[:, 0] + rows[:, 1] * rows[:, 2] - rows[:, 3].square()
    return _data("table", rows, ((target - target.mean()) / target.std())[:, None], 1, "regression")


def noisy() -> Data:
    """Smooth images [1, 12, 12] in [0, 1] with noise, and without it."""
    clean = F.interpolate(_draws(1, 3, 3), size=12, mode="bilinear")
    noise = 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    return _data("noisy", clean + noise, clean, 1, "restoration")


def texts() -> Data:
    """Token ids [8] with padding at the end; the class says whether token 1 occurs."""
    lengths = (3 + 6 * _draws(1)).long()
    ids = 2 + (_draws(8) * (WORDS - 2)).long()
    said = torch.arange(sum(SIZES)) % 2
    ids[said == 1, 1] = 1
    ids[torch.arange(8) >= lengths] = 0
    return _data("texts", ids, said, 2, "text-classification")


def series() -> Data:
    """Sequences [2, 16] of sine waves with noise; the class is their frequency, one of three."""
    target = torch.arange(sum(SIZES)) % 3
    steps = torch.arange(16) / 16
    phase = 6.28 * _draws(2, 1)
    waves = torch.sin(6.28 * (1 + target)[:, None, None] * steps + phase)
    noise = 0.1 * torch.randn(waves.shape, generator=torch.Generator().manual_seed(1))
    return _data("series", waves + noise, target, 3, "sequence-classification")


def labels_net(classes: int) -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(192, classes)),
    )


class MapsNet(nn.Module):
    """Convolutions down and up again; the scores are the entry "out" of a dict, as in torchvision's models."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(12, classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 1, H, W] -> {"out": [B, classes, H, W]}."""
        return {"out": self.head(self.down(x))}


def maps_net(classes: int) -> nn.Module:
    return MapsNet(classes)


def table_net(classes: int) -> nn.Module:
    """6 -> 24 -> 24 -> `classes` numbers."""
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, classes))


class NoisyNet(nn.Module):
    """Three convolutions that give the noise, which is taken off the image."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Sequential(
            *(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU()),
            nn.Conv2d(12, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, H, W] -> [B, 1, H, W]."""
        return x - self.noise(x)


def noisy_net() -> nn.Module:
    return NoisyNet()


class TextsNet(nn.Module):
    """The mean of the words' embeddings over the places that are no padding, and two linear layers."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16)
        self.one, self.two = nn.Linear(16, 24), nn.Linear(24, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, classes]."""
        said = (ids != 0).float()[:, :, None]
        mean = (self.words(ids) * said).sum(1) / said.sum(1)
        return self.two(torch.relu(self.one(mean)))


def texts_net(classes: int) -> nn.Module:
    return TextsNet(classes)


def series_net(classes: int) -> nn.Module:
    """Two convolutions over time, their mean, and a linear layer."""
    return nn.Sequential(
        *(nn.Conv1d(2, 12, 5, padding=2), nn.ReLU(), nn.Conv1d(12, 16, 5, padding=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, classes)),
    )


class AbsoluteError(Task):
    """A task of the user's own whose metric is better where it is lower."""

    name = "absolute-error"
    metric_name = "MAE"
    metric_unit = "K"
    metric_bounds = (0.0, float("inf"))
    higher_is_better = False
    sample_name = "row"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean absolute error."""
        return F.l1_loss(output, target)

    def metric(self, output: Tensor, target: Tensor) -> Tensor:
        """Absolute error of each sample, [B]."""
        return (output - target).abs().mean(1)

    def chance(self, classes: int) -> float:
        """Of the mean of targets that are normal with variance 1."""
        return 0.8


def absolute_error() -> Task:
    return AbsoluteError()


SIDE = 32  # pixels of the images with boxes


def boxes() -> Data:
    """Images [3, 32, 32] with one bright square each; its class, 1 or 2, says which channel is bright."""
    generator = torch.Generator().manual_seed(0)
    images = 0.05 * torch.randn(sum(SIZES), 3, SIDE, SIDE, generator=generator)
    places = torch.randint(0, SIDE - 12, (sum(SIZES), 2), generator=generator)
    targets = []
    for i, (x, y) in enumerate(places.tolist()):
        label = 1 + i % 2
        images[i, label, y : y + 12, x : x + 12] += 1.0
        corners = torch.tensor([[x, y, x + 12, y + 12]], dtype=torch.float32)
        targets.append({"boxes": corners, "labels": torch.tensor([label])})
    ends = [0, *torch.tensor(SIZES).cumsum(0).tolist()]
    parts = [
        Batches(images[a:b], ListColumn(targets[a:b]), batch_size=16, shuffle=a == 0)
        for a, b in itertools.pairwise(ends)
    ]
    return Data(
        "boxes",
        *parts,
        example=images[:2],
        classes=3,
        shape=(3, SIDE, SIDE),
        checksum="",
        task=TASKS["detection"],
    )


def boxes_net(classes: int, height: int, width: int) -> nn.Module:
    """A RetinaNet of torchvision on one map of 8 x 8 places, with square anchors of 12 pixels."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    from jpq.tasks.detectors import DetectorNetwork

    backbone = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ReLU()),
    )
    backbone.out_channels = 16  # type: ignore[assignment]
    anchors = AnchorGenerator(((12,),), ((1.0,),))
    return DetectorNetwork(RetinaNet(backbone, classes, anchor_generator=anchors), (height, width))
