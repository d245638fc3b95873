"""Readers of masks, images to be restored, texts, tables and series, on tiny files that are written here."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from jpq.cli.evaluate import describe_metric
from jpq.config import Config, Task
from jpq.results.finish import data_record
from jpq.tasks.batches import MaskAugment
from jpq.tasks.data import load
from jpq.tasks.folder_parts import list_folders
from jpq.tasks.load import read_data
from jpq.tasks.readers.hf_dataset import _text_rows
from jpq.tasks.readers.restoration import Degradation
from jpq.tasks.readers.text import _label_order, build_vocabulary, encode, split_words
from jpq.types import JpqError


def save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def camvid(folder: Path, parts=("train", "val", "test"), void: int = 7, size=(12, 16)) -> dict[str, list]:
    """Images whose red is 10 times the class of their pixel, with masks beside each part."""
    draw = np.random.default_rng(0)
    masks = {}
    for part in parts:
        masks[part] = [draw.integers(0, 4, size).astype(np.uint8) for _ in range(6)]
        for n, mask in enumerate(masks[part]):
            mask[0, 0] = void
            save(np.stack([mask * 10, mask, mask], 2).astype(np.uint8), folder / part / f"{n}.png")
            save(mask, folder / f"{part}_labels" / f"{n}.png")
    return masks


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_masks_are_those_of_the_files_and_void_is_255(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    masks = camvid(tmp_path / "data")
    data = load(f"folder:{tmp_path / 'data'}", void=7, cache=cache, batch_size=4)
    assert (data.task.name, data.classes, data.shape) == ("segmentation", 4, (3, 12, 16))
    assert (data.train.size, data.held_out.size, data.test.size) == (6, 6, 6)
    expected = torch.from_numpy(np.stack(masks["test"])).long()
    expected[expected == 7] = 255
    assert torch.equal(torch.cat([y for _, y in data.test]), expected)
    reds = torch.cat([x for x, _ in data.test])[:, 0] * 0.229 + 0.485
    inside = expected != 255
    torch.testing.assert_close(reds[inside] * 255, 10.0 * expected[inside], atol=1e-3, rtol=0)


def test_cached_masks_are_those_of_their_void_class(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    masks = camvid(tmp_path / "data")
    checksums = set()
    for void in (7, 0):  # the files of the cache were those of the first void class
        data = load(f"folder:{tmp_path / 'data'}", void=void, cache="disk")
        expected = torch.from_numpy(np.stack(masks["test"])).long()
        expected[expected == void] = 255
        assert torch.equal(torch.cat([y for _, y in data.test]), expected)
        checksums.add(data.checksum)
    assert len(checksums) == 2


def test_masks_move_with_their_images(tmp_path):
    camvid(tmp_path)
    data = load(f"folder:{tmp_path}", void=7, crop=(8, 10))
    for x, y in data.train.epoch(3):
        assert y.shape[1:] == (8, 10)
        reds = (x[:, 0] * 0.229 + 0.485) * 255
        inside = y != 255
        torch.testing.assert_close(reds[inside], 10.0 * y[inside], atol=1e-3, rtol=0)
        assert {0, 1, 2, 3} <= set(y.unique().tolist()) <= {0, 1, 2, 3, 255}
    moved = MaskAugment(2, True, 255)
    images = torch.ones(50, 1, 6, 6)
    moves = moved.draw(50, torch.Generator().manual_seed(0))
    x, y = moved.apply_pair(images, torch.zeros(50, 6, 6, dtype=torch.int64), moves)
    assert torch.equal(y == 255, x[:, 0] == 0)  # outside of the image is void


def test_two_folders_without_parts_are_split(tmp_path):
    camvid(tmp_path / "source", parts=("train",))
    (tmp_path / "data").mkdir()
    (tmp_path / "source" / "train").rename(tmp_path / "data" / "images")
    (tmp_path / "source" / "train_labels").rename(tmp_path / "data" / "masks")
    data = load(f"folder:{tmp_path / 'data'}", void=7, held_out=0.25)
    assert (data.train.size, data.held_out.size, data.test.size) == (3, 1, 2)


def two_classes(folder: Path, second: str = "masks") -> None:
    """Photos, which have many colours, in folders called as images and their masks are."""
    draw = np.random.default_rng(2)
    for name in ("images", second):
        for n in range(12):
            save(draw.integers(0, 256, (12, 16, 3)).astype(np.uint8), folder / name / f"{n}.png")


@pytest.mark.parametrize("second", ["masks", "labels"])
def test_classes_called_images_and_masks_are_classes_and_the_run_says_why(tmp_path, second):
    two_classes(tmp_path, second)  # of the same names
    data = load(f"folder:{tmp_path}")
    assert (data.task.name, data.class_names) == ("classification", ("images", second))
    assert "has more than 64 different values, as masks do not. --task segmentation" in data.notes[-1]
    with pytest.raises(JpqError, match="RGB image"):
        load(f"folder:{tmp_path}", task="segmentation")
    for n, file in enumerate(sorted((tmp_path / second).iterdir())):
        save(np.full((12, 16), n % 2, np.uint8), file.with_name(f"other{n}.png"))
        file.unlink()
    data = load(f"folder:{tmp_path}", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert data.task.name == "classification"
    assert "12 of 12 images in" in data.notes[-1]


def test_images_with_masks_are_told_from_classes_by_their_files_unless_the_task_says_it(tmp_path):
    camvid(tmp_path / "source", parts=("train",))
    for part, name in (("train", "images"), ("train_labels", "masks")):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "source" / part).rename(tmp_path / "data" / name)
    data = load(f"folder:{tmp_path / 'data'}", void=7)
    assert data.task.name == "segmentation"
    assert data.notes[-1].endswith("--task classification reads the two folders as classes.")
    assert load(f"folder:{tmp_path / 'data'}", task="classification", mean=(0.5,) * 3, std=(0.5,) * 3).class_names == (
        "images",
        "masks",
    )
    (tmp_path / "data" / "masks" / "0.png").unlink()  # most still have their mask: one that lacks it is an error
    with pytest.raises(JpqError, match="1 of 6 images have no file of the same name"):
        load(f"folder:{tmp_path / 'data'}", void=7)


def wrong_masks(folder: Path, kind: str) -> None:
    camvid(folder)
    file = folder / "test_labels" / "3.png"
    if kind == "size":
        save(np.zeros((5, 5), np.uint8), file)
    elif kind == "class":
        save(np.full((12, 16), 9, np.uint8), file)
    elif kind == "colour":
        save(np.zeros((12, 16, 3), np.uint8), file)
    elif kind == "damaged":
        file.write_bytes(b"no image")
        (folder / "test_labels" / "4.png").write_bytes(b"no image")
    else:
        file.unlink()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("size", "is 5x5 and its image"),
        ("class", "class 9; training masks end at 3"),
        ("colour", "RGB image"),
        ("damaged", "2 of 6 masks cannot be read"),
        ("missing", "1 of 6 images have no file"),
    ],
)
def test_bad_masks_are_refused_in_one_sentence(tmp_path, kind, words):
    wrong_masks(tmp_path, kind)
    with pytest.raises(JpqError, match=words):
        load(f"folder:{tmp_path}", void=7)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_masks_of_photos_that_exif_turns_are_as_large_as_the_upright_photo(tmp_path, cache):
    masks = camvid(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees to be upright
    for file in (tmp_path / "test").iterdir():
        with Image.open(file) as image:
            image.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    data = load(f"folder:{tmp_path}", void=7, cache=cache)
    (x, y), *_ = data.test
    assert torch.equal(y[1, 1:], torch.from_numpy(masks["test"][1]).long()[1:])
    reds = (x[:, 0] * 0.229 + 0.485) * 255
    torch.testing.assert_close(reds[y != 255], 10.0 * y[y != 255], atol=1e-3, rtol=0)
    save(masks["test"][0].T.copy(), tmp_path / "test_labels" / "0.png")  # as the photo's pixels are stored
    with pytest.raises(JpqError, match=r"is 12x16 and its image '.*0.png' 16x12 once its EXIF orientation.* upright"):
        load(f"folder:{tmp_path}", void=7, cache=cache, image_size=(8,))


def photos(folder: Path, sizes=((20, 24),) * 8, part: str = "", colour: bool = False) -> None:
    draw = np.random.default_rng(1)
    for n, size in enumerate(sizes):
        smooth = draw.integers(0, 200, (3, 3, 3) if colour else (3, 3)).astype(np.uint8)
        image = Image.fromarray(smooth).resize(size[::-1], Image.Resampling.BICUBIC)
        (folder / part).mkdir(parents=True, exist_ok=True)
        image.save(folder / part / f"{n}.png")


def test_noise_is_new_in_each_epoch_and_fixed_in_evaluation(tmp_path):
    photos(tmp_path)
    one, two = (load(f"folder:{tmp_path}", noise=25.0, crop=(10,), seed=seed) for seed in (0, 0))
    assert data_facts(one) == ("restoration", 1, (1, 20, 24))
    (x, y), (u, v) = next(iter(one.train.epoch(2))), next(iter(two.train.epoch(2)))
    assert torch.equal(x, u)
    assert torch.equal(y, v)
    assert not torch.equal(x, next(iter(one.train.epoch(3)))[0])
    assert abs(float((x - y).std()) * 255 - 25) < 1.5
    other = load(f"folder:{tmp_path}", noise=25.0, crop=(10,), seed=5)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one.test, other.test, strict=True))
    assert one.train.size == 5 * (20 * 24 // 100)  # of 8 images 2 are tested and 1 is held out


def data_facts(data) -> tuple:
    return data.task.name, data.classes, data.shape


def test_crops_are_windows_of_the_images(tmp_path):
    photos(tmp_path)
    data = load(f"folder:{tmp_path}", scale=2, crop=(8,), augment=False)
    whole = [target.float() / 255 for _, target in data.train.images.entries]
    windows = torch.cat([image.unfold(1, 8, 1).unfold(2, 8, 1).reshape(-1, 8, 8) for image in whole])
    _, y = next(iter(data.train.epoch(1)))
    apart = torch.cdist(y.flatten(1), windows.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    assert apart.amin(1).max() == 0


def test_smaller_inputs_are_bicubic_and_antialiased(tmp_path):
    photos(tmp_path, colour=True)
    data = load(f"folder:{tmp_path}", scale=2)
    x, y = next(iter(data.test))
    assert (x.shape[1:], y.shape[1:], data.shape) == ((3, 10, 12), (3, 20, 24), (3, 10, 12))
    image = Image.fromarray((y[0] * 255).round().byte().permute(1, 2, 0).numpy())
    expected = np.asarray(image.resize((12, 10), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(x[0].permute(1, 2, 0).numpy() * 255 - expected).max() <= 1.01  # Pillow rounds between the two passes


def test_degradation_without_noise_or_scale_is_the_image():
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(Degradation().apply(x, []), x)


def test_facts_of_the_users_own_change_no_other_record(tmp_path):
    for n in range(8):
        save(np.full((4, 4), n, np.uint8), tmp_path / "ab"[n % 2] / f"{n}.png")
    data = load(f"folder:{tmp_path}")
    record = data_record(replace(data, about={"test": "of 2019", "task": "wafers", "mean": [0.5], "camera": "left"}))
    assert (record["test"], record["mean"], record["camera"]) == (data.test.size, [0.5], "left")
    assert "task" not in record


class WindowsFolder(PureWindowsPath):
    def is_dir(self):
        return True


def test_classes_have_the_same_order_on_every_system():
    entries = [WindowsFolder(name) for name in ("banana", "Cat", "apple")]
    folders = list_folders(SimpleNamespace(iterdir=lambda: iter(entries)))
    assert [folder.name for folder in folders] == ["Cat", "apple", "banana"]


def test_noise_is_added_on_the_device_of_the_images():
    clean = torch.empty(2, 1, 4, 4, device="meta")  # as on an accelerator, sums with tensors of the CPU are errors
    assert Degradation(noise=25.0).apply(clean, [torch.Generator()] * 2).device == clean.device


def test_bad_images_to_be_restored_are_left_out_with_a_note(tmp_path):
    photos(tmp_path, ((10, 12),) * 6, "input")
    photos(tmp_path, ((20, 24),) * 6, "target")
    for bad in ("input/0.png", "target/0.png", "target/1.png"):
        (tmp_path / bad).write_bytes(b"no image")
    with pytest.raises(JpqError, match="3 of 12 images cannot be read"):
        load(f"folder:{tmp_path}", task="restoration", crop=(8,))
    data = load(f"folder:{tmp_path}", task="restoration", crop=(8,), skip_bad=True)
    assert sum(len(split.images) for split in (data.train, data.held_out, data.test)) == 4
    assert "3 of 12 images cannot be read and are left out" in data.notes[0]
    for file in (tmp_path / "input").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(JpqError, match="None of 8 images can be read"):
        load(f"folder:{tmp_path}", task="restoration", crop=(8,), skip_bad=True)


def test_with_image_size_images_of_different_sizes_are_cut_to_the_common_one(tmp_path):
    photos(tmp_path, part="train")
    photos(tmp_path, ((30, 30), (26, 40)), "test")
    data = load(f"folder:{tmp_path}", noise=10.0, image_size=(40,))
    assert [tuple(x.shape[1:]) for x, _ in data.test] == [(1, 26, 30)]
    assert [tuple(x.shape[1:]) for x, _ in data.held_out] == [(1, 20, 24)]
    assert data.notes == ("2 of 2 test images are cut to 26 x 30 around their centre.",)


def test_pairs_of_images_are_read_from_two_folders(tmp_path):
    photos(tmp_path, ((10, 12),) * 6, "input")
    photos(tmp_path, ((20, 24),) * 6, "target")
    data = load(f"folder:{tmp_path}", task="restoration", crop=(8,))
    x, y = next(iter(data.train))
    assert (x.shape[1:], y.shape[1:]) == ((1, 4, 4), (1, 8, 8))
    assert data.about["scale"] == 2


def test_two_folders_of_one_name_each_are_classes_and_the_run_says_how_to_restore(tmp_path):
    photos(tmp_path, ((10, 12),) * 6, "input")
    photos(tmp_path, ((10, 12),) * 6, "target")
    data = load(f"folder:{tmp_path}")
    assert (data.task.name, data.class_names) == ("classification", ("input", "target"))
    assert "have the same names. --task restoration reads them as pairs" in data.notes[-1]
    assert not load(f"folder:{tmp_path}", task="classification").notes
    for file in (tmp_path / "target").iterdir():
        file.rename(file.with_name(f"other_{file.name}"))
    assert not load(f"folder:{tmp_path}").notes


@pytest.mark.parametrize(
    ("names", "task"), [(("images", "masks"), "segmentation"), (("input", "target"), "restoration")]
)
def test_photos_in_two_folders_inside_of_parts_are_classes_and_the_run_says_how_they_are_pairs(tmp_path, names, task):
    for part in ("train", "test"):
        for name in names:
            photos(tmp_path, ((10, 12),) * 6, f"{part}/{name}")
    data = load(f"folder:{tmp_path}")
    assert (data.task.name, data.class_names) == ("classification", names)
    assert f"--task {task} reads " in data.notes[-1]
    for part in ("train", "test"):
        for file in (tmp_path / part / names[1]).iterdir():
            file.rename(file.with_name(f"other_{file.name}"))
    assert load(f"folder:{tmp_path}").task.name == "classification"


def test_pairs_in_two_folders_inside_of_parts(tmp_path):
    for part, count in (("train", 6), ("test", 3)):
        photos(tmp_path, ((10, 12),) * count, f"{part}/input")
        photos(tmp_path, ((20, 24),) * count, f"{part}/target")
        photos(tmp_path / "marked", ((10, 12),) * count, f"{part}/images")
        (tmp_path / "marked" / part / "masks").mkdir()
        for file in (tmp_path / "marked" / part / "images").iterdir():
            mask = (np.asarray(Image.open(file)) > 127).astype(np.uint8)
            Image.fromarray(mask).save(tmp_path / "marked" / part / "masks" / f"{file.stem}.png")
    x, y = next(iter(load(f"folder:{tmp_path}", task="restoration", crop=(8,)).test))
    assert (x.shape, y.shape) == ((3, 1, 10, 12), (3, 1, 20, 24))
    data = load(f"folder:{tmp_path / 'marked'}")
    assert (data.task.name, data.classes, data.test.size) == ("segmentation", 2, 3)
    assert "few values each. --task classification reads the two folders as classes." in data.notes[-1]
    x, y = next(iter(data.test))
    grey = np.stack([np.asarray(Image.open(f)) for f in sorted((tmp_path / "marked" / "test" / "images").iterdir())])
    assert np.array_equal(y.numpy(), grey > 127)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "restoration"}, "noise.*25 or .*scale.*2"),
        ({"noise": 25.0, "crop": (64,)}, "larger than the smallest"),
        ({"scale": 2, "crop": (9,)}, "no multiple"),
    ],
)
def test_bad_settings_of_restoration(tmp_path, options, words):
    photos(tmp_path)
    with pytest.raises(JpqError, match=words):
        load(f"folder:{tmp_path}", **options)


def texts(folder: Path, **parts: str) -> str:
    folder.mkdir(exist_ok=True)
    for part, content in parts.items():
        (folder / f"{part}.tsv").write_text(content, encoding="utf-8")
    return f"text:{folder}"


TRAIN = "a good film , good\t1\nbad , so bad\t0\n" * 6


def test_texts_are_numbered_by_the_words_of_training(tmp_path):
    data = load(texts(tmp_path / "t", train=TRAIN, dev=TRAIN, test="good unseen film\t1\n"))
    vocabulary = data.about["vocabulary"]
    assert vocabulary == ["<padding>", "<unknown>", ",", "bad", "good", "a", "film", "so"]
    assert data_facts(data) == ("text-classification", 2, (5,))
    assert data.arguments == {"vocabulary": 8, "length": 5}
    x, y = next(iter(data.test))
    assert x.tolist() == [[4, 1, 6, 0, 0]]
    assert y.tolist() == [1]
    assert x.dtype == torch.int64


def test_classes_of_texts_are_in_one_order_whatever_the_order_of_sets():
    labels = ["10", "b", "1", "01", "2", "001", "a"]
    for turn in range(len(labels)):
        turned = labels[turn:] + labels[:turn]
        assert sorted(turned, key=_label_order) == ["001", "01", "1", "2", "10", "a", "b"]


def test_classes_of_texts_that_are_equal_as_numbers_are_one(tmp_path):
    train = "good film\t1\nfine film\t1.0\nbad film\t0\n" * 4
    data = load(texts(tmp_path / "t", train=train, test="good\t1.00\nbad\t0.0\n"))
    assert (data.classes, data.class_names) == (2, ("0", "1"))
    assert torch.cat([y for _, y in data.test]).tolist() == [1, 0]


def test_texts_without_a_word_are_noted(tmp_path):
    rows = "good film\t1\nbad film\t0\n \t1\n"
    data = load(texts(tmp_path / "x", train=rows * 4, test=rows))
    assert [note.split(" of '")[0] for note in data.notes] == ["4 of 12 texts", "1 of 3 texts"]
    assert "have no word; the model sees padding alone" in data.notes[0]
    assert not load(texts(tmp_path / "y", train=TRAIN)).notes


def test_words_and_vocabularies():
    assert split_words("It's GOOD, naïve!") == ["it", "'", "s", "good", ",", "naïve", "!"]
    assert build_vocabulary(["b a a", "c b"]) == ("<padding>", "<unknown>", "a", "b")
    assert build_vocabulary(["b a"]) == ("<padding>", "<unknown>", "a", "b")  # all occur once
    assert encode(["a b a"], ("<padding>", "<unknown>", "a"), 2).tolist() == [[2, 1]]


def test_models_of_transformers_get_a_mask(tmp_path):
    data = load(texts(tmp_path / "t", train=TRAIN), attention_mask=True)
    x, _ = next(iter(data.train))
    assert set(x) == {"input_ids", "attention_mask"}
    assert torch.equal(x["attention_mask"], (x["input_ids"] != 0).long())
    assert set(data.example) == set(x)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"train": "no tab here\n"}, "Line 1 of .* has no tab"),
        ({"train": ""}, "is empty"),
        ({"test": TRAIN}, "no train.tsv"),
        ({"train": TRAIN, "test": "fine\t5\n"}, "class '5'"),
        ({"train": "a\tb\tc\n"}, "name the two"),
        ({"train": "good\t\nbad\t0\n"}, "line 1 of .* has no class"),
        ({"train": TRAIN + "\na\tb\t1\n"}, "line 14 of .* has 3 columns, and the first row 2"),
        (
            {"train": "".join(f"{n % 2}\ttext {n}\n" for n in range(30))},
            "30 classes in 30 rows; the class seems to come",
        ),
        ({"train": "\t1\n\t0\n" * 6}, "no word in any text, so there is no vocabulary"),
        ({"train": "good film\t1\n" * 8}, "are of one class"),
        ({"train": "text\tlabel\n" + TRAIN, "test": TRAIN}, "Add the same header"),
    ],
)
def test_bad_texts_are_refused_in_one_sentence(tmp_path, parts, words):
    with pytest.raises(JpqError, match=words):
        load(texts(tmp_path / "t", **parts))


def quoted(file: Path, content: str) -> str:
    """A text: of a .csv file with this content."""
    file.write_bytes(content.encode())
    return f"text:{file}"


def test_quoted_texts_hold_separators_and_line_ends(tmp_path):
    rows = '"one\ntwo, three",good\r\n"he said ""no""",bad\r\n' * 6
    data = load(quoted(tmp_path / "t.csv", "tweet,label\r\n" + rows))  # the one name that is known tells the other
    assert data.class_names == ("bad", "good")
    assert set(data.about["vocabulary"]) >= {"one", "two", "three", "no", '"'}
    again = load(quoted(tmp_path / "s.csv", "text;label\n" + "a, b;1\nc;0\n" * 6))
    assert again.class_names == ("0", "1")
    long = load(quoted(tmp_path / "l.csv", f'text,label\n"{"word " * 40_000}",1\n' + "b,0\n" * 9))
    assert long.arguments["length"] == 64


def test_line_ends_of_other_alphabets_are_no_line_ends(tmp_path):
    data = load(texts(tmp_path / "t", train="one\u2028two\x0c three\t1\nfour\t0\n" * 6))
    assert data.train.size + data.held_out.size + data.test.size == 12


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('text,label\n"good,1\nbad,0\n', "row that begins on line 2 of .* is wrongly quoted"),
        ("text,label\n" + "good, really,1\n" * 9, "line 2 of .* has 3 columns, and the first row 2"),
        ('text,label\n"a\nb",1\nc,\n', "line 4 of .* has no class"),
    ],
)
def test_badly_quoted_texts_are_refused_in_one_sentence(tmp_path, content, words):
    with pytest.raises(JpqError, match=words):
        load(quoted(tmp_path / "t.csv", content))


def table(file: Path, rows: list[list[object]]) -> str:
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows(rows)
    return f"table:{file}"


def house_rows(count: int = 60) -> list[list[object]]:
    draw = np.random.default_rng(0)
    sizes = draw.uniform(50, 200, count)
    towns = draw.choice(["here", "there"], count)
    rooms = draw.integers(1, 4, count)
    prices = 3 * sizes + 100 * (towns == "here")
    return [["size", "town", "price", "rooms"], *map(list, zip(sizes, towns, prices, rooms, strict=True))]


def test_tables_are_standardised_by_their_training_part(tmp_path):
    data = load(table(tmp_path / "t.csv", house_rows()), target_column="price", held_out=0.1)
    assert data_facts(data) == ("regression", 1, (4,))
    assert data.about["columns"] == ["size", "town=here", "town=there", "rooms"]
    inputs = torch.cat([*(x for x, _ in data.train), *(x for x, _ in data.held_out)])
    torch.testing.assert_close(inputs.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std(0, correction=0), torch.ones(4), atol=1e-5, rtol=0)
    raw, y = data.test.images, torch.cat([y for _, y in data.test])[:, 0]
    price = y * data.about["target_std"] + data.about["target_mean"]
    torch.testing.assert_close(price, 3 * raw[:, 0] + 100 * raw[:, 1], atol=1e-2, rtol=0)


def test_classes_of_a_table_are_its_few_whole_numbers_or_texts(tmp_path):
    name = table(tmp_path / "t.csv", house_rows())
    assert load(name, target_column="rooms").class_names == ("1", "2", "3")
    assert load(name, target_column="town").class_names == ("here", "there")
    assert load(name, target_column="rooms", task="regression").task.name == "regression"


def test_classes_of_a_table_that_are_equal_as_numbers_are_one(tmp_path):
    rows = [["x", "y"], *[[n, ("1", "1.0", "2")[n % 3]] for n in range(30)]]
    (tmp_path / "t").mkdir()
    table(tmp_path / "t" / "train.csv", rows)
    table(tmp_path / "t" / "test.csv", [["x", "y"], [1, "1.00"], [2, "2.0"]])
    data = load(f"table:{tmp_path / 't'}", target_column="y")
    assert (data.task.name, data.classes, data.class_names) == ("classification", 2, ("1", "2"))
    assert torch.cat([y for _, y in data.test]).tolist() == [0, 1]
    table(tmp_path / "t" / "test.csv", [["x", "y"], [1, "1.5"]])
    with pytest.raises(JpqError, match=r"has the class '1\.5'"):
        load(f"table:{tmp_path / 't'}", target_column="y")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_tables_of_other_separators(tmp_path, separator):
    file = tmp_path / "t.csv"
    file.write_text("\n".join(separator.join(map(str, row)) for row in house_rows()))
    assert load(f"table:{file}", target_column="price").about["columns"][0] == "size"


@pytest.mark.parametrize(("name", "classes"), [("diabetes", 1), ("iris", 3), ("wine", 3), ("breast_cancer", 2)])
def test_bundled_tables(name, classes):
    data = load(f"sklearn:{name}")
    assert data.classes == classes
    assert len(data.about["columns"]) == data.shape[0]
    assert data.task.name == ("regression" if name == "diabetes" else "classification")


def changed(row: int, column: int, value: object) -> list[list[object]]:
    rows = house_rows()
    rows[row][column] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "target", "words"),
    [
        (house_rows(), "", "target.*rooms \\(size"),
        (house_rows(), "prize", "price"),
        (changed(3, 0, ""), "price", "Row 4 .* no value in column 'size'"),
        (changed(3, 0, "nan"), "price", "Row 4"),
        (changed(3, 0, "inf"), "price", "Column 'size' of .* holds numbers, and 'inf' in row 3"),
        (changed(3, 0, "1e40"), "price", "'1e40' in row 3"),
        (changed(3, 2, "unknown"), "price", "Column 'price' of .* holds numbers, and 'unknown'"),
        ([row if n == 0 else [*row[:2], 5, row[3]] for n, row in enumerate(house_rows())], "price", "'5' in every row"),
        (changed(0, 0, "price"), "price", "two columns of one name"),
        (house_rows()[:1], "price", "no rows"),
        ([*house_rows(), [1, 2]], "price", "Row 62 .* has 2 values"),
        ([["name", "y"], *([f"n{i}", 1.5 * i] for i in range(60))], "y", "60 different texts"),
        (changed(3, 2, "7,5"), "price", "Column 'price' of .* holds numbers, and '7,5'"),
        ([["x", "y"], *([i, f"{i},5"] for i in range(60))], "y", "Column 'y' of .* holds decimal commas, as '0,5'"),
        ([["x", "y"], *([f"{i % 9},5", i] for i in range(60))], "y", "Column 'x' of .* holds decimal commas"),
    ],
)
def test_bad_tables_are_refused_in_one_sentence(tmp_path, rows, target, words):
    with pytest.raises(JpqError, match=words):
        load(table(tmp_path / "t.csv", rows), target_column=target)


@pytest.mark.parametrize(
    ("value", "task", "words"),
    [
        (lambda i: 1.5 * i, "classification", "holds 60 different numbers in 60 rows, .* --task regression"),
        (lambda i: 3 * i, "classification", "holds 60 different numbers in 60 rows, .* --task regression"),
        (lambda i: i % 30 + 0.5, "classification", "holds 30 different numbers"),
        (lambda i: f"person {i}", "", "holds 60 different texts in 60 rows, too many to be classes. Name another"),
    ],
)
def test_targets_of_hardly_a_row_each_are_no_classes(tmp_path, value, task, words):
    path = table(tmp_path / "t.csv", [["x", "y"], *([i % 7, value(i)] for i in range(60))])
    with pytest.raises(JpqError) as caught:
        load(path, target_column="y", task=task)
    assert re.search(words, caught.value.command_line)


def test_many_classes_of_some_rows_each_are_classes(tmp_path):
    path = table(tmp_path / "t.csv", [["x", "y"], *([i % 7, i % 30] for i in range(60))])
    assert load(path, target_column="y", task="classification").classes == 30


def test_real_targets_are_no_classes():
    config = Config(task=Task(data="sklearn:diabetes", task="classification"))
    with pytest.raises(JpqError, match=r"'classification' reads class numbers.* are torch.float32"):
        read_data(config, torch.device("cpu"))


def test_the_error_of_a_table_is_given_in_the_unit_of_its_target(tmp_path):
    data = load(table(tmp_path / "t.csv", house_rows()), target_column="price")
    sentence = describe_metric(data, "test", [torch.zeros(len(y), 1) for _, y in data.test])
    figures = re.search(r"RMSE (\S+) standard deviations, (\S+) in the target's unit", sentence).groups()
    share, error = map(float, figures)
    assert error == pytest.approx(share * data.about["target_std"], rel=1e-3)


def test_samples_are_called_by_what_the_data_hold(tmp_path):
    """Rows of tables, windows of series and texts, whatever their task; the record of a run names them too."""
    np.savez(tmp_path / "s.npz", x=np.random.default_rng(0).normal(0, 1, (40, 2, 9)), y=np.arange(40) % 2)
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"word {i},{'ab'[i % 2]}\n" for i in range(40)))
    names = {
        table(tmp_path / "h.csv", house_rows()): "row",
        "sklearn:wine": "row",
        f"series:{tmp_path / 's.npz'}": "window",
        f"text:{tmp_path / 't.csv'}": "text",
        "digits": "image",
    }
    found = {name: load(name, target_column="town" if name.startswith("table") else "") for name in names}
    assert {name: data.sample_name for name, data in found.items()} == names
    assert {name: data_record(data)["sample"] for name, data in found.items()} == names
    wine = found["sklearn:wine"]
    sentence = describe_metric(wine, "test", [torch.eye(3)[y] for _, y in wine.test])
    assert sentence == f"100.00 % of {wine.test.size} test rows of sklearn:wine are right"


def test_california_is_not_bundled():
    with pytest.raises(JpqError, match="needs no network"):
        load("sklearn:california_housing")


def test_series_are_windows_standardised_by_channel(tmp_path):
    draw = np.random.default_rng(0)
    x = draw.normal(3, 2, (40, 2, 9)).astype(np.float32)
    y = np.array(["up", "down"])[draw.integers(0, 2, 40)]
    np.savez(tmp_path / "s.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    data = load(f"series:{tmp_path / 's.npz'}")
    assert data_facts(data) == ("sequence-classification", 2, (2, 9))
    assert data.class_names == ("down", "up")
    torch.testing.assert_close(data.train.mean, tuple(x.mean((0, 2)).tolist()), atol=1e-4, rtol=1e-4)
    got = torch.cat([x for x, _ in data.test])
    scaled = (x[:10] - x.mean((0, 2), keepdims=True)) / x.std((0, 2), keepdims=True)
    torch.testing.assert_close(got, torch.from_numpy(scaled), atol=1e-4, rtol=1e-4)


def test_series_of_the_ucr_archive(tmp_path):
    lines = "".join(f"{n % 2 + 1}\t{math.sin(n)}\t{n}\t1.0\n" for n in range(20))
    (tmp_path / "Toy_TRAIN.tsv").write_text(lines)
    (tmp_path / "Toy_TEST.tsv").write_text(lines)
    data = load(f"series:{tmp_path}")
    assert data_facts(data) == ("sequence-classification", 2, (1, 3))
    assert torch.cat([y for _, y in data.test]).tolist() == [0, 1] * 10


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": np.zeros(3)}, "it must hold x and y"),
        ({"x": np.zeros((4, 2, 3, 3)), "y": np.zeros(4)}, "numbers \\[N, C, T\\]"),
        ({"x": np.full((4, 3), np.nan), "y": np.zeros(4)}, "NaN"),
        ({"x": np.zeros((4, 3)), "y": np.zeros(3)}, "y must be|and y"),
        ({"x": np.zeros((4, 3)), "y": np.zeros(())}, r"y of train in .* is float64 \[\]"),
        ({"x": np.zeros((4, 3)), "y": np.full(4, np.nan)}, "y of train in .* holds NaN"),
        ({"x": np.zeros((4, 3)), "y": np.eye(4)}, "one-hot rows"),
        ({"x": np.zeros((9, 3)), "y": np.zeros(9)}, "are of one class"),
        ({"x": np.zeros((9, 2, 0)), "y": np.arange(9) % 2}, r"x \[9, 2, 0\], which holds nothing"),
    ],
)
def test_bad_series_are_refused_in_one_sentence(tmp_path, arrays, words):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(JpqError, match=words):
        load(f"series:{tmp_path / 's.npz'}")


def test_files_that_are_no_archives_of_numbers_are_refused_with_the_way_to_write_one(tmp_path):
    way = "it with numpy.savez(FILE, x_train=x, y_train=y, x_test=..., y_test=...)."
    np.savez(tmp_path / "cut.npz", x=np.zeros((20, 3)), y=np.arange(20) % 2)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:300])
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "objects.npz", x=np.array([1, "a", None], dtype=object), y=np.arange(3))
    objects = "holds an array of Python objects. Give all a type of numbers (x.astype(numpy.float32)), and save"
    for name, reason in (
        ("cut", "is no .npz file, or only a part of one. Write"),
        ("text", "is no .npz file, or only a part of one. Write"),
        ("objects", objects),
    ):
        file = tmp_path / f"{name}.npz"
        with pytest.raises(JpqError) as error:
            load(f"series:{file}")
        assert str(error.value) == f"'{file}' {reason} {way}"


def test_folders_of_series_in_another_format_say_how_to_save_them(tmp_path):
    with pytest.raises(JpqError, match="Put the training part there"):
        load(f"series:{tmp_path}")
    (tmp_path / "waves.npz").write_bytes(b"")
    with pytest.raises(JpqError, match=r"Name the file instead, as series:.*waves\.npz\.$"):
        load(f"series:{tmp_path}")
    (tmp_path / "Wave_TRAIN.ts").write_text("@data")
    with pytest.raises(JpqError, match=r"'Wave_TRAIN\.ts' is of a format that is not read: .* numpy\.savez\(FILE"):
        load(f"series:{tmp_path}")


@pytest.mark.parametrize(
    ("train", "test", "task", "words"),
    [
        (np.array(["a", "b"] * 10), np.array(["a", "b"] * 10), "regression", "has texts as y, as 'a', and regression"),
        (np.zeros((20, 2)) + 0.5, np.zeros((20, 3)) + 0.5, "", r"test part of .* has y \[20, 3\], and training 2 a"),
        (np.arange(20) % 2, np.zeros((20, 2)), "", r"test part of .* has y \[20, 2\], and training 1 a"),
    ],
)
def test_targets_of_series_that_do_not_fit_are_refused_in_one_sentence(tmp_path, train, test, task, words):
    x = np.random.default_rng(0).random((20, 2, 5))
    np.savez(tmp_path / "s.npz", x_train=x, y_train=train, x_test=x, y_test=test)
    with pytest.raises(JpqError, match=words):
        load(f"series:{tmp_path / 's.npz'}", task=task)


def test_targets_of_series_in_other_shapes(tmp_path):
    x, y = np.random.default_rng(0).random((20, 2, 5)), np.arange(20) % 2
    np.savez(tmp_path / "column.npz", x=x, y=y[:, None])  # as Keras has them
    np.savez(tmp_path / "several.npz", x=x, y=x.mean(2))
    assert load(f"series:{tmp_path / 'column.npz'}").class_names == ("0", "1")
    np.savez(tmp_path / "mixed.npz", x_train=x, y_train=y, x_test=x, y_test=1.0 * y[:, None])
    assert torch.cat([y for _, y in load(f"series:{tmp_path / 'mixed.npz'}").test]).tolist() == [0, 1] * 10
    several = load(f"series:{tmp_path / 'several.npz'}")
    assert (several.task.name, several.classes) == ("regression", 2)


@pytest.mark.parametrize(("label", "words"), [("1.a", ""), ("caf\xe9", "no text in UTF-8")])
def test_names_of_classes_in_lines_of_series(tmp_path, label, words):
    (tmp_path / "train.csv").write_bytes(f"{label},0.5,0.6\n2.b,0.1,0.2\n".encode("latin-1") * 8)
    if not words:
        assert load(f"series:{tmp_path}").class_names == ("1.a", "2.b")
        return
    with pytest.raises(JpqError, match=words):
        load(f"series:{tmp_path}")


def coco(folder: Path, parts=("train", "test"), **changes: object) -> str:
    """Three images a part, of 20 x 40, with a box each; the category ids are 7 (cat) and 3 (dog)."""
    for part in parts:
        annotations = [
            {"image_id": n, "category_id": 7 if n % 2 else 3, "bbox": [10, 5, 10, 10], "iscrowd": 0} for n in range(3)
        ]
        annotations.append({"image_id": 0, "category_id": 3, "bbox": [0, 0, 5, 5], "iscrowd": 1})
        record = {
            "images": [{"id": n, "file_name": f"{n}.png"} for n in range(3)],
            "annotations": annotations,
            "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        }
        if part == "train":
            record |= changes
        for n in range(3):
            save(np.full((20, 40, 3), 10 * n, np.uint8), folder / part / f"{n}.png")
        (folder / part / "_annotations.coco.json").write_text(json.dumps(record))
    return f"coco:{folder}"


def test_boxes_are_corners_and_move_with_their_images(tmp_path):
    name = coco(tmp_path)
    (_, targets) = next(iter(load(name).test))
    assert [target["boxes"].tolist() for target in targets] == [[[10, 5, 20, 15]]] * 3
    assert [target["labels"].tolist() for target in targets] == [[1], [2], [1]]  # ids 3 and 7 in order
    x, targets = next(iter(load(name, image_size=(20,)).test))
    assert x.shape == (3, 3, 20, 20)  # the middle of 20 x 40
    assert targets[0]["boxes"].tolist() == [[0, 5, 10, 15]]


def test_boxes_end_at_the_edges_of_their_images(tmp_path):
    boxes = [[30, 10, 50, 50], [100, 100, 5, 5], [3, 4, 0.5, 0.5]]
    annotations = [{"image_id": 0, "category_id": 3, "bbox": box} for box in boxes]
    (_, targets) = next(iter(load(coco(tmp_path, annotations=annotations)).train))
    found = [target["boxes"].tolist() for target in targets if len(target["boxes"])]
    assert found in ([], [[[30, 10, 40, 20], [3, 4, 3.5, 4.5]]])  # the image may be the held-out one


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"annotations": [{"image_id": 0, "category_id": 3, "bbox": [0, float("nan"), 5, 5]}]}, "NaN or infinity"),
        ({"annotations": [{"image_id": 0, "category_id": 3, "bbox": [0.1, 0.2, 0.5, 0.5]}]}, "look like shares of the"),
        (
            {"annotations": [{"image_id": 0, "category_id": 3, "bbox": [90, 90, 5, 5]}]},
            "All boxes in .* lie outside of their images",
        ),
        ({"annotations": []}, "train/_annotations.coco.json' has no box"),
        ({"categories": [{"id": 3, "name": "dog"}, {"id": 3, "name": "cat"}]}, "lists category 3 twice"),
        (
            {"categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]},
            "calls category 3 'dog', and the training",
        ),
        ({"images": [{"id": 0, "file_name": "0.png"}, {"id": 0, "file_name": "1.png"}]}, "image 0 twice"),
        ({"categories": []}, "names no categories"),
        ({"annotations": [{"image_id": 9, "category_id": 3, "bbox": [0, 0, 1, 1]}]}, "image 9"),
        ({"annotations": [{"image_id": 0, "category_id": 5, "bbox": [0, 0, 1, 1]}]}, "category 5"),
        ({"annotations": [{"image_id": 0, "category_id": 3, "bbox": [0, 0]}]}, "not of COCO's form"),
        ({"images": [{"id": 0, "file_name": "lost.png"}], "annotations": []}, "1 are not there"),
        ({"images": 3}, "no annotation file of COCO's form"),
    ],
)
def test_bad_annotations_are_refused_in_one_sentence(tmp_path, changes, words):
    with pytest.raises(JpqError, match=words):
        load(coco(tmp_path, **changes))


def test_data_sets_of_hugging_face_are_read_from_the_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    labels = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": labels})
    rows = {"sentence": ["a good film", "so bad"] * 10, "label": [1, 0] * 10}
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "d"))
    data = load(f"hf-dataset:{tmp_path / 'd'}")
    assert data_facts(data) == ("text-classification", 2, (3,))
    assert data.class_names == ("no", "yes")


class Split:
    """What the reader uses of a split of `datasets`; `numpy` says in which form samples are given."""

    def __init__(self, columns, names=(), numpy=False):
        self.columns, self.numpy, self.column_names = columns, numpy, list(columns)
        self.features = {name: SimpleNamespace(names=list(names) or None) for name in columns}
        self.names = names

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        sample = {name: values[key] for name, values in self.columns.items()}
        for value in sample.values():
            if isinstance(value, Exception):
                raise value
        return {name: np.asarray(value) for name, value in sample.items()} if self.numpy else sample

    def select_columns(self, names):
        return Split({name: self.columns[name] for name in names}, self.names, self.numpy)

    def with_format(self, form):
        return Split(self.columns, self.names, form == "numpy")


def load_splits(monkeypatch, splits, **options):
    """The data of splits that `datasets` would read from the disk."""
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_from_disk=lambda folder: splits))
    return load("hf-dataset:photos", **options)


def pictures(count, modes=("RGB",), labels=None, names=("cat", "dog", "eel"), numpy=False, label="label"):
    images = [Image.new("RGB", (6, 5), (9 * n, 40, 200)).convert(modes[n % len(modes)]) for n in range(count)]
    return Split({"image": images, label: labels or [n % 3 for n in range(count)]}, names, numpy)


@pytest.mark.parametrize("modes", [("RGB", "L"), ("RGBA", "LA", "P")], ids=str)
def test_grey_images_among_colour_ones_of_hugging_face_are_read_as_colour(monkeypatch, modes):
    data = load_splits(monkeypatch, {"train": pictures(24, modes), "test": pictures(6)})
    assert data.shape == (3, 5, 6)
    data = load_splits(monkeypatch, {"train": pictures(24, ("L",)), "test": pictures(6)})
    assert data.shape == (3, 5, 6)
    assert load_splits(monkeypatch, {"train": pictures(24, ("L",)), "test": pictures(6, ("LA",))}).shape == (1, 5, 6)


def test_pictures_of_hugging_face_saved_in_the_format_of_numpy_keep_their_channels_first(monkeypatch):
    plain, saved = (
        load_splits(monkeypatch, {"train": pictures(24, numpy=numpy), "test": pictures(6, numpy=numpy)})
        for numpy in (False, True)
    )
    assert saved.shape == (3, 5, 6)
    assert saved.checksum == plain.checksum


def test_bytes_of_hugging_face_with_channels_last_are_refused(monkeypatch):
    last = Split({"image": [np.zeros((8, 9, 3), np.uint8)] * 9, "label": [0, 1, 2] * 3})
    with pytest.raises(JpqError, match=r"looks like \[N, H, W, C\]"):
        load_splits(monkeypatch, {"train": last})


def test_classes_of_hugging_face_keep_their_numbers_and_a_note_names_those_without_samples(monkeypatch):
    data = load_splits(monkeypatch, {"train": pictures(24, labels=[0, 2] * 12), "test": pictures(6)})
    assert (data.classes, data.class_names) == (3, ("cat", "dog", "eel"))
    assert "1 of 3 classes have no training image (1): the last class is 2." in data.notes
    texts = Split({"text": ["so fine", "so dull"] * 12, "labels": [0, 2] * 12}, ("world", "sport", "arts"))
    data = load_splits(monkeypatch, {"train": texts})
    assert data.class_names == ("world", "sport", "arts")
    assert set(data.test.labels.tolist()) == {0, 2}
    assert any("1 of 3 classes have no training text (1)" in note for note in data.notes)


def test_images_of_hugging_face_that_cannot_be_decoded_are_listed_or_left_out(monkeypatch):
    split = pictures(24)
    split.columns["image"][3] = OSError("cannot identify image file <_io.BytesIO object at 0x7f>")
    split.columns["image"][5] = None
    says = r"2 of 24 images cannot be read: sample 3 \(cannot identify image file\), sample 5 \(None\)"
    with pytest.raises(JpqError, match=says):
        load_splits(monkeypatch, {"train": split, "test": pictures(6)})
    data = load_splits(monkeypatch, {"train": split, "test": pictures(6)}, skip_bad=True)
    assert data.train.size + data.held_out.size == 22
    assert any("2 of 24 images cannot be read and are left out" in note for note in data.notes)


@pytest.mark.parametrize(
    ("test", "says"),
    [
        (pictures(6, labels=[-1] * 6), r"no class \(-1\) for sample 0"),
        (pictures(6, label="target"), "no column 'label', as training has: it has image, target"),
        (pictures(6, names=("dog", "cat", "eel")), "numbers its classes dog, cat, eel, and training cat, dog, eel"),
        (pictures(0), "test split of 'photos' has no samples"),
    ],
)
def test_splits_of_hugging_face_that_do_not_fit_training_are_refused(monkeypatch, test, says):
    with pytest.raises(JpqError, match=says):
        load_splits(monkeypatch, {"train": pictures(24), "test": test})


def test_missing_texts_of_hugging_face_are_refused():
    split = {"sentence": ["good", None], "label": [1, 0]}
    with pytest.raises(JpqError, match=r"The test split has no text \(None\) for sample 1"):
        _text_rows(split, "sentence", "label", ("no", "yes"), "The test split")


@pytest.mark.parametrize("label", [-1, None, 2])
def test_texts_of_hugging_face_without_a_class_are_refused(label):
    split = {"sentence": ["good", "bad"], "label": [1, label]}  # -1 would be the last class
    with pytest.raises(JpqError, match=f"The test split has no class \\({label}\\) for sample 1"):
        _text_rows(split, "sentence", "label", ("no", "yes"), "The test split")


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(JpqError, match=r"python -m pip install \"jpq\[datasets\]\""):
        load(f"hf-dataset:{tmp_path}")
