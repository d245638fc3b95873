"""Models of other libraries by name: `timm:NAME`, `smp:ARCHITECTURE:ENCODER`, `hf:FOLDER_OR_CONFIG`; random weights.

Nothing is downloaded, and no code of a model's folder runs. Each library is an extra of jpq.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jpq.files.paths import expand_home
from jpq.tracing.forward import eval_mode
from jpq.types import JpqError, unknown

SMP_ENCODER = "resnet34"  # where `smp:ARCHITECTURE` names none

TEXT_LENGTH = 128  # usual number of tokens, where the model takes so many

HEADS = {  # end of a class's name in transformers -> the kind of its inputs and outputs
    "ForSequenceClassification": "text",
    "ForImageClassification": "image",
    "ForSemanticSegmentation": "map",
}


def is_third_party(name: str) -> bool:
    """Whether a model's name begins with one of these libraries."""
    return name.partition(":")[0] in LIBRARIES


def build_third_party(name: str, classes: int, channels: int, arguments: Mapping[str, int] | None = None) -> nn.Module:
    """A model of another library with random weights.

    Args:
        name: such as `timm:resnet18`.
        classes, channels: of the data.
        arguments: of the data's texts: "vocabulary" and "length"; of images for timm: "height" and "width".

    Raises JpqError for an extra that is missing, an unknown name, and data that the model cannot take.
    """
    kind, _, rest = name.partition(":")
    return LIBRARIES[kind].build(rest, classes, channels, arguments or {})


def usual_third_party_input(name: str) -> tuple[tuple[int, ...], int]:
    """The usual (shape of one sample, number of classes); texts have the shape (tokens,)."""
    kind, _, rest = name.partition(":")
    return LIBRARIES[kind].usual_input(rest)


def import_extra(package: str, extra: str, what: str) -> Any:
    """A package of an extra. Raises JpqError, with the command that installs it, where it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise JpqError(f"Model '{what}' needs a package that is missing: pip install \"jpq[{extra}]\".") from error


def _build_timm(name: str, classes: int, channels: int, arguments: Mapping[str, int]) -> nn.Module:
    timm = _timm(name)
    settings: dict[str, Any] = {"pretrained": False, "num_classes": classes, "in_chans": channels}
    try:
        model: nn.Module = timm.create_model(name, **settings)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise JpqError(
            f"timm cannot make {name} for {classes} classes and {channels} channels ({reason}). Choose another model."
        ) from error
    if {"height", "width"} <= arguments.keys():
        return _sized_timm(timm, name, settings, model, (arguments["height"], arguments["width"]))
    return model


def _sized_timm(timm: Any, name: str, settings: dict[str, Any], model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """A model of timm for images of this size: as it is where it takes them, else built for them where it can be.

    One that resamples its table of positions in each call, which no file can hold, is built with a fixed table.
    """
    channels = settings["in_chans"]
    fixed = {"dynamic_img_size": False} if getattr(model, "dynamic_img_size", False) else {}
    if not fixed and _takes_size(model, channels, size):
        return model
    try:
        sized: nn.Module = timm.create_model(name, **settings, img_size=size, **fixed)
    except Exception:  # the builder knows no sizes, or not this one: the model's own error tells
        return model
    return sized if _takes_size(sized, channels, size) else model


def _takes_size(model: nn.Module, channels: int, size: tuple[int, int]) -> bool:
    """Whether a model computes images of this size."""
    tensors = {name: x.to("meta") for name, x in (*model.named_parameters(), *model.named_buffers())}
    image = torch.empty(1, channels, *size, device="meta")
    try:
        with torch.no_grad(), eval_mode(model):
            torch.func.functional_call(model, tensors, image)
    except Exception:  # models refuse sizes by errors of many kinds
        return False
    return True


def _usual_timm(name: str) -> tuple[tuple[int, ...], int]:
    config = _timm(name).get_pretrained_cfg(name)
    return (tuple(config.input_size), int(config.num_classes)) if config else ((3, 224, 224), 1000)


def _timm(name: str) -> Any:
    """The package timm, which knows this model. Raises JpqError for an unknown one."""
    timm = import_extra("timm", "timm", f"timm:{name}")
    if ":" in name or not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    return timm


def _build_smp(name: str, classes: int, channels: int, _: Mapping[str, int]) -> nn.Module:
    smp, architecture, encoder = _smp(name)
    try:
        model: nn.Module = smp.create_model(
            architecture, encoder_name=encoder, encoder_weights=None, in_channels=channels, classes=classes
        )
    except (KeyError, ValueError, TypeError, NotImplementedError) as error:
        reason = str(error).strip("'\" \n").partition("\n")[0].rstrip(".")
        raise JpqError(
            f"segmentation_models_pytorch cannot make {architecture} with encoder {encoder} ({reason[:200]}). Choose "
            "another encoder."
        ) from error
    return model


def _usual_smp(name: str) -> tuple[tuple[int, ...], int]:
    _smp(name)
    return (3, 224, 224), 21


def _smp(name: str) -> tuple[Any, str, str]:
    """(package, architecture, encoder) of `unet:resnet18`. Raises JpqError for unknown ones."""
    smp = import_extra("segmentation_models_pytorch", "smp", f"smp:{name}")
    architecture, _, encoder = name.partition(":")
    encoder = encoder or SMP_ENCODER
    if architecture.lower() not in smp.MODEL_ARCHITECTURES_MAPPING:
        raise unknown("smp architecture", architecture, smp.MODEL_ARCHITECTURES_MAPPING)
    if encoder not in smp.encoders.get_encoder_names() and not encoder.startswith("tu-"):
        raise unknown("smp encoder", encoder, smp.encoders.get_encoder_names())
    return smp, architecture, encoder


def _build_hf(name: str, classes: int, channels: int, arguments: Mapping[str, int]) -> nn.Module:
    transformers, config = _hf_config(name)
    head = _hf_head(transformers, config, name)
    config.num_labels = classes
    if head != "text" and hasattr(config, "num_channels"):
        config.num_channels = channels
    model = _make_hf(transformers, config, head, name).float()  # some were saved in half precision
    if head == "text":
        _check_texts(model, config, arguments, name)
        return TextModel(model)
    return ImageModel(model, whole_map=head == "map")


def _make_hf(transformers: Any, config: Any, head: str, name: str) -> nn.Module:
    """A model of transformers with random weights."""
    end = next(end for end, kind in HEADS.items() if kind == head)
    try:
        model: nn.Module = getattr(transformers, f"AutoModel{end}").from_config(config)
    except (ValueError, TypeError, RuntimeError, AttributeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise JpqError(
            f"transformers cannot make a model of {name} ({reason[:200]}). Correct its config.json."
        ) from error
    return model


def _usual_hf(name: str) -> tuple[tuple[int, ...], int]:
    transformers, config = _hf_config(name)
    if _hf_head(transformers, config, name) == "text":
        return (min(TEXT_LENGTH, longest_text(name) or TEXT_LENGTH),), int(config.num_labels)
    side = getattr(config, "image_size", 224)
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    return (int(getattr(config, "num_channels", 3)), int(height), int(width)), int(config.num_labels)


def _hf_config(name: str) -> tuple[Any, Any]:
    """(package, configuration) of a folder with a config.json, or of such a file."""
    transformers = import_extra("transformers", "transformers", f"hf:{name}")
    path = expand_home(name)
    if not (path / "config.json" if path.is_dir() else path).is_file():
        raise JpqError(
            f"There is no config.json in '{name}', and jpq downloads no models: give hf: a folder that save_pretrained "
            "wrote, or its config.json."
        )
    try:
        return transformers, transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise JpqError(f"'{name}' is no configuration that transformers reads ({reason[:200]}).") from error


def _hf_head(transformers: Any, config: Any, name: str) -> str:
    """ "text", "image" or "map": by the class that the configuration names, else by what its model type can do."""
    for architecture in config.architectures or ():
        for end, kind in HEADS.items():
            if architecture.endswith(end):
                return kind
    mappings = (
        ("text", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
        ("image", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
        ("map", "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING"),
    )
    for kind, mapping in mappings:
        if type(config) in getattr(transformers, mapping):
            return kind
    raise JpqError(
        f"hf:{name} is a {config.model_type}, which transformers has for no classification or segmentation: use "
        "jpq.compress in your own loop."
    )


def longest_text(name: str) -> int | None:
    """The largest number of tokens that a text model takes, `hf:` left away; None where it has no table of positions.

    Raises JpqError for a folder that holds no text classifier.
    """
    transformers, config = _hf_config(name)
    head = _hf_head(transformers, config, name)
    if head != "text":
        raise JpqError(f"hf:{name} takes images, and the data are texts. Choose a model of texts.")
    with torch.device("meta"):
        return _positions(_make_hf(transformers, config, head, name), config)


def class_names(name: str) -> tuple[str, ...]:
    """The names that a model of transformers gives its outputs, by their numbers; () where it names none."""
    names = _hf_config(name)[1].id2label or {}
    return tuple(str(names[number]) for number in sorted(names))


def _positions(model: nn.Module, config: Any) -> int | None:
    """Number of tokens for which a model has positions; in RoBERTa and its kin they begin behind that of padding."""
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.num_embeddings - table.padding_idx - 1
    most = getattr(config, "max_position_embeddings", None)
    return most if most is not None and most > 0 else None


def _check_texts(model: nn.Module, config: Any, arguments: Mapping[str, int], name: str) -> None:
    """Raise JpqError for texts with more tokens, or longer ones, than a model's tables have."""
    positions = _positions(model, config)
    above = getattr(config, "max_position_embeddings", 0) - positions if positions is not None else 0
    for key, field, what, most, more in (
        ("vocabulary", "vocab_size", "different tokens", config.vocab_size, 0),
        ("length", "max_position_embeddings", "tokens in a text", positions, above),
    ):
        wanted = arguments.get(key, 0)
        if most is not None and wanted > most:
            raise JpqError(
                f"The data have {wanted:,} {what}, and hf:{name} takes {most:,}: set {field} in its config.json to "
                f"{wanted + more} or more."
            )


class TextModel(nn.Module):
    """A text classifier of transformers that gives its logits; its inputs are ids, and a mask where texts are padded.

    Without a mask the tokens that equal the configuration's `pad_token_id` are padding.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        self.padding = config.pad_token_id
        self.vocabulary = int(config.vocab_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Ids, int64 [B, T] -> logits [B, classes]."""
        if attention_mask is None and self.padding is not None:
            attention_mask = (input_ids != self.padding).to(input_ids.dtype)
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


class ImageModel(nn.Module):
    """An image model of transformers that gives its logits; those of a segmenter are scaled up to the image."""

    def __init__(self, model: nn.Module, whole_map: bool) -> None:
        super().__init__()
        self.model, self.whole_map = model, whole_map

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, classes], or [B, classes, H, W]."""
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        if self.whole_map:
            return F.interpolate(logits, size=pixel_values.shape[2:], mode="bilinear", align_corners=False)
        return logits


def rename_saved_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that transformers saved, by the names that its model has in memory, where the two differ.

    Newer releases read and write ViT, Swin, SegFormer and others under the names of older ones. Tensors of another
    shape than the model's are on the device "meta". {} for other models, and for tensors that are not of this kind.
    """
    if not isinstance(model, TextModel | ImageModel):
        return {}
    logging = import_extra("transformers", "transformers", "hf:").utils.logging
    inner: Any = model.model
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        loaded, found = type(inner).from_pretrained(
            None,
            config=copy.deepcopy(inner.config),
            state_dict=dict(tensors),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception:  # it raises many kinds for tensors of other models
        return {}
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    state = {name: value for name, value in loaded.state_dict().items() if name not in found["missing_keys"]}
    if len(state) < len(found["missing_keys"]):
        return {}
    state.update({name: torch.empty(shape, device="meta") for name, shape, _ in found["mismatched_keys"]})
    state.update({name: tensors[name] for name in found["unexpected_keys"] if name in tensors})
    kinds = {value.dtype for value in tensors.values() if value.is_floating_point()}
    if len(kinds) == 1:  # as it is in the file
        kind = kinds.pop()
        state = {name: value.to(kind) if value.is_floating_point() else value for name, value in state.items()}
    return {f"model.{name}": value for name, value in state.items()}


def noise(model: nn.Module, samples: int, shape: tuple[int, ...]) -> Tensor:
    """A batch of noise that a model takes: token ids for a text model, else normal numbers [samples, *shape]."""
    if isinstance(model, TextModel):
        return torch.randint(1, model.vocabulary, (samples, *shape))
    return torch.randn(samples, *shape)


@dataclass(frozen=True)
class Library:
    """How a library's models are made."""

    build: Callable[[str, int, int, Mapping[str, int]], nn.Module]
    usual_input: Callable[[str], tuple[tuple[int, ...], int]]


LIBRARIES: dict[str, Library] = {
    "timm": Library(_build_timm, _usual_timm),
    "smp": Library(_build_smp, _usual_smp),
    "hf": Library(_build_hf, _usual_hf),
}
