"""What a run leaves on disk, besides its checkpoints. Only process 0 writes."""

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

# Fields in which a resumed run may differ from the run it resumes: they move sums by rounding
# at most, or say what is written down.
_FREE = {
    "audit.canaries", "audit.confidence", "audit.count", "audit.runs", "checkpoint_every",
    "data.data_dir", "dp.method", "eval_every", "keep_best",
    "keep_checkpoints", "log_every", "microbatch", "physical_batch", "sharding",
}  # fmt: skip


class OtherRun(ValueError):
    """Raised when a directory holds something else than the run that is to be resumed."""


class Workdir:
    """The directory of one run: config, metrics, checkpoints, statement.

    Nothing is written before `create`, so a run that fails its checks leaves no trace.

    Args:
        path: the directory; need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes."""
        return jax.process_index() == 0

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises unless the directory is new or belongs to a run of the same config.

        Fields that do not change the result, such as `physical_batch`, may differ.

        Raises:
            OtherRun: it holds a run of another config (naming the fields), or other files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OtherRun(f"workdir={str(self.path)!r} is not a directory.")
        if not self._files():
            return
        if not self.exists("config.json"):
            raise OtherRun(f"workdir={str(self.path)!r} holds files that are not a run's.")
        changed = [
            text
            for text in differences(self.read("config.json"), json.loads(_dumps(config)))
            if text.split(":")[0].removeprefix("config.") not in _FREE
        ]
        if changed:
            raise OtherRun(
                f"workdir={str(self.path)!r} holds a run of another config "
                f"({'; '.join(changed[:5])}). Resume it with its own config, give a new workdir, "
                "or move it out of the way with --restart."
            )

    def create(self, config: Mapping[str, Any]) -> None:
        """Makes the directory, or opens it to resume; writes config and environment."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.write("config.json", config)
        self.write("environment.json", _environment())

    def move_aside(self) -> Path | None:
        """Renames a run that is there to DIR.1, or the next free number; nothing is deleted."""
        if not self._files() or not self.writes:
            return None
        if not self.exists("config.json"):
            raise OtherRun(f"workdir={str(self.path)!r} holds files that are not a run's.")
        names = (self.path.with_name(f"{self.path.name}.{n}") for n in itertools.count(1))
        free = next(path for path in names if not path.exists())
        self.path.rename(free)
        return free

    def _files(self) -> list[Path]:
        """What is there; a file that a killed process had begun to write counts as nothing."""
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
        """Writes a file whole or not at all: text as it is, anything else as JSON.

        Args:
            name: file name.
            content: what to write.
            secret: only the owner may read it.
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
        """Forgets logged steps that a resumed run executes again."""
        if self.writes and self.exists("metrics.jsonl"):
            rows = [r for r in read_jsonl(self.path / "metrics.jsonl") if r["step"] <= step]
            self.write("metrics.jsonl", "".join(_dumps(r, indent=None) + "\n" for r in rows))

    def losses(self) -> dict[int, float]:
        """Returns the held-out loss of every step that was evaluated."""
        if not self.exists("metrics.jsonl"):
            return {}
        rows = read_jsonl(self.path / "metrics.jsonl")
        names = ("eval/nll", "nonprivate/eval/nll")
        return {row["step"]: row[name] for row in rows for name in names if name in row}

    def private_seed(self, draw: Callable[[], int]) -> int | None:
        """Returns the seed this run drew before, or draws and keeps one; None except on host 0."""
        if not self.writes:
            return None
        if not self.exists("private_seed.json"):
            self.write("private_seed.json", {"private_seed": draw()}, secret=True)
        return int(self.read("private_seed.json")["private_seed"])


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON-lines file; a last line that was cut off is left out."""
    with open(path) as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def digest(content: Any) -> str:
    """Returns the sha256 of a JSON-able value."""
    return hashlib.sha256(_dumps(content).encode()).hexdigest()


def code_digest() -> str:
    """Returns the sha256 of this package's sources and of the versions of what it stands on."""
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
        raise TypeError(f"{type(value).__name__} is not JSON-able.")

    return json.dumps(content, indent=indent, default=plain)
