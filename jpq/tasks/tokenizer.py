"""Texts as the tokenizer in a folder of transformers has them, `hf:FOLDER`: token ids as in the model's training.

Nothing is downloaded, and no code of the folder runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jpq.files.model_files import KEPT, PREFIX, tokenizer_checksum, tokenizer_files
from jpq.tasks.third_party import class_names, import_extra, longest_text
from jpq.types import JpqError

LONGEST = 2**20  # tokens of a text, where neither model nor tokenizer has a limit


@dataclass(frozen=True)
class EncodedTexts:
    """Texts of all parts as token ids, each cut or padded to one length."""

    inputs: Mapping[str, Any]  # part -> ids, int64 [N, length], or {"input_ids": ids, "attention_mask": mask}
    length: int
    tokens: int  # number of different ones that a model has to know
    about: Mapping[str, Any]  # facts for records and files
    notes: tuple[str, ...]
    class_names: tuple[str, ...]  # by the number of the model's output; () where it names none


def encode_texts(model: str, parts: Mapping[str, Sequence[str]], length: int = 0) -> EncodedTexts | None:
    """The texts of each part as the tokenizer of a model `hf:FOLDER` has them; None where its folder holds none.

    Args:
        model: its name.
        parts: texts by the name of their part.
        length: to which all are cut or padded; 0: that of the longest text, and no more than the model's positions or
            the tokenizer's `model_max_length`, to which longer texts are cut.

    Raises JpqError for a tokenizer that cannot be read, has no words, or no token for padding.
    """
    files = tokenizer_files(model)
    if not files:
        return None
    folder = files[0].parent
    tokenizer = _read(folder)
    positions = longest_text(model.removeprefix(PREFIX)) or LONGEST
    limit = length or min(positions, int(tokenizer.model_max_length), LONGEST)
    specials = int(tokenizer.num_special_tokens_to_add())
    if limit <= specials:
        raise JpqError(
            f"hf:{folder} takes {limit} tokens, of which the tokenizer's own marks are {specials}. Set "
            "model_max_length in tokenizer_config.json, or max_position_embeddings in config.json, to more."
        )
    encoded = {part: _encode(tokenizer, texts, limit) for part, texts in parts.items()}
    length = length or max(len(tokens) for rows in encoded.values() for tokens in rows)
    inputs = {part: _pad(rows, length, int(tokenizer.pad_token_id), tokenizer) for part, rows in encoded.items()}
    largest = max(int(columns["input_ids"].max()) for columns in inputs.values())
    notes = []
    for part, texts in parts.items():
        full = [text for text, tokens in zip(texts, encoded[part], strict=True) if len(tokens) == limit]
        cut = sum(len(tokens) > limit for tokens in _encode(tokenizer, full, None))
        if cut:
            notes.append(f"{cut} of {len(texts)} texts of the {part} part are cut to {limit} tokens.")
    about = {
        "length": length,
        "tokenizer": f"{type(tokenizer).__name__} of transformers, with the files in {KEPT}",
        "tokenizer_checksum": tokenizer_checksum(model),
        "padding": int(tokenizer.pad_token_id),
    }
    names = class_names(model.removeprefix(PREFIX))
    return EncodedTexts(inputs, length, max(len(tokenizer), largest + 1), about, tuple(notes), names)


def _read(folder: Path) -> Any:
    """The tokenizer of a folder. Raises JpqError where transformers cannot read it."""
    transformers = import_extra("transformers", "transformers", f"{PREFIX}{folder}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files raise errors of the package that reads them
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise JpqError(
            f"transformers cannot read the tokenizer in '{folder}' ({reason[:200]}). Save it anew."
        ) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise JpqError(
            f"The tokenizer in '{folder}' knows no words: the file of its vocabulary is missing. Copy tokenizer.json "
            "(or vocab.txt) of the model there."
        )
    if tokenizer.pad_token_id is None:
        raise JpqError(
            f"The tokenizer in '{folder}' has no token for padding: give it one (tokenizer.pad_token = ...), as in "
            "training, and save it there."
        )
    return tokenizer


def _encode(tokenizer: Any, texts: Sequence[str], limit: int | None) -> list[list[int]]:
    """Token ids of each text, its marks among them, cut to a limit."""
    if not texts:
        return []
    cut = {"truncation": True, "max_length": limit} if limit is not None else {}
    rows: list[list[int]] = tokenizer(list(texts), padding=False, verbose=False, **cut)["input_ids"]
    return rows


def _pad(rows: Sequence[Sequence[int]], length: int, padding: int, tokenizer: Any) -> dict[str, Tensor]:
    """Ids and mask, int64 [N, length], padded on the tokenizer's side."""
    ids = torch.full((len(rows), length), padding)
    mask = torch.zeros_like(ids)
    for row, seen, tokens in zip(ids, mask, rows, strict=True):
        start = length - len(tokens) if tokenizer.padding_side == "left" else 0
        row[start : start + len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        seen[start : start + len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask}
