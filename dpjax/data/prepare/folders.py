"""A directory of images, `SPLIT/CLASS/IMAGE`, as a TFDS data set under a name of your choice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from dpjax.data.prepare.builders import Record, records_builder

__all__ = ["builder_class", "is_folder"]

_IMAGES = (".png", ".jpg", ".jpeg")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def is_folder(source: Path) -> bool:
    """Whether `source` is a directory with a split named train."""
    return (source / "train").is_dir()


def builder_class(name: str, source: Path) -> Any:
    """Returns the TFDS builder of a directory of images; the files are stored unchanged.

    Args:
        name: name of the data set, in lower case.
        source: directory with one folder per split ("train" and, say, "test"), each with one folder
            of PNG or JPEG files per class. Classes are numbered in alphabetical order.

    Raises:
        ValueError: the name is invalid, a class has no images, the splits have different classes,
            or a file is not an image.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"dataset={name!r} must match {_NAME.pattern}.")
    splits = {path.name: _images(path) for path in sorted(source.iterdir()) if path.is_dir()}
    classes = sorted(splits["train"])
    for split, by_class in splits.items():
        if sorted(by_class) != classes:
            raise ValueError(f"split {split!r} has the classes {sorted(by_class)}, not {classes}.")
    sizes = {_size(f) for by_class in splits.values() for files in by_class.values() for f in files}
    height, width = sizes.pop() if len(sizes) == 1 else (None, None)  # None: sizes vary

    features = {
        "image": tfds.features.Image(shape=(height, width, 3)),
        "label": tfds.features.ClassLabel(names=classes),
    }

    def records() -> dict[str, Iterator[Record]]:
        return {split: _records(by_class) for split, by_class in splits.items()}

    return records_builder(name, "Images from a directory.", features, records)


def _records(by_class: dict[str, list[Path]]) -> Iterator[Record]:
    for label in sorted(by_class):
        for file in by_class[label]:
            yield f"{label}/{file.name}", {"image": file.read_bytes(), "label": label}


def _images(split: Path) -> dict[str, list[Path]]:
    """Returns the files of each class."""
    by_class = {
        label.name: sorted(f for f in label.iterdir() if f.suffix.lower() in _IMAGES)
        for label in split.iterdir()
        if label.is_dir()
    }
    empty = sorted(label for label, files in by_class.items() if not files)
    if empty or not by_class:
        raise ValueError(f"split {split.name!r} has no images of {empty or 'any class'}.")
    return by_class


def _size(file: Path) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except OSError as error:
        raise ValueError(f"{file} is not an image: {error}.") from error
