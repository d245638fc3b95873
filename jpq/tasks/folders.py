"""Folders of images: which reader takes one, by what it holds."""

from __future__ import annotations

from dataclasses import replace

from jpq.tasks.datasets import ReadOptions, Source
from jpq.tasks.readers import class_folders, pairs, restoration, segmentation
from jpq.types import JpqError


def read(path: str, options: ReadOptions) -> Source:
    """The images of a folder, by what it holds: with masks, to be restored, or in class folders (`class_folders`).

    Folders called `images` and `masks` are judged by their files, unless --task says what they are.
    """
    if options.task == "restoration" or options.noise or options.scale > 1:
        return restoration.read(path, options)
    has_masks, sentence = options.task == "segmentation", ""
    if not options.task and pairs.is_arranged(path, pairs.MASKS):
        has_masks, sentence = segmentation.judge_contents(path)
    elif not options.task:
        sentence = restoration.classes_note(path)
    if not has_masks:
        _refuse_flags_of_masks(path, options)
    reader = segmentation if has_masks else class_folders
    source = reader.read(path, options)
    return replace(source, notes=(*source.notes, sentence)) if sentence else source


def _refuse_flags_of_masks(path: str, options: ReadOptions) -> None:
    """Raise JpqError for flags that say nothing of images in class folders."""
    for flag, given, images in (
        ("crop", options.crop, "with masks or to be restored"),
        ("void", options.void != ReadOptions.void, "with masks"),
    ):
        if given:
            raise JpqError(f"--{flag} is for images {images}, and 'folder:{path}' has class folders. Leave it out.")
