"""Restoration of images (denoising, super-resolution, deblurring): squared or absolute error, PSNR and SSIM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from jpq.tasks.base import Pair, Task, check_targets

LARGEST_PSNR = 100.0  # dB, of equal images, whose PSNR has no bound

UNIT = 1e-3  # squared error over the squared peak that counts as a loss of 1: that of 30 dB


class Restoration(Task):
    """An image per sample: outputs `[B, C, H, W]`, targets the clean images `[B, C, H, W]`, both in [0, peak].

    The metric is the mean over images of the peak signal-to-noise ratio, 10 log10(peak^2 / mean squared error), of
    outputs that are clipped to [0, peak]; SSIM is shown beside it (torchmetrics).

    The loss is 1 at 30 dB. Other losses are about 1 too, and what the budget adds to the loss of a search is made for
    that: beside plain squared errors of 0.001 it would decide alone.

    Args:
        peak: largest value of a pixel.
        border: pixels at each side that metrics leave out, as papers on super-resolution do.
        error: "mse" or "l1", the training loss.
    """

    name = "restoration"
    metric_name = "PSNR"
    divergence_unit = "shares of the squared peak"
    metric_unit = "dB"
    metric_bounds = (-math.inf, LARGEST_PSNR)
    output_name = "images"
    decision_name = "pixel value"
    tolerance = 0.02  # of the peak, by which pixels that agree may differ: 5 of 255 levels
    any_size = True
    packages = ("torchmetrics",)

    def __init__(self, peak: float = 1.0, border: int = 0, error: Literal["mse", "l1"] = "mse") -> None:
        self.peak, self.border, self.error = peak, border, error

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared error over all pixels, over that of 30 dB; or mean absolute error over the root of that."""
        self._check_sizes(output, target)
        if self.error == "l1":
            return F.l1_loss(output, target) / (self.peak * math.sqrt(UNIT))
        return F.mse_loss(output, target) / (self.peak**2 * UNIT)

    def distill(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """The divergence in the unit of the loss."""
        return self.divergence(student, teacher) / UNIT

    def divergence(self, output: Tensor, reference: Tensor) -> Tensor:
        """Mean squared error over the square of the peak: the inverse of the PSNR against the float model's images."""
        return F.mse_loss(output, reference.detach()) / self.peak**2

    def metric(self, output: Tensor, target: Tensor) -> Tensor:
        """PSNR of each image in dB, [B]; that of equal images counts as 100 dB."""
        from torchmetrics.functional.image import peak_signal_noise_ratio

        output, target = self._cropped(output, target)
        values = peak_signal_noise_ratio(
            output, target, data_range=self.peak, dim=tuple(range(1, output.dim())), reduction="none"
        )
        return values.clamp_max(LARGEST_PSNR)

    def other_metrics(self, pairs: Sequence[Pair]) -> dict[str, tuple[float, str]]:
        """Mean over images of the structural similarity (Wang et al. 2004), where they have 11 x 11 pixels at least."""
        from torchmetrics.functional.image import structural_similarity_index_measure

        values = []
        for output, target in pairs:
            images = self._cropped(output, target)
            if min(images[0].shape[-2:]) < 11:
                return {}
            every: Any = structural_similarity_index_measure(*images, data_range=self.peak, reduction="none")
            values.append(every.reshape(-1))
        return {"SSIM": (float(torch.cat(values).mean()), "")}

    def _cropped(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs clipped to [0, peak] and targets, without their borders."""
        self._check_sizes(output, target)
        rows, columns = (slice(self.border, size - self.border) for size in output.shape[-2:])
        inside = (..., rows, columns)
        return output[inside].float().clamp(0, self.peak), target[inside].to(output.device).float()

    def _check_sizes(self, output: Tensor, target: Tensor) -> None:
        """Raise JpqError where outputs and targets have different sizes."""
        if output.shape != target.shape:
            form = f"images of the outputs' size {list(output.shape[1:])}"
            check_targets(False, self, form, target)

    def chance(self, classes: int) -> float:
        """PSNR of a grey image against pixels that are spread evenly over the range: 10 log10(12) dB."""
        return 10 * math.log10(12)

    def same_decision(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether pixels differ by at most `tolerance` times the peak, boolean [B, C, H, W]."""
        return (a - b).abs() <= self.tolerance * self.peak

    def decision_gap(self, a: Tensor, b: Tensor) -> Tensor:
        """Difference of each pixel, as a share of the peak."""
        return (a - b).abs() / self.peak

    def fits(self, output: object, samples: int, classes: int | None) -> bool:
        """Whether the output is one tensor of images, [samples, channels, height, width]."""
        if not isinstance(output, Tensor) or output.dim() != 4 or len(output) != samples:
            return False
        return classes is None or classes in (output.shape[1], output[0].numel())

    def check_target(self, target: Any, classes: int) -> None:
        """Raise JpqError for targets that are not images [B, C, H, W] of real numbers in [0, peak]."""
        fine = isinstance(target, Tensor) and target.dim() == 4 and target.is_floating_point()
        fine = fine and bool(((target >= 0) & (target <= self.peak)).all())
        check_targets(fine, self, f"images of real numbers between 0 and {self.peak:g}", target)

    def example_batch(self, samples: int, classes: int) -> tuple[Tensor, Tensor]:
        """Images with a little noise, and the images without it."""
        generator = torch.Generator().manual_seed(0)
        target = self.peak * torch.rand(samples, classes, 12, 12, generator=generator)
        noise = 0.001 * self.peak * torch.randn(target.shape, generator=generator)
        return (target + noise).clamp(0, self.peak), target

    def row_text(self, classes: int) -> str:
        """Form of one sample's output, in words."""
        return f"an image of {classes} channels"
