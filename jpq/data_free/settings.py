"""Settings of `jpq prune-private`: the fields become flags, and their docstrings the help texts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from jpq.config import TextPaths
from jpq.types import JpqError, unknown

INPUT_KINDS = ("matched", "noise")

KERNEL_DENSITY = 0.75  # default share of the kernels that stay, with patterns

WEIGHT_DENSITY = 0.5  # default share of the weights that stay, with other structures


@dataclass(frozen=True)
class DataFreeSettings(TextPaths):
    """The model, the random images, the structure of the zeros, and ADMM's numbers."""

    model: str = "convnet"
    """convnet, lenet5, vgg7, resnet8/20/32/44/56, torchvision:NAME, or module:callable (runs your code)."""
    weights: Path | None = None
    """The trained weights (.pth, .th, .safetensors): all that is known of the client."""
    synthetic: bool = True
    """Inputs are random images. There is no other kind here, so the flag may be left out."""
    inputs: str = "matched"
    """noise: random images as they are. matched: each BatchNorm is measured anew on them (in a copy), so that what it
    gives has the mean and the variance that it has on real images."""
    structure: str = "pattern"
    """Where zeros may lie: pattern (4 of 9 weights of each 3 x 3 kernel), elementwise, kernels, 2:4, block:8x4 ..."""
    density: float | None = None
    """Share that stays, in each layer. With pattern: of the kernels, the others go whole (default 0.75; the layer that
    reads the image keeps all). Otherwise: of the weights (default 0.5; N:M says it itself)."""
    skip: tuple[str, ...] = ()
    """Layers that stay dense."""
    input_shape: tuple[int, ...] | None = None
    """One sample without the batch: channels, height and width. Default: what the model usually takes."""
    classes: int | None = None
    """Number of classes. Default: what the model usually has."""
    like: str = ""
    """Data set whose published mean and deviation the model's inputs are normalised with: digits, mnist,
    fashion-mnist, cifar10, cifar100, imagenet. Only these constants are used. Default: imagenet's for 3 channels, which
    are cifar10's here; else pixels in [0, 1] as they are."""
    rho: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    """Weights of the penalty that pulls each layer to the structure, one after the other."""
    steps: int = 400
    """Optimiser steps of each layer, over all rhos."""
    images: int = 256
    """Random images that a layer learns from at each rho; what it reads of them is held in memory."""
    batch_size: int = 64
    """Images of a step."""
    lr: float = 0.05
    """Learning rate (Adam), times the root mean square of the layer's weights; falls tenfold after each third of a
    rho."""
    seed: int = 0
    """Seeds the images and their order."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    threads: int = 0
    """CPU threads; 0: one for small nets, torch's choice for larger ones."""
    out: Path = Path("private")
    """Folder for mask.json, weights.safetensors, layers.csv and report.json."""

    def check(self) -> DataFreeSettings:
        """The validated settings. Raises JpqError with the flag to change."""
        self._check_model_and_images()
        if self.density is not None and not 0 < self.density <= 1:
            raise JpqError(f"--density {self.density} must lie above 0 and be at most 1: it is the share that stays.")
        self._check_admm()
        if self.input_shape is not None and (not self.input_shape or min(self.input_shape) < 1):
            raise JpqError(
                f"--input-shape {' '.join(map(str, self.input_shape))}: give positive sizes, such as 3 32 32."
            )
        return self

    def _check_model_and_images(self) -> None:
        """Check the weights and the kind of random images. Raises JpqError."""
        if not self.synthetic:
            raise JpqError(
                "--no-synthetic: prune-private never sees data. To prune with data: `jpq optimize --method admm`."
            )
        if not -(2**63) <= self.seed < 2**63:
            raise JpqError(f"--seed {self.seed} is too large: at most 63 bits.")
        if self.weights is None:
            raise JpqError("No trained model: give its weights with --weights FILE. prune-private trains none.")
        if self.inputs not in INPUT_KINDS:
            raise unknown("kind of --inputs", self.inputs, INPUT_KINDS)

    def _check_admm(self) -> None:
        """Check penalties, steps, images and learning rate. Raises JpqError."""
        if not self.rho or not all(0 < r < math.inf for r in self.rho):
            raise JpqError(f"--rho {' '.join(map(str, self.rho))}: give one or more positive numbers.")
        minimum_steps = 5 * len(self.rho)
        if self.steps < minimum_steps:
            raise JpqError(f"--steps {self.steps}: at least {minimum_steps} are needed, five for each --rho.")
        if not 2 <= self.batch_size <= self.images:
            raise JpqError(
                f"--batch-size {self.batch_size}, --images {self.images}: give 2 or more a step, and no more than all."
            )
        if not 0 < self.lr < math.inf:
            raise JpqError(f"--lr {self.lr} must be a positive number.")

    def share(self) -> float:
        """The density of the settings, or the structure's default."""
        default = KERNEL_DENSITY if self.structure.startswith("pattern") else WEIGHT_DENSITY
        return default if self.density is None else self.density
