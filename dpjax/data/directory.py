"""Opening prepared TFDS directories: which files, which features, which split. No network."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from dpjax.files import cache_dir, did_you_mean, local_path

__all__ = [
    "Piece", "check_shards", "data_dir_or_default", "find_directory", "find_feature",
    "open_directory", "split_name", "split_pieces",
]  # fmt: skip

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[^:]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_SPLIT = re.compile(r"\s*(?P<name>[\w-]+)\s*(\[.*\])?\s*")


class Piece(NamedTuple):
    """Consecutive records of a named split: positions [start, stop)."""

    split: str
    start: int
    stop: int


def data_dir_or_default(data_dir: str | os.PathLike[str] | None) -> Path:
    """Returns `data_dir`, $DPJAX_DATA_DIR, $DPJAX_CACHE_DIR/data or ~/.cache/dpjax/data."""
    directory = data_dir or os.environ.get("DPJAX_DATA_DIR")
    if not directory:
        return cache_dir("data")
    return local_path("data.data_dir", directory)


def split_name(name: str) -> tuple[str, str | None, str | None]:
    """Returns (name, config, version) of "name/config:1.0.0"."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"dataset={name!r} must have the form name, name/config or name/config:1.0.0."
        )
    return match["name"], match["config"], match["version"]


def find_directory(name: str, data_dir: Path) -> Path | None:
    """Returns the prepared directory of a data set, or None if it has not been prepared.

    Args:
        name: "name" or "name/config", either with ":1.0.0"; without a version, the newest.
        data_dir: directory of the TFDS data sets.

    Raises:
        ValueError: a preparation was interrupted, the version or config does not exist, or several
            configs exist and none was named.
    """
    base, config, version = split_name(name)
    root = data_dir / base / config if config else data_dir / base
    if not root.is_dir():
        return None
    versions = sorted(
        (path for path in root.iterdir() if _VERSION.fullmatch(path.name) and path.is_dir()),
        key=lambda path: tuple(int(part) for part in path.name.split(".")),
    )
    if version:
        names = [path.name for path in versions]
        if versions and version not in names:
            raise ValueError(f"dataset={name!r}: version {version} is not among {names}.")
        versions = [path for path in versions if path.name == version]
    if versions:
        return versions[-1]
    configs = sorted(
        path.name for path in root.iterdir() if path.is_dir() and any(path.glob("*.*.*/"))
    )
    if configs and not config:
        raise ValueError(f"dataset={name!r} must name one of its configs: {configs}.")
    if any(root.glob("*incomplete*")):
        raise ValueError(
            f"dataset={name!r} is half-written in {root}: its preparation was interrupted, or is "
            "still running. Prepare it again."
        )
    return None


def open_directory(directory: Path) -> Any:
    """Opens a prepared directory as a TFDS builder.

    Args:
        directory: data_dir/name[/config]/version.

    Returns:
        A read-only TFDS builder with random access.

    Raises:
        ValueError: a file is missing, or its format has no random access.
    """
    for required in ("dataset_info.json", "features.json"):
        if not (directory / required).is_file():
            raise ValueError(_half_written(directory, f"{required} is missing"))
    try:
        builder = tfds.builder_from_directory(directory)
        splits = dict(builder.info.splits)
    except Exception as error:  # a truncated JSON file raises many types
        raise ValueError(_half_written(directory, f"its description: {error}")) from error
    file_format = _file_format(builder)
    if file_format not in ("array_record", "parquet"):
        raise ValueError(
            f"file_format={file_format!r} of {directory} has no random access; prepare the data "
            "set again with file_format='array_record'."
        )
    if not splits:
        raise ValueError(_half_written(directory, "it has no splits"))
    for path in (Path(path) for split in splits.values() for path in split.filepaths):
        if not path.is_file():
            raise ValueError(_half_written(directory, f"{path.name} is missing"))
    return builder


def check_shards(builder: Any, split: str) -> None:
    """Checks that every file of a named split opens and holds as many records as it should.

    Raises:
        ValueError: naming the file.
    """
    info, directory = builder.info.splits[split], Path(builder.data_path)
    for path, length in zip(map(Path, info.filepaths), info.shard_lengths, strict=True):
        if _file_format(builder) != "array_record":
            continue
        try:
            with contextlib.closing(array_record_module.ArrayRecordReader(str(path))) as reader:
                records = reader.num_records()
        except Exception as error:
            what = f"{path.name} is damaged: {error}"
            raise ValueError(_half_written(directory, what)) from error
        if records != length:
            what = f"{path.name} holds {records} of {length} examples"
            raise ValueError(_half_written(directory, what))


def split_pieces(builder: Any, split: str) -> list[Piece]:
    """Resolves a split expression to pieces of named splits, in the order of its records.

    Args:
        builder: an opened TFDS builder.
        split: TFDS slicing syntax, e.g. "train", "train[:80%]", "train+validation".

    Raises:
        ValueError: it names an unknown split, is empty or overlaps itself. An overlap is rejected
            because an example that is read twice would be clipped twice and could contribute twice
            the bound.
    """
    known = sorted(builder.info.splits)
    for part in split.split("+"):
        match = _SPLIT.fullmatch(part)
        if match is None or match["name"] not in known:
            wrong = match["name"] if match else part
            raise ValueError(
                f"split={split!r}: {wrong!r} must be one of {known}.{did_you_mean(wrong, known)}"
            )
    try:
        instructions = builder.info.splits["".join(split.split())].file_instructions
    except Exception as error:
        raise ValueError(f"split={split!r} cannot be read as a slice: {error}") from error
    # TFDS has resolved the expression to (file, first record, number of records).
    offsets = {}
    for name, info in builder.info.splits.items():
        starts = [0, *itertools.accumulate(info.shard_lengths)]
        for path, start in zip(info.filepaths, starts, strict=False):
            offsets[Path(path).name] = (name, start)
    pieces: list[Piece] = []
    for one in instructions:
        name, start = offsets[Path(one.filename).name]
        piece = Piece(name, start + one.skip, start + one.skip + one.take)
        if pieces and pieces[-1].split == name and pieces[-1].stop == piece.start:
            pieces[-1] = pieces[-1]._replace(stop=piece.stop)  # the next file
        elif one.take > 0:  # of train[9:1], TFDS says -8
            pieces.append(piece)
    for one, other in itertools.pairwise(sorted(pieces)):
        if one.split == other.split and other.start < one.stop:
            raise ValueError(f"split={split!r} must not contain an example twice.")
    if not pieces:
        raise ValueError(f"split={split!r} has no examples.")
    return pieces


def find_feature(builder: Any, kind: type, key: str | None, field: str) -> str:
    """Returns the name of the only feature of a kind, or of the supervised one among several.

    Args:
        builder: an opened TFDS builder.
        kind: tfds.features.Image, ClassLabel or Text.
        key: name of the feature; None finds it.
        field: name of the argument in messages, e.g. "label_key".

    Raises:
        ValueError: the named feature does not exist or is of another kind, or the choice is not
            unique.
    """
    features = builder.info.features
    of_kind = sorted(name for name, feature in features.items() if isinstance(feature, kind))
    if key is not None:
        if key not in of_kind:
            raise ValueError(
                f"{field}={key!r} must be one of {of_kind}, the {kind.__name__} features of "
                f"{builder.info.name!r}.{did_you_mean(key, of_kind)}"
            )
        return key
    supervised = [name for name in builder.info.supervised_keys or () if name in of_kind]
    candidates = supervised or of_kind
    if len(candidates) != 1:
        raise ValueError(
            f"{field}=None must name one {kind.__name__} feature of {builder.info.name!r}; it has "
            f"{of_kind}."
        )
    return candidates[0]


def _file_format(builder: Any) -> str:
    file_format = builder.info.file_format
    return str(getattr(file_format, "value", file_format))


def _half_written(directory: Path, what: str) -> str:
    return f"data in {directory} is half-written: {what}. Delete it and prepare it again."
