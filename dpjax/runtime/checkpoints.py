"""Checkpoints: written atomically in the background, and verified when they are read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from dpjax.files import free_name

__all__ = ["Checkpoints", "Unreadable", "Unwritable", "fingerprint"]

PyTree = Any

# An array that all devices hold is written by all of them, a slice each. Taking a slice out is a
# program for every shape and place: compiling them took ten seconds of a first checkpoint on eight
# devices. Smaller slices than this many bytes are not worth it.
_LEAST_SLICE = 2**24


class Unreadable(ValueError):
    """Raised when a checkpoint is truncated or damaged."""


class Unwritable(OSError):
    """Raised when a checkpoint could not be written; earlier ones are unchanged."""


class Checkpoints:
    """The checkpoints of a run, by step; a context manager that every host enters.

    Args:
        path: their directory; created if it does not exist.
        keep: how many of the latest checkpoints are kept.
        keep_best: how many of those with the lowest loss are kept in addition.
        losses: held-out losses by step, from before this process.

    Guarantees:
        A checkpoint is written completely or not at all. Reading one returns the bits that were
        saved, on any number of devices, or raises `Unreadable`.
    """

    def __init__(
        self,
        path: Path,
        *,
        keep: int,
        keep_best: int = 0,
        losses: Mapping[int, float] | None = None,
    ) -> None:
        self.path = path
        self._keep = _Keep(keep, keep_best, losses or {})
        if jax.process_index() == 0:
            # Orbax writes exact times and paths into its files, which may not be published.
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o700)
            for leftover in path.glob("*.orbax-checkpoint-tmp*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
        context = ocp.Context()
        context.array.saving.min_slice_bytes_for_replica_parallel = _LEAST_SLICE
        with context:
            self._orbax = ocp.training.Checkpointer(path, preservation_policy=self._keep)

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, the latest first."""
        return [c.step for c in reversed(self._orbax.checkpoints)]

    def save(
        self, step: int, tree: PyTree, about: Mapping[str, Any], loss: float | None = None
    ) -> None:
        """Starts saving; the arrays may be donated as soon as this returns.

        Args:
            step: number of the checkpoint; an existing one is replaced.
            tree: arrays.
            about: JSON values that can be read without reading the arrays.
            loss: held-out loss at this step, if known.

        Raises:
            Unwritable: this checkpoint, or the one before it, could not be written.
        """
        if loss is not None:
            self._keep.losses[step] = loss
        content = {"tree": tree, "fingerprint": fingerprint(tree)}
        try:
            self._orbax.save_async(
                step, content, force=True, overwrite=True, custom_metadata=dict(about)
            )
        except Exception as error:
            raise self._unwritable(error) from error

    def about(self, step: int) -> dict[str, Any]:
        """Returns the JSON values that were saved with a checkpoint.

        Raises:
            Unreadable: it is damaged.
        """
        try:
            about = self._orbax.metadata(step).custom_metadata
        except Exception as error:
            raise Unreadable(f"checkpoint {step}: {_line(error)}") from error
        if not about:
            raise Unreadable(f"checkpoint {step}: its metadata is missing.")
        return dict(about)

    def load(self, step: int, like: PyTree) -> PyTree:
        """Reads a checkpoint into the shapes, dtypes and (named) shardings of `like`.

        Raises:
            Unreadable: it is damaged, or its arrays have other shapes.
        """
        replicated = NamedSharding(jax.tree.leaves(like)[0].sharding.mesh, PartitionSpec())
        number = jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated)
        abstract = {"tree": like, "fingerprint": number}
        try:
            content = self._orbax.load(step, abstract)
        except Exception as error:
            raise Unreadable(f"checkpoint {step}: {_line(error)}") from error
        if int(fingerprint(content["tree"])) != int(content["fingerprint"]):
            raise Unreadable(f"checkpoint {step}: its arrays differ from those that were saved.")
        return content["tree"]

    def set_aside(self, step: int) -> None:
        """Renames an unreadable checkpoint; every host then calls `reload`."""
        if jax.process_index() == 0:
            aside = self.path / f"unreadable-{step}"
            (self.path / str(step)).rename(free_name(aside) if aside.exists() else aside)

    def reload(self) -> None:
        """Lists the directory again."""
        self._orbax.reload()

    def wait(self) -> None:
        """Waits for the checkpoint that is being written.

        Raises:
            Unwritable: it could not be written.
        """
        try:
            self._orbax.wait()
        except Exception as error:
            raise self._unwritable(error) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._orbax.close()
        except Exception as failure:
            if error is None:  # else the first error is the one to show
                raise self._unwritable(failure) from failure

    def _unwritable(self, error: Exception) -> Unwritable:
        complete = sorted(int(p.name) for p in self.path.iterdir() if p.name.isdigit())
        latest = f"checkpoint {complete[-1]} is intact" if complete else "there is no earlier one"
        return Unwritable(f"a checkpoint could not be written ({_line(error)}); {latest}.")


class _Keep:
    """An Orbax preservation policy: keeps the latest, and those with the lowest loss."""

    def __init__(self, latest: int, best: int, losses: Mapping[int, float]) -> None:
        self.latest, self.best, self.losses = latest, best, dict(losses)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [c.step for c in checkpoints]
        by_loss = sorted((s for s in steps if s in self.losses), key=lambda s: self.losses[s])
        kept = {*steps[-self.latest :], *by_loss[: self.best]}
        return [step in kept for step in steps]


@jax.jit
def fingerprint(tree: PyTree) -> jax.Array:
    """Returns a uint32 sum over the bits of all leaves: the same on any number of devices."""
    # Integer addition wraps and is associative, so sharding and order do not change the sum.
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        words = leaf.view(f"uint{8 * leaf.dtype.itemsize}") if leaf.dtype != bool else leaf
        total += jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)
    return total


def _line(error: BaseException) -> str:
    """The first line of the innermost cause, cut to a readable length."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
