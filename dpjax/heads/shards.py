"""One large array on disk in pieces that appear whole or not at all and carry their checksums."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["Shards"]

_ROWS = 1024


class Shards:
    """Rows of an array, cut into files `00000.npz`, `00001.npz`, ... of one directory.

    Each file is a zip archive; reading it checks the CRC of what it holds. Several processes may
    write the same shard: the last one wins, and readers see one of them whole.

    Args:
        folder: made by the first `write`; None keeps nothing.
        shape: `[rows, columns]` of the array.
        dtype: on disk.
    """

    def __init__(self, folder: Path | None, shape: tuple[int, int], dtype: str) -> None:
        self._folder = folder
        self._shape = shape
        self._dtype = np.dtype(dtype)

    def __len__(self) -> int:
        return -(-self._shape[0] // _ROWS)

    def rows(self, number: int) -> slice:
        """The rows of the array that shard `number` holds."""
        return slice(number * _ROWS, min((number + 1) * _ROWS, self._shape[0]))

    def read(self, number: int) -> np.ndarray | None:
        """Returns a shard; None if it is not there or damaged, which is said on stderr."""
        if self._folder is None:
            return None
        path, rows = self._path(self._folder, number), self.rows(number)
        want = (rows.stop - rows.start, self._shape[1])
        try:
            with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
                part: np.ndarray = archive["arr_0"]
            if part.shape != want or part.dtype != self._dtype:
                raise ValueError(f"{part.dtype} {part.shape} instead of {self._dtype} {want}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, EOFError, zlib.error,
                zipfile.BadZipFile, NotImplementedError) as error:  # fmt: skip
            sys.stderr.write(f"{path} is damaged ({error}) and is computed again.\n")
            return None
        return part

    def write(self, number: int, part: np.ndarray) -> None:
        """Writes a shard whole or not at all.

        Raises:
            ValueError: the directory cannot be written.
        """
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _replacing(self._path(self._folder, number)) as temporary:
                with temporary.open("wb") as file:
                    np.savez(file, part.astype(self._dtype))
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise ValueError(
                f"cache_dir={str(self._folder.parent)!r} cannot be written: {error}."
            ) from error

    @staticmethod
    def _path(folder: Path, number: int) -> Path:
        return folder / f"{number:05d}.npz"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a path of its own to write, which then takes the place of `path`."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        yield Path(name)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
