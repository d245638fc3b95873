"""Where samples come from, and every bad input of jpq.tasks.datasets: absent files, folders, the user's code."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from PIL import Image

from jpq.tasks.data import load
from jpq.types import JpqError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data with the real data sets is absent")


def refuse(*_, **__):
    raise URLError("no route to host")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_no_files_and_no_network_is_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(JpqError, match=f"'{name}' is not in the folder '{tmp_path}'.*data_root"):
        load(name, tmp_path)


@needs_files
def test_damaged_files_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    shutil.copytree(SHARED / "FashionMNIST", tmp_path / "FashionMNIST")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.chmod(0o755)
    packed = raw / "train-images-idx3-ubyte.gz"
    packed.chmod(0o644)
    packed.write_bytes(packed.read_bytes()[:1000])
    with pytest.raises(JpqError, match="data_root"):
        load("fashion-mnist", tmp_path)
    for file in list(raw.iterdir()):
        (raw / file.name.removesuffix(".gz")).write_bytes(b"nothing")
    with pytest.raises(JpqError, match="damaged"):
        load("fashion-mnist", tmp_path)


def paint(root: Path, names: str, mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> None:
    for number, name in enumerate(names.split()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, number * 7 % 256 if mode != "RGB" else (number * 7 % 256, 1, 2)).save(root / name)


def two_classes(part: str, n: int) -> str:
    return " ".join(f"{part}/{label}/{i}.png" for label in ("cat", "dog") for i in range(n))


def test_a_folder_with_a_test_part(tmp_path):
    paint(tmp_path, two_classes("train", 10) + " " + two_classes("test", 3))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    data = load(f"folder:{tmp_path}")
    assert [data.train.size, data.held_out.size, data.test.size] == [18, 2, 6]
    assert (data.classes, data.shape) == (2, (3, 4, 6))
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.images.dtype == torch.uint8
    assert data.test.images[0, :, 0, 0].tolist() == [20 * 7, 1, 2]


def test_a_folder_with_val_only_and_one_with_both(tmp_path):
    paint(tmp_path, two_classes("train", 10) + " " + two_classes("val", 3), mode="L")
    data = load(f"folder:{tmp_path}")
    assert [data.train.size, data.held_out.size, data.test.size] == [18, 2, 6]
    assert data.shape == (1, 4, 6)
    paint(tmp_path, two_classes("test", 4), mode="L")
    data = load(f"folder:{tmp_path}")
    assert [data.train.size, data.held_out.size, data.test.size] == [20, 6, 8]


def test_a_folder_without_a_test_part_is_split_the_same_way_whatever_the_seed(tmp_path):
    paint(tmp_path, two_classes("train", 20))
    one, two = load(f"folder:{tmp_path}", seed=0), load(f"folder:{tmp_path}", seed=1)
    assert [one.train.size, one.held_out.size, one.test.size] == [27, 3, 10]
    assert torch.equal(one.test.images, two.test.images)
    assert one.test.labels.bincount().tolist() == [5, 5]


def test_bad_folders_say_what_and_where(tmp_path):
    def fails(match: str) -> None:
        with pytest.raises(JpqError, match=match):
            load(f"folder:{tmp_path}")

    fails("holds no class folders")
    (tmp_path / "train").mkdir()
    fails("holds no class folders")
    (tmp_path / "train" / "cat").mkdir()
    fails("class folder '.*cat' holds no image")
    paint(tmp_path, two_classes("train", 1))
    fails("too small: 1 training, 1 held-out and 0 test")
    paint(tmp_path, two_classes("train", 9))
    paint(tmp_path, "train/dog/wide.png", size=(7, 4))
    fails("wide.png' is 7x4 but '.*0.png' is 6x4.*image_size=224.*resize")
    (tmp_path / "train/dog/wide.png").write_bytes(b"\x89PNG nothing")
    fails("1 of 19 images cannot be read: '.*wide.png' .*skip_bad")
    (tmp_path / "train/dog/wide.png").unlink()
    paint(tmp_path, "test/bird/0.png")
    fails("Class 'bird' of '.*test' has no folder under '.*train'")


USER = """
import torch
from jpq.tasks.data import load as _load
from torch.utils.data import TensorDataset
x, y = torch.rand(40, 3, 4, 4), torch.arange(40) % 4
def ready(): return _load("digits", limit=50)
def pair(): return (x, y), (x[:8], y[:8])
def bytes_pair(): return ((x * 255).byte().numpy(), y.numpy()), ((x[:8] * 255).byte(), y[:8])
def triple(): return TensorDataset(x, y), TensorDataset(x[:6], y[:6]), TensorDataset(x[:8], y[:8])
def lone(): return x, y
def nothing(): return None
def dicts(): return ({"x": x, "y": y},) * 2
def text(): return "train", "test"
def flat(): return ((x.flatten(1), y),) * 2
def fractions(): return (x, y + 0.5), (x, y)
def short(): return (x, y[:5]), (x, y)
def negative(): return (x, y - 1), (x, y)
def nan(): return (x / 0 * 0, y), (x, y)
def other(): return (x, y), (x[:, :1], y)
def more(): return (x, y), (x, y + 1)
def longs(): return (y.view(40, 1, 1, 1), y), (x, y)
def empty(): return TensorDataset(x[:0], y[:0]), TensorDataset(x, y)
def wants(path): return pair()
value = 3
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"user_data_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(USER)
    (tmp_path / f"broken_{name}.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    return name


def test_user_code_gives_data_or_pairs_or_datasets(user):
    before = list(sys.path)
    assert load(f"{user}:ready").name == "digits"
    data = load(f"{user}:pair")
    assert [data.train.size, data.held_out.size, data.test.size] == [36, 4, 8]
    assert (data.classes, data.shape, data.train.augment) == (4, (3, 4, 4), None)
    x, y = next(iter(data.test))
    assert torch.equal(x, data.test.images)  # floats are left as they come
    assert y.tolist() == [0, 1, 2, 3] * 2
    assert next(iter(load(f"{user}:bytes_pair").test))[0].max() <= 1
    data = load(f"{user}:triple")
    assert [data.train.size, data.held_out.size, data.test.size] == [40, 6, 8]
    flat = load(f"{user}:flat")  # rows of numbers are no images: they are batched as they are
    assert (flat.task.name, flat.classes, flat.shape, flat.train.size) == ("classification", 4, (48,), 36)
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("lone", r"returned \(Tensor, Tensor\); it must return"),
        ("nothing", "returned NoneType"),
        ("dicts", r"train part of .* is a dict \(x, y\); it must be a pair"),
        ("text", "train part of .* samples are not pairs"),
        ("fractions", "label 0.5, which is no whole number.*task regression"),
        ("short", r"y \[5\]"),
        ("negative", "label -1; labels count from 0"),
        ("nan", "NaN or infinity"),
        ("other", "another shape"),
        ("more", "label 4; training labels end at 3"),
        ("longs", "x of torch.int64"),
        ("empty", "train part of .* is empty"),
        ("wants", "cannot be called: missing a required argument: 'path'"),
        ("value", "is a int; the data needs a function"),
        ("pear", "Unknown callable .*Did you mean pair"),
        ("", "must be written as module:callable"),
    ],
)
def test_bad_user_data_says_what_and_where(user, name, match):
    with pytest.raises(JpqError, match=match):
        load(f"{user}:{name}")


def test_user_modules_that_do_not_import(user):
    with pytest.raises(JpqError, match=r"Could not import 'no_such_module_'.*Run from the folder"):
        load("no_such_module_:make")
    with pytest.raises(JpqError, match="ZeroDivisionError"):
        load(f"broken_{user}:make")


def test_a_dataset_of_pictures_is_read_into_bytes(monkeypatch, tmp_path):
    (tmp_path / "pictures_data.py").write_text(
        "from PIL import Image\n"
        "part = [(Image.new('RGB', (5, 4), (i, 0, 9)), i % 2) for i in range(12)]\n"
        "class Listed:\n"
        "    def __len__(self): return len(part)\n"
        "    def __getitem__(self, i): return part[i]\n"
        "def make(): return Listed(), Listed()\n"
    )
    monkeypatch.chdir(tmp_path)
    data = load("pictures_data:make")
    assert data.test.images.dtype == torch.uint8
    assert data.test.images[:, 0, 0, 0].tolist() == list(range(12))
