"""The files of a run, except its checkpoints. Only process 0 writes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpjax.config import differences
from dpjax.files import replacing

__all__ = ["OtherRun", "Workdir", "code_digest", "digest", "read_jsonl"]

_PACKAGES = (
    "dpjax", "jax", "jaxlib", "flax", "optax", "numpy", "dp-accounting", "orbax-checkpoint",
    "tensorflow-datasets", "ml-collections",
)  # fmt: skip

# Fields that may change when a run is resumed: they change sums by rounding at most, or only what
# is written to disk.
_MAY_CHANGE = {
    "audit.canaries", "audit.confidence", "audit.count", "audit.runs", "checkpoint_every",
    "data.data_dir", "dp.method", "eval_every", "keep_best",
    "keep_checkpoints", "log_every", "microbatch", "physical_batch", "sharding",
}  # fmt: skip


class OtherRun(ValueError):
    """Raised when a directory contains anything but the run to be resumed."""


class Workdir:
    """The directory of one run: config, metrics, checkpoints, privacy statement.

    Nothing is written before `create`, so a run that fails its checks leaves no trace.

    Args:
        path: the directory; it need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()

    @property
    def writes(self) -> bool:
        """Whether this process writes files."""
        return jax.process_index() == 0

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises unless the directory is new or belongs to a run of the same config.

        Fields that do not change the result, such as `physical_batch`, may differ.

        Raises:
            OtherRun: the directory contains a run of another config (the message names the
                fields), or other files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OtherRun(f"workdir={str(self.path)!r} is not a directory.")
        if not self._files():
            return
        self._must_be_a_run()
        changed = [
            text
            for text in differences(self.read("config.json"), json.loads(_dumps(config)))
            if text.split(":")[0].removeprefix("config.") not in _MAY_CHANGE
        ]
        if changed:
            raise OtherRun(
                f"workdir={str(self.path)!r} contains a run of another config "
                f"({'; '.join(changed[:5])}). Resume it with its own config, name a new workdir, "
                "or move it aside with --restart."
            )

    def create(self, config: Mapping[str, Any]) -> None:
        """Creates the directory, or opens it to resume; writes config and environment."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.write("config.json", config)
        self.write("environment.json", _environment())

    def move_aside(self) -> Path | None:
        """Renames an existing run to DIR.1, or the next free number; nothing is deleted."""
        if not self._files() or not self.writes:
            return None
        self._must_be_a_run()
        names = (self.path.with_name(f"{self.path.name}.{n}") for n in itertools.count(1))
        free = next(path for path in names if not path.exists())
        self.path.rename(free)
        return free

    def _must_be_a_run(self) -> None:
        if not self.exists("config.json"):
            raise OtherRun(
                f"workdir={str(self.path)!r} is not empty and does not contain a dpjax run: name a "
                "new directory."
            )

    def _files(self) -> list[Path]:
        """The files of the directory, without those that a killed process left half-written."""
        if not self.path.is_dir():
            return []
        return [p for p in self.path.iterdir() if not (p.name[0] == "." and p.suffix == ".tmp")]

    def exists(self, name: str) -> bool:
        """Whether the run has a file `name`."""
        return (self.path / name).exists()

    def read(self, name: str) -> Any:
        """Reads a JSON file of the run."""
        return json.loads((self.path / name).read_text())

    def write(self, name: str, content: Any, *, secret: bool = False) -> None:
        """Writes a file atomically: text as it is, anything else as JSON.

        Args:
            name: file name.
            content: text, or a value that JSON can express.
            secret: makes the file readable by its owner only.
        """
        if not self.writes:
            return
        text = content if isinstance(content, str) else _dumps(content) + "\n"
        with replacing(self.path / name, secret=secret) as temporary:
            temporary.write_text(text)

    def append_metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one object to `metrics.jsonl`."""
        if self.writes:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(_dumps({"step": step, **values}, indent=None) + "\n")

    def drop_metrics_after(self, step: int) -> None:
        """Deletes logged steps that a resumed run executes again."""
        if self.writes and self.exists("metrics.jsonl"):
            rows = [r for r in read_jsonl(self.path / "metrics.jsonl") if r["step"] <= step]
            self.write("metrics.jsonl", "".join(_dumps(r, indent=None) + "\n" for r in rows))

    def losses(self) -> dict[int, float]:
        """Returns the held-out loss of every evaluated step."""
        if not self.exists("metrics.jsonl"):
            return {}
        rows = read_jsonl(self.path / "metrics.jsonl")
        names = ("eval/nll", "nonprivate/eval/nll")
        return {row["step"]: row[name] for row in rows for name in names if name in row}

    def private_seed(self, draw: Callable[[], int]) -> int | None:
        """Returns the run's stored seed, or draws and stores one; None on all hosts but 0."""
        if not self.writes:
            return None
        if not self.exists("private_seed.json"):
            self.write("private_seed.json", {"private_seed": draw()}, secret=True)
        return int(self.read("private_seed.json")["private_seed"])


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON-lines file; a truncated last line is skipped."""
    with open(path) as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def digest(content: Any) -> str:
    """Returns the SHA-256 of a value that JSON can express."""
    return hashlib.sha256(_dumps(content).encode()).hexdigest()


def code_digest() -> str:
    """Returns the SHA-256 of this package's sources and of its dependencies' versions."""
    root = Path(__file__).parents[1]
    sources = {str(p.relative_to(root)): p.read_text() for p in sorted(root.rglob("*.py"))}
    return digest([sources, _environment()["packages"]])


def _environment() -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "processes": jax.process_count(),
        "cpu_count": os.cpu_count(),
    }


def _dumps(content: Any, *, indent: int | None = 2) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, (np.generic, np.ndarray, jax.Array)):
            return np.asarray(value).tolist()
        if isinstance(value, Mapping) or hasattr(value, "to_dict"):
            return dict(value.items())
        raise TypeError(f"{type(value).__name__} cannot be written as JSON.")

    return json.dumps(content, indent=indent, default=plain)
