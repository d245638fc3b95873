"""Laws of a task: loss, metric, distillation and agreement of outputs, on one example batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jpq.tasks.base import Task
from jpq.testing.expectation import expect
from jpq.types import JpqError

SAMPLES, OUTPUTS = 8, 3  # of the example batch: samples, and numbers per sample
TEMPERATURE = 2.0  # of the distillation
STUDENTS = 5  # random students that are compared with the teacher itself


@dataclass(frozen=True)
class Example:
    """A batch of outputs that are right, their targets, and random outputs of the same mean and spread."""

    right: Tensor
    target: Tensor
    random: tuple[Tensor, ...]


def check_task(task: Task, output: Tensor | None = None, target: Tensor | None = None) -> None:
    """Check the laws of tasks on outputs that are right for their targets.

    Names are texts; the loss is finite, a scalar, and has a gradient; the metric is one number per sample (unless the
    task has a `summarize` of its own), within its bounds, and better for right outputs than for random ones and than
    chance; `distill` and `divergence` are smallest where student and teacher are equal, and leave the teacher alone,
    and `divergence` is 0 there; the targets pass `check_target`; `same_decision` has booleans per sample, and an output
    agrees with itself but not with random ones.

    Args:
        task: an instance.
        output: outputs that are right for each sample, and `target`: their targets. Default: `task.example_batch`.

    Raises AssertionError with the law that is broken, and JpqError where only one of output and target is given.
    """
    if output is None and target is None:
        output, target = task.example_batch(SAMPLES, OUTPUTS)
    if output is None or target is None:
        raise JpqError("check_task takes outputs together with their targets: give both, or none of them.")
    generator = torch.Generator().manual_seed(1)  # not that of example_batch
    random = tuple(
        output.mean() + output.std() * torch.randn(output.shape, generator=generator, dtype=output.dtype)
        for _ in range(STUDENTS)
    )
    for law in LAWS:
        law(task, Example(output, target, random), type(task).__name__)


def _names_are_texts(task: Task, _: Example, name: str) -> None:
    for key in ("name", "metric_name", "output_name", "decision_name", "sample_name", "divergence_unit"):
        text = getattr(task, key, "")
        expect(isinstance(text, str) and text.strip(), f"{name}: {key} is empty.")
    expect(isinstance(task.metric_unit, str), f"{name}: metric_unit is not a text; one without a unit has ''.")


def _the_loss_can_be_trained_on(task: Task, example: Example, name: str) -> None:
    student = example.random[0].clone().requires_grad_()
    _check_gradient(task.loss(student, example.target), student, f"{name}: loss")
    right, wrong = (task.loss(output, example.target) for output in (example.right, example.random[0]))
    expect(right < wrong, f"{name}: the loss of right outputs is not below that of random ones.")


def _check_gradient(loss: Tensor, student: Tensor, what: str) -> None:
    """Expect a finite scalar with a finite gradient that is not zero."""
    expect(loss.dim() == 0, f"{what} is of shape {tuple(loss.shape)}, not a scalar.")
    expect(loss.isfinite(), f"{what} is not finite.")
    expect(loss.requires_grad, f"{what} has no gradient for the output.")
    (gradient,) = torch.autograd.grad(loss, student, allow_unused=True)
    expect(gradient is not None and gradient.isfinite().all(), f"{what} has no finite gradient for the output.")
    expect(gradient.abs().sum() > 0, f"{what} has a gradient of zero at a random output.")


def _a_better_metric_is_told_from_a_worse_one(task: Task, example: Example, name: str) -> None:
    low, high = task.score_bounds
    for output in (example.right, example.random[0]) if task.is_mean_over_samples else ():
        values = task.metric(output, example.target)
        samples = len(output)
        expect(values.shape == (samples,), f"{name}: the metric of {samples} samples is of {tuple(values.shape)}.")
        expect(values.double().isfinite(), f"{name}: a sample's metric is not finite.")
    right, wrong = (_evaluate(task, output, example.target) for output in (example.right, example.random[0]))
    expect(low <= wrong <= high and low <= right <= high, f"{name}: a metric lies outside of metric_bounds.")
    expect(right > wrong, f"{name}: the metric of right outputs is not better than that of random ones.")
    chance = task.score(task.chance(task.count_outputs(example.right)))
    expect(low <= chance <= high, f"{name}: chance lies outside of metric_bounds.")
    expect(right > chance, f"{name}: the metric of right outputs is not better than chance.")


def _evaluate(task: Task, output: Tensor, target: Tensor) -> float:
    """Score of a network that answers with this output."""
    return task.evaluate(lambda _: output, [(output, target)])


def _the_example_has_the_tasks_targets(task: Task, example: Example, name: str) -> None:
    try:
        task.check_target(example.target, task.count_outputs(example.right))
    except JpqError as error:
        raise AssertionError(f"{name}: check_target refuses the example's targets: {error}") from error


def _a_divergence_is_a_distance_from_the_reference(task: Task, example: Example, name: str) -> None:
    reference = example.right
    least = task.divergence(reference, reference.clone())
    expect(least.dim() == 0, f"{name}: divergence is of shape {tuple(least.shape)}, not a scalar.")
    expect(least.abs() <= 1e-6, f"{name}: divergence of an output from itself is {float(least):.3g}, not 0.")
    for output in example.random:
        distance = task.divergence(output, reference)
        expect(distance.isfinite() & (distance > least), f"{name}: divergence of other outputs is not above 0.")


def _a_student_is_nearest_to_its_teacher_where_they_are_equal(task: Task, example: Example, name: str) -> None:
    teacher = example.right
    student = example.random[0].clone().requires_grad_()
    _check_gradient(task.distill(student, teacher, TEMPERATURE), student, f"{name}: distill")
    least = task.distill(teacher, teacher.clone(), TEMPERATURE)
    expect(least.isfinite(), f"{name}: distill is not finite where the student is the teacher.")
    distances = torch.stack([task.distill(output, teacher, TEMPERATURE) for output in example.random])
    expect(distances > least, f"{name}: distill is not smallest where the student is the teacher.")


def _a_teacher_gets_no_gradient(task: Task, example: Example, name: str) -> None:
    student, teacher = (output.clone().requires_grad_() for output in (example.random[0], example.right))
    loss = task.distill(student, teacher, TEMPERATURE)
    (gradient,) = torch.autograd.grad(loss, teacher, allow_unused=True)
    reaches = gradient is not None and bool(gradient.abs().sum() > 0)
    expect(not reaches, f"{name}: distill has a gradient for the teacher; use teacher.detach().")


def _an_output_agrees_with_itself(task: Task, example: Example, name: str) -> None:
    right, random, samples = example.right, example.random[0], len(example.right)
    same, differs = task.same_decision(right, right.clone()), task.same_decision(right, random)
    for decisions in (same, differs):
        fits = decisions.dtype == torch.bool and decisions.dim() > 0 and len(decisions) == samples
        expect(fits, f"{name}: same_decision gives {decisions.dtype} {tuple(decisions.shape)}, no boolean per sample.")
    expect(same, f"{name}: an output is not the same decision as itself.")
    expect(not differs.all(), f"{name}: random outputs are the same decisions as right ones.")
    gaps = task.decision_gap(right, random)
    expect(gaps.shape == differs.shape, f"{name}: decision_gap and same_decision have different shapes.")
    expect(gaps.isfinite() & (gaps >= 0), f"{name}: a decision_gap is negative or not finite.")


def _one_tensor_of_outputs_fits(task: Task, example: Example, name: str) -> None:
    output, samples, count = example.right, len(example.right), task.count_outputs(example.right)
    for classes in (count, None):
        expect(task.fits(output, samples, classes), f"{name}: fits refuses the example's outputs.")
        expect(not task.fits((output, output), samples, classes), f"{name}: fits accepts a pair of outputs.")
    expect(not task.fits(output, samples + 1, count), f"{name}: fits accepts outputs of too few samples.")


LAWS = (
    _names_are_texts,
    _the_loss_can_be_trained_on,
    _a_better_metric_is_told_from_a_worse_one,
    _the_example_has_the_tasks_targets,
    _a_divergence_is_a_distance_from_the_reference,
    _a_student_is_nearest_to_its_teacher_where_they_are_equal,
    _a_teacher_gets_no_gradient,
    _an_output_agrees_with_itself,
    _one_tensor_of_outputs_fits,
)
