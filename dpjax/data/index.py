"""The index of a split: labels and content hashes, so that opening it reads no record.

An index is computed once by reading every record, and is written beside the data, or into the cache
where the data cannot be written. It is used only as long as the files of the split have not
changed. Their sizes are compared, and the content of small files; of a large file, its beginning
and its end, where an array_record file lists the place of each record. A change that this misses is
noticed when a record is read: its content and label must be those of the index.

An index is as private as the data. It gets the permissions of the data files.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from dpjax.data.directory import check_shards
from dpjax.data.images import decode
from dpjax.files import cache_dir, caching, did_you_mean, replacing

__all__ = ["Index", "content_key", "kept", "read_column", "read_index", "read_records",
           "records_of", "workers"]  # fmt: skip

_FORMAT = "1"  # of index files; part of the fingerprint
_PIECE = 256  # records that one task reads
_END = 2**18  # bytes at the beginning and end of a large file that are compared

T = TypeVar("T")


class Index(NamedTuple):
    """What is known of a named split without reading its records.

    Attributes:
        keys: for each image feature, or else each text feature, the digest of its stored bytes,
            uint8 [examples, 16].
        labels: for each label feature, int64 [examples].
        fingerprint: of the files of the split, in hexadecimal.
    """

    keys: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    fingerprint: str


def read_index(builder: Any, split: str, *, decoded: bool = False) -> Index:
    """Returns the index of a named split; computes and writes it if there is none that fits.

    Args:
        builder: an opened TFDS builder.
        split: name of a split, no expression.
        decoded: the images were decoded when they were written; if it is False, an index that must
            be computed decodes each of them.

    Raises:
        ValueError: a file is damaged or incomplete, or an image cannot be decoded; names it.
    """
    fingerprint = _fingerprint(builder, split)

    def read(path: Path) -> Index | None:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if str(arrays.pop("fingerprint")) != fingerprint:
            return None
        parts: dict[str, dict[str, np.ndarray]] = {"key": {}, "label": {}}
        for name, array in arrays.items():
            kind, _, feature = name.partition("/")
            parts[kind][feature] = array
        return Index(parts["key"], parts["label"], fingerprint)

    def compute() -> Index:
        return _computed(builder, split, fingerprint, decoded)

    def write(index: Index, path: Path) -> None:
        arrays = {f"key/{name}": value for name, value in index.keys.items()}
        arrays |= {f"label/{name}": value for name, value in index.labels.items()}
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, fingerprint=np.array(fingerprint), **arrays)

    return kept(builder, split, f"{split}.npz", fingerprint, read, compute, write)


def read_column(builder: Any, split: str, name: str) -> np.ndarray:
    """Returns a scalar feature of a named split as text, [examples]; read once, like the index.

    Args:
        builder: an opened TFDS builder.
        split: name of a split, no expression.
        name: a feature that holds one number or one text.

    Raises:
        ValueError: there is no such feature, or a record is damaged.
    """
    features = builder.info.features
    names = sorted(key for key, feature in features.items() if feature.shape == ())
    if name not in names:
        raise ValueError(
            f"unit={name!r} must be one of {names}, the columns of {builder.info.name!r}."
            f"{did_you_mean(name, names)}"
        )
    fingerprint = _fingerprint(builder, split)

    def compute() -> np.ndarray:
        records, values = records_of(builder, split), []
        for rows in pieces_of(len(records)):
            for record in read_records(records, rows, f"{builder.info.name!r} split {split!r}"):
                value = record[name]
                values.append(value.decode("utf-8", "replace") if isinstance(value, bytes)
                              else str(value))  # fmt: skip
        return np.array(values)

    def read(path: Path) -> np.ndarray:
        return np.asarray(np.load(path, allow_pickle=False))

    def write(values: np.ndarray, path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, values)

    own = hashlib.sha256(f"{fingerprint} {name}".encode()).hexdigest()
    return kept(builder, split, f"{split}-{own[:16]}-unit.npy", own, read, compute, write)


def kept(
    builder: Any,
    split: str,
    name: str,
    fingerprint: str,
    read: Callable[[Path], T | None],
    compute: Callable[[], T],
    write: Callable[[T, Path], None],
) -> T:
    """Reads a result that was computed from a split before, or computes and writes it.

    Args:
        builder: an opened TFDS builder.
        split: name of a split.
        name: of the file, in the folder `index` of the data or in the cache.
        fingerprint: of what the result depends on.
        read: reads a file; returns None if it does not fit, and raises if it is damaged.
        compute: computes the result.
        write: writes it to an empty file.
    """
    shard = Path(builder.info.splits[split].filepaths[0])
    places = [shard.parent / "index" / name]
    if caching():
        places.append(cache_dir("index") / f"{fingerprint[:32]}-{name}")
    for path in places:
        try:
            result = read(path)
            if result is not None:
                return result
            reason = "is of other data"
        except FileNotFoundError:
            continue
        except Exception as error:  # a damaged file raises almost anything
            reason = f"is damaged ({type(error).__name__}: {error})"
        sys.stderr.write(f"{path} {reason} and is computed again.\n")
    result = compute()
    for path in places:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, secret=True) as temporary:
                write(result, temporary)
                if path == places[0]:
                    os.chmod(temporary, shard.stat().st_mode & 0o666)
            break
        except OSError:  # a read-only directory; without a cache, nothing is kept
            continue
    return result


def records_of(builder: Any, split: str) -> Any:
    """Returns random access to the records of a split expression, with images still encoded."""
    skip = {name: tfds.decode.SkipDecoding() for name in _features(builder, tfds.features.Image)}
    return builder.as_data_source("".join(split.split()), decoders=skip or None)


def read_records(records: Any, rows: np.ndarray, where: str) -> list[dict[str, Any]]:
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


def content_key(content: bytes | str) -> bytes:
    """Returns the 16 bytes that identify the content of an input."""
    content = content if isinstance(content, bytes) else content.encode("utf-8")
    return hashlib.sha256(content).digest()[:16]


def workers() -> int:
    """Number of threads that read and decode."""
    return min(os.cpu_count() or 1, 32)


def _features(builder: Any, kind: type) -> list[str]:
    return sorted(n for n, feature in builder.info.features.items() if isinstance(feature, kind))


def _fingerprint(builder: Any, split: str) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for path in map(Path, builder.info.splits[split].filepaths):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_END if size > 4 * _END else size))
            if size > 4 * _END:
                file.seek(-_END, os.SEEK_END)
                digest.update(file.read())
    return digest.hexdigest()


def _computed(builder: Any, split: str, fingerprint: str, decoded: bool) -> Index:
    check_shards(builder, split)
    name, features = builder.info.name, builder.info.features
    images = _features(builder, tfds.features.Image)
    inputs, targets = (
        images or _features(builder, tfds.features.Text),
        _features(builder, tfds.features.ClassLabel),
    )
    shapes = {key: features[key].shape for key in images}
    readable = {key: shape for key, shape in shapes.items() if shape[-1] in (None, 1, 3)}
    records = records_of(builder, split)
    where = f"{name!r} split {split!r}"

    def scan(rows: np.ndarray) -> tuple[list[bytes], list[int]]:
        keys, labels = [], []
        for row, record in zip(rows.tolist(), read_records(records, rows, where), strict=True):
            keys += [content_key(record[key]) for key in inputs]
            labels += [int(record[key]) for key in targets]
            for key, (height, width, channels) in () if decoded else readable.items():
                try:
                    decode(record[key], (height, width, channels or 3))
                except ValueError as error:
                    raise ValueError(f"image {row} of {where} cannot be read: {error}.") from error
        return keys, labels

    key_table = np.zeros((len(records), len(inputs), 16), np.uint8)
    label_table = np.zeros((len(records), len(targets)), np.int64)
    with (
        ThreadPoolExecutor(workers(), thread_name_prefix="dpjax-index") as pool,
        tqdm(desc=f"Reading {name} {split}", total=len(records), file=sys.stderr) as bar,
    ):
        pieces = list(pieces_of(len(records)))
        for rows, (keys, labels) in zip(pieces, pool.map(scan, pieces), strict=True):
            flat = np.frombuffer(b"".join(keys), np.uint8)
            key_table[rows] = flat.reshape(len(rows), len(inputs), 16)
            label_table[rows] = np.reshape(labels, (len(rows), len(targets)))
            bar.update(len(rows))
    return Index(
        {key: np.ascontiguousarray(key_table[:, at]) for at, key in enumerate(inputs)},
        {key: np.ascontiguousarray(label_table[:, at]) for at, key in enumerate(targets)},
        fingerprint,
    )


def pieces_of(total: int) -> Iterator[np.ndarray]:
    """Yields 0, 1, ..., total - 1 in arrays of a few hundred."""
    for start in range(0, total, _PIECE):
        yield np.arange(start, min(start + _PIECE, total))
