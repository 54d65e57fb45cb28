"""The files of a run, except its checkpoints. Only process 0 writes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpjax.config import MAY_CHANGE, differences
from dpjax.dp import AUDIT
from dpjax.files import free_name, local_path, read_object, replacing
from dpjax.metrics import PRIVATE
from dpjax.runtime import hosts

__all__ = [
    "PUBLISHED", "OtherRun", "Workdir", "code_digest", "json_digest", "may_be_published",
    "read_jsonl",
]  # fmt: skip

_IDENTITY, _LOCK = "identity.json", ".lock"

_PACKAGES = (
    "dpjax", "jax", "jaxlib", "flax", "optax", "numpy", "dp-accounting", "orbax-checkpoint",
    "tensorflow-datasets", "ml-collections",
)  # fmt: skip

# The files of a private run that may be published, see the threat model. All others are readable
# by their owner alone, and so are two kinds of these: a config with a private seed in it, and a
# file that shows a number named `nonprivate/...`.
PUBLISHED = frozenset({
    "best.json", "config.json", "confusion.png", "environment.json", "eval.json", "model.json",
    "privacy.json", "privacy.md", "reliability.png", "vote.json",
    "weights.safetensors", "weights_ema.safetensors",
})  # fmt: skip


class OtherRun(ValueError):
    """Raised when a directory contains anything but the run to be resumed."""


class Workdir:
    """The directory of one run: config, metrics, checkpoints, privacy statement.

    Nothing is written before `create`, so a run that fails its checks leaves no trace.

    Args:
        path: the directory; it need not exist. "~" is the user's home.

    Raises:
        ValueError: the path is a URL.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = local_path("workdir", path).absolute()

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
        above = next(p for p in (self.path, *self.path.parents) if p.exists())
        if self.writes and not (above.is_dir() and os.access(above, os.W_OK)):
            raise OtherRun(f"workdir={str(self.path)!r} cannot be written: see {str(above)!r}.")
        if not self._files():
            return
        self._must_be_a_run()
        changed = [
            text
            for text in differences(self.read("config.json"), json.loads(_dumps(config)))
            if text.split(":")[0].removeprefix("config.") not in MAY_CHANGE
        ]
        if changed:
            raise OtherRun(
                f"workdir={str(self.path)!r} contains a run of another config "
                f"({'; '.join(changed[:5])}). Resume it with its own config, name a new workdir, "
                "or move it aside with --restart."
            )

    def create(self, config: Mapping[str, Any]) -> None:
        """Creates the directory, or opens it to resume; writes config and environment.

        Raises:
            OtherRun: see `check`. Since the caller checked, another process may have begun a run
                here, and ended it.
        """
        self.check(config)
        self.path.mkdir(parents=True, exist_ok=True)
        self.write("config.json", config)
        self.write("environment.json", _environment())

    def move_aside(self) -> Path | None:
        """Renames an existing run to DIR.1, or the next free number; nothing is deleted.

        Every host calls it.

        Raises:
            OtherRun: another process works in the directory, or it contains no run.
        """
        if not hosts.first(bool(self._files())):
            return None
        self._must_be_a_run()
        with self.lock():
            free = free_name(self.path)
            if self.writes:
                self.path.rename(free)
        return free

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes out of the directory while the block runs; every host enters it.

        Host 0 holds the lock for all. The system frees it when the process ends, however it ends,
        so that no lock is ever stale.

        Raises:
            OtherRun: on every host, if another process works in the directory.
        """
        with contextlib.ExitStack() as held:
            problem = None
            if self.writes:
                self.path.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(open(self.path / _LOCK, "a+", opener=_owner_only))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # Between opening and locking, `move_aside` may have renamed the directory:
                    # then this is the lock of the run that was moved.
                    if not _is_at(file.fileno(), self.path / _LOCK):
                        raise BlockingIOError
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {platform.node()}")
                    file.flush()
                except BlockingIOError:
                    file.seek(0)
                    problem = (
                        f"workdir={str(self.path)!r}: another process runs here "
                        f"({file.read().strip() or 'unknown'}). Wait until it ends, or name a new "
                        "directory."
                    )
                except OSError as error:
                    print(
                        f"warning: {str(self.path)!r} cannot be locked ({error}): make sure that "
                        "no other process runs there.", file=sys.stderr,
                    )  # fmt: skip
            problem = hosts.first(problem)
            if problem is not None:
                raise OtherRun(problem)
            yield

    def claim(self, facts: Mapping[str, Any]) -> str:
        """Writes the run's identity, or compares it with the one in the directory.

        Equal configs are not enough: data, weights or code may have changed under the same name.
        Every host calls it.

        Args:
            facts: what must be equal for a run to be resumed, and "code", which only warns.

        Returns:
            The run's name, 128 random bits. Checkpoints carry it in place of the facts.

        Raises:
            OtherRun: the directory, or its checkpoints, belong to another run.
        """
        facts = json.loads(_dumps(facts))
        known = hosts.first(self.read(_IDENTITY) if self.exists(_IDENTITY) else None)
        if known is None:
            if hosts.first(any(self.path.glob("checkpoints/[0-9]*"))):
                raise OtherRun(
                    f"workdir={str(self.path)!r} has checkpoints but no {_IDENTITY}: nothing shows "
                    "whose they are. Put it back, or move the run aside with --restart."
                )
            known = {**facts, "name": hosts.first(secrets.token_hex(16))}
        if "name" not in known:
            raise OtherRun(f"{self.path / _IDENTITY} is damaged: it has no name.")
        changed = differences(known, {**facts, "name": known["name"]}, "run")
        code = [text for text in changed if text.startswith("run.code")]
        if set(changed) - set(code):
            others = [text for text in changed if text not in code]
            raise OtherRun(f"the workdir belongs to another run: {'; '.join(others[:5])}.")
        if code and self.writes:
            print(
                "warning: the code has changed since this run began (code in identity.json). If it "
                "changes batches, gradients or noise, steps that a killed process had begun are "
                "executed again with the same noise on another sum: use --restart then.",
                file=sys.stderr,
            )
        self.write(_IDENTITY, {**facts, "name": known["name"]})
        return str(known["name"])

    def _must_be_a_run(self) -> None:
        if not self.exists("config.json"):
            raise OtherRun(
                f"workdir={str(self.path)!r} is not empty and does not contain a dpjax run: name a "
                "new directory."
            )

    def _files(self) -> list[Path]:
        """The files of the directory, without the lock and what a killed process left behind."""
        if not self.path.is_dir():
            return []
        ours = {p for p in self.path.glob(".*") if p.suffix == ".tmp" or p.name == _LOCK}
        return [p for p in self.path.iterdir() if p not in ours]

    def exists(self, name: str) -> bool:
        """Whether the run has a file `name`."""
        return (self.path / name).exists()

    def read(self, name: str) -> Any:
        """Reads a JSON file of the run, an object.

        Raises:
            OtherRun: the file is missing or damaged.
        """
        try:
            return read_object(self.path / name)
        except ValueError as error:
            hint = "Restore it, or move the run aside with --restart."
            raise OtherRun(f"{error} {hint}") from error

    def write(self, name: str, content: Any) -> None:
        """Writes a file atomically: text as it is, anything else as JSON.

        What may not be published is readable by its owner only.

        Args:
            name: file name.
            content: text, or a value that JSON can express.
        """
        if not self.writes:
            return
        text = content if isinstance(content, str) else _dumps(content) + "\n"
        with replacing(self.path / name, secret=not may_be_published(name, text)) as temporary:
            temporary.write_text(text)

    def save_figure(self, name: str, figure: Any, *, shows: str = "") -> Path:
        """Writes a matplotlib figure as `write` writes text, and returns its path.

        Args:
            name: file name, `.png`.
            figure: the figure.
            shows: text of the numbers in it, which decides whether it may be published.
        """
        path = self.path / name
        with replacing(path, secret=not may_be_published(name, shows)) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
        return path

    def append_metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one object to `metrics.jsonl`."""
        if self.writes:
            with open(self.path / "metrics.jsonl", "a", opener=_owner_only) as file:
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
            self.write("private_seed.json", {"private_seed": draw()})
        return int(self.read("private_seed.json")["private_seed"])


def may_be_published(name: str, text: str = "") -> bool:
    """Whether the guarantee covers a file of a private run, by its name and its content.

    Args:
        name: of the file.
        text: what it contains; of a picture, the file that it shows.
    """
    if name == "config.json":
        return json.loads(text or "{}").get("private_seed") is None
    # The statement names what it does not cover, but shows nothing of it except an audit's result.
    private = AUDIT if name.startswith("privacy.") else PRIVATE
    return name in PUBLISHED and private not in text


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON-lines file; a truncated last line is skipped.

    Raises:
        OtherRun: another line is damaged; names it.
    """
    with open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise OtherRun(f"{path}, line {number} is damaged: {error}. Remove it.") from error
            yield row


def json_digest(content: Any) -> str:
    """Returns the SHA-256 of a value that JSON can express."""
    return hashlib.sha256(_dumps(content).encode()).hexdigest()


def code_digest(others: Sequence[str] = ()) -> str:
    """Returns the SHA-256 of this package's sources and of its dependencies' versions.

    Args:
        others: names of imported modules of the user's, whose sources count too.
    """
    root = Path(__file__).parents[1]
    sources = {str(p.relative_to(root)): p.read_text() for p in sorted(root.rglob("*.py"))}
    for name in sorted(others):
        file = getattr(sys.modules.get(name), "__file__", None)
        sources[f"{name}:"] = Path(file).read_text() if file else ""
    return json_digest([sources, _environment()["packages"]])


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
