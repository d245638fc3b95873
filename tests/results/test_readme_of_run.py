"""README.md of a run's folder, which is executed, and `--embed-normalization`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image, ImageOps

from jpq.cli.main import main
from jpq.config import Budget, Config, Run, Task, Train
from jpq.export.onnx.metadata import read_metadata
from jpq.recipe import optimize
from jpq.results.readme import IMAGE, WHOLE, run_code
from jpq.tasks.images import image_bytes
from jpq.types import JpqError


def run(folder: Path, data: str, model: str = "convnet", **settings):
    run_settings = {k: settings.pop(k) for k in list(settings) if k in ("embed_normalization", "formats")}
    config = Config(
        task=Task(data=data, model=model, **settings),
        budget=Budget(target_bops="20%"),
        train=Train(epochs=2, float_epochs=2, batch_size=32),
        run=Run(out=folder, name="run", threads=1, **run_settings),
    )
    return optimize(config)


def execute(folder: Path) -> str:
    """What the block of a folder's README prints."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) < 22
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=environment, check=False
    )
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def picture(folder: Path, image: torch.Tensor) -> None:
    pixels = (image * 255).round().to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).squeeze().numpy()).save(folder / "image.png")


def photographs(folder: Path) -> None:
    """Write colour images of two classes: red and blue."""
    draw = np.random.default_rng(0)
    for n in range(60):
        array = draw.integers(0, 90, (8, 8, 3)).astype(np.uint8)
        array[:, :, 0 if n % 2 else 2] += 120
        place = folder / ("red" if n % 2 else "blue")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(place / f"{n}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    photographs(folder)
    return folder


@pytest.fixture(scope="module")
def of_photos(tmp_path_factory, photos):
    """Runs on the photographs: the model normalises its input itself, or not."""
    return {
        embed: run(
            tmp_path_factory.mktemp("run"),
            f"folder:{photos}",
            "readme_nets:images",
            embed_normalization=embed,
            formats="onnx,pt2" if embed else "onnx",
        )
        for embed in (False, True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("embed", [False, True])
def test_the_readme_of_images_names_the_class_that_the_model_gives(photos, of_photos, embed):
    folder = of_photos[embed].folder
    file = next((photos / "red").iterdir())
    Image.open(file).save(folder / "image.png")
    about = read_metadata(folder / "model.onnx")
    assert about["class_names"] == ["blue", "red"]
    if embed:
        assert (about["mean"], about["embedded_mean"][0]) == ([0.0] * 3, 0.485)
        assert "normalises its input itself" in (folder / "README.md").read_text()
    x = torch.from_numpy(np.asarray(Image.open(file))).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(about[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    (scores,) = session.run(None, {"input": ((x - mean) / std).numpy()})
    assert execute(folder) == about["class_names"][scores.argmax()]


@pytest.mark.slow
def test_embedded_normalisation_changes_no_output(of_photos):
    plain, embedded = of_photos[False], of_photos[True]
    x = torch.rand(5, 3, 8, 8)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    sessions = [onnxruntime.InferenceSession(str(r.folder / "model.onnx")) for r in (plain, embedded)]
    one = sessions[0].run(None, {"input": ((x - mean) / std).numpy()})[0]
    two = sessions[1].run(None, {"input": x.numpy()})[0]
    assert np.abs(one - two).max() < 0.02 * np.abs(one).max()
    assert embedded.verified["rebuilt_vs_onnxruntime"]["argmax_differs"] == 0


@pytest.mark.slow
def test_the_readme_of_a_table_gives_the_target_in_its_units(tmp_path):
    result = run(tmp_path, "sklearn:diabetes", "readme_nets:table")
    (result.folder / "row.csv").write_text(",".join(["0.01"] * 10))
    value = float(execute(result.folder).strip("[]"))
    assert 20 < value < 350  # the targets go from 25 to 346
    assert "pip install onnxruntime`" in (result.folder / "README.md").read_text()  # and no package for images


@pytest.mark.slow
def test_the_readme_of_texts_names_a_class(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = "a moving and funny film\tgood\na dull film , dull and long\tbad\nfunny and moving\tgood\nso long\tbad\n"
    (folder / "train.tsv").write_text(lines * 20)
    result = run(tmp_path, f"text:{folder}", "readme_nets:text")
    assert execute(result.folder) in ("good", "bad")
    assert result.data["class_names"] == ["bad", "good"]


@pytest.mark.parametrize(("code", "size"), [(IMAGE, (12, 16)), (WHOLE, ())])
def test_the_code_reads_a_photo_as_training_does(tmp_path, monkeypatch, code, size):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: taken with the camera on its side
    Image.fromarray(pixels).save("image.png", exif=turned)
    names = {"about": {"input_size": [3, *size]}, "Image": Image, "ImageOps": ImageOps, "np": np}
    exec(code, names)
    expected = image_bytes(Image.open("image.png"), size).numpy()[None] / np.float32(255)
    assert names["x"].shape == ((1, 3, 12, 16) if size else (1, 3, 30, 40))
    assert np.array_equal(names["x"], expected)


@pytest.mark.parametrize(("code", "size"), [(IMAGE, (12, 16)), (WHOLE, ())])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_code_scales_images_of_16_bits_as_training_does(tmp_path, monkeypatch, code, size, channels):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 2**16, (40, 30)).astype(np.uint16)
    Image.fromarray(pixels).save("image.png")
    names = {"about": {"input_size": [channels, *size]}, "Image": Image, "ImageOps": ImageOps, "np": np}
    exec(code, names)
    expected = image_bytes(Image.open("image.png"), size)[:channels].numpy()[None] / np.float32(255)
    assert np.array_equal(names["x"], expected)


def test_every_kind_of_data_has_code_that_compiles():
    records = [
        {"shape": [3, 8, 8], "mean": [0.5] * 3},
        {"shape": [3, 8, 8], "mean": [0.5] * 3, "task": "segmentation"},
        {"shape": [1, 8, 8], "task": "restoration"},
        {"shape": [4], "columns": ["a"], "mean": [0.0], "task": "regression"},
        {"shape": [2, 9], "mean": [0.0] * 2, "task": "sequence-classification"},
        {"shape": [9], "task": "text-classification", "tokenizer": "words"},
        {"shape": [9], "task": "text-classification", "tokenizer": "words", "padding": 0, "inputs": 2},
        {"shape": [9], "inputs": 2},
        {"shape": [3, 8, 8], "mean": [0.0] * 3, "task": "detection"},
    ]
    codes = [run_code(record) for record in records]
    assert len(set(codes)) == len(records)
    for code in codes:
        compile(code, "README.md", "exec")


def test_the_code_for_texts_gives_models_with_a_mask_both_inputs(monkeypatch, capsys):
    class Session:
        def __init__(self, file):
            self.get_modelmeta = lambda: self
            words = '["<padding>", "<unknown>", "film", "a"]'
            self.custom_metadata_map = {"vocabulary": words, "length": "7", "unknown": "1", "padding": "0"}

        def run(self, names, feed):
            assert feed["input_ids"].tolist() == [[3, 1, 1, 1, 2, 0, 0]]
            assert feed["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0]]
            assert {array.dtype for array in feed.values()} == {np.dtype(np.int64)}
            return [np.array([[0.5, 2.0, 1.0]], np.float32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    record = {"shape": [7], "inputs": 2, "task": "text-classification", "tokenizer": "words", "padding": 0}
    exec(run_code(record), {})
    assert capsys.readouterr().out.strip() == "1"


def test_the_code_for_detectors_names_the_surest_boxes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 20)).save("image.png")
    output = np.zeros((1, 6, 3 + 8), np.float32)
    output[0, :, 1:3] = -5.0
    output[0, 4, 2], output[0, 1, 1] = 3.0, 2.0
    output[0, :, 3:7] = np.arange(24).reshape(6, 4)

    class Session:
        def __init__(self, file):
            self.get_modelmeta = lambda: self
            names = '["none", "cat", "dog"]'
            self.custom_metadata_map = {
                "input_size": "[3, 8, 8]",
                "mean": "[0, 0, 0]",
                "std": "[1, 1, 1]",
                "class_names": names,
            }

        def run(self, names, feed):
            assert feed["input"].shape == (1, 3, 8, 8)
            return [output]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    exec(run_code({"shape": [3, 8, 8], "mean": [0.0] * 3, "task": "detection"}), {})
    first, second, *others = capsys.readouterr().out.splitlines()
    assert first.split()[0] == "dog"
    box = first[first.index("[") + 1 : first.index("]")]
    assert [float(side) for side in box.split()] == [16, 17, 18, 19]
    assert second.split()[0] == "cat"
    assert len(others) == 3


def test_data_without_a_mean_has_no_normalisation_to_embed(tmp_path):
    with pytest.raises(JpqError, match="not normalised by a mean"):
        run(tmp_path, "own_loaders:digits", embed_normalization=True)


@pytest.mark.slow
def test_the_readme_of_restoration_writes_an_image(tmp_path):
    draw = np.random.default_rng(0)
    (tmp_path / "clean").mkdir()
    for n in range(12):
        image = Image.fromarray(draw.integers(0, 255, (3, 3)).astype(np.uint8))
        image.resize((24, 20), Image.Resampling.BICUBIC).save(tmp_path / "clean" / f"{n}.png")
    result = run(tmp_path, f"folder:{tmp_path / 'clean'}", "readme_nets:denoiser", noise=25.0, crop=(10,))
    assert result.data["noise"] == 25
    assert result.verified["rebuilt_vs_onnxruntime"]["images"] == 3
    Image.open(tmp_path / "clean" / "0.png").save(result.folder / "image.png")
    execute(result.folder)
    assert Image.open(result.folder / "restored.png").size == (24, 20)


@pytest.mark.slow
def test_the_readme_of_series_names_a_class(tmp_path):
    draw = np.random.default_rng(0)
    x = draw.normal(0, 1, (80, 2, 12)).astype(np.float32)
    y = np.array(["down", "up"])[(x[:, 0].mean(1) > 0).astype(int)]
    np.savez(tmp_path / "s.npz", x=x, y=y)
    result = run(tmp_path, f"series:{tmp_path / 's.npz'}", "readme_nets:series")
    np.save(result.folder / "window.npy", x[0])
    assert execute(result.folder) in ("down", "up")


@pytest.mark.slow
def test_a_file_with_its_normalisation_is_evaluated_and_exported_again(tmp_path, of_photos, capsys):
    folder = shutil.copytree(of_photos[True].folder, tmp_path / "run")
    evaluated = ["evaluate", str(folder), "--run-code", "--runtime", "onnxruntime,openvino"]
    assert main(evaluated) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "15 of 15 as the PyTorch model" in said
    assert main(["export", str(folder), "--run-code", "--formats", "onnx"]) == 0
    assert "embedded_mean" in read_metadata(folder / "model.onnx")
