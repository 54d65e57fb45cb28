"""Preparing a TFDS data set so that it is there whole or not at all."""

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
    """Runs a TFDS builder unless its result is already there.

    Args:
      builder_class: a GeneratorBasedBuilder whose generator yields encoded image bytes.
      data_dir: where TFDS data sets lie; made if missing.

    Returns:
      data_dir/name/version.

    Guarantees:
      The directory appears by one rename, after everything in it was written. Of several processes
      one prepares and the others wait for it. What an interrupted preparation left is removed and
      made again.

    Raises:
      ValueError: if data_dir cannot be written.
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
                    _tell(f"{error} Preparing it again.")
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
    with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(sys.stderr):
        builder.download_and_prepare(
            download_dir=unused,
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an advisory lock, which the system releases even if the process is killed."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _tell(f"Waiting for another process that prepares data ({path}).")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tell(message: str) -> None:
    sys.stderr.write(message + "\n")
