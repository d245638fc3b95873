"""torchvision's architectures by name: how each is built, and what it usually takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from jpq.types import JpqError, unknown

BACKBONE = ".backbone"  # after the name of a detector

CLASSES = {"classification": 1000, "segmentation": 21, "detection": 91, "video": 400}  # as torchvision's weights have

CLIPS = {"mvit": (3, 16, 224, 224), "s3d": (3, 16, 224, 224), "swin3d": (3, 16, 224, 224)}  # else 112 x 112

SIDES = {"inception_v3": 299, "ssd300": 300, "ssdlite320": 320}  # else 224, detectors 320


@cache
def kinds() -> dict[str, str]:
    """Name -> "classification", "segmentation", "detection" or "video"."""
    models = torchvision.models
    families = {"segmentation": models.segmentation, "detection": models.detection, "video": models.video}
    found = dict.fromkeys(models.list_models(module=models), "classification")
    for kind, module in families.items():
        found |= dict.fromkeys(models.list_models(module=module), kind)
    return found


def kind_of(name: str) -> str:
    """What sort of network `name`, or `name.backbone` of a detector, is. Raises JpqError for an unknown name."""
    known = kinds()
    plain = name.removesuffix(BACKBONE)
    if plain not in known or (plain != name and known[plain] != "detection"):
        raise unknown("torchvision model", name, known)
    return known[plain]


def build_torchvision(name: str, classes: int) -> nn.Module:
    """A new model with random weights; of a detector its backbone, since its forward cannot be read.

    Raises JpqError for an unknown name, and for a detector without `.backbone`.
    """
    kind = kind_of(name)
    extra: dict[str, object] = {}
    if kind in ("segmentation", "detection"):
        extra["weights_backbone"] = None  # else it would be downloaded
    if name in ("googlenet", "inception_v3"):
        # their training-only heads return tuples, and their own initialisation takes minutes or warns
        extra |= {"aux_logits": False, "init_weights": False}
    if kind == "detection" and not name.endswith(BACKBONE):
        raise JpqError(
            f"torchvision:{name} is a detector, whose code chooses boxes by their values, which no exported graph can "
            f"hold. Its backbone can be read: give torchvision:{name}{BACKBONE}."
        )
    model = torchvision.models.get_model(name.removesuffix(BACKBONE), weights=None, num_classes=classes, **extra)
    return model.backbone if kind == "detection" else model


def usual_shape(name: str) -> tuple[int, ...]:
    """What one sample usually looks like: channels, (frames,) height, width."""
    kind = kind_of(name)
    if kind == "video":
        return next((shape for start, shape in CLIPS.items() if name.startswith(start)), (3, 16, 112, 112))
    side = next((side for start, side in SIDES.items() if name.startswith(start)), None)
    return (3, *(2 * [side or (320 if kind == "detection" else 224)]))


def lenet5(classes: int, channels: int) -> nn.Module:
    """32C5-MP2-64C5-MP2-512-classes for 28x28 images: 4,267,008 MACs with 1 channel and 10 classes."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, classes)),
    )


def vgg7(classes: int, channels: int) -> nn.Module:
    """2x128C3-MP2-2x256C3-MP2-2x512C3-MP2-1024-classes for 32x32 images: 615,917,568 MACs (3 channels, 10 classes)."""
    layers: list[nn.Module] = []
    for width in (128, 256, 512):
        layers += [*_conv_bn_relu(channels, width), *_conv_bn_relu(width, width), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8192, 1024), nn.ReLU(), nn.Linear(1024, classes))


def convnet(classes: int, channels: int) -> nn.Module:
    """Three 3x3 convolutions, 32-64-64 with strides 1, 2, 1, for small images such as the 8x8 digits; any size fits."""
    return nn.Sequential(
        *_conv_bn_relu(channels, 32),
        *_conv_bn_relu(32, 64, stride=2),
        *_conv_bn_relu(64, 64),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)),
    )


def _conv_bn_relu(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: every second pixel, zero channels on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()
        self.pad: PadChannels | None = None
        if inputs != outputs:
            before = (outputs - inputs) // 2
            self.pad = PadChannels(before, outputs - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        short = x if self.pad is None else self.pad(x[:, :, ::2, ::2])
        return self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))) + short)


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016 (arXiv:1512.03385, section 4.2), option-A shortcuts, depth 6 * blocks + 2.

    The names of its parameters are those of the public weights of akamaster/pytorch_resnet_cifar10.
    """

    def __init__(self, blocks: int, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(blocks, 16, 16)
        self.layer2 = self._stage(blocks, 16, 32)
        self.layer3 = self._stage(blocks, 32, 64)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(blocks: int, inputs: int, outputs: int) -> nn.Sequential:
        first = Block(inputs, outputs, stride=1 if inputs == outputs else 2)
        return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def cifar_resnet(blocks: int) -> Callable[[int, int], nn.Module]:
    """A builder, (classes, channels) -> model, of the CIFAR ResNet with so many blocks per stage (He et al. 2016)."""
    return lambda classes, channels: ResNet(blocks, classes, channels)


class PadChannels(nn.Module):
    """Append zero channels along dim 1: [B, C, ...] -> [B, before + C + after, ...].

    The counts are attributes, not numbers in somebody's `forward`, so removing channels can change them.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        """Pad `x` over its channel dimension."""
        return F.pad(x, [0, 0] * (x.dim() - 2) + [self.before, self.after])

    def extra_repr(self) -> str:
        """The two counts, for `print(model)`."""
        return f"before={self.before}, after={self.after}"
