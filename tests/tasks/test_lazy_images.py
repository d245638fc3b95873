"""Images in memory, in a file of decoded bytes, and decoded for each batch: the same batches, lazily."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jpq.tasks import lazy_images
from jpq.tasks.data import load
from jpq.tasks.lazy_images import LazyImages, choose_cache, open_images
from jpq.types import JpqError

CACHES = ("memory", "disk", "none")


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")


@pytest.fixture
def photos(tmp_path) -> Path:
    """24 photographs of three classes, of many sizes, some turned by their EXIF data, some grey."""
    draw = np.random.default_rng(0)
    for n in range(24):
        height, width = draw.integers(20, 40, 2)
        image = Image.fromarray(draw.integers(0, 255, (height, width, 3)).astype(np.uint8))
        image = image.convert("L") if n % 5 == 0 else image
        exif = Image.Exif()
        exif[0x0112] = 6 if n % 4 == 0 else 1
        place = tmp_path / "photos" / f"class{n % 3}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{n}.jpg", exif=exif)
    return tmp_path / "photos"


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.jpg"))


def test_batches_are_the_same_whichever_cache(photos):
    sets = [load(f"folder:{photos}", image_size=(16, 18), cache=cache, batch_size=5) for cache in CACHES]
    for epoch in (0, 3):
        for batches in zip(*(data.train.epoch(epoch) for data in sets), strict=True):
            assert all(torch.equal(x, batches[0][0]) and torch.equal(y, batches[0][1]) for x, y in batches)
    for batches in zip(*(data.test for data in sets), strict=True):
        assert all(torch.equal(x, batches[0][0]) for x, _ in batches)
    assert all(torch.equal(data.example, sets[0].example) for data in sets)
    halves = [torch.cat([x for x, _ in data.train.halves()[0]]) for data in sets]
    assert all(torch.equal(half, halves[0]) for half in halves)


def test_a_file_is_decoded_when_a_batch_asks_for_it(photos, monkeypatch):
    decoded = []
    plain = lazy_images.image_bytes
    monkeypatch.setattr(lazy_images, "image_bytes", lambda image, size: decoded.append(1) or plain(image, size))
    images = open_images(files_of(photos), (16,), cache="none")
    assert isinstance(images.pixels, LazyImages)
    assert not decoded
    assert images.pixels.index_select(0, torch.tensor([3, 7])).shape == (2, 3, 16, 16)
    assert len(decoded) == 2


def test_the_disk_cache_is_filled_once_and_anew_for_changed_files(photos, tmp_path, monkeypatch):
    decoded = []
    plain = lazy_images.image_bytes
    monkeypatch.setattr(lazy_images, "image_bytes", lambda image, size: decoded.append(1) or plain(image, size))
    first = open_images(files_of(photos), (16,), cache="disk")
    assert len(decoded) == 24
    again = open_images(files_of(photos), (16,), cache="disk")
    assert len(decoded) == 24
    rows = torch.tensor([5, 0])
    assert torch.equal(first.pixels.index_select(0, rows), again.pixels.index_select(0, rows))
    (stored,) = (tmp_path / "home" / ".cache" / "jpq" / "images").glob("*.npy")
    assert 24 * 3 * 16 * 16 <= stored.stat().st_size <= 24 * 3 * 16 * 16 + 4096
    shutil.copy(files_of(photos)[0], files_of(photos)[1])
    open_images(files_of(photos), (16,), cache="disk")
    assert len(decoded) == 48


def test_runs_that_begin_together_fill_the_disk_cache_once(photos, monkeypatch):
    decoded = []
    plain = lazy_images.image_bytes

    def slowly(image, size):
        time.sleep(0.005)
        decoded.append(1)
        return plain(image, size)

    monkeypatch.setattr(lazy_images, "image_bytes", slowly)
    with ThreadPoolExecutor(2) as runs:
        columns = list(runs.map(lambda _: open_images(files_of(photos), (16,), cache="disk").pixels, range(2)))
    assert len(decoded) == 24
    rows = torch.arange(24)
    assert torch.equal(*(column.index_select(0, rows) for column in columns))


def test_images_beyond_memory_go_to_the_disk_and_beyond_that_nowhere(photos, monkeypatch):
    files = files_of(photos)
    assert choose_cache(files, (16,)) == "memory"
    monkeypatch.setattr(lazy_images, "free_memory", lambda: 24 * 3 * 16 * 16)  # a quarter of it is too little
    assert choose_cache(files, (16,)) == "disk"
    monkeypatch.setattr(lazy_images.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    assert choose_cache(files, (16,)) == "none"


@pytest.mark.parametrize("cache", CACHES)
def test_all_bad_files_are_listed_or_left_out(photos, cache):
    for file in files_of(photos)[:2]:
        file.write_bytes(b"no image")
    with pytest.raises(JpqError, match="2 of 24 images cannot be read"):
        open_images(files_of(photos), (16,), cache=cache)
    images = open_images(files_of(photos), (16,), True, cache)
    assert len(images.read) == 22
    assert "left out" in images.note


@pytest.mark.parametrize("cache", CACHES)
def test_a_file_that_ends_early(photos, cache):
    damaged = files_of(photos)[4]
    damaged.write_bytes(damaged.read_bytes()[:-200])
    with pytest.raises(JpqError, match=damaged.name):
        open_images(files_of(photos), (16,), cache=cache).pixels.index_select(0, torch.arange(24))


@pytest.mark.parametrize("cache", CACHES)
def test_different_sizes_need_an_image_size(photos, cache):
    with pytest.raises(JpqError, match=r"image.size"):
        open_images(files_of(photos), cache=cache)


def test_memory_stays_flat_without_a_cache(tmp_path):
    """100 images of 3 x 64 x 64 take 1.2 MB decoded; a batch of 4 takes 0.05 MB."""
    import tracemalloc

    image = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    for n in range(100):
        place = tmp_path / "flat" / f"c{n % 2}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{n}.png")
    data = load(f"folder:{tmp_path / 'flat'}", cache="none", batch_size=4)
    held = [leaf for leaf in vars(data.train).values() if isinstance(leaf, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in held) < 10_000
    tracemalloc.start()
    for _ in data.train:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 600_000
