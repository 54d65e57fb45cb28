"""What a run leaves on disk. The only file that writes, and only process 0 writes plain files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dpjax.config import differences
from dpjax.models import save_weights

__all__ = ["Workdir", "read_jsonl"]

_PACKAGES = (
    "dpjax", "jax", "jaxlib", "flax", "optax", "numpy", "dp-accounting", "orbax-checkpoint",
    "tensorflow-datasets", "ml-collections",
)  # fmt: skip


class Workdir:
    """The directory of one run: config, metrics, checkpoints, statement.

    Nothing is written before `create`, so a run that fails its checks leaves no trace.

    Args:
        path: the directory; need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._checkpointer: ocp.training.Checkpointer | None = None

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises unless the directory is new or belongs to a run of the same config.

        Raises:
            ValueError: it holds a run of another config (naming the fields), or other files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"workdir={str(self.path)!r} is not a directory.")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not (self.path / "config.json").is_file():
            raise ValueError(f"workdir={str(self.path)!r} holds files that are not a run's.")
        changed = differences(self.read("config.json"), json.loads(_dumps(config)))
        if changed:
            raise ValueError(
                f"workdir={str(self.path)!r} holds a run of another config "
                f"({'; '.join(changed[:5])}). Resume it with its own config, or give a new workdir."
            )

    def create(self, config: Mapping[str, Any], *, keep: int) -> None:
        """Makes the directory, or opens it to resume; writes config and environment."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.write("config.json", config)
        self.write("environment.json", _environment())
        self._checkpointer = ocp.training.Checkpointer(
            self.path / "checkpoints",
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

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
        if jax.process_index() != 0:
            return
        text = content if isinstance(content, str) else _dumps(content) + "\n"
        temporary = self.path / f".{name}.tmp"
        descriptor = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if secret else 0o644
        )
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / name)

    def append_metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one object to `metrics.jsonl`."""
        if jax.process_index() == 0:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(_dumps({"step": step, **values}, indent=None) + "\n")

    def drop_metrics_after(self, step: int) -> None:
        """Forgets logged steps that a resumed run executes again."""
        if jax.process_index() == 0 and self.exists("metrics.jsonl"):
            rows = [r for r in read_jsonl(self.path / "metrics.jsonl") if r["step"] <= step]
            self.write("metrics.jsonl", "".join(_dumps(r, indent=None) + "\n" for r in rows))

    def save(self, step: int, state: Any) -> None:
        """Starts saving a checkpoint; it appears whole or not at all."""
        self._orbax().save_async(step, state, overwrite=True)

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Returns (step, state) of the latest checkpoint in the shapes and places of `like`."""
        latest = self._orbax().latest
        if latest is None:
            return None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        return latest.step, self._orbax().load(latest.step, abstract)

    def save_weights(self, params: Any) -> None:
        """Writes `weights.safetensors`."""
        if jax.process_index() == 0:
            save_weights(params, self.path / "weights.safetensors")

    def close(self) -> None:
        """Waits for checkpoints that are being written."""
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None

    def _orbax(self) -> ocp.training.Checkpointer:
        if self._checkpointer is None:
            raise RuntimeError("call create() first.")
        return self._checkpointer


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON-lines file; a last line that was cut off is left out."""
    with open(path) as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


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
