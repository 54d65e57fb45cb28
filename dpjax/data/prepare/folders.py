"""A directory of images, `SPLIT/CLASS/IMAGE`, as a TFDS data set under a name of your choice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

__all__ = ["builder_class", "is_folder"]

_IMAGES = (".png", ".jpg", ".jpeg")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def is_folder(source: Path) -> bool:
    """Tells whether `source` is a directory with a split named train."""
    return (source / "train").is_dir()


def builder_class(name: str, source: Path) -> Any:
    """The TFDS builder of a directory of images; the files are stored as they are.

    Args:
      name: of the data set, lower case.
      source: has one directory for each split ("train" and, say, "test"), each with one directory
        for each class, with PNG or JPEG files. Classes are numbered in alphabetical order.

    Raises:
      ValueError: for another name, a class without images, a split with other classes, or a file
        that is no image.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"dataset={name!r} must match {_NAME.pattern}.")
    splits = {path.name: _images(path) for path in sorted(source.iterdir()) if path.is_dir()}
    classes = sorted(splits["train"])
    for split, found in splits.items():
        if sorted(found) != classes:
            raise ValueError(f"split {split!r} has the classes {sorted(found)}, not {classes}.")
    sizes = {_size(f) for found in splits.values() for files in found.values() for f in files}
    height, width = sizes.pop() if len(sizes) == 1 else (None, None)

    class Folder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Images from a directory."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=type(self).__doc__,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(height, width, 3)),
                        "label": tfds.features.ClassLabel(names=classes),
                    }
                ),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {split: self._generate_examples(found) for split, found in splits.items()}

        def _generate_examples(
            self, found: dict[str, list[Path]]
        ) -> Iterator[tuple[str, dict[str, Any]]]:
            for label in classes:
                for file in found[label]:
                    yield f"{label}/{file.name}", {"image": file.read_bytes(), "label": label}

    Folder.name = name
    return Folder


def _images(split: Path) -> dict[str, list[Path]]:
    """The files of each class."""
    found = {
        label.name: sorted(f for f in label.iterdir() if f.suffix.lower() in _IMAGES)
        for label in split.iterdir()
        if label.is_dir()
    }
    empty = sorted(label for label, files in found.items() if not files)
    if empty or not found:
        raise ValueError(f"split {split.name!r} has no images of {empty or 'any class'}.")
    return found


def _size(file: Path) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except OSError as error:
        raise ValueError(f"{file} is not an image: {error}.") from error
