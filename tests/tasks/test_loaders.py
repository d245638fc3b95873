"""Data of any iterable of batches: DataLoaders, lists, several inputs; order, laziness, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import own_loaders
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

import jpq
from jpq.config import Budget, Config, Run, Task, Train
from jpq.recipe import optimize
from jpq.tasks import Task as AnyTask
from jpq.tasks.data import load
from jpq.tasks.load import load_dense_model, read_data
from jpq.tasks.loaders import LoaderBatches
from jpq.types import JpqError

CPU = torch.device("cpu")


def batches(loader, training: bool = False, seed: int = 0) -> LoaderBatches:
    return LoaderBatches(loader, "The train part", device=CPU, seed=seed, training=training)


def equal(one, two) -> bool:
    pairs = list(zip(one, two, strict=True))
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


def served(monkeypatch, value) -> str:
    """A --data that returns this value."""
    module = ModuleType("served")
    module.data = lambda: value  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "served", module)
    return "served:data"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_depends_on_seed_and_epoch_alone_and_moves_no_other_draw(workers):
    one, two = (
        batches(DataLoader(own_loaders.Noisy(), batch_size=6, shuffle=True, num_workers=workers)) for _ in range(2)
    )
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = list(one.epoch(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    list(two.epoch(1))
    assert equal(first, two.epoch(3))
    assert not equal(first, two.epoch(4))
    samples = torch.cat([x[:, 0] for x, _ in first])
    assert sorted(samples.tolist()) == list(range(20))


def test_workers_that_persist_are_started_anew_for_each_epoch():
    """Else they go on with the draws of the epoch before, and a reading amid an epoch ends it."""
    made = [DataLoader(own_loaders.Noisy(), batch_size=6, num_workers=1, persistent_workers=True) for _ in range(2)]
    one, two = map(batches, made)
    first = list(one.epoch(3))
    list(two.epoch(1))
    assert equal(first, two.epoch(3))
    outer = []
    for pair in two.epoch(3):
        if not outer:
            list(two.epoch(4))
        outer.append(pair)
    assert equal(first, outer)
    assert made[0].persistent_workers


def test_draws_of_training_between_batches_do_not_change_the_batches():
    loader = DataLoader(own_loaders.Noisy(), batch_size=6, shuffle=True)
    quiet = list(batches(loader).epoch(2))
    disturbed = []
    for pair in batches(loader).epoch(2):
        torch.rand(3)
        disturbed.append(pair)
    assert equal(quiet, disturbed)


def test_sizes_are_known_without_reading_where_a_loader_has_them():
    data = own_loaders.Noisy(21)
    split = batches(DataLoader(data, batch_size=5, shuffle=True), training=True)
    assert (split.size, len(split), split.batch_size) == (20, 4, 5)  # the single left-over sample is dropped
    assert data.reads == 5  # of the first batch alone
    assert [len(y) for _, y in split] == [5, 5, 5, 5]
    stream = batches(DataLoader(own_loaders.Stream(), batch_size=6))
    assert (stream.size, len(stream)) == (20, 4)


def test_a_batch_is_read_when_it_is_asked_for():
    data = own_loaders.Noisy(1000)
    split = batches(DataLoader(data, batch_size=10))
    data.reads = 0
    epoch = split.epoch(0)
    next(epoch), next(epoch)
    assert data.reads == 20


def test_the_first_samples_and_a_fixed_part():
    split = batches(DataLoader(own_loaders.Noisy(), batch_size=6))
    assert torch.cat([x[:, 0] for x, _ in split.first(8)]).tolist() == list(range(8))
    assert (split.first(8).size, len(split.first(8))) == (8, 2)
    part = split.fixed_part(0.5)
    assert part.size == 10
    assert torch.equal(torch.cat([x[:, 0] for x, _ in part]), torch.cat([x[:, 0] for x, _ in part.epoch(3)]))


@pytest.mark.parametrize("indexed", [True, False])
def test_halves_are_disjoint_and_stay_the_same(indexed):
    rows = torch.arange(24.0)[:, None]
    pairs = TensorDataset(rows, torch.arange(24) % 2)
    loader = DataLoader(pairs, batch_size=4, shuffle=True) if indexed else [pairs[i : i + 4] for i in range(0, 24, 4)]
    halves = batches(loader).halves()
    seen = [[set(torch.cat([x[:, 0] for x, _ in half.epoch(e)]).tolist()) for e in (0, 1)] for half in halves]
    assert seen[0][0] == seen[0][1]
    assert seen[1][0] == seen[1][1]
    assert not seen[0][0] & seen[1][0]
    assert len(seen[0][0] | seen[1][0]) == 24


def small_run(data: str, folder, **settings) -> jpq.Result:
    config = Config(
        task=Task(data=data, **settings),
        budget=Budget(target_bops="5%"),
        train=Train(epochs=2, float_epochs=1, batch_size=32, augment=False),
        run=Run(out=folder, threads=1),
    )
    return optimize(config)


def test_a_loader_in_the_same_order_gives_the_run_of_batches_in_memory(tmp_path):
    memory = small_run("digits", tmp_path / "memory", limit=200)
    loaders = small_run("own_loaders:digits", tmp_path / "loaders")
    assert loaders.data["train"] == memory.data["train"]
    assert [row.loss for row in loaders.history] == [row.loss for row in memory.history]
    assert loaders.compressed == memory.compressed
    assert loaders.held_out == memory.held_out


@pytest.mark.parametrize("kind", ["two_inputs", "tuples"])
def test_a_model_of_two_inputs_goes_through_the_whole_run(kind, tmp_path):
    result = small_run(f"own_loaders:{kind}", tmp_path, model="own_loaders:TwoInputs")
    assert result.export["forms"]["onnx"]["bytes"] > 0
    assert result.verified["rebuilt_vs_onnxruntime"]["images"] == 60


def test_held_out_samples_are_split_off_a_loader_with_a_dataset(monkeypatch):
    pairs = TensorDataset(torch.rand(40, 1, 4, 4), torch.arange(40) % 3)
    loader = DataLoader(pairs, batch_size=8, shuffle=True)
    data = load(served(monkeypatch, (loader, DataLoader(pairs, batch_size=8))), held_out=0.25)
    assert (data.train.size, data.held_out.size, data.test.size, data.classes) == (30, 10, 40, 3)
    rows = [{x.numpy().tobytes() for batch, _ in split for x in batch} for split in (data.train, data.held_out)]
    assert not rows[0] & rows[1]


def test_parts_of_a_loader_drop_incomplete_batches_as_it_does(monkeypatch):
    pairs = TensorDataset(torch.rand(45, 1, 4, 4), torch.arange(45) % 3)
    loader = DataLoader(pairs, batch_size=8, shuffle=True, drop_last=True)
    data = load(served(monkeypatch, (loader, DataLoader(pairs, batch_size=8))), held_out=0.25)
    assert [len(y) for _, y in data.train] == [8, 8, 8, 8]  # of 34 samples
    assert data.held_out.size == 11
    assert [len(y) for _, y in data.train.halves()[0]] == [8, 8]
    assert [len(y) for _, y in data.train.limited(13)] == [8]
    assert [len(y) for _, y in data.train.limited(5)] == [5], "a single batch stays"
    assert data.train.fixed_part(1.0).size == 34


def test_flags_that_loaders_have_no_use_for_are_noted(monkeypatch):
    pairs = TensorDataset(torch.rand(40, 1, 4, 4), torch.arange(40) % 3)
    loader = DataLoader(pairs, batch_size=8, shuffle=True)
    name = served(monkeypatch, (loader, loader, loader))
    assert load(name).notes == load(name, batch_size=8).notes == ()
    assert load(name, batch_size=16, held_out=0.3).notes == (
        f"--batch-size 16 is not used: '{name}' makes batches of 8 by itself.",
        f"--held-out 0.3 is not used: '{name}' has a held-out part of its own.",
    )
    assert load(served(monkeypatch, (loader, loader)), held_out=0.3).notes == ()
    assert load(served(monkeypatch, (pairs, pairs)), batch_size=16, cache="none").notes == ()


def test_a_limit_holds_for_the_users_own_data_and_other_flags_are_noted(monkeypatch):
    data = replace(load("digits", limit=300), notes=("Odd.",))
    name = served(monkeypatch, data)
    limited = load(name, limit=50, batch_size=16, held_out=0.3)
    assert limited.train.size == 50
    assert limited.train.labels.bincount().min() >= 4, "of each class about as many"
    assert limited.notes[0] == "Odd."
    assert [note.split()[0] for note in limited.notes[1:]] == ["--batch-size", "--held-out"]
    assert load(name, limit=1000) == data


def test_a_loader_of_single_samples_is_trained_on():
    x, y = torch.arange(5.0)[:, None], torch.arange(5)
    for loader in (DataLoader(TensorDataset(x, y)), [(x[n : n + 1], y[n : n + 1]) for n in range(5)]):
        split = batches(loader, training=True)
        assert (split.size, len(split), len(list(split))) == (5, 5, 5)


@pytest.mark.parametrize(
    ("x", "y", "task"),
    [
        (torch.rand(4, 3, 5, 5), torch.arange(4), "classification"),
        (torch.rand(4, 3, 5, 5), torch.arange(25).view(5, 5).expand(4, 5, 5) % 2, "segmentation"),
        (torch.rand(4, 3, 5, 5), torch.rand(4, 3, 5, 5), "restoration"),
        (torch.randint(9, (4, 7)), torch.arange(4), "text-classification"),
        (torch.rand(4, 2, 9), torch.arange(4), "sequence-classification"),
        (torch.rand(4, 6), torch.rand(4, 1), "regression"),
        (torch.rand(4, 6), torch.tensor([[0.0, 1.0]] * 4), "multi-label"),
    ],
)
def test_the_task_is_that_of_the_first_batch(monkeypatch, x, y, task):
    data = load(served(monkeypatch, {"train": [(x, y)], "held_out": [(x, y)], "test": [(x, y)]}))
    assert data.task.name == task


def once():
    return iter([(torch.rand(4, 2), torch.arange(4))])


FINE = [(torch.rand(4, 2), torch.arange(4))]
NAN = [(torch.full((4, 2), torch.nan), torch.arange(4))]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"train": [], "held_out": FINE, "test": FINE}, "gives no batches"),
        ({"train": once(), "held_out": FINE, "test": FINE}, "only once"),
        ({"train": [*FINE, (torch.rand(4, 3), torch.arange(4))], "held_out": FINE, "test": FINE}, "float32"),
        ({"train": NAN, "held_out": FINE, "test": FINE}, "NaN"),
        ({"train": [torch.rand(4, 2)], "held_out": FINE, "test": FINE}, "must be a pair"),
        ({"train": [(torch.rand(4, 2), None)], "held_out": FINE, "test": FINE}, "NoneType"),
        ({"train": FINE, "held_out": FINE}, "no 'test'"),
        ({"train": FINE, "checking": FINE, "test": FINE}, "checking"),
        ({"train": FINE, "val": FINE, "held_out": FINE, "test": FINE}, "'val' and 'held_out', which are names of one"),
        ({"train": FINE, "dev": FINE, "valid": None, "test": FINE}, "'dev' and 'valid', which are names of one"),
        ({"train": FINE, "test": FINE}, "Return \\(train, held_out, test\\)"),
        ({"train": FINE, "held_out": FINE, "test": [(torch.rand(4, 2), torch.arange(4) + 3)]}, "label 6"),
        ({"train": FINE, "held_out": FINE, "test": [(torch.rand(4, 5), torch.arange(4))]}, "one shape"),
        ({"train": 3, "held_out": FINE, "test": FINE}, "int"),
    ],
)
def test_bad_loaders_are_refused_in_one_sentence(monkeypatch, value, words):
    with pytest.raises(JpqError, match=words):
        for _ in load(served(monkeypatch, value)).train:
            pass


@pytest.mark.parametrize("form", ["tensors", "batches"])
def test_targets_of_a_task_are_checked_in_every_batch(monkeypatch, form):
    labels = torch.stack([NUMBERS % 2, NUMBERS // 2], 1).float()
    wrong = labels.clone()
    wrong[-1, 0] = 2
    fine, bad = ((ROWS, labels), (ROWS, wrong))
    if form == "batches":
        fine, bad = ([(x[:15], y[:15]), (x[15:], y[15:])] for x, y in (fine, bad))
    config = Config(task=Task(data=served(monkeypatch, (fine, fine, bad)), task="multi-label"))
    with pytest.raises(JpqError, match="a row of 2 zeros and ones per sample"):
        for _ in read_data(config, CPU).test:
            pass


class ReadTwice:
    """Gives its batches twice, and nothing after that."""

    def __init__(self):
        self.left = 2

    def __iter__(self):
        self.left -= 1
        return iter([(ROWS, NUMBERS)] if self.left >= 0 else [])


def test_batches_that_are_given_no_more_end_in_a_sentence():
    given = batches(ReadTwice())
    assert len([y for _, y in given]) == 1
    with pytest.raises(JpqError, match="The train part gave batches once and none when it was read again"):
        next(iter(given))


def test_a_model_that_is_built_with_nan_is_refused(monkeypatch):
    net = torch.nn.Linear(ROWS.shape[1], 4)
    net.weight.data[0, 0] = torch.nan
    name = served(monkeypatch, ((ROWS, NUMBERS), (ROWS, NUMBERS)))
    monkeypatch.setattr(sys.modules["served"], "net", lambda: net, raising=False)
    config = Config(task=Task(data=name, model="served:net"))
    with pytest.raises(JpqError, match=r"Model 'served:net' holds NaN in 1 of its weights \(weight\)"):
        load_dense_model(config, read_data(config, CPU), CPU)


def test_a_loader_whose_order_is_unknown_is_noted(monkeypatch):
    class Own:
        def __iter__(self):
            return iter(FINE)

    data = load(served(monkeypatch, {"train": Own(), "held_out": FINE, "test": FINE}))
    assert "whose order jpq cannot set" in data.notes[0]


def test_a_dataset_is_read_lazily_without_a_cache(monkeypatch):
    train, test = own_loaders.Noisy(30), own_loaders.Noisy(30)
    data = load(served(monkeypatch, (train, test)), cache="none", batch_size=5)
    assert isinstance(data.train, LoaderBatches)
    assert (data.train.size, data.held_out.size) == (27, 3)


ROWS, MAPS = torch.rand(30, 6), torch.rand(30, 3, 8, 8)


@pytest.mark.parametrize(
    ("x", "y", "task", "classes"),
    [
        (ROWS, ROWS[:, :2], "regression", 2),
        (ROWS.numpy(), ROWS.sum(1).numpy(), "regression", 1),
        (ROWS, torch.arange(30) % 3, "classification", 3),
        (ROWS.view(30, 2, 3), torch.arange(30) % 3, "sequence-classification", 3),
        (torch.randint(0, 9, (30, 5)), torch.arange(30) % 2, "text-classification", 2),
        (MAPS, torch.arange(30)[:, None, None].expand(30, 8, 8) % 3, "segmentation", 3),
        (MAPS, MAPS / 2, "restoration", 3),
    ],
)
def test_samples_in_memory_are_of_any_task(monkeypatch, x, y, task, classes):
    for part in ((x, y), TensorDataset(torch.as_tensor(x), torch.as_tensor(y))):
        data = load(served(monkeypatch, (part, part)), batch_size=10)
        assert (data.task.name, data.classes, data.train.size, data.held_out.size) == (task, classes, 27, 3)


def test_bytes_of_images_with_other_targets_are_divided(monkeypatch):
    part = ((255 * MAPS).byte(), MAPS.mean((1, 2, 3)))
    data = load(served(monkeypatch, (part, part)), task="regression", batch_size=30)
    x, _ = next(iter(data.test))
    assert torch.equal(x, part[0].float() / 255)


@pytest.mark.parametrize(
    "change", [torch.Tensor.bool, torch.Tensor.byte, lambda y: y[:, None], lambda y: y[:, None] * 1.0]
)
def test_labels_of_any_kind_are_class_numbers_in_every_batch(monkeypatch, change):
    labels = torch.arange(8) % 2
    part = [(torch.rand(8, 2), change(labels))]
    data = load(served(monkeypatch, {"train": part, "held_out": part, "test": part}), task="classification")
    assert data.classes == 2
    for batches in (data.train, data.held_out, data.test):
        ((_, y),) = batches
        assert torch.equal(y, labels)


def test_labels_beyond_those_of_training_are_refused_in_any_batch(monkeypatch):
    y = torch.arange(30) % 3
    late = torch.cat([y[:-1], torch.tensor([7])])
    train, test = (DataLoader(TensorDataset(ROWS, labels), batch_size=10) for labels in (y, late))
    with pytest.raises(JpqError, match=r"test part of .* has label 7; training labels end at 2"):
        load(served(monkeypatch, (train, test)))


@pytest.mark.parametrize("sampler", [torch.utils.data.SubsetRandomSampler(range(20)), [3, 4, 5, 6]])
def test_no_held_out_samples_are_split_off_beside_a_sampler(monkeypatch, sampler):
    """They would be drawn from all samples of the Dataset, those of the test part among them."""
    whole = TensorDataset(ROWS, torch.arange(30) % 3)
    train = DataLoader(whole, batch_size=5, sampler=sampler)
    test = DataLoader(whole, batch_size=5, sampler=torch.utils.data.SubsetRandomSampler(range(20, 30)))
    with pytest.raises(JpqError, match=r"chooses among the samples.*Return \(train, held_out, test\)"):
        load(served(monkeypatch, (train, test)))
    assert load(served(monkeypatch, (train, test, test))).held_out.size == 10


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        ({"batch_sampler": [[0, 1, 2], [3, 4, 5]]}, "come from a batch_sampler"),
        ({"batch_size": None}, r"are made by its Dataset \(batch_size=None\)"),
    ],
)
def test_no_held_out_samples_are_split_off_batches_that_are_made_elsewhere(monkeypatch, loader, reason):
    train = DataLoader(TensorDataset(ROWS, torch.arange(30) % 3), **loader)
    test = DataLoader(TensorDataset(ROWS, torch.arange(30) % 3), batch_size=5)
    with pytest.raises(JpqError, match=rf"train part of .* {reason}, so jpq cannot split.*Return \(train, held_out"):
        load(served(monkeypatch, (train, test)))


@pytest.mark.parametrize("indexed", [True, False])
def test_a_limit_holds_for_loaders(monkeypatch, indexed):
    y = torch.arange(30) % 3
    loader = DataLoader(TensorDataset(ROWS, y), batch_size=3, shuffle=True)
    value = (loader, loader) if indexed else ([*loader], loader, loader)
    data = load(served(monkeypatch, value), limit=10)
    assert data.train.size + data.held_out.size * indexed == (10 if indexed else 9), "one sample is no batch"
    first, second = (torch.cat([x for x, _ in data.train.epoch(epoch)])[:, 0].sort().values for epoch in (0, 1))
    assert torch.equal(first, second)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_limit_leaves_no_batch_of_one_training_sample(lazy):
    pairs = TensorDataset(ROWS, torch.arange(30) % 3)
    loader = DataLoader(pairs, batch_size=4)
    split = batches(loader if lazy else [*loader], training=True).first(9)
    assert [len(y) for _, y in split] == [4, 4]
    assert (split.size, len(split)) == (8, 2)
    assert [len(y) for _, y in split.first(1)] == [1], "a single batch stays"


def test_other_names_of_the_held_out_part_and_names_of_classes(monkeypatch):
    loader = DataLoader(TensorDataset(ROWS, torch.arange(30) % 3), batch_size=5)
    assert load(served(monkeypatch, {"train": loader, "val": loader, "test": loader})).held_out.size == 30
    with pytest.raises(JpqError, match="names 2 classes"):
        load(served(monkeypatch, {"train": loader, "test": loader, "class_names": ["a", "b"]}))


class Uneven(Dataset):
    """Samples of two shapes."""

    def __len__(self):
        return 8

    def __getitem__(self, number):
        return torch.rand(3 + number % 2), 0


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_cannot_be_stacked_are_refused_in_one_sentence(monkeypatch, workers):
    loader = DataLoader(Uneven(), batch_size=4, num_workers=workers)
    with pytest.raises(JpqError, match=r"samples of different shapes in one batch \(.*\[3\].*\[4\].*\)\. Bring them"):
        load(served(monkeypatch, {"train": loader, "held_out": FINE, "test": FINE}))


def boxed(*boxes):
    objects = [{"boxes": torch.tensor([box]), "labels": torch.tensor([1])} for box in boxes]
    return [(torch.rand(len(boxes), 3, 20, 30), objects)]


INSIDE = boxed([2.0, 2.0, 40.0, 19.0], [0.0, 0.0, 9.0, 9.0])


@pytest.mark.parametrize("part", ["train", "held_out", "test"])
@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([31.0, 2.0, 40.0, 9.0], r"a box \(31, 2, 40, 9\) outside of its image of 20 x 30 pixels"),
        ([2.0, 20.0, 9.0, 29.0], r"outside of its image"),
        ([-9.0, 2.0, -1.0, 9.0], r"outside of its image"),
        ([0.1, 0.1, 0.5, 0.9], r"end at 0.9 at most, which look like shares of the image of 20 x 30 pixels"),
    ],
)
def test_boxes_outside_of_their_images_are_refused(monkeypatch, part, box, words):
    parts = {"train": INSIDE, "held_out": INSIDE, "test": INSIDE, "classes": 2}
    data = load(served(monkeypatch, parts))
    assert [len(y) for _, y in data.train] == [2]
    for batches_of_part in (boxed(box, box), [*INSIDE, *boxed(box, box)]):
        with pytest.raises(JpqError, match=f"The {part.replace('_', '-')} part of .*{words}"):
            list(getattr(load(served(monkeypatch, {**parts, part: batches_of_part})), part))


class Own(AnyTask):
    """A task of the user's own with class numbers."""

    name, metric_name = "own", "score"

    def loss(self, output, target):
        return torch.nn.functional.cross_entropy(output, target)

    def metric(self, output, target):
        return (output.argmax(1) == target).float()


@pytest.mark.parametrize(("targets", "outputs"), [(torch.arange(30) % 4, 4), (ROWS[:, 0], 1), (ROWS[:, :2], 2)])
def test_class_numbers_of_an_own_task_are_counted(monkeypatch, targets, outputs):
    loader = DataLoader(TensorDataset(ROWS, targets), batch_size=7)
    name = served(monkeypatch, {"train": loader, "held_out": loader, "test": loader})
    monkeypatch.setattr(sys.modules["served"], "Own", Own, raising=False)
    assert load(name, task="served:Own").classes == outputs


class Rowwise(Own):
    """A loss that is no mean."""

    def loss(self, output, target):
        return torch.nn.functional.cross_entropy(output, target, reduction="none")


class Unmeasured(AnyTask):
    """A task without a metric."""

    name, metric_name, sample_name = "unmeasured", "score", "patch"

    def loss(self, output, target):
        return Own().loss(output, target)


def shifted(images):
    """Pairs of an image and its target; targets are the images themselves."""
    return DataLoader(TensorDataset(images, images), batch_size=7)


IMAGES = torch.rand(14, 3, 8, 8)
NUMBERS = torch.arange(30) % 4


@pytest.mark.parametrize(
    ("test", "task", "words"),
    [
        ([(IMAGES[:7], IMAGES[:7, :, :7])], "", "^The test part of 'served:data': Task 'restoration' reads images"),
        ([(IMAGES[:7], torch.rand(7, 3, 8, 7))], "", "^The test part of .* \\[2, 3, 8, 7\\]"),
    ],
)
def test_targets_of_any_part_are_compared_with_the_outputs_before_training(monkeypatch, tmp_path, test, task, words):
    name = served(monkeypatch, {"train": shifted(IMAGES), "held_out": shifted(IMAGES), "test": test})
    monkeypatch.setattr(sys.modules["served"], "net", lambda: torch.nn.Conv2d(3, 3, 3, padding=1), raising=False)
    config = Config(task=Task(data=name, model="served:net", task=task), run=Run(out=tmp_path))
    with pytest.raises(JpqError, match=words):
        load_dense_model(config, read_data(config, CPU), CPU)


def test_a_loss_that_is_no_single_number_is_refused_before_training(monkeypatch, tmp_path):
    loader = DataLoader(TensorDataset(ROWS, NUMBERS), batch_size=7)
    name = served(monkeypatch, {"train": loader, "held_out": loader, "test": loader})
    monkeypatch.setattr(sys.modules["served"], "Rowwise", Rowwise, raising=False)
    monkeypatch.setattr(sys.modules["served"], "net", lambda: torch.nn.Linear(ROWS.shape[1], 4), raising=False)
    config = Config(task=Task(data=name, model="served:net", task="served:Rowwise"), run=Run(out=tmp_path))
    with pytest.raises(JpqError, match=r"The loss of task 'own' is \[2\]; it must be one number"):
        load_dense_model(config, read_data(config, CPU), CPU)


def test_a_task_without_a_metric_is_refused_in_a_sentence():
    with pytest.raises(JpqError, match="Task 'unmeasured' has no metric: give its class metric"):
        Unmeasured().evaluate(lambda x: x, [(torch.rand(4, 2), torch.zeros(4))])


@pytest.mark.parametrize(
    ("inputs", "name"), [(ROWS[:30], "sample"), (torch.rand(30, 2, 5), "sequence"), (torch.rand(30, 1, 4, 4), "image")]
)
def test_samples_of_one_s_own_data_are_called_by_their_form_or_as_the_task_says(monkeypatch, inputs, name):
    loader = DataLoader(TensorDataset(inputs, NUMBERS), batch_size=7)
    data = load(served(monkeypatch, {"train": loader, "held_out": loader, "test": loader}))
    assert (data.sample_name, replace(data, task=Own()).sample_name) == (name, name)
    assert replace(data, task=Unmeasured()).sample_names == "patches"


def test_the_plural_of_samples():
    assert (Unmeasured().sample_names, Own().sample_names) == ("patches", "images")


class Photos(Dataset):
    """Pictures with a class each: as rows of Hugging Face's `datasets`, or as keywords of its models."""

    def __init__(self, as_rows: bool, modes: tuple[str, ...] = ("RGB",)):
        self.as_rows, self.modes = as_rows, modes

    def __len__(self):
        return 20

    def __getitem__(self, n):
        picture = Image.new("RGB", (6, 5), (9 * n, 40, 200)).convert(self.modes[n % len(self.modes)])
        return {"image": picture, "label": n % 2} if self.as_rows else ({"pixel_values": picture}, n % 2)


def test_pictures_within_dicts_are_read_and_rows_that_are_no_pairs_refused(monkeypatch):
    data = load(served(monkeypatch, (Photos(as_rows=False), Photos(as_rows=False))))
    assert data.example["pixel_values"].shape[1:] == (3, 5, 6)
    with pytest.raises(JpqError, match=r"gives batches that are a dict \(image, label\); each must be a pair"):
        load(served(monkeypatch, (Photos(as_rows=True), Photos(as_rows=True))))


class Mixed(Photos):
    def __getitem__(self, n):
        (inputs, label) = super().__getitem__(n)
        return inputs["pixel_values"], label


def test_grey_pictures_among_colour_ones_become_colour_ones(monkeypatch):
    split = Mixed(as_rows=False, modes=("RGB", "L"))
    assert load(served(monkeypatch, (split, split))).shape == (3, 5, 6)


class OwnDraws:
    """Batches of an iterable whose `generator` is no generator of torch."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __iter__(self):
        return iter([(torch.from_numpy(self.generator.random((4, 3), np.float32)), torch.arange(4))])


def test_a_generator_of_another_library_is_left_to_its_loader():
    loader = OwnDraws()
    assert len(batches(loader)) == 1
    assert isinstance(loader.generator, np.random.Generator)
