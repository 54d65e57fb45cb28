"""Prepares a TFDS data set atomically: completely or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from dpjax.data.directory import open_directory

__all__ = ["prepare_builder"]


def prepare_builder(builder_class: Any, data_dir: Path) -> Path:
    """Runs a TFDS builder unless its result already exists.

    Args:
        builder_class: a GeneratorBasedBuilder whose generator yields encoded image bytes.
        data_dir: directory of the TFDS data sets; created if missing.

    Returns:
        data_dir/name/version.

    Guarantees:
        The directory appears by one rename, after all of its files were written. If several
        processes call this, one prepares and the others wait. The leftovers of an interrupted
        preparation are removed, and the data set is prepared again.

    Raises:
        ValueError: data_dir cannot be written.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with _locked(data_dir / f".{builder_class.name}.lock"):
            builder = builder_class(data_dir=data_dir, file_format="array_record")
            directory = Path(builder.data_path)
            if directory.exists():
                try:
                    open_directory(directory)
                except ValueError as error:
                    _say(f"{error} Preparing it again.")
                    shutil.rmtree(directory)
                else:
                    return directory
            for stale in directory.parent.glob("incomplete.*"):
                shutil.rmtree(stale)
            _generate(builder)
            open_directory(directory)
    except OSError as error:
        raise ValueError(f"data_dir={str(data_dir)!r} cannot be written: {error}") from error
    return directory


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
