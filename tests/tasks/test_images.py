"""Photographs as people have them: any size, turned by EXIF, every colour mode, damaged ones, and what systems add."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jpq.config import Budget, Config, Task
from jpq.tasks import data as tasks_data
from jpq.tasks.images import image_bytes, read_images
from jpq.tasks.load import read_data
from jpq.types import JpqError

ORIENTATION = 0x0112  # EXIF tag


def paint(path: Path, size: tuple[int, int] = (12, 8), seed: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of ten photographs each, of mixed sizes, without parts."""
    for seed in range(20):
        paint(tmp_path / "photos" / ("cat", "dog")[seed % 2] / f"{seed}.png", (20 + seed, 35 - seed), seed)
    return tmp_path / "photos"


def test_photos_of_any_size_need_a_size(photos):
    with pytest.raises(JpqError, match=r"10.png' is 30x25 but .*0.png' is 20x35 \(20 sizes in all\).*image_size=224"):
        tasks_data.load(f"folder:{photos}")
    data = tasks_data.load(f"folder:{photos}", image_size=(16,))
    assert data.shape == (3, 16, 16)
    assert (data.classes, data.class_names) == (2, ("cat", "dog"))
    assert [data.train.size, data.held_out.size, data.test.size] == [13, 2, 5]
    assert tasks_data.load(f"folder:{photos}", image_size=(12, 20)).shape == (3, 12, 20)


def test_a_folder_without_parts_is_split_the_same_way_whatever_the_seed(photos):
    one, two = (tasks_data.load(f"folder:{photos}", image_size=(16,), seed=seed) for seed in (0, 1))
    assert torch.equal(one.test.images, two.test.images)
    assert not torch.equal(one.held_out.images, two.held_out.images)


@pytest.mark.parametrize(("size", "target"), [((40, 20), (10, 10)), ((20, 40), (10, 10)), ((9, 30), (12, 12))])
def test_the_centre_is_kept_in_proportion(size, target):
    """A picture that is a ramp in x and y stays one: values at the centre of each pixel, up to rounding and the rim."""
    (w, h), (height, width) = size, target
    ramp = np.stack([np.tile(np.arange(w) * 6, (h, 1)), np.tile(np.arange(h)[:, None] * 6, (1, w))], 2)
    pixels = np.concatenate([ramp, np.zeros((h, w, 1))], 2).astype(np.uint8)
    out = image_bytes(Image.fromarray(pixels), target).double()
    scale = max(height / h, width / w)
    for channel, (number, side) in enumerate(((width, w), (height, h))):
        centres = ((torch.arange(number) + 0.5) / scale + (side - number / scale) / 2 - 0.5) * 6
        row = out[channel].mean(0) if channel == 0 else out[channel].mean(1)
        assert (row[1:-1] - centres[1:-1]).abs().max() < 1.5


def test_an_image_of_the_size_is_left_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    assert (image_bytes(Image.fromarray(pixels), (10, 14)).permute(1, 2, 0).numpy() == pixels).all()


@pytest.mark.parametrize(
    ("turn", "of"), [(1, lambda x: x), (3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1))]
)
def test_exif_turns_are_applied(tmp_path, turn, of):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    images = read_images([tmp_path / "a.png"])
    assert (images.pixels[0].permute(1, 2, 0).numpy() == of(pixels)).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_colour_mode_becomes_bytes(mode):
    image = Image.new("RGB", (5, 4), (204, 204, 204)).convert(mode, dither=Image.Dither.NONE)
    pixels = image_bytes(image)
    assert (pixels.dtype, list(pixels.shape)) == (torch.uint8, [3, 4, 5])
    assert (pixels.int() - (255 if mode == "1" else 204)).abs().max() <= 3


def test_sixteen_bits_are_scaled_and_other_ranges_are_refused(tmp_path):
    values = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    Image.fromarray(values).save(tmp_path / "grey.png")
    images = read_images([tmp_path / "grey.png"])
    assert list(images.pixels.shape) == [1, 1, 6, 8]
    assert (images.pixels[0, 0].numpy() == np.round(values / 257)).all()
    with pytest.raises(ValueError, match="floating-point"):
        image_bytes(Image.new("F", (4, 4), 0.5))
    with pytest.raises(ValueError, match="from 70000 to 70000"):
        image_bytes(Image.new("I", (4, 4), 70000))


def test_all_grey_is_one_channel_unless_three_values_are_given(tmp_path):
    for seed in range(20):
        paint(tmp_path / ("a", "b")[seed % 2] / f"{seed}.png", seed=seed, mode="LA" if seed % 3 else "L")
    grey = tasks_data.load(f"folder:{tmp_path}")
    assert grey.shape == (1, 8, 12)
    colour = tasks_data.load(f"folder:{tmp_path}", mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0))
    assert colour.shape == (3, 8, 12)
    x, _ = next(iter(colour.test))
    stored = grey.test.images.float() / 255
    for channel, (mean, std) in enumerate(((0.1, 1.0), (0.2, 1.0), (0.3, 2.0))):
        assert torch.allclose(x[:, channel], (stored[:, 0] - mean) / std, atol=1e-6)
    paint(tmp_path / "a" / "colour.png")
    assert tasks_data.load(f"folder:{tmp_path}").shape == (3, 8, 12)
    with pytest.raises(JpqError, match=r"mean and std have 1 and 1 values, and the images of .* 3 channels"):
        tasks_data.load(f"folder:{tmp_path}", mean=(0.5,), std=(0.5,))


def test_hidden_files_and_those_of_systems_are_no_images(photos):
    plain = tasks_data.load(f"folder:{photos}", image_size=(16,)).checksum
    for name in ("._0.png", ".DS_Store", "Thumbs.db", ".hidden.png", "notes.txt"):
        (photos / "cat" / name).write_bytes(b"\0\5\26\7")
    for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir", "$RECYCLE.BIN"):
        paint(photos / name / "0.png")
        paint(photos / "cat" / name / "0.png")
    (photos / ".DS_Store").write_bytes(b"x")
    assert tasks_data.load(f"folder:{photos}", image_size=(16,)).checksum == plain


def test_all_bad_images_are_listed_at_once_and_may_be_skipped(photos):
    for name in ("cat/x.jpg", "dog/y.png", "dog/z.heic"):
        (photos / name).write_bytes(b"nothing")
    cut = (photos / "cat" / "0.png").read_bytes()
    (photos / "cat" / "cut.png").write_bytes(cut[: len(cut) // 2])
    with pytest.raises(JpqError) as caught:
        tasks_data.load(f"folder:{photos}", image_size=(16,))
    assert "4 of 24 images cannot be read" in str(caught.value)
    assert all(name in str(caught.value) for name in ("x.jpg", "y.png", "z.heic", "cut.png", "skip_bad"))
    data = tasks_data.load(f"folder:{photos}", image_size=(16,), skip_bad=True)
    assert data.train.size + data.held_out.size + data.test.size == 20
    assert "4 of 24 images cannot be read and are left out" in data.notes[0]


def test_a_class_or_folder_that_loses_all_images_is_named(tmp_path):
    for seed in range(10):
        paint(tmp_path / "a" / f"{seed}.png", seed=seed)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.png").write_bytes(b"nothing")
    with pytest.raises(JpqError, match=r"No image in '.*b' can be read"):
        tasks_data.load(f"folder:{tmp_path}", skip_bad=True)
    for image in (tmp_path / "a").iterdir():
        image.write_bytes(b"nothing")
    with pytest.raises(JpqError, match="None of 11 images can be read"):
        tasks_data.load(f"folder:{tmp_path}", skip_bad=True)


def test_parts_by_their_common_names(tmp_path):
    for part, count in (("Training", 8), ("validation", 3), ("Testing", 2)):
        for seed in range(2 * count):
            paint(tmp_path / part / ("a", "b")[seed % 2] / f"{seed}.png", seed=seed)
    data = tasks_data.load(f"folder:{tmp_path}")
    assert [data.train.size, data.held_out.size, data.test.size] == [16, 6, 4]
    (tmp_path / "Training").rename(tmp_path / "t")
    with pytest.raises(JpqError, match=r"no folder '.*train' beside 'Testing', 'validation'"):
        tasks_data.load(f"folder:{tmp_path}")
    (tmp_path / "t").rename(tmp_path / "train")
    paint(tmp_path / "training" / "a" / "0.png")
    with pytest.raises(JpqError, match="both a train part"):
        tasks_data.load(f"folder:{tmp_path}")


def test_bad_sizes_and_values_name_their_setting(photos):
    def fails(words: str, **task: object) -> None:
        with pytest.raises(JpqError, match=words):
            Config(task=Task(**task), budget=Budget(target_bops="1%")).check()  # type: ignore[arg-type]

    fails("image_size=0", image_size=(0,))
    fails("image_size=", image_size=(1, 2, 3))
    fails("mean and std have 1 and 0 values", mean=(0.5,))
    fails("above 0", mean=(0.5,), std=(0.0,))
    fails("finite", mean=(float("nan"),), std=(1.0,))
    with pytest.raises(JpqError, match="image_size is for"):
        tasks_data.load("digits", image_size=(16,))
    with pytest.raises(JpqError, match="skip_bad is for"):
        tasks_data.load("digits", skip_bad=True)
    with pytest.raises(JpqError, match=f"For a folder of images give folder:{photos}"):
        tasks_data.load(str(photos))
    with pytest.raises(JpqError, match=r"give folder:C:\\data"):
        tasks_data.load("C:\\data")
    with pytest.raises(JpqError, match=r"The folder 'C:\\data' is not there"):
        tasks_data.load("folder:C:\\data")


@pytest.mark.parametrize("flag", [{"noise": 25.0}, {"scale": 2}, {"crop": (4,)}, {"void": 3}, {"target_column": "x"}])
def test_a_flag_for_other_data_is_refused(flag):
    with pytest.raises(JpqError, match=rf"^{next(iter(flag))} is for .*, and the data are 'digits'\. Leave it out"):
        tasks_data.load("digits", **flag)


@pytest.mark.parametrize(("flag", "words"), [({"crop": (4,)}, "masks or to be restored"), ({"void": 3}, "masks")])
def test_flags_of_masks_are_refused_for_class_folders(photos, flag, words):
    with pytest.raises(JpqError, match=f"^{next(iter(flag))} is for images with {words}, and .*has class folders"):
        tasks_data.load(f"folder:{photos}", image_size=(16,), **flag)


def test_a_held_out_share_is_noted_where_the_data_have_a_part_for_it(tmp_path):
    for seed, part in enumerate(("train", "train", "val", "test")):
        for name in ("cat", "dog"):
            paint(tmp_path / part / name / f"{seed}.png", seed=seed)
    note = f"--held-out 0.3 is not used: 'folder:{tmp_path}' has a held-out part of its own."
    assert tasks_data.load(f"folder:{tmp_path}", held_out=0.3).notes == (note,)
    assert tasks_data.load(f"folder:{tmp_path}").notes == ()


def test_home_folders_are_expanded(photos, monkeypatch):
    monkeypatch.setenv("HOME", str(photos.parent))
    config = Config(task=Task(data="folder:~/photos", image_size=(16,)), budget=Budget(target_bops="1%")).check()
    assert config.task.data == f"folder:{photos}"
    assert read_data(config, torch.device("cpu")).test.size == 5
    assert tasks_data.load("folder:~/photos", image_size=(16,)).test.size == 5


def test_pictures_of_a_dataset_are_brought_to_one_size(tmp_path, monkeypatch):
    (tmp_path / "mixed_pictures.py").write_text(
        "from PIL import Image\n"
        "class Listed:\n"
        "    def __len__(self): return 12\n"
        "    def __getitem__(self, i): return Image.new('RGB', (5 + i, 9), (i, 0, 9)), i % 2\n"
        "def make(): return Listed(), Listed()\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JpqError, match=r"differ in size, such as .*image_size=224"):
        tasks_data.load("mixed_pictures:make")
    assert tasks_data.load("mixed_pictures:make", image_size=(6,)).shape == (3, 6, 6)
