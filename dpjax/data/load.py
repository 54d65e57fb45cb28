"""Opens a data set by name, and checks it: mistakes are reported here, before training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dpjax.data.dataset import Dataset
from dpjax.data.directory import (
    data_dir_or_default,
    find_directory,
    open_directory,
    split_name,
    split_pieces,
)
from dpjax.data.images import ImageSpec
from dpjax.data.prepare import EMBEDDED, SOURCES, prepare_builder
from dpjax.data.records import images_dataset, text_dataset, with_units
from dpjax.files import did_you_mean

__all__ = ["load", "load_text", "stored_examples"]

_MEMORY_LIMIT = 2 * 2**30


def load(
    name: str,
    *,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    spec: ImageSpec | None = None,
    unit: str | None = None,
    memory_limit: int = _MEMORY_LIMIT,
) -> Dataset:
    """Opens an image-classification data set.

    Args:
        name: "digits" and "mnist5k" are prepared on first use. Any other TFDS data set must have
            been prepared in `data_dir` with file_format array_record (or parquet);
            "name/config:1.0.0" picks a config and a version.
        split: TFDS slicing syntax: "train", "train[:80%]", "train+validation".
        data_dir: directory of the TFDS data sets; default $DPJAX_DATA_DIR or ~/.cache/dpjax/data.
        spec: size, channels and features; by default as stored.
        unit: the column that says whose data an example is; None leaves that open.
        memory_limit: bytes; the images of a split whose pixels take at most this stay in memory
            once they are read.

    Returns:
        The data set, with splits, features, channels and label range checked. Labels and content
        hashes come from an index, which is computed once by reading and decoding every record;
        images are read when they are needed. The network is never used.

    Raises:
        ValueError: the message names the argument and its value.
    """
    builder = _open(name, data_dir)
    dataset = images_dataset(
        builder, name, split, spec=spec or ImageSpec(), memory_limit=memory_limit
    )
    return with_units(builder, dataset, unit)


def load_text(
    name: str,
    *,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    tokenize: Callable[[list[str]], np.ndarray],
    label_key: str | None = None,
    unit: str | None = None,
) -> Dataset:
    """Opens a text-classification data set and tokenizes it.

    Args:
        name: e.g. "newsgroups20", prepared in `data_dir`.
        split: TFDS slicing syntax.
        data_dir: as for `load`.
        tokenize: maps texts [n] to int32 tokens [n, L]; its padding token should be 0, because
            padding examples are zeros. If it has an attribute `digest`, a string that names what it
            computes, the tokens are kept on disk.
        label_key: the label feature; None finds it.
        unit: as for `load`.

    Returns:
        The data set; inputs are int32 [L].

    Raises:
        ValueError: as for `load`, or `tokenize` returns another dtype or shape.
    """
    builder = _open(name, data_dir)
    dataset = text_dataset(builder, name, split, tokenize=tokenize, label_key=label_key)
    return with_units(builder, dataset, unit)


def stored_examples(
    name: str, *, split: str = "train", data_dir: str | os.PathLike[str] | None = None
) -> int | None:
    """Returns how many examples a split has, from its description: no record is read.

    None for a data set of the package that has not been prepared, which its first use does.

    Args:
        name: as for `load`.
        split: as for `load`.
        data_dir: as for `load`.

    Raises:
        ValueError: as for `load`.
    """
    if name in EMBEDDED and find_directory(name, data_dir_or_default(data_dir)) is None:
        return None
    builder = _open(name, data_dir)
    return sum(piece.stop - piece.start for piece in split_pieces(builder, split))


def _open(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    root = data_dir_or_default(data_dir)
    if name in EMBEDDED:
        return open_directory(prepare_builder(EMBEDDED[name], root))
    _check_name(name, root)
    directory = find_directory(name, root)
    if directory is None:
        raise ValueError(_not_prepared(name, root))
    return open_directory(directory)


def _check_name(name: str, root: Path) -> None:
    base = split_name(name)[0]
    folders = root.iterdir() if root.is_dir() else []
    prepared = [path.name for path in folders if path.is_dir() and path.name.isidentifier()]
    known = {*EMBEDDED, *SOURCES, *tfds.list_builders(with_community_datasets=False)}
    if base not in known and base not in prepared:
        local = sorted({*EMBEDDED, *SOURCES, *prepared})
        # TFDS registers hundreds of names; one that is available here is the likelier intention.
        hint = did_you_mean(base, local, cutoff=0.75) or did_you_mean(base, {*known, *local})
        raise ValueError(f"dataset={name!r} is unknown.{hint} Known without TFDS: {local}.")


def _not_prepared(name: str, root: Path) -> str:
    base = split_name(name)[0]
    missing = "" if root.is_dir() else " (which does not exist)"
    message = f"dataset={name!r} is not prepared in data_dir={str(root)!r}{missing}. "
    if base in SOURCES:
        return message + (
            f"Run: dpjax prepare {base} --source=FILE --data_dir={root} with "
            f"FILE one of: {SOURCES[base].files}."
        )
    return message + (
        "Prepare it with TFDS on a machine with network access, "
        f"tfds build {base} --file_format=array_record --data_dir={root}."
    )
