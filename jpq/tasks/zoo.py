"""Networks built by name: LeNet-5, VGG7, convnet, CIFAR ResNets, and torchvision's architectures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from jpq.tracing.pad_channels import PadChannels
from jpq.types import JpqError, unknown

BACKBONE = ".backbone"  # suffix of a detector's name

CLASSES = {"classification": 1000, "segmentation": 21, "detection": 91, "video": 400}  # of torchvision's weights

CLIP_SHAPES = {"mvit": (3, 16, 224, 224), "s3d": (3, 16, 224, 224), "swin3d": (3, 16, 224, 224)}  # else 112 x 112

IMAGE_SIDES = {"inception_v3": 299, "ssd300": 300, "ssdlite320": 320}  # image side in pixels; others 224, detectors 320


@cache
def kinds() -> dict[str, str]:
    """Kind of each torchvision architecture: name -> "classification", "segmentation", "detection" or "video"."""
    models = torchvision.models
    families = {"segmentation": models.segmentation, "detection": models.detection, "video": models.video}
    kind_by_name = dict.fromkeys(models.list_models(module=models), "classification")
    for kind, module in families.items():
        kind_by_name |= dict.fromkeys(models.list_models(module=module), kind)
    return kind_by_name


def kind_of(name: str) -> str:
    """Kind of the architecture `name`, or of a detector's `name.backbone`. Raises JpqError for an unknown name."""
    known = kinds()
    plain = name.removesuffix(BACKBONE)
    if plain not in known or (plain != name and known[plain] != "detection"):
        raise unknown("torchvision model", name, known)
    return known[plain]


def is_detector(name: str) -> bool:
    """Whether an architecture is a whole detector, not its backbone."""
    return kind_of(name) == "detection" and not name.endswith(BACKBONE)


def build_torchvision(name: str, classes: int) -> nn.Module:
    """A torchvision model with random weights; of a detector only its backbone, since its forward cannot be traced.

    Raises JpqError for an unknown name, and for a detector without `.backbone`.
    """
    kind = kind_of(name)
    arguments: dict[str, object] = {}
    if kind in ("segmentation", "detection"):
        arguments["weights_backbone"] = None  # else it would be downloaded
    if name in ("googlenet", "inception_v3"):
        # their training-only heads return tuples, and their own initialisation takes minutes or warns
        arguments |= {"aux_logits": False, "init_weights": False}
    if is_detector(name):
        raise JpqError(
            f"torchvision:{name} is a detector, whose code chooses boxes by their values, which no exported graph can "
            f"hold. Its backbone can be read: give torchvision:{name}{BACKBONE}; data of --task detection train an SSD "
            "or a RetinaNet as a whole."
        )
    model = torchvision.models.get_model(name.removesuffix(BACKBONE), weights=None, num_classes=classes, **arguments)
    return model.backbone if kind == "detection" else model


def usual_shape(name: str) -> tuple[int, ...]:
    """Usual shape of one sample of an architecture: channels, (frames,) height, width."""
    kind = kind_of(name)
    if kind == "video":
        return next((shape for start, shape in CLIP_SHAPES.items() if name.startswith(start)), (3, 16, 112, 112))
    side = next((side for start, side in IMAGE_SIDES.items() if name.startswith(start)), None)
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
    """A residual block of two 3x3 convolutions; its shortcut has no parameters (option A: subsampled, zero-padded)."""

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

    Its parameters have the names of the public weights of akamaster/pytorch_resnet_cifar10.
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
        begin = Block(inputs, outputs, stride=1 if inputs == outputs else 2)
        return nn.Sequential(begin, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def cifar_resnet(blocks: int) -> Callable[[int, int], nn.Module]:
    """A builder, (classes, channels) -> model, of the CIFAR ResNet with `blocks` blocks per stage (He et al. 2016)."""
    return partial(ResNet, blocks)
