"""Weights files of common training scripts: where their tensors lie, which of them fit a model, what else is there."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor, nn

from jpq.files.paths import expand_home
from jpq.files.tensors import ZIP_MAGIC, one_line, read_safetensors, read_torch
from jpq.files.untrusted import check_file
from jpq.tasks.third_party import rename_saved_weights
from jpq.tasks.weight_names import AVERAGED, Match, Misfit, NamedState, Tensors, equal
from jpq.types import JpqError

SUFFIXES = (".pth", ".pt", ".th", ".bin", ".ckpt", ".tar", ".pkl", ".safetensors")

POSITIONS = re.compile(r"(?:^|[._])pos(?:ition|_|$)")  # in the name of a table with an entry for each position

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

DEEP = 4  # dicts within dicts that are searched

HEAD = 64  # bytes that tell what a file is

NAMED = 3  # names that an error lists

SAVE = "torch.save(model.state_dict(), 'weights.pth')"


def load_weights(model: nn.Module, path: str | Path) -> tuple[str, ...]:
    """Copy weights from a file into `model`; every name and shape must fit, and all must be finite.

    Takes what torch.save (.pth, .pt, .th, .bin, .ckpt, .tar) or safetensors wrote: a dict of tensors, plain or within
    others, such as under `state_dict`, `model` or `model_state_dict`, with names as DataParallel, torch.compile, FSDP
    or Lightning write them. Averaged weights (`state_dict_ema`) come before those that they are averages of. Nothing
    in the file is executed.

    Returns sentences on what was cast, left out or chosen. Raises JpqError for a file that cannot be read, that holds
    several models which fit, or none.
    """
    path = expand_home(path)
    return load_content(model, read_weights(path), path)


def load_content(model: nn.Module, content: Any, path: Path) -> tuple[str, ...]:
    """Copy weights from the content of a weights file, which `path` names in errors: see `load_weights`."""
    tensors_by_place = dict(tensor_dicts(content))
    if not tensors_by_place:
        raise JpqError(f"Weights '{path}' hold no dict of tensors. Save them as {SAVE}.")
    named = NamedState({name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)})
    try:
        place, match = _choose(tensors_by_place, named, path)
    except JpqError:
        renamed = {place: rename_saved_weights(model, tensors) for place, tensors in tensors_by_place.items()}
        tensors_by_place = {place: tensors for place, tensors in renamed.items() if tensors}
        if not tensors_by_place:
            raise
        place, match = _choose(tensors_by_place, named, path)
    _check_values(match.tensors, named.state, path)
    model.load_state_dict(dict(match.tensors), strict=False)
    return tuple(_notes(place, match, tensors_by_place, named.state, path))


def read_weights(path: Path) -> Any:
    """The content of a weights file. Raises JpqError for one that is missing, foreign or damaged."""
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES and not p.name.startswith("."))
        example = f", such as {path / files[0]}" if files else ""
        raise JpqError(f"Weights '{path}' are a folder. Give a file with --weights{example}.")
    if not path.is_file():
        raise JpqError(f"There is no weights file '{path}'. Check --weights.")
    if path.name.endswith(".index.json"):
        raise JpqError(f"Weights '{path}' are the index of several files. Save the model's weights in one: {SAVE}.")
    if path.suffix.lower() == ".npz":
        raise JpqError(
            f"Weights '{path}' are arrays of NumPy. Where their names are those of the model's state_dict, save them "
            f"as tensors: torch.save({{name: torch.from_numpy(a) for name, a in numpy.load('{path.name}').items()}}, "
            "'weights.pth')."
        )
    if path.suffix.lower() not in SUFFIXES:
        raise JpqError(f"Weights '{path}' end in '{path.suffix}'; jpq reads {', '.join(SUFFIXES)}, of PyTorch.")
    if not check_file(path):
        raise JpqError(f"Weights '{path}' cannot be read: the file is empty. Copy or download it again.")
    other = _other_content(path)
    if other:
        raise JpqError(f"Weights '{path}' cannot be read: the file is {other}.")
    try:
        return read_safetensors(path) if path.suffix.lower() == ".safetensors" else read_torch(path, True)
    except JpqError as error:
        cause = error.__cause__ or error  # a KeyError's text is the byte that no pickle has there
        reason = "it is no pickle" if isinstance(cause, KeyError) else one_line(cause).rstrip(".")
        raise JpqError(f"Weights '{path}' cannot be read: {reason}. {_advice(path)}") from error


def _other_content(path: Path) -> str:
    """What a file is where its first bytes show something else than its name, and what to do; else ""."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    is_safetensors = path.suffix.lower() == ".safetensors"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the weights themselves: fetch them with git lfs pull"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not weights: download it again from its direct link, logged in where that is needed"
    if not is_safetensors and head[8:10] == b'{"':
        return "of safetensors: name it so that it ends in .safetensors"
    if is_safetensors and (head.startswith(ZIP_MAGIC) or (head[:1] == b"\x80" and head[8:9] != b"{")):
        return "one that torch.save wrote: name it so that it ends in .pth"
    return ""


def tensor_dicts(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(place, tensors) of each dict in a file's content that holds tensors by name, the outermost first.

    A place is the keys on the way, joined by dots; that of the whole content is "".
    """
    if not isinstance(content, Mapping) or "param_groups" in content:  # the state of an optimizer
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in content.items():
        if isinstance(key, str) and depth < DEEP:
            yield from tensor_dicts(value, f"{place}.{key}" if place else key, depth + 1)


def _choose(by_place: Mapping[str, Tensors], named: NamedState, path: Path) -> tuple[str, Match]:
    """(place, match) of the tensors that fit the model: the averaged ones where there are others."""
    matches = {place: named.match(tensors) for place, tensors in by_place.items()}
    fitting = {place: match for place, match in matches.items() if match is not None}
    if not fitting:
        raise _misfit_error(by_place, named, path)
    averaged = [place for place in fitting if AVERAGED.search(place)]
    chosen, *rivals = averaged or list(fitting)
    rivals = [place for place in rivals if not equal(fitting[place].tensors, fitting[chosen].tensors)]
    if rivals:
        places = " and ".join(f"'{place}'" for place in (chosen, *rivals))
        keys = "".join(f"[{key!r}]" for key in chosen.split(".") if key)
        raise JpqError(
            f"Weights '{path}' hold several models that fit: {places}. Save the one you mean, such as "
            f"torch.save(torch.load('{path.name}'){keys}, 'weights.pth')."
        )
    return chosen, fitting[chosen]


def _misfit_error(by_place: Mapping[str, Tensors], named: NamedState, path: Path) -> JpqError:
    """The error for weights that do not fit: which names or shapes differ, and what to do."""
    for tensors in by_place.values():
        rivals = [f"'{match.prefix}'" for match in named.behind_each_prefix(named.plain(tensors))]
        if rivals:
            return JpqError(
                f"Weights '{path}' hold several models that fit, with names behind {' and '.join(rivals)}. Save the "
                f"one you mean: {SAVE}."
            )
    misfits = [named.misfit(tensors) for tensors in by_place.values()]
    misfit = max(misfits, key=lambda m: (len(named.own.keys() & m.tensors), len(m.tensors)))
    shapes = [f"{name} {list(misfit.tensors[name].shape)} for {list(named.shape(name))}" for name in misfit.shapes]
    counts = (
        _count_text("missing", misfit.missing),
        _count_text("unexpected", misfit.unexpected),
        _count_text("differently shaped", shapes),
    )
    why = "; ".join(filter(None, counts))
    return JpqError(f"Weights '{path}' do not fit the model: {why}. {_misfit_advice(misfit, named)}")


def _misfit_advice(misfit: Misfit, named: NamedState) -> str:
    """What to do about weights that do not fit: other classes or channels, a part of the model, or another model."""
    layers = {name.rpartition(".")[0] for name in (*misfit.shapes, *misfit.missing)}
    if not misfit.shapes and misfit.missing and all(name.endswith(STATISTICS) for name in misfit.missing):
        return f"The file lacks the statistics of norms, which are no parameters: save the whole state, {SAVE}."
    if not misfit.unexpected and not misfit.shapes and len(layers) <= 2 and len(layers) < len(named.own) / 4:
        return (
            f"The file lacks {' and '.join(sorted(layers))}: train the whole model first, and give all of its weights."
        )
    if not misfit.shapes and not misfit.missing:
        return (
            "All weights of this model are there, and more: give the model that has the others too with --model, or "
            "save the weights without them."
        )
    weights = [name for name in misfit.shapes if misfit.tensors[name].dim() > 1]
    if misfit.shapes and not misfit.missing and all(POSITIONS.search(name) for name in misfit.shapes):
        return "Their table of positions has another length: give images of the size (--image-size) of their training."
    if misfit.missing or misfit.unexpected or len(layers) != 1 or not weights:
        return "Choose the model that they were trained for with --model."
    old, new = misfit.tensors[weights[0]].shape, named.shape(weights[0])
    if old[0] != new[0] and old[1:] == new[1:]:
        return (
            f"They have {old[0]} outputs in layer '{layers.pop()}', and the data {new[0]} classes: give the data that "
            f"they were trained for, or train the model further with {new[0]} outputs and give the weights of that."
        )
    if old[0] == new[0] and old[1] != new[1] and old[2:] == new[2:]:
        way = (
            " (--mean and --std of three values turn grey images into colour ones)"
            if (old[1], new[1]) == (3, 1)
            else ""
        )
        return (
            f"They take {old[1]} channels in layer '{layers.pop()}', and the images have {new[1]}: give images of "
            f"{old[1]} channels{way}."
        )
    return "Choose the model, and the size of images, that they were trained for."


def _check_values(tensors: Tensors, state: Tensors, path: Path) -> None:
    """Raise JpqError for NaN, infinity, and integers where the model has real numbers."""
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not value.float().isfinite().all()]
    if bad:
        raise JpqError(
            f"Weights '{path}' hold NaN or infinity: {_count_text('in', bad)}. Use a checkpoint from before that."
        )
    whole = [n for n, value in tensors.items() if state[n].is_floating_point() and not value.is_floating_point()]
    if whole:
        raise JpqError(
            f"Weights '{path}' are quantized already: {_count_text('of integers', whole)}. Give those of the float "
            "model."
        )


def _notes(place: str, match: Match, by_place: Mapping[str, Tensors], state: Tensors, path: Path) -> Iterator[str]:
    """Sentences on what was cast, left out or chosen."""
    types = Counter(
        str(value.dtype).removeprefix("torch.")
        for name, value in match.tensors.items()
        if value.is_floating_point() and value.dtype != state[name].dtype
    )
    if types:
        kinds = " and ".join(types)
        yield f"Weights '{path.name}' are stored as {kinds}; they were cast to the model's own precision."
    if AVERAGED.search(f"{place}.{match.prefix}") and (len(by_place) > 1 or match.left_out):
        yield f"Of the weights in '{path.name}' those averaged over training were taken ('{place or match.prefix}')."
    if match.left_out:
        begins = ", ".join(sorted({name.partition(".")[0] for name in match.left_out})[:NAMED])
        yield (
            f"{len(match.left_out)} tensors in '{path.name}' that are no part of this model were left out ({begins})."
        )


@dataclass(frozen=True)
class PickleSummary:
    """What a file of torch.save holds beside tensors, as far as its opcodes tell without running them."""

    outer: str = ""  # class of the outermost object; "" for a dict
    foreign: str = ""  # first class or function that has nothing to do with tensors
    is_script: bool = False  # written by torch.jit.save


def summarize_pickle(path: Path) -> PickleSummary:
    """The classes that a zipped file of torch.save names; nothing is imported or called, and errors tell nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.endswith("constants.pkl") for name in names):
                return PickleSummary(is_script=True)
            program = archive.read(next(name for name in names if name.endswith("/data.pkl")))
        classes = list(_named_classes(program))
    except Exception:  # whatever a damaged file raises: its reader has said so
        return PickleSummary()
    is_dict = not classes or classes[0][1] > 2 or classes[0][0].startswith("collections.")
    foreign = next(
        (name for name, _ in classes if not name.startswith(("collections.", "torch._utils.")) and not _is_torch(name)),
        "",
    )
    return PickleSummary("" if is_dict else classes[0][0], foreign)


def _is_plain_pickle(path: Path) -> bool:
    """Whether Python's pickle wrote tensors into a file, without torch.save; nothing is imported or called."""
    try:
        with path.open("rb") as file:
            return any(name == "torch.storage._load_from_bytes" for name, _ in _named_classes(file))
    except Exception:  # whatever a damaged file raises: its reader has said so
        return False


def _is_torch(name: str) -> bool:
    """Whether a name is torch's own for a storage, type, size or device."""
    return name.startswith("torch.") and name.count(".") == 1


def _named_classes(program: bytes | BinaryIO) -> Iterator[tuple[str, int]]:
    """(class or function, number of opcodes before it) for each that a pickle names."""
    texts: list[str] = []
    for number, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", "."), number
        elif opcode.name == "STACK_GLOBAL" and len(texts) > 1:
            yield f"{texts[-2]}.{texts[-1]}", number
        elif isinstance(argument, str):
            texts.append(argument)


def _advice(path: Path) -> str:
    """What to do about a file that cannot be read."""
    if path.suffix.lower() == ".safetensors":
        return "Copy or download it again."
    summary = summarize_pickle(path)
    if summary.is_script:
        return (
            f"It is a TorchScript program; save its weights: torch.save(torch.jit.load('{path.name}').state_dict(), "
            "'weights.pth')."
        )
    if summary.outer:
        return (
            f"It is a whole model ({summary.outer}), not its weights alone: where you trust the file, and its code can "
            f"be imported, model = torch.load('{path.name}', weights_only=False); {SAVE}."
        )
    if summary.foreign.startswith("numpy."):
        return (
            "Beside tensors it holds arrays of NumPy: where you trust the file, save its weights as tensors, content = "
            f"torch.load('{path.name}', weights_only=False); torch.save({{name: torch.as_tensor(w) for name, w in "
            "content.items()}, 'weights.pth'), with content['state_dict'], or the key that they lie under, for content."
        )
    if summary.foreign:
        return (
            f"Beside tensors it holds Python objects ({summary.foreign}): where you trust the file, save its tensors "
            f"alone, content = torch.load('{path.name}', weights_only=False); torch.save(content['state_dict'], "
            "'weights.pth'), with the key that they lie under (and .state_dict() behind it where that is a model)."
        )
    if _is_plain_pickle(path):
        return (
            "It was written by pickle.dump: where you trust the file, content = "
            f"pickle.load(open('{path.name}', 'rb')); torch.save(content, 'weights.pth')."
        )
    if path.suffix.lower() == ".pkl":
        return f"Load it with the library that wrote it, and save the model's tensors: {SAVE}."
    return f"Copy or download it again, or save it anew: {SAVE}."


def _count_text(what: str, names: Sequence[str]) -> str:
    """The number of names and the first three: `5 missing (a, b, c, ...)`; "" where there is none."""
    return f"{len(names)} {what} ({', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''})" if names else ""
