"""Labels of every type that holds whole numbers load alike; others end in one sentence that says how to mend them."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from jpq.tasks.data import load
from jpq.tasks.labels import class_numbers, count_classes, gap_note, unify_numbers
from jpq.types import JpqError

Y = np.arange(12) % 4


class Samples:
    """A Dataset of 40 small images whose labels a function makes."""

    def __init__(self, label: Any) -> None:
        self.label = label

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[torch.Tensor, Any]:
        return torch.rand(1, 8, 8), self.label(i)


@pytest.mark.parametrize(
    "labels",
    [
        *(Y.astype(kind) for kind in ("uint8", "int8", "uint16", "uint32", "uint64", "int64", "float32", "float16")),
        *(torch.tensor(Y, dtype=kind) for kind in (torch.int32, torch.float64, torch.bfloat16)),
        torch.tensor(Y.astype("uint16")),
        torch.tensor(Y)[:, None],
        Y.reshape(12, 1),
        Y.reshape(12, 1, 1).astype("float32"),
        Y.tolist(),
        [np.uint8(y) for y in Y],
        [torch.tensor(y) for y in Y],
        [torch.tensor([float(y)]) for y in Y],
        [np.array([y]) for y in Y],
        np.array(Y.tolist(), dtype=object),
        tuple(float(y) for y in Y),
    ],
    ids=lambda labels: f"{type(labels).__name__} {getattr(labels, 'dtype', type(labels[0]).__name__)}",
)
def test_whole_numbers_of_every_type(labels):
    numbers = class_numbers(labels, "It")
    assert numbers.dtype == torch.int64
    assert numbers.tolist() == Y.tolist()


def test_booleans_are_classes_0_and_1():
    for labels in (np.array([True, False]), torch.tensor([True, False]), [True, False], [np.True_, np.False_]):
        assert class_numbers(labels, "It").tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.eye(4), r"It has one-hot labels y \[4, 4\]. Give class numbers: y.argmax\(1\)"),
        ([torch.eye(4)[i % 4] for i in range(8)], "one-hot"),
        (np.array([[1, 1, 0], [0, 0, 1]]), "several classes at once"),
        (np.array([[0.2, 0.8], [0.9, 0.1]]), r"probabilities y.argmax\(1\)"),
        (["cat", "dog"], r"text as labels \('cat'\). Number the classes .* numpy.unique"),
        (np.array(["cat", "dog"]), "text as labels"),
        (np.array(["cat", 1], dtype=object), "text as labels"),
        ([b"cat"], "text as labels"),
        ([0, None, 1], r"no label \(None\) for sample 1"),
        (np.array([0, None], dtype=object), r"no label \(None\)"),
        ([0.0, 1.5], "label 1.5, which is no whole number"),
        (torch.tensor([0.0, float("nan")]), "label nan for sample 1"),
        ([0, -1], "label -1; labels count from 0"),
        ([0, 10**9, 3 * 10**9], "up to 3,000,000,000 and only 3 classes: these look like ids"),
        (np.array([0, 2**64 - 1], dtype="uint64"), "look like ids"),
        ([0.0, 1e12], "look like ids"),
        ([[0, 1], [1]], "not one number per sample"),
        (3, r"single label"),
        (np.zeros((3, 2, 2), int), r"labels y \[3, 2, 2\]"),
        (np.array([1j, 2]), "of type complex128"),
        (np.array(["2026-01-01"], dtype="datetime64[D]"), "of type datetime64"),
    ],
    ids=str,
)
def test_other_labels_say_how_to_mend_them(labels, words):
    with pytest.raises(JpqError, match=words):
        class_numbers(labels, "It")


def test_numbers_with_gaps_are_classes_and_ids_are_not():
    assert count_classes(torch.tensor([0, 999]), "It") == 1000  # a part of ImageNet's classes
    assert count_classes(torch.arange(20_000), "It") == 20_000
    with pytest.raises(JpqError, match=r"up to 20,231 and only 3 classes: these look like ids"):
        count_classes(torch.tensor([10115, 20231, 3]), "It")
    assert gap_note(torch.tensor([0, 1, 2]), 3) == ""
    assert "count from 1" in gap_note(torch.tensor([1, 2]), 3)
    assert "2 of 4 classes have no training image (1, 2)" in gap_note(torch.tensor([0, 3]), 4)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("fine", lambda: (Samples(lambda i: np.float32(i % 4)),) * 2, ""),
        ("column", lambda: (Samples(lambda i: torch.tensor([i % 4])),) * 2, ""),
        ("onehot", lambda: (Samples(lambda i: torch.eye(4)[i % 4]),) * 2, "train part of .* one-hot"),
        ("text", lambda: (Samples(lambda i: "cat"),) * 2, "text as labels"),
        ("fraction", lambda: (Samples(lambda i: i % 4 + 0.5),) * 2, "no whole number"),
        ("ids", lambda: ((torch.rand(60, 1, 8, 8), np.arange(60) % 4 * 10**9),) * 2, "look like ids"),
    ],
)
def test_labels_of_users_data(monkeypatch, name, make, words):
    module: Any = types.ModuleType("users_labels")
    module.make = make
    monkeypatch.setitem(sys.modules, "users_labels", module)
    if not words:
        data = load("users_labels:make")
        assert (data.classes, data.notes) == (4, ())
        assert data.test.labels.tolist() == [i % 4 for i in range(40)]
        return
    with pytest.raises(JpqError, match=words):
        load("users_labels:make")


def test_text_in_the_batches_of_a_loader_is_refused_with_how_to_number_it(monkeypatch):
    module: Any = types.ModuleType("users_text")
    module.make = lambda: (DataLoader(Samples(lambda i: "cat"), batch_size=8),) * 2
    monkeypatch.setitem(sys.modules, "users_text", module)
    with pytest.raises(JpqError) as error:
        load("users_text:make")
    assert str(error.value) == (
        "The train part of 'users_text:make' gives text ('cat') in its batches, and models read numbers. Number "
        "classes 0, 1, 2 ... (names, y = numpy.unique(labels, return_inverse=True)), and give texts as token ids."
    )


def test_arrays_with_channels_last_are_named(monkeypatch):
    module: Any = types.ModuleType("users_layout")
    y = torch.arange(40) % 4
    for name, shape, kind in (
        ("photos", (40, 16, 16, 3), torch.uint8),
        ("rgba", (40, 12, 20, 4), torch.float32),
        ("grey", (40, 16, 16, 1), torch.float32),
        ("bytes", (40, 28, 20, 1), torch.uint8),
        ("flat", (40, 28, 20), torch.uint8),
        ("signal", (40, 16, 100, 1), torch.float32),
        ("small", (40, 3, 3, 3), torch.float32),
    ):
        x = torch.zeros(shape).to(kind)
        setattr(module, name, lambda x=x: ((x, y), (x, y)))
    monkeypatch.setitem(sys.modules, "users_layout", module)
    for name in ("photos", "rgba", "grey", "bytes"):
        with pytest.raises(JpqError, match=r"looks like \[N, H, W, C\].*x.permute\(0, 3, 1, 2\)"):
            load(f"users_layout:{name}")
    with pytest.raises(JpqError, match=r"need x\[:, None\]"):
        load("users_layout:flat")
    assert load("users_layout:signal").shape == (16, 100, 1)
    assert load("users_layout:small").shape == (3, 3, 3)


def test_labels_that_are_equal_as_numbers_get_one_spelling():
    assert unify_numbers(["1.0", "1", "2.50", "1e0", "02.50"]) == ["1", "1", "2.50", "1", "2.50"]
    assert unify_numbers(["1.0", "3", "none"], ["1", "2"]) == ["1", "3", "none"]
    for texts in (["1", "1.0", "one"], ["1", "1.0", "nan"], ["1", "1.0", "inf"]):
        assert unify_numbers(texts) == texts
    ids = ["12345678901234567890", "12345678901234567891"]
    assert unify_numbers(ids) == ids
