"""Writes a prepared data set completely or not at all, with a record of the source it came from."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from dpjax.data.directory import open_directory
from dpjax.data.index import read_index

__all__ = ["Contents", "digest_of", "listed", "prepare_builder", "prepare_contents", "summary"]

_RECORD = "source.json"  # beside the data: digests of the source, and what was skipped
_NAMES = 3  # of files that a message names
_CLASSES = 40  # of a summary; more are counted only


class Contents(NamedTuple):
    """What a source holds, every image decoded once.

    Attributes:
        builder_class: the TFDS builder that writes it.
        digests: for each record, by the name that its user knows, the digest of content and label.
        notes: what was found, taken and skipped, one line each.
    """

    builder_class: Any
    digests: Mapping[str, str]
    notes: Sequence[str] = ()


def prepare_contents(name: str, contents: Contents, data_dir: Path, *, rebuild: bool) -> Path:
    """Writes what a source holds, unless exactly this was prepared before.

    Args:
        name: of the data set.
        contents: of its source.
        data_dir: directory of the TFDS data sets; created if missing.
        rebuild: whether a data set of the same name from another source is replaced.

    Returns:
        data_dir/name/version.

    Raises:
        ValueError: the name was prepared from another source and `rebuild` is False; says what
            changed. Or data_dir cannot be written.
    """
    directory = _directory(contents.builder_class, data_dir)
    if _is_whole(directory):
        change = _change(directory, contents.digests)
        if not change:
            return directory
        if not rebuild:
            raise ValueError(
                f"dataset={name!r} is already prepared in {directory} from another source: "
                f"{change}. Choose another name, or replace it with --rebuild (rebuild=True); runs "
                "on the old data can then not be resumed."
            )
    record = {"digests": dict(contents.digests), "notes": list(contents.notes)}
    return prepare_builder(contents.builder_class, data_dir, record=record)


def prepare_builder(
    builder_class: Any, data_dir: Path, *, record: Mapping[str, Any] | None = None
) -> Path:
    """Runs a TFDS builder unless its result already exists.

    Args:
        builder_class: a GeneratorBasedBuilder whose generator yields encoded image bytes.
        data_dir: directory of the TFDS data sets; created if missing.
        record: of the source, whose images were decoded; an existing result is then replaced.

    Returns:
        data_dir/name/version.

    Guarantees:
        The directory appears by one rename, after all of its files were written. If several
        processes call this, one prepares and the others wait. The leftovers of an interrupted
        preparation are removed, and the data set is prepared again. Where it exists already,
        nothing is written, so that `data_dir` may be read-only.

    Raises:
        ValueError: data_dir cannot be written.
    """
    directory, name = _directory(builder_class, data_dir), builder_class.name
    if record is None and _is_whole(directory):
        return directory
    stage = data_dir / f".{name}.preparing"  # on the same disk, so that renaming is atomic
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with _locked(data_dir / f".{name}.lock"):
            if record is None and _is_whole(directory, say=True):
                return directory
            shutil.rmtree(stage, ignore_errors=True)
            try:
                builder = builder_class(data_dir=stage, file_format="array_record")
                _generate(builder)
                new = Path(builder.data_path)
                if record is not None:
                    opened = open_directory(new)
                    for split in opened.info.splits:
                        read_index(opened, split, decoded=True)
                    (new / _RECORD).write_text(json.dumps(record))
                directory.parent.mkdir(exist_ok=True)
                for stale in directory.parent.glob("incomplete.*"):
                    shutil.rmtree(stale)
                if directory.exists():
                    os.rename(directory, stage / "replaced")
                os.rename(new, directory)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"data_dir={str(data_dir)!r} cannot be written: {error}") from error
    return directory


def summary(directory: Path) -> str:
    """Returns what a prepared data set was made from, and a table of its classes with counts."""
    builder = open_directory(directory)
    splits = list(builder.info.splits)
    lines = [*(_read_record(directory) or {}).get("notes", ())]
    indexes = [read_index(builder, split) for split in splits]
    key = (builder.info.supervised_keys or ("", "label"))[-1]
    names = builder.info.features[key].names
    counts = np.stack([np.bincount(i.labels[key], minlength=len(names)) for i in indexes])
    rows = [(name, *counts[:, at]) for at, name in enumerate(names[:_CLASSES])]
    if len(names) > _CLASSES:
        rest = counts[:, _CLASSES:].sum(axis=1)
        rows.append((f"{len(names) - _CLASSES} more classes", *rest))
    rows.append(("all", *counts.sum(axis=1)))
    width = max(len(str(row[0])) for row in rows)
    for name, *numbers in [("class", *splits), *rows]:
        cells = [f"{number:>{max(8, len(split))}}" for split, number in zip(splits, numbers)]
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return "\n".join(lines)


def digest_of(*parts: Any) -> str:
    """Returns the digest of a record's content, label and unit, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:32]


def _directory(builder_class: Any, data_dir: Path) -> Path:
    return data_dir / builder_class.name / str(builder_class.VERSION)


def _is_whole(directory: Path, *, say: bool = False) -> bool:
    """Whether a directory is a complete data set without damaged images."""
    if not directory.exists():
        return False
    try:
        builder = open_directory(directory)
        for split in builder.info.splits:
            read_index(builder, split)
    except ValueError as error:
        if say:
            _say(f"{error} Preparing it again.")
        return False
    return True


def _read_record(directory: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((directory / _RECORD).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "digests" in record else None


def _change(directory: Path, digests: Mapping[str, str]) -> str:
    """Describes how a source differs from the one that was prepared; empty if it does not."""
    record = _read_record(directory)
    if record is None:
        return "it has no record of its source"
    old = record["digests"]
    names = {
        "added": [name for name in digests if name not in old],
        "removed": [name for name in old if name not in digests],
        "changed": [name for name in digests if old.get(name, digests[name]) != digests[name]],
    }
    return "; ".join(f"{len(some)} {how}: {listed(some)}" for how, some in names.items() if some)


def listed(names: Sequence[str]) -> str:
    """Returns the first few names, and how many more there are."""
    more = f", and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more


def _generate(builder: Any) -> None:
    # TFDS insists on a download directory, and prints its progress to stdout.
    with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(sys.stderr):
        builder.download_and_prepare(
            download_dir=unused,
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an advisory lock, which the system releases even when the process is killed."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"Waiting for another process to prepare the data ({path}).")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")
