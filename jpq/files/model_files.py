"""Files in the folder of a model of transformers, `hf:FOLDER`, that say what it is: config.json and its tokenizer's.

A run keeps copies of them in its own folder (`KEPT`), so that its data can be read, and its model built, when the first
folder is gone or holds another model. Nothing of transformers is imported.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from jpq.files.paths import expand_home
from jpq.types import JpqError

PREFIX = "hf:"
KEPT = "hf-model"  # folder in that of a run, with copies of config.json and the tokenizer's files

CONFIG = "config.json"
WORDS = (  # files of which a folder with a tokenizer has one at least
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "spm.model"),
    *("sentencepiece.bpe.model", "sentencepiece.model", "tokenizer.model"),
)
FILES = (*WORDS, "merges.txt", "bpe.codes", "dict.txt", "special_tokens_map.json", "added_tokens.json")
KEPT_FILES = (CONFIG, *FILES)


def tokenizer_files(model: str) -> list[Path]:
    """The files of the tokenizer beside a model `hf:FOLDER` or `hf:FOLDER/config.json`; [] for other models."""
    folder = _folder(model)
    if folder is None or not any((folder / name).is_file() for name in WORDS):
        return []
    return [folder / name for name in FILES if (folder / name).is_file()]


def tokenizer_checksum(model: str) -> str:
    """sha256 over the names and bytes of a tokenizer's files; "" for a model without one."""
    files = tokenizer_files(model)
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest() if files else ""


def model_files(model: str) -> list[Path]:
    """config.json and the tokenizer's files of a model `hf:FOLDER`; [] for other models."""
    path = expand_home(model.removeprefix(PREFIX))
    config = path / CONFIG if path.is_dir() else path
    return [config, *tokenizer_files(model)] if model.startswith(PREFIX) and config.is_file() else []


def keep_files(model: str, folder: Path) -> None:
    """Copy config.json and the tokenizer's files of a model `hf:FOLDER` into a run's folder; nothing for others.

    Raises JpqError where they cannot be written.
    """
    files = model_files(model)
    kept = folder / KEPT
    if not files or files[0].parent.resolve() == kept.resolve():
        return
    wanted = {CONFIG: files[0], **{file.name: file for file in files[1:]}}
    try:
        kept.mkdir(parents=True, exist_ok=True)
        for name in KEPT_FILES:  # also those of an earlier run that this model has not
            (kept / name).unlink(missing_ok=True)
        for name, file in wanted.items():
            shutil.copyfile(file, kept / name)
    except OSError as error:
        raise JpqError(f"Cannot write to {kept}: {error.strerror}. Choose another folder with --out.") from error


def kept_model(model: str, folder: Path) -> str:
    """A model's name with the copies in a run's folder, where they are there; else as it is."""
    return f"{PREFIX}{folder / KEPT}" if _is_kept(model, folder) else model


def text_model(model: str, folder: Path | None = None) -> str:
    """The model whose tokenizer reads the texts of a run: `model` if it is of transformers, else "".

    Args:
        model: name that the run was given.
        folder: of the run, where it has begun: the copies in it then stand for the model's own folder. Runs of
            earlier versions have none, and read texts by jpq's own word numbers: "".
    """
    if not model.startswith(PREFIX):
        return ""
    if folder is None:
        return model
    return kept_model(model, folder) if _is_kept(model, folder) else ""


def _is_kept(model: str, folder: Path) -> bool:
    return model.startswith(PREFIX) and (folder / KEPT / CONFIG).is_file()


def _folder(model: str) -> Path | None:
    """The folder of a model `hf:...` that is there."""
    if not model.startswith(PREFIX):
        return None
    path = expand_home(model.removeprefix(PREFIX))
    folder = path if path.is_dir() else path.parent
    return folder if folder.is_dir() else None
