"""Held-out samples that a model was trained on are noticed; unseen ones are not."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from jpq.results.unseen import GAP, held_out_warning
from jpq.tasks import TASKS, Task, load_data


class Memory(nn.Module):
    """Knows the classes of the images that it has seen, and says class 0 for the others."""

    def __init__(self, seen, classes):
        super().__init__()
        self.classes = classes
        pairs = [pair for images, labels in seen for pair in zip(images, labels, strict=True)]
        self.known = {image.numpy().tobytes(): int(label) for image, label in pairs}

    def forward(self, x):
        rows = []
        for image in x:
            key = image.numpy().tobytes()
            label = self.known.get(key, 0)
            rows.append(torch.nn.functional.one_hot(torch.tensor(label), self.classes))
        return torch.stack(rows).float()


@pytest.fixture(scope="module")
def data():
    return load_data("digits", batch_size=64, held_out=0.4, augment=False)


def test_samples_that_were_trained_on_are_noticed(data):
    both = Memory([*data.train, *data.held_out], data.classes)
    text = held_out_warning(both, data)
    assert text is not None
    assert "trained on both" in text
    assert "accuracy is 100" in text


class Several(nn.Module):
    """Returns the outputs of a model in a dict, beside others, as networks of torchvision and transformers do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return {"aux": x, "out": self.model(x)}


def test_models_of_several_outputs_are_judged_by_the_main_one(data):
    both = Memory([*data.train, *data.held_out], data.classes)
    assert held_out_warning(Several(both), data) == held_out_warning(both, data) is not None


def test_unseen_samples_are_not(data):
    assert held_out_warning(Memory(list(data.train), data.classes), data) is None


class Errors(Task):
    """The error rate of classes."""

    name, metric_name, metric_unit = "errors", "error rate", "%"
    metric_bounds, higher_is_better = (0.0, 1.0), False

    def loss(self, output, target):
        raise NotImplementedError

    def metric(self, output, target):
        return (output.argmax(1) != target).double()


def test_errors_are_larger_on_unseen_samples(data):
    judged = replace(data, task=Errors())
    assert held_out_warning(Memory(list(data.train), data.classes), judged) is None
    text = held_out_warning(Memory([*data.train, *data.held_out], data.classes), judged)
    assert text is not None
    assert "error rate is 0.00 % on" in text


def test_few_samples_cannot_tell(data):
    few = replace(data, held_out=data.held_out.first(12))
    both = Memory([*data.train, *data.held_out], data.classes)
    assert held_out_warning(both, few) is None
    assert 0 < GAP < 0.1


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.is_mean_over_samples])
def test_metrics_of_a_whole_split_are_not_compared(data, name):
    both = Memory([*data.train, *data.held_out], data.classes)
    assert held_out_warning(both, replace(data, task=TASKS[name])) is None
