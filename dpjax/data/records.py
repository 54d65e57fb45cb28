"""Turns a prepared TFDS split into a `Dataset`, whose inputs are read when they are needed."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from dpjax.data.dataset import Dataset, Source
from dpjax.data.directory import Piece, find_feature, split_pieces
from dpjax.data.images import ImageSpec, decode, output_shape
from dpjax.data.index import (
    Index,
    content_key,
    kept,
    pieces_of,
    read_column,
    read_index,
    read_records,
    records_of,
    workers,
)  # fmt: skip

__all__ = ["images_dataset", "text_dataset", "with_units"]

Tokenize = Callable[[list[str]], np.ndarray]

_CHANGED = (
    "{} is not the one that was indexed: the data changed or is damaged. Prepare it again, or "
    "delete {} if the change is meant."
)


def images_dataset(
    builder: Any, name: str, split: str, *, spec: ImageSpec, memory_limit: int
) -> Dataset:
    """Opens one split of an image-classification data set.

    Args:
        builder: an opened TFDS builder.
        name: name of the data set.
        split: TFDS slicing syntax.
        spec: how images are brought to one shape.
        memory_limit: bytes; the images of a split whose pixels take at most this stay in memory
            once they are read.

    Guarantees:
        An image and its label are those that the digest of the data set was computed from, or
        reading them raises.

    Raises:
        ValueError: as for `split_pieces`, `find_feature`, `output_shape`, `read_index` and
            `Dataset`. Reading raises if an image was damaged or changed since it was indexed;
            the message names its position in the split.
    """
    image_key = find_feature(builder, tfds.features.Image, spec.image_key, "image_key")
    label_key = find_feature(builder, tfds.features.ClassLabel, spec.label_key, "label_key")
    feature = builder.info.features[image_key]
    if np.dtype(feature.np_dtype) != np.uint8:
        raise ValueError(f"dtype={feature.np_dtype} of {name!r} images must be uint8.")
    shape = output_shape(feature.shape, spec)
    _, _, keys, labels = _opened(builder, split, image_key, label_key)
    records, where = records_of(builder, split), f"{name!r} split {split!r}"
    keeps = len(keys) * int(np.prod(shape)) <= memory_limit
    pixels = np.zeros((len(keys) if keeps else 0, *shape), np.uint8)  # the system gives it lazily
    present = np.zeros(len(pixels), bool)
    pool = ThreadPoolExecutor(workers(), thread_name_prefix="dpjax-decode")

    def decoded(rows: np.ndarray) -> np.ndarray:
        out = np.zeros((len(rows), *shape), np.uint8)
        for at, record in enumerate(read_records(records, rows, where)):
            row, content = int(rows[at]), record[image_key]
            same = content_key(content) == keys[row].tobytes()
            if not same or int(record[label_key]) != labels[row]:
                what = f"image {row} of {where}"
                raise ValueError(_CHANGED.format(what, Path(builder.data_path) / "index"))
            try:
                out[at] = decode(content, shape, spec)
            except ValueError as error:
                raise ValueError(f"image {row} of {where} cannot be read: {error}.") from error
        return out

    def read(rows: np.ndarray) -> np.ndarray:
        missing = np.unique(rows[~present[rows]]) if keeps else rows
        # More parts than threads: images differ in size, and no thread should end up waiting.
        parts = np.array_split(missing, min(len(missing), 4 * workers()) or 1)
        new = list(pool.map(decoded, parts)) if len(missing) else []
        if not keeps:
            return np.concatenate([np.zeros((0, *shape), np.uint8), *new])
        for part, values in zip(parts, new, strict=False):
            pixels[part], present[part] = values, True
        return pixels[rows]

    # The keys are of the encoded bytes. Pixels also depend on how they are decoded, and so must the
    # digest.
    salt = repr(("upright", *(("crop", spec.resample) if spec.image_size else ())))
    source = Source(read, _salted(keys, salt), np.dtype(np.uint8))
    names = tuple(builder.info.features[label_key].names)
    return Dataset(name, split, labels, names, shape, np.arange(len(labels)), source)


def text_dataset(
    builder: Any, name: str, split: str, *, tokenize: Tokenize, label_key: str | None = None
) -> Dataset:
    """Opens one split of a text-classification data set.

    Args:
        builder: an opened TFDS builder with a Text and a ClassLabel feature.
        name: name of the data set.
        split: TFDS slicing syntax.
        tokenize: maps texts [n] to int32 tokens [n, L], with the same L in all calls; called on a
            few hundred texts at a time, in order. If it has an attribute `digest`, a string that
            names what it computes, the tokens of each split are kept beside the data or in the
            cache, and read from there.
        label_key: the label feature; None finds it.

    Returns:
        The data set of tokens.

    Raises:
        ValueError: as for images, or `tokenize` returns another dtype, rank or length.
    """
    text_key = "text" if "text" in builder.info.features else None
    text_key = find_feature(builder, tfds.features.Text, text_key, "text_key")
    label_key = find_feature(builder, tfds.features.ClassLabel, label_key, "label_key")
    digest = getattr(tokenize, "digest", None)
    pieces, indexes, keys, labels = _opened(builder, split, text_key, label_key)
    whole = {
        split: _tokens(builder, split, index, text_key, tokenize, digest)
        for split, index in indexes.items()
    }
    tables = [whole[piece.split][piece.start : piece.stop] for piece in pieces]
    ends = np.cumsum([len(table) for table in tables])

    def read(rows: np.ndarray) -> np.ndarray:
        out = np.zeros((len(rows), tables[0].shape[1]), np.int32)
        number = np.searchsorted(ends, rows, side="right")
        for one in np.unique(number):
            at = np.flatnonzero(number == one)
            out[at] = tables[one][rows[at] - (ends[one] - len(tables[one]))]
        for row, tokens in zip(rows.tolist(), out, strict=True):
            if _checksum(tokens[:-1]) != tokens[-1]:
                raise ValueError(
                    f"the tokens of text {row} of {name!r} split {split!r} are damaged: delete the "
                    f"files *.npy in {Path(builder.data_path) / 'index'} or in the cache."
                )
        return out[:, :-1]

    if digest is not None:
        keys = _salted(keys, digest)
    else:  # of the tokens of each text by itself: no key may depend on another example
        all_keys = (content_key(row[:-1].tobytes()) for table in tables for row in table)
        keys = np.frombuffer(b"".join(all_keys), np.uint8).reshape(-1, 16)
    source, shape = Source(read, keys, np.dtype(np.int32)), (tables[0].shape[1] - 1,)
    names = tuple(builder.info.features[label_key].names)
    return Dataset(name, split, labels, names, shape, np.arange(len(labels)), source)


def _opened(
    builder: Any, split: str, input_key: str, label_key: str
) -> tuple[list[Piece], dict[str, Index], np.ndarray, np.ndarray]:
    """Returns the pieces of a split expression, the index of each named split, and the keys and
    labels of the examples."""
    pieces = split_pieces(builder, split)
    indexes = {name: read_index(builder, name) for name in {piece.split for piece in pieces}}
    keys = _joined(pieces, {name: index.keys[input_key] for name, index in indexes.items()})
    labels = _joined(pieces, {name: index.labels[label_key] for name, index in indexes.items()})
    return pieces, indexes, keys, labels


def _tokens(
    builder: Any, split: str, index: Index, text_key: str, tokenize: Tokenize, digest: str | None
) -> np.ndarray:
    """Returns the tokens of a named split, int32 [examples, L + 1], the last one a checksum."""

    def compute() -> np.ndarray:
        records, name = records_of(builder, split), builder.info.name
        parts: list[np.ndarray] = []
        pieces = list(pieces_of(len(records)))
        for rows in tqdm(pieces, f"Tokenizing {name} {split}", unit="piece", file=sys.stderr):
            texts = []
            for row, record in zip(rows, read_records(records, rows, f"{name!r} split {split!r}")):
                texts.append(bytes(record[text_key]).decode("utf-8", "replace"))
                same = content_key(bytes(record[text_key])) == index.keys[text_key][row].tobytes()
                if not same or any(int(record[k]) != v[row] for k, v in index.labels.items()):
                    raise ValueError(
                        _CHANGED.format(
                            f"text {row} of {name!r} split {split!r}",
                            Path(builder.data_path) / "index",
                        )
                    )
            part = np.asarray(tokenize(texts))
            length = parts[0].shape[1] - 1 if parts else part.shape[-1]
            if part.dtype.kind not in "iu" or part.shape != (len(texts), length):
                raise ValueError(
                    f"tokenize returned dtype {part.dtype} and shape {part.shape}; it must return "
                    f"int32 [{len(texts)}, length] with one length."
                )
            part = part.astype(np.int32)
            checks = np.array([[_checksum(row)] for row in part], np.int32)
            parts.append(np.concatenate([part, checks], axis=1))
        return np.concatenate(parts)

    def read(path: Path) -> np.ndarray | None:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
        fits = table.dtype == np.int32 and table.ndim == 2
        return table if fits and len(table) == len(index.keys[text_key]) else None

    if digest is None:
        return compute()
    fingerprint = hashlib.sha256(f"{index.fingerprint} {text_key} {digest}".encode()).hexdigest()

    def write(table: np.ndarray, path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, table)

    name = f"{split}-{fingerprint[:16]}.npy"
    return kept(builder, split, name, fingerprint, read, compute, write)


def with_units(builder: Any, dataset: Dataset, unit: str | None) -> Dataset:
    """Gives each example the unit that a column names; None leaves the data set as it is."""
    if unit is None:
        return dataset
    pieces = split_pieces(builder, dataset.split)
    columns = {name: read_column(builder, name, unit) for name in {p.split for p in pieces}}
    return dataclasses.replace(dataset, units=_joined(pieces, columns))


def _joined(pieces: list[Piece], arrays: dict[str, np.ndarray]) -> np.ndarray:
    parts = [arrays[piece.split][piece.start : piece.stop] for piece in pieces]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _checksum(tokens: np.ndarray) -> int:
    return zlib.crc32(tokens.tobytes()) - 2**31  # fits int32


def _salted(keys: np.ndarray, salt: str) -> np.ndarray:
    # xor: keys stay distinct, and another salt changes all of them.
    return keys ^ np.frombuffer(content_key(salt), np.uint8)[None]
