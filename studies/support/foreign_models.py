"""Models of timm, transformers and others for `studies/coverage_third_party.py`: random weights, no downloads.

88 families of timm (one model each), 25 architectures of transformers with small configurations, and 16 others: small
networks of common kinds, segmentation_models_pytorch, and detectors of torchvision. Transformers of timm whose blocks
are all alike are built with fewer of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Callable[[int], Any]  # number of samples -> an example: a tensor, a tuple of arguments, a dict of keywords


@dataclass(frozen=True)
class ForeignModel:
    """A model of another project: how it is built, and its inputs."""

    name: str
    group: str  # "timm", "transformers" or "others"
    build: Callable[[], nn.Module]
    batch: Batch
    order: int = field(default=0)  # small models are measured first


def foreign_models() -> dict[str, ForeignModel]:
    """Every model of the study by name, roughly the smallest first."""
    models = [*_transformers(), *_others(), *_timm()]
    return {model.name: model for model in sorted(models, key=lambda model: model.order)}


def images(side: int, channels: int = 3) -> Batch:
    """Batches of random square images, [n, channels, side, side]."""
    return lambda n: torch.randn(n, channels, side, side)


# timm: model -> (side of its images, arguments)

_TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_base_patch16_224": (224, {"embed_dim": 192, "num_heads": 3, "depth": 3}),
    "botnet26t_256": (256, {}),
    "caformer_s18": (96, {}),
    "cait_xxs24_224": (96, {"img_size": 96, "depth": 4}),
    "coat_lite_tiny": (224, {}),
    "coatnet_pico_rw_224": (224, {}),
    "convit_tiny": (224, {"depth": 3}),
    "convmixer_768_32": (96, {}),
    "convnext_atto": (96, {}),
    "convnextv2_atto": (96, {}),
    "crossvit_9_240": (240, {}),
    "cs3darknet_focus_s": (96, {}),
    "cspdarknet53": (96, {}),
    "davit_tiny": (224, {}),
    "deit3_small_patch16_224": (96, {"img_size": 96, "depth": 4}),
    "densenetblur121d": (96, {}),
    "dla34": (96, {}),
    "dpn48b": (96, {}),
    "eca_nfnet_l0": (96, {}),
    "ecaresnet26t": (96, {}),
    "edgenext_xx_small": (96, {}),
    "efficientformerv2_s0": (224, {}),
    "efficientnet_b0_gn": (96, {}),
    "efficientvit_b0": (128, {}),
    "efficientvit_m0": (224, {}),
    "ese_vovnet19b_slim": (96, {}),
    "eva02_tiny_patch14_224": (98, {"img_size": 98, "depth": 4}),
    "fasternet_t0": (96, {}),
    "fastvit_t8": (128, {}),
    "focalnet_tiny_srf": (96, {}),
    "gcresnext26ts": (96, {}),
    "ghostnet_050": (96, {}),
    "gmlp_ti16_224": (224, {}),
    "halonet26t": (256, {}),
    "hardcorenas_a": (96, {}),
    "hgnetv2_b0": (96, {}),
    "hiera_tiny_224": (224, {}),
    "hrnet_w18_small": (96, {}),
    "inception_next_atto": (96, {}),
    "inception_v4": (128, {}),
    "lambda_resnet26t": (128, {}),
    "legacy_xception": (96, {}),
    "levit_128s": (224, {}),
    "mambaout_femto": (96, {}),
    "maxvit_pico_rw_256": (256, {}),
    "mixer_s32_224": (224, {}),
    "mixnet_s": (96, {}),
    "mnasnet_small": (96, {}),
    "mobilenetv3_small_050": (96, {}),
    "mobilenetv4_conv_small_035": (96, {}),
    "mobilenetv4_hybrid_medium": (128, {}),
    "mobileone_s0": (96, {}),
    "mobilevit_xxs": (128, {}),
    "mobilevitv2_050": (128, {}),
    "mvitv2_tiny": (96, {"img_size": 96}),
    "nest_tiny": (224, {}),
    "pit_ti_224": (224, {}),
    "poolformer_s12": (96, {}),
    "pvt_v2_b0": (96, {}),
    "regnety_002": (96, {}),
    "repvgg_a0": (96, {}),
    "repvit_m0_9": (128, {}),
    "res2net50_14w_8s": (96, {}),
    "resmlp_12_224": (224, {}),
    "resnest14d": (96, {}),
    "resnetblur18": (96, {}),
    "resnetv2_18": (96, {}),
    "resnetv2_50x1_bit": (96, {}),
    "rexnet_100": (96, {}),
    "samvit_base_patch16_224": (224, {"embed_dim": 192, "num_heads": 3, "depth": 2}),
    "selecsls42": (96, {}),
    "sequencer2d_s": (224, {"layers": (1, 1, 1, 1)}),
    "skresnet18": (96, {}),
    "starnet_s1": (96, {}),
    "swin_tiny_patch4_window7_224": (224, {"depths": (1, 1, 2, 1)}),
    "swinv2_tiny_window8_256": (256, {"depths": (1, 1, 2, 1)}),
    "tf_efficientnet_b0": (96, {}),
    "tiny_vit_5m_224": (224, {}),
    "tinynet_e": (96, {}),
    "tnt_s_patch16_224": (224, {"depth": 3}),
    "tresnet_m": (96, {}),
    "twins_svt_small": (224, {}),
    "visformer_tiny": (224, {}),
    "vit_relpos_small_patch16_224": (96, {"img_size": 96, "depth": 4}),
    "vit_small_patch14_reg4_dinov2": (98, {"img_size": 98, "depth": 4}),
    "vit_tiny_patch16_224": (96, {"img_size": 96, "depth": 6}),
    "volo_d1_224": (96, {"img_size": 96}),
    "xcit_nano_12_p16_224": (96, {"depth": 4}),
}


def _timm() -> list[ForeignModel]:
    """One model of each family of timm."""

    def builder(name: str, arguments: Mapping[str, Any]) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            import timm

            return timm.create_model(name, pretrained=False, **arguments)

        return build

    return [
        ForeignModel(name, "timm", builder(name, arguments), images(side), side)
        for name, (side, arguments) in _TIMM.items()
    ]


# transformers: small configurations

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
_BERT = {**_TEXT, "max_position_embeddings": 32}
_VISION = {**{k: v for k, v in _TEXT.items() if k != "vocab_size"}, "image_size": 64, "patch_size": 16}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 99}
_LLAMA = {**_TEXT, "num_key_value_heads": 2, "max_position_embeddings": 32}
_NO_CACHE = {"use_cache": False, "tie_word_embeddings": False}


def _text(*extra: str) -> Batch:
    """Batches of 16 tokens: input_ids, attention_mask, and what else is named."""

    def batch(n: int) -> dict[str, Tensor]:
        ids = torch.randint(1, 99, (n, 16))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **{name: ids % 2 for name in extra}}

    return batch


def _pixels(side: int = 64) -> Batch:
    """Batches of images under the name that models of transformers give them."""
    return lambda n: {"pixel_values": torch.randn(n, 3, side, side)}


_SEGFORMER = {
    "num_encoder_blocks": 3,
    "depths": [1, 1, 1],
    "hidden_sizes": [16, 32, 64],
    "num_attention_heads": [1, 2, 4],
    "sr_ratios": [4, 2, 1],
    "patch_sizes": [7, 3, 3],
    "strides": [4, 2, 2],
    "mlp_ratios": [2, 2, 2],
    "decoder_hidden_size": 64,
    "num_labels": 5,
}
_WAV2VEC2 = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_labels": 5,
    "vocab_size": 32,
    "classifier_proj_size": 32,
}
_WHISPER = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_mel_bins": 20,
    "max_source_positions": 50,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_MOBILEVIT = {
    "image_size": 64,
    "hidden_sizes": [32, 48, 64],
    "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 128],
    "num_attention_heads": 4,
    "num_labels": 10,
}

_HF: dict[str, tuple[str, str, dict[str, Any], Batch]] = {  # name -> (model's class, config's class, settings, inputs)
    "albert-seqcls (shared layers)": (
        "AlbertForSequenceClassification",
        "AlbertConfig",
        {**_BERT, "embedding_size": 32},
        _text(),
    ),
    "bert": ("BertModel", "BertConfig", _BERT, _text()),
    "bert-mlm (tied)": ("BertForMaskedLM", "BertConfig", _BERT, _text()),
    "bert-seqcls": (
        "BertForSequenceClassification",
        "BertConfig",
        {**_BERT, "num_labels": 3},
        _text("token_type_ids"),
    ),
    "clip-vision": ("CLIPVisionModel", "CLIPVisionConfig", _VISION, _pixels()),
    "convnext-imgcls": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "num_labels": 10},
        _pixels(),
    ),
    "deit-imgcls": ("DeiTForImageClassification", "DeiTConfig", {**_VISION, "num_labels": 10}, _pixels()),
    "detr-like: yolos": (
        "YolosForObjectDetection",
        "YolosConfig",
        {**_VISION, "image_size": [64, 64], "num_detection_tokens": 10, "num_labels": 5},
        _pixels(),
    ),
    "dinov2-imgcls": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**_VISION, "image_size": 56, "patch_size": 14, "mlp_ratio": 2, "num_labels": 10},
        _pixels(56),
    ),
    "distilbert-seqcls": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 99, "max_position_embeddings": 32},
        _text(),
    ),
    "electra-seqcls": (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {**_BERT, "embedding_size": 32},
        _text(),
    ),
    "gpt2 (default)": ("GPT2LMHeadModel", "GPT2Config", _GPT2, _text()),
    "gpt2 (use_cache=False, untied)": ("GPT2LMHeadModel", "GPT2Config", {**_GPT2, **_NO_CACHE}, _text()),
    "llama (default)": ("LlamaForCausalLM", "LlamaConfig", _LLAMA, _text()),
    "llama (use_cache=False)": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, **_NO_CACHE}, _text()),
    "mobilevit-imgcls": ("MobileViTForImageClassification", "MobileViTConfig", _MOBILEVIT, _pixels()),
    "qwen2 (use_cache=False)": ("Qwen2ForCausalLM", "Qwen2Config", {**_LLAMA, **_NO_CACHE}, _text()),
    "resnet-imgcls": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {
            "embedding_size": 16,
            "hidden_sizes": [32, 64, 64, 128],
            "depths": [1, 1, 1, 1],
            "layer_type": "bottleneck",
            "num_labels": 10,
        },
        _pixels(),
    ),
    "roberta-seqcls": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**_BERT, "pad_token_id": 0},
        _text(),
    ),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", _SEGFORMER, _pixels()),
    "swin-imgcls": (
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 64,
            "patch_size": 4,
            "embed_dim": 32,
            "depths": [1, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "num_labels": 10,
        },
        _pixels(),
    ),
    "t5 encoder": (
        "T5EncoderModel",
        "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
        _text(),
    ),
    "vit-imgcls": ("ViTForImageClassification", "ViTConfig", {**_VISION, "num_labels": 10}, _pixels()),
    "wav2vec2-seqcls": (
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        _WAV2VEC2,
        lambda n: {"input_values": torch.randn(n, 1600)},
    ),
    "whisper encoder": (
        "WhisperModel",
        "WhisperConfig",
        _WHISPER,
        lambda n: {"input_features": torch.randn(n, 20, 100)},
    ),
}


def _transformers() -> list[ForeignModel]:
    """Architectures of transformers; of Whisper the encoder."""

    def builder(name: str, model: str, config: str, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            import transformers

            built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
            return built.get_encoder() if name.endswith("whisper encoder") else built

        return build

    return [
        ForeignModel(f"hf:{name}", "transformers", builder(name, model, config, settings), batch)
        for name, (model, config, settings, batch) in _HF.items()
    ]


# others


class _InteractionNet(nn.Module):
    """Dense features through an MLP, sparse ones through bags of embeddings, and the products of all pairs (DLRM)."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.bags = nn.ModuleList(nn.EmbeddingBag(50, 16, mode="sum") for _ in range(3))
        self.top = nn.Sequential(nn.Linear(16 + 6, 32), nn.ReLU(), nn.Linear(32, 1))
        self.register_buffer("pairs", torch.tril_indices(4, 4, -1), persistent=False)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        vectors = torch.stack([x, *(bag(sparse[:, i]) for i, bag in enumerate(self.bags))], dim=1)
        products = vectors @ vectors.transpose(1, 2)
        return self.top(torch.cat([x, products[:, self.pairs[0], self.pairs[1]]], dim=1))


class _ResBlock(nn.Module):
    """Two 3x3 convolutions without norms and a scaled sum (EDSR)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.body(x)


class _SuperResolution(nn.Module):
    """EDSR: residual blocks, a long skip, pixel shuffle."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_ResBlock(width) for _ in range(5)), nn.Conv2d(width, width, 3, padding=1))
        self.up = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.tail = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return self.tail(self.up(x + self.blocks(x)))


class _RecurrentClassifier(nn.Module):
    """Embedding, bidirectional GRU, classes of the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 32)
        self.rnn = nn.GRU(32, 32, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(64, 32)
        self.fc = nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(F.relu(self.hidden(self.rnn(self.emb(tokens))[0][:, -1])))


class _TextLines(nn.Module):
    """CRNN: convolutions, the columns as steps of a bidirectional LSTM, classes of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.rnn = nn.LSTM(32 * 8, 64, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(128, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        return self.fc(self.rnn(x.permute(0, 3, 1, 2).flatten(2))[0])


class _Speech(nn.Module):
    """M5: one-dimensional convolutions on the waveform, an average, log-softmax."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers = [1, 32, 32, 64, 64], []
        for i, (before, after) in enumerate(pairwise(widths)):
            conv = nn.Conv1d(before, after, 80, stride=16) if i == 0 else nn.Conv1d(before, after, 3)
            layers += [conv, nn.BatchNorm1d(after), nn.ReLU(), nn.MaxPool1d(4)]
        self.features = nn.Sequential(*layers)
        self.fc1 = nn.Linear(64, 35)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean(-1, keepdim=True).permute(0, 2, 1)
        return F.log_softmax(self.fc1(x), dim=2)


class _Alignment(nn.Module):
    """PointNet's T-Net: a matrix for each cloud, near the identity."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.c1, self.c2 = nn.Conv1d(k, 32, 1), nn.Conv1d(32, 64, 1)
        self.f1, self.f2 = nn.Linear(64, 32), nn.Linear(32, k * k)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c2(F.relu(self.c1(x)))).amax(2)
        x = self.f2(F.relu(self.f1(x))) + torch.eye(self.k, dtype=x.dtype).flatten()
        return x.view(-1, self.k, self.k)


class _PointCloud(nn.Module):
    """PointNet: points and features turned by learned matrices, a maximum over points."""

    def __init__(self) -> None:
        super().__init__()
        self.t, self.ft = _Alignment(3), _Alignment(32)
        self.c1, self.b1 = nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32)
        self.c2, self.b2 = nn.Conv1d(32, 128, 1), nn.BatchNorm1d(128)
        self.head = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.3))
        self.fc = nn.Linear(64, 10)

    def forward(self, points: Tensor) -> Tensor:
        x = torch.bmm(points.transpose(2, 1), self.t(points)).transpose(2, 1)
        x = F.relu(self.b1(self.c1(x)))
        x = torch.bmm(x.transpose(2, 1), self.ft(x)).transpose(2, 1)
        return self.fc(self.head(F.relu(self.b2(self.c2(x))).amax(2)))


class _CausalBlock(nn.Module):
    """Two dilated causal convolutions with weight norm, cut at the end, and a skip (TCN)."""

    def __init__(self, before: int, after: int, dilation: int) -> None:
        super().__init__()
        weight_norm, self.cut = nn.utils.parametrizations.weight_norm, 2 * dilation
        self.c1 = weight_norm(nn.Conv1d(before, after, 3, padding=self.cut, dilation=dilation))
        self.c2 = weight_norm(nn.Conv1d(after, after, 3, padding=self.cut, dilation=dilation))
        self.skip = nn.Conv1d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.c1(x)[:, :, : -self.cut])
        y = F.relu(self.c2(y)[:, :, : -self.cut])
        return F.relu(y + self.skip(x))


class _Temporal(nn.Module):
    """TCN: causal blocks of growing dilation, classes of the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_CausalBlock(8 if i == 0 else 32, 32, 2**i) for i in range(3)))
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x)[:, :, -1])


class _TimeBlock(nn.Module):
    """A residual block whose channels are shifted by an embedding of the time step."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.n1, self.c1 = nn.GroupNorm(4, before), nn.Conv2d(before, after, 3, padding=1)
        self.time = nn.Linear(64, after)
        self.n2, self.c2 = nn.GroupNorm(4, after), nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.c1(F.silu(self.n1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.c2(F.silu(self.n2(y)))


class _Denoiser(nn.Module):
    """A diffusion U-Net: sinusoids of the time step, two resolutions, skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.t1, self.t2 = nn.Linear(16, 64), nn.Linear(64, 64)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.d1, self.down = _TimeBlock(16, 16), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.d2, self.middle = _TimeBlock(16, 32), _TimeBlock(32, 32)
        self.up = nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1)
        self.u1, self.norm, self.out = _TimeBlock(32, 16), nn.GroupNorm(4, 16), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        rates = torch.exp(-torch.arange(8, dtype=x.dtype))
        angles = step.to(x.dtype)[:, None] * rates
        time = self.t2(F.silu(self.t1(torch.cat([angles.sin(), angles.cos()], dim=1))))
        first = self.d1(self.first(x), time)
        deep = self.middle(self.d2(self.down(first), time), time)
        last = self.u1(torch.cat([self.up(deep), first], dim=1), time)
        return self.out(F.silu(self.norm(last)))


class _DetectorCore(nn.Module):
    """Backbone and head of a detector of torchvision: what it computes before boxes are chosen."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.detection import retinanet_resnet50_fpn

        detector = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(images).values()))


def _whole_detector() -> nn.Module:
    """SSDlite as torchvision has it: its output's sizes depend on the images."""
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=91)


def _generator() -> nn.Module:
    """DCGAN's generator: transposed convolutions from a vector to an image."""
    layers: list[nn.Module] = []
    for before, after, stride, padding in ((32, 64, 1, 0), (64, 32, 2, 1), (32, 16, 2, 1)):
        layers += [nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.Tanh())


def _denoising_cnn() -> nn.Module:
    """DnCNN: seven convolutions with batch norm at full resolution."""
    layers: list[nn.Module] = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()]
    for _ in range(5):
        layers += [nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(32, 1, 3, padding=1))


def _segmenter(kind: str, encoder: str) -> Callable[[], nn.Module]:
    """A network of segmentation_models_pytorch with 4 classes."""

    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, kind)(encoder, encoder_weights=None, classes=4)

    return build


def _others() -> list[ForeignModel]:
    """Small networks of common kinds, segmentation_models_pytorch, torchvision's detectors."""
    small: dict[str, tuple[Callable[[], nn.Module], Batch]] = {
        "DCGAN generator (ConvTranspose)": (_generator, lambda n: torch.randn(n, 32, 1, 1)),
        "DLRM-like (EmbeddingBag, interactions)": (
            _InteractionNet,
            lambda n: (torch.randn(n, 13), torch.randint(0, 50, (n, 3, 4))),
        ),
        "DnCNN": (_denoising_cnn, images(40, 1)),
        "EDSR-like (PixelShuffle)": (_SuperResolution, images(24)),
        "GRU classifier": (_RecurrentClassifier, lambda n: torch.randint(0, 50, (n, 12))),
        "M5 speech (Conv1d)": (_Speech, lambda n: torch.randn(n, 1, 8000)),
        "PointNet-like (T-Net, bmm)": (_PointCloud, lambda n: torch.randn(n, 3, 64)),
        "TCN (weight_norm, dilated causal)": (_Temporal, lambda n: torch.randn(n, 8, 50)),
        "conv + BiLSTM (CRNN)": (_TextLines, lambda n: torch.randn(n, 1, 32, 40)),
        "diffusion UNet (time embedding)": (
            _Denoiser,
            lambda n: (torch.randn(n, 3, 16, 16), torch.randint(0, 100, (n,))),
        ),
    }
    large: dict[str, tuple[Callable[[], nn.Module], Batch]] = {
        "smp DeepLabV3Plus mobilenet_v2": (_segmenter("DeepLabV3Plus", "mobilenet_v2"), images(64)),
        "smp FPN efficientnet-b0": (_segmenter("FPN", "efficientnet-b0"), images(64)),
        "smp Unet resnet18": (_segmenter("Unet", "resnet18"), images(64)),
        "smp UnetPlusPlus resnet18": (_segmenter("UnetPlusPlus", "resnet18"), images(64)),
        "torchvision retinanet core": (_DetectorCore, images(128)),
        "torchvision ssdlite320 (whole detector)": (
            _whole_detector,
            lambda n: ([torch.rand(3, 320, 320) for _ in range(n)],),
        ),
    }
    return [
        *(ForeignModel(f"other:{name}", "others", build, batch, 1) for name, (build, batch) in small.items()),
        *(ForeignModel(f"other:{name}", "others", build, batch, 99) for name, (build, batch) in large.items()),
    ]
