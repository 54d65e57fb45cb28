"""Turns the records of a prepared TFDS split into a `Dataset`, decoded at once or on demand."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from dpjax.data.dataset import Dataset, Source
from dpjax.data.directory import check_split, find_feature
from dpjax.data.images import ImageSpec, decode, output_shape

__all__ = ["images_dataset", "progress", "text_dataset"]

_PIECE = 256  # records read, hashed and decoded by one task


class _Piece(NamedTuple):
    rows: np.ndarray
    labels: list[int]
    keys: list[bytes]


def images_dataset(
    builder: Any, name: str, split: str, *, spec: ImageSpec, memory_limit: int
) -> Dataset:
    """Reads one split of an image-classification data set.

    Args:
        builder: an opened TFDS builder.
        name: name of the data set.
        split: TFDS slicing syntax.
        spec: how images are brought to one shape.
        memory_limit: bytes; a split whose decoded pixels take at most this is decoded now, a larger
            one on demand.

    Returns:
        The data set. Every record has been read once: its label is checked, and its image is
        decoded if the split is held in memory. Otherwise the image's first and last bytes are
        checked.

    Raises:
        ValueError: as for `check_split`, `find_feature`, `output_shape` and `Dataset`, or an image
            is unreadable; the message names its position in the split.
    """
    check_split(builder, split)
    image_key = find_feature(builder, tfds.features.Image, spec.image_key, "image_key")
    label_key = find_feature(builder, tfds.features.ClassLabel, spec.label_key, "label_key")
    features = builder.info.features
    if np.dtype(features[image_key].np_dtype) != np.uint8:
        raise ValueError(f"dtype={features[image_key].np_dtype} of {name!r} images must be uint8.")
    shape = output_shape(features[image_key].shape, spec)
    records = _records(builder, split)
    in_memory = len(records) * int(np.prod(shape)) <= memory_limit
    pixels = np.zeros((len(records), *shape), np.uint8) if in_memory else None

    def decoded(row: int, data: bytes) -> np.ndarray:
        try:
            return decode(data, shape, spec)
        except ValueError as error:
            raise ValueError(
                f"image {row} of {name!r} split {split!r} cannot be read: {error}."
            ) from error

    def scan(rows: np.ndarray) -> _Piece:
        examples = _examples(records, rows, f"{name!r} split {split!r}")
        keys = [_key(example[image_key]) for example in examples]
        for row, example in zip(rows.tolist(), examples, strict=True):
            if pixels is not None:
                pixels[row] = decoded(row, example[image_key])
            elif not _looks_whole(example[image_key]):
                decoded(row, example[image_key])
        return _Piece(rows, [int(example[label_key]) for example in examples], keys)

    def read(rows: np.ndarray) -> np.ndarray:
        if pixels is not None:
            return pixels[rows]
        out = np.zeros((len(rows), *shape), np.uint8)

        def fill(positions: np.ndarray) -> None:
            examples = _examples(records, rows[positions], f"{name!r} split {split!r}")
            for position, example in zip(positions, examples, strict=True):
                out[position] = decoded(int(rows[position]), example[image_key])

        # More pieces than threads: images differ in size, and no thread should end up waiting.
        pieces = np.array_split(np.arange(len(rows)), min(len(rows), 4 * _workers()))
        for _ in pool.map(fill, pieces):  # consumed, so that an exception is raised here
            pass
        return out

    pool = ThreadPoolExecutor(_workers(), thread_name_prefix="dpjax-decode")
    labels, keys = _scan(pool, scan, len(records), f"Reading {name} {split}")
    if in_memory:
        pool.shutdown()  # otherwise `read` keeps using it
    # The keys are of the encoded bytes. Pixels also depend on the resizing, so the digest must too.
    salt = repr((spec.resize, spec.resample) if spec.image_size else ())
    return Dataset(
        name=name,
        split=split,
        labels=labels,
        class_names=_class_names(features[label_key]),
        shape=shape,
        rows=np.arange(len(records)),
        source=Source(read, _salted(keys, salt), np.dtype(np.uint8)),
    )


def text_dataset(
    builder: Any, name: str, split: str, *, tokenize: Callable[[list[str]], np.ndarray]
) -> Dataset:
    """Reads and tokenizes one split of a text-classification data set.

    Args:
        builder: an opened TFDS builder with a Text and a ClassLabel feature.
        name: name of the data set.
        split: TFDS slicing syntax.
        tokenize: maps texts [n] to int32 tokens [n, L], with the same L in all calls; called on a
            few hundred texts at a time, in order.

    Returns:
        The data set of tokens, held in memory.

    Raises:
        ValueError: as for images, or `tokenize` returns another dtype, rank or length.
    """
    check_split(builder, split)
    features = builder.info.features
    text_keys = [key for key in ("text",) if key in features]
    text_key = find_feature(
        builder, tfds.features.Text, text_keys[0] if text_keys else None, "text_key"
    )
    label_key = find_feature(builder, tfds.features.ClassLabel, None, "label_key")
    records = _records(builder, split)
    tokens: list[np.ndarray] = []
    labels: list[int] = []
    keys: list[bytes] = []
    for rows in progress(_pieces(len(records)), f"Tokenizing {name} {split}", unit="piece"):
        examples = _examples(records, rows, f"{name!r} split {split!r}")
        texts = [bytes(example[text_key]).decode("utf-8", "replace") for example in examples]
        piece = np.asarray(tokenize(texts))
        length = tokens[0].shape[1:] if tokens else piece.shape[1:]
        if piece.dtype.kind not in "iu" or piece.shape != (len(texts), *length) or piece.ndim != 2:
            raise ValueError(
                f"tokenize returned dtype {piece.dtype} and shape {piece.shape}; it must return "
                f"int32 [{len(texts)}, length] with one length."
            )
        tokens.append(piece.astype(np.int32))
        labels += [int(example[label_key]) for example in examples]
        keys += [_key(row.tobytes()) for row in tokens[-1]]
    table = np.concatenate(tokens)
    return Dataset(
        name=name,
        split=split,
        labels=np.asarray(labels),
        class_names=_class_names(features[label_key]),
        shape=table.shape[1:],
        rows=np.arange(len(table)),
        source=Source(lambda rows: table[rows], _table(keys), np.dtype(np.int32)),
    )


def progress(iterable: Any, description: str, *, unit: str, total: int | None = None) -> Any:
    """Wraps an iterable in a progress bar on stderr."""
    return tqdm(
        iterable, description, total=total, unit=f" {unit}", file=sys.stderr, mininterval=0.5
    )


def _records(builder: Any, split: str) -> Any:
    """Returns random access to the records, with images still encoded."""
    skip = {
        key: tfds.decode.SkipDecoding()
        for key, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    return builder.as_data_source("".join(split.split()), decoders=skip or None)


def _examples(records: Any, rows: np.ndarray, where: str) -> list[dict[str, Any]]:
    """Reads records in one call; if that fails, one by one, to name the damaged one."""
    try:
        return list(records.__getitems__(rows.tolist()))
    except Exception:  # the type depends on the file format
        for row in rows.tolist():
            try:
                records[row]
            except Exception as error:
                raise ValueError(f"record {row} of {where} cannot be read: {error}.") from error
        raise


def _scan(
    pool: ThreadPoolExecutor, task: Callable[[np.ndarray], _Piece], total: int, description: str
) -> tuple[np.ndarray, np.ndarray]:
    labels = np.zeros(total, np.int64)
    keys: list[bytes] = []
    with tqdm(total=total, desc=description, unit=" examples", file=sys.stderr) as bar:
        for piece in pool.map(task, _pieces(total)):
            labels[piece.rows] = piece.labels
            keys += piece.keys
            bar.update(len(piece.rows))
    return labels, _table(keys)


def _pieces(total: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + _PIECE, total)) for start in range(0, total, _PIECE)]


def _key(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


def _table(keys: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)


def _salted(keys: np.ndarray, salt: str) -> np.ndarray:
    # xor: keys stay distinct, and another salt changes all of them.
    return keys ^ np.frombuffer(_key(salt.encode()), np.uint8)[None]


def _class_names(feature: Any) -> tuple[str, ...]:
    return tuple(feature.names)


def _looks_whole(data: bytes) -> bool:
    """Whether the bytes start and end like a PNG or JPEG; cheap enough for large splits."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data.endswith(b"IEND\xaeB`\x82")
    return data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9")


def _workers() -> int:
    return min(os.cpu_count() or 1, 32)
