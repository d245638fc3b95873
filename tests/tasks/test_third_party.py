"""Models of timm, segmentation_models_pytorch and transformers by name; published weights; every bad input."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torchvision

from jpq.files.untrusted import names_code
from jpq.tasks import models
from jpq.tasks.published_weights import load_named_weights
from jpq.tasks.third_party import TextModel
from jpq.types import JpqError


def needs(package: str, extra: str) -> pytest.MarkDecorator:
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f'needs the extra: pip install "jpq[{extra}]"')


timm, smp, transformers = (
    needs("timm", "timm"),
    needs("segmentation_models_pytorch", "smp"),
    needs("transformers", "transformers"),
)

BERT = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
VIT = {
    "model_type": "vit",
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
SEGFORMER = {
    "model_type": "segformer",
    "architectures": ["SegformerForSemanticSegmentation"],
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 1, 1],
    "decoder_hidden_size": 8,
}


def folder_of(tmp_path: Path, config: dict[str, object]) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return f"hf:{tmp_path}"


@timm
@pytest.mark.parametrize("channels", [1, 3])
def test_timm_models_follow_classes_and_channels(channels: int) -> None:
    model = models.build("timm:mobilenetv3_small_050", 7, channels)
    models.check_fits(model, torch.rand(2, channels, 32, 32), classes=7)
    assert models.usual_input("timm:mobilenetv3_small_050") == ((3, 224, 224), 1000)


@timm
@pytest.mark.parametrize(("name", "size"), [("vit_tiny_patch16_224", (32, 48)), ("test_vit", (32, 32))])
def test_timm_models_are_built_for_the_images_size(name: str, size: tuple[int, int]) -> None:
    sides = dict(zip(("height", "width"), size, strict=True))
    model = models.build(f"timm:{name}", 3, 1, sides).eval()
    models.check_fits(model, torch.rand(2, 1, *size), classes=3)
    tokens = size[0] * size[1] // 16**2
    assert model.pos_embed.shape[1] == tokens + 1, "one for each patch, and the class token"
    ops = {str(node.target) for node in torch.export.export(model, (torch.rand(2, 1, *size),)).graph.nodes}
    assert not any("upsample" in op for op in ops)
    usual = models.build(f"timm:{name}", 3, 1)
    assert model.state_dict().keys() == usual.state_dict().keys()


@timm
def test_timm_models_that_take_any_size_stay_as_they_are() -> None:
    model = models.build("timm:test_efficientnet", 3, 3, {"height": 32, "width": 32})
    models.check_fits(model.eval(), torch.rand(2, 3, 32, 32), classes=3)


@smp
def test_smp_models_give_a_class_per_pixel() -> None:
    model = models.build("smp:unet:resnet18", 5, 1).eval()
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 5, 32, 32)
    assert models.usual_input("smp:unet:resnet18") == ((3, 224, 224), 21)


@transformers
def test_texts_are_ids_with_a_mask_or_without(tmp_path: Path) -> None:
    name = folder_of(tmp_path, BERT)
    model = models.build(name, 3, None, {"vocabulary": 60, "length": 12}).eval()
    assert isinstance(model, TextModel)
    ids = torch.randint(1, 60, (2, 9))
    ids[1, 5:] = 0
    with torch.no_grad():
        assert torch.allclose(model(ids), model(ids, (ids > 0).long()), atol=1e-6)
        assert torch.allclose(model(ids)[1], model(ids[1:, :5])[0], atol=1e-5), "padding changes nothing"
    models.check_fits(model, {"input_ids": ids, "attention_mask": (ids > 0).long()}, classes=3)
    assert models.usual_input(name) == ((12,), 2)
    assert models.usual_input(name + "/config.json") == ((12,), 2)
    noise = models.noise(model, 4, (12,))
    assert noise.dtype == torch.int64
    assert noise.shape == (4, 12)


@transformers
def test_weights_that_transformers_wrote_load(tmp_path: Path) -> None:
    import transformers as library

    config = library.BertConfig(**{**BERT, "num_labels": 3})
    library.BertForSequenceClassification(config).save_pretrained(tmp_path)
    model = models.build(f"hf:{tmp_path}", 3).eval()
    assert load_named_weights(model, "hf:", tmp_path / "model.safetensors") == ()
    original = library.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.randint(1, 60, (2, 9))
    with torch.no_grad():
        assert torch.allclose(model(ids), original(input_ids=ids).logits, atol=1e-6)


@transformers
@pytest.mark.parametrize("config", [BERT, VIT, SEGFORMER], ids=["bert", "vit", "segformer"])
@pytest.mark.parametrize("half", [False, True])
def test_what_save_pretrained_wrote_loads_under_the_names_of_any_release(
    tmp_path: Path, config: dict[str, object], half: bool
) -> None:
    saved = models.build(folder_of(tmp_path, config), 3).eval()
    (saved.half() if half else saved).model.save_pretrained(tmp_path)
    saved.float()  # config.json says float16 now
    model = models.build(f"hf:{tmp_path}", 3).eval()
    notes = load_named_weights(model, "hf:", tmp_path / "model.safetensors")
    assert ["stored as float16" in note for note in notes] == [True] * half
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())


@transformers
@pytest.mark.parametrize("config", [BERT, VIT], ids=["bert", "vit"])
def test_weights_for_other_classes_are_told_as_such(tmp_path: Path, config: dict[str, object]) -> None:
    models.build(folder_of(tmp_path, config), 3).model.save_pretrained(tmp_path)
    with pytest.raises(JpqError, match=r"They have 3 outputs in layer 'model\.classifier', and the data 5 classes"):
        load_named_weights(models.build(f"hf:{tmp_path}", 5), "hf:", tmp_path / "model.safetensors")


@transformers
def test_images_give_classes_and_maps_of_the_images_size(tmp_path: Path) -> None:
    name = folder_of(tmp_path, VIT)
    assert models.build(name, 4, 3).eval()(torch.rand(2, 3, 16, 16)).shape == (2, 4)
    assert models.usual_input(name) == ((3, 16, 16), 2)
    name = folder_of(tmp_path, SEGFORMER)
    assert models.build(name, 4, 3).eval()(torch.rand(2, 3, 32, 48)).shape == (2, 4, 32, 48)


@transformers
@pytest.mark.parametrize(
    ("config", "arguments", "says"),
    [
        (BERT, {"vocabulary": 61}, "data have 61 different tokens, and hf:.* takes 60: set vocab_size"),
        (BERT, {"length": 13}, "data have 13 tokens in a text.*max_position_embeddings"),
        ({**BERT, "model_type": "time_series_transformer"}, {}, "no classification or segmentation"),
        ({**BERT, "hidden_size": 15}, {}, "transformers cannot make a model of"),
        ({"model_type": "no such"}, {}, "no configuration that transformers reads"),
        ({}, {}, "no configuration that transformers reads"),
    ],
)
def test_bad_configurations(tmp_path: Path, config: dict[str, object], arguments: dict[str, int], says: str) -> None:
    with pytest.raises(JpqError, match=says):
        models.build(folder_of(tmp_path, config), 3, None, arguments)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        pytest.param("timm:resnet19", "Unknown timm model 'resnet19'. Did you mean", marks=timm),
        pytest.param("timm:hf-hub:someone/net", "Unknown timm model", marks=timm),
        pytest.param("timm:resnet18.nowhere_in1k", "Invalid pretrained tag", marks=timm),
        pytest.param("smp:unett", "Unknown smp architecture 'unett'. Did you mean unet", marks=smp),
        pytest.param("smp:unet:resnet19", "Unknown smp encoder 'resnet19'", marks=smp),
        pytest.param("hf:nowhere", "no config.json in 'nowhere'.*downloads no models", marks=transformers),
        ("timn:resnet18", "timn"),
    ],
)
def test_bad_names(name: str, says: str) -> None:
    with pytest.raises(JpqError, match=says):
        models.build(name, 3)


@pytest.mark.parametrize(
    ("package", "name", "extra"),
    [
        ("timm", "timm:resnet18", "timm"),
        ("segmentation_models_pytorch", "smp:unet", "smp"),
        ("transformers", "hf:folder", "transformers"),
    ],
)
def test_a_missing_extra_is_named(package: str, name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)  # an import of it fails from here on
    with pytest.raises(JpqError, match=rf'pip install "jpq\[{extra}\]"'):
        models.build(name, 3)


def test_names_of_libraries_are_no_code() -> None:
    assert not any(names_code(name) for name in ("timm:resnet18", "smp:unet:resnet18", "hf:folder"))


def test_published_weights_come_from_the_librarys_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    torch.manual_seed(3)
    published = torchvision.models.squeezenet1_1()
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    file = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(published.state_dict(), file)
    model = models.build("torchvision:squeezenet1_1", 1000)
    load_named_weights(model, "torchvision:squeezenet1_1", Path("imagenet"))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in published.state_dict().items())
    small = models.build("torchvision:squeezenet1_1", 10)
    with pytest.raises(JpqError, match=r"1000 outputs in layer 'classifier\.1', and the data 10 classes"):
        load_named_weights(small, "torchvision:squeezenet1_1", Path("imagenet"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("torchvision:squeezenet1_1", "not here and could not be downloaded .*give a file with weights"),
        pytest.param(
            "timm:mobilenetv3_small_050", "not here and could not be downloaded", marks=[timm, pytest.mark.slow]
        ),
        ("torchvision:googlenet", "publishes no ImageNet weights that jpq can use"),
        ("torchvision:fcn_resnet50", "publishes no ImageNet weights"),
        ("resnet20", "is for torchvision:NAME and timm:NAME, and the model is resnet20"),
        pytest.param("timm:botnet50ts_256", "publishes no weights", marks=timm),
    ],
)
def test_without_published_weights_or_a_network_there_is_a_sentence(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nobody listens there
    for cache in ("TORCH_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(cache, str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    with pytest.raises(JpqError, match=says):
        load_named_weights(torch.nn.Linear(2, 2), name, Path("imagenet"))
