"""Splits, order and augmentation of jpq.tasks.data."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jpq.tasks.data import PREPROCESSING, Augment, Batches, load, stratified
from jpq.types import JpqError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data with the real data sets is absent")


def moved(image: Tensor, pad: int, row: int, column: int, mirrored: int) -> Tensor:
    """The oracle: one image on a larger black one, a window of it, pixel by pixel mirrored."""
    channels, height, width = image.shape
    black = torch.zeros(channels, height + 2 * pad, width + 2 * pad, dtype=image.dtype)
    black[:, pad : pad + height, pad : pad + width] = image
    window = black[:, row : row + height, column : column + width]
    return torch.stack([window[:, :, width - 1 - x] for x in range(width)], 2) if mirrored else window


def batches(n: int = 10, **options) -> Batches:
    images = torch.arange(n * 3 * 4 * 5, dtype=torch.int64).remainder(251).to(torch.uint8).view(n, 3, 4, 5)
    settings = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "batch_size": 4} | options
    return Batches(images, torch.arange(n), **settings)


def same(one: Batches, two: Batches, epochs: tuple[int, int] = (0, 0)) -> bool:
    pairs = zip(one.epoch(epochs[0]), two.epoch(epochs[1]), strict=True)
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


@given(st.integers(0, 4), st.booleans(), st.integers(1, 7), st.integers(1, 3), st.integers(0, 2**31), st.booleans())
def test_augmentation_is_the_reference_applied_to_each_image(pad, flip, height, channels, seed, whole):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (6, channels, height, 5), generator=generator)
    images = images.to(torch.uint8) if whole else images.float()
    moves = Augment(pad, flip).draw(6, generator)
    expected = torch.stack([moved(image, pad, *move) for image, move in zip(images, moves.tolist(), strict=True)])
    assert torch.equal(Augment(pad, flip).apply(images, moves), expected)


def test_every_move_is_drawn_about_equally_often():
    moves = Augment(pad=2, flip=True).draw(50_000, torch.Generator().manual_seed(0))
    assert moves.max(0).values.tolist() == [4, 4, 1]
    # 50 cells of 1,000 expected draws: a standard deviation of 31
    counts = (moves[:, 0] * 10 + moves[:, 1] * 2 + moves[:, 2]).bincount(minlength=50)
    assert counts.min() > 850
    assert counts.max() < 1150


def test_an_epoch_depends_on_seed_and_epoch_alone():
    options = {"augment": Augment(1, True), "shuffle": True}
    one, two = batches(**options), batches(**options)
    list(one.epoch(0)), list(one.epoch(7))
    torch.manual_seed(99)
    assert same(one, two, (3, 3))
    assert not same(one, two, (3, 4))
    assert not same(one, batches(**options, seed=1))


def test_training_batches_are_the_oracle_in_the_drawn_order():
    split = batches(8, augment=Augment(2, True), shuffle=True, seed=5)
    generator = torch.Generator().manual_seed(5 * 1_000_003 + 2)
    order = torch.randperm(8, generator=generator)
    moves = Augment(2, True).draw(8, generator).tolist()
    images = [moved(split.images[i], 2, *move) for i, move in zip(order.tolist(), moves, strict=True)]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (split.mean, split.std))
    got = list(split.epoch(2))
    assert torch.equal(torch.cat([y for _, y in got]), order)
    torch.testing.assert_close(torch.cat([x for x, _ in got]), (torch.stack(images) / 255 - mean) / std)


@pytest.mark.parametrize(
    ("n", "size", "training", "evaluation"),
    [(9, 4, [4, 4], [4, 4, 1]), (10, 4, [4, 4, 2], [4, 4, 2]), (3, 8, [3], [3])],
)
def test_only_training_drops_and_only_a_single_left_over_sample(n, size, training, evaluation):
    for shuffle, expected in ((True, training), (False, evaluation)):
        split = batches(n, batch_size=size, shuffle=shuffle)
        assert [len(y) for _, y in split] == expected
        assert len(split) == len(expected)
        assert split.size == n


def test_evaluation_keeps_the_order_and_the_pixels():
    split = batches()
    x, y = (torch.cat(parts) for parts in zip(*split, strict=True))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (split.mean, split.std))
    assert y.tolist() == list(range(10))
    torch.testing.assert_close(x, (split.images / 255 - mean) / std)
    assert x.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_an_accelerator_are_those_of_the_cpu():
    options = {"augment": Augment(2, True), "shuffle": True}
    one, two = batches(**options), batches(**options)
    two = Batches(two.images.cuda(), two.labels.cuda(), mean=two.mean, std=two.std, batch_size=4, **options)
    for (x, y), (u, v) in zip(one.epoch(1), two.epoch(1), strict=True):
        assert u.is_cuda
        torch.testing.assert_close(u.cpu(), x)
        assert torch.equal(v.cpu(), y)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 3))
def test_stratified_takes_exactly_that_many_and_of_each_class_its_share(labels, share, seed):
    target = torch.tensor(labels)
    count = round(share * len(labels))
    mask = stratified(target, count, seed)
    assert int(mask.sum()) == count
    for label in set(labels):
        assert abs(int(mask[target == label].sum()) - labels.count(label) * count / len(labels)) <= 1
    assert torch.equal(mask, stratified(target, count, seed))


def rows(split: Batches) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def test_digits_splits():
    data = load("digits")
    sizes = [data.train.size, data.held_out.size, data.test.size]
    assert sizes == [1213, 135, 449]
    assert sum(sizes) == 1797
    assert (data.classes, data.shape, data.example.shape) == (10, (1, 8, 8), (2, 1, 8, 8))
    parts = [rows(split) for split in (data.train, data.held_out, data.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797  # no two digits are alike, none is in two splits
    for split in (data.train, data.held_out, data.test):
        share = split.labels.bincount(minlength=10) / split.size
        assert (share - 0.1).abs().max() < 0.012
    x, _ = next(iter(data.test))
    assert x.min() == 0
    assert x.max() == 1


def test_the_seed_moves_the_held_out_samples_and_never_the_test():
    one, two, again = load("digits", seed=0), load("digits", seed=1), load("digits", seed=0)
    assert torch.equal(one.test.images, two.test.images)
    assert rows(one.held_out) != rows(two.held_out)
    assert one.checksum == again.checksum != two.checksum
    assert same(one.train, again.train)
    assert load("digits", held_out=0.25, seed=0).held_out.size == 337


def test_limit_keeps_that_many_training_samples_of_every_class():
    data = load("digits", limit=100)
    assert data.train.size + data.held_out.size == 100
    assert data.test.size == 449
    counts = torch.cat([data.train.labels, data.held_out.labels]).bincount(minlength=10)
    assert counts.min() >= 9
    assert counts.max() <= 11


def test_without_augmentation_only_the_order_changes():
    data = load("digits", augment=False)
    x = torch.cat([x for x, _ in data.train.epoch(0)])
    assert {image.numpy().tobytes() for image in x} <= rows(data.train)
    assert data.train.augment is None
    assert load("digits").held_out.augment is None


@needs_files
def test_fashion_mnist_is_read_from_the_files_as_published():
    data = load("fashion-mnist", SHARED)
    assert [data.train.size, data.held_out.size, data.test.size] == [54_000, 6_000, 10_000]
    assert data.train.labels.bincount().tolist() == [5_400] * 10
    assert data.held_out.labels.bincount().tolist() == [600] * 10
    images = torch.cat([data.train.images, data.held_out.images]).float() / 255
    # the usual constants, from 60,000 training images
    assert images.mean().item() == pytest.approx(PREPROCESSING["fashion-mnist"].mean[0], abs=1e-4)
    assert images.std().item() == pytest.approx(PREPROCESSING["fashion-mnist"].std[0], abs=1e-4)
    assert data.test.labels[:5].tolist() == [9, 2, 1, 1, 6]  # the test set's well-known first five


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cifar")
    subprocess.run([sys.executable, SHARED / "unpack.py", root], check=True, capture_output=True)
    return root


@pytest.mark.slow
@needs_files
def test_cifar10_and_the_time_of_its_augmentation(cifar: Path):
    data = load("cifar10", cifar)
    assert [data.train.size, data.held_out.size, data.test.size] == [45_000, 5_000, 10_000]
    assert data.held_out.labels.bincount().tolist() == [500] * 10
    assert (data.shape, data.train.mean) == ((3, 32, 32), (0.485, 0.456, 0.406))
    assert not rows(data.held_out) & rows(data.train)
    start = time.perf_counter()
    seen = sum(len(y) for _, y in data.train.epoch(0))
    # 5 us measured on one core; an epoch of ResNet20 takes some 3,000 us an image, of which this is 2 %
    assert (time.perf_counter() - start) / seen < 60e-6


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("cifar", {}, "Unknown data set 'cifar'. Did you mean cifar10"),
        ("folder:", {}, "Unknown data set 'folder:'. Did you mean folder:PATH"),
        ("digits", {"held_out": 0.0}, "held-out share is 0.0"),
        ("digits", {"held_out": 1.0}, "held-out share is 1.0"),
        ("digits", {"held_out": 0.9999}, "too small: 0 training"),
        ("digits", {"limit": 0}, "limit is 0"),
        ("digits", {"batch_size": 0}, "batch size is 0"),
    ],
)
def test_bad_requests(name, options, match):
    with pytest.raises(JpqError, match=match):
        load(name, **options)
