"""Checkpoints: written in the background, whole or not at all, and checked when they are read."""

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

__all__ = ["Checkpoints", "Unreadable", "Unwritable", "fingerprint"]

PyTree = Any


class Unreadable(ValueError):
    """Raised for a checkpoint that is truncated or damaged."""


class Unwritable(OSError):
    """Raised when a checkpoint could not be written; the earlier ones are as they were."""


class Checkpoints:
    """The checkpoints of a run, by step; to be used in a `with`, by every host alike.

    Args:
        path: their directory; made if it does not exist.
        keep: how many of the latest stay.
        keep_best: how many of those with the lowest loss stay besides.
        losses: held-out losses of the steps that were evaluated before.

    Guarantees:
        A checkpoint appears whole or not at all. Reading one gives the bits that were saved, on
        any number of devices, or raises `Unreadable`.
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
            for rest in path.glob("*.orbax-checkpoint-tmp*"):  # of a process that was killed
                shutil.rmtree(rest, ignore_errors=True)
        self._orbax = ocp.training.Checkpointer(path, preservation_policy=self._keep)

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, the latest first."""
        return [c.step for c in reversed(self._orbax.checkpoints)]

    def save(
        self, step: int, tree: PyTree, about: Mapping[str, Any], loss: float | None = None
    ) -> None:
        """Starts saving; the arrays may be donated as soon as this returns.

        Args:
            step: number of the checkpoint; one that is there is replaced.
            tree: arrays.
            about: JSON values to be read back before the arrays are.
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
        """Returns what `save` was told about a checkpoint.

        Raises:
            Unreadable: it is damaged.
        """
        try:
            about = self._orbax.metadata(step).custom_metadata
        except Exception as error:
            raise Unreadable(f"checkpoint {step}: {_line(error)}") from error
        if not about:
            raise Unreadable(f"checkpoint {step}: its metadata is lost.")
        return dict(about)

    def load(self, step: int, like: PyTree) -> PyTree:
        """Reads a checkpoint into the shapes, dtypes and (named) shardings of `like`.

        Raises:
            Unreadable: it is damaged, or holds other arrays.
        """
        whole = NamedSharding(jax.tree.leaves(like)[0].sharding.mesh, PartitionSpec())
        number = jax.ShapeDtypeStruct((), jnp.uint32, sharding=whole)
        wanted = {"tree": like, "fingerprint": number}
        try:
            content = self._orbax.load(step, wanted)
        except Exception as error:
            raise Unreadable(f"checkpoint {step}: {_line(error)}") from error
        if int(fingerprint(content["tree"])) != int(content["fingerprint"]):
            raise Unreadable(f"checkpoint {step}: its arrays are not those that were saved.")
        return content["tree"]

    def set_aside(self, step: int) -> None:
        """Renames a checkpoint that cannot be read; every host then calls `steps` anew."""
        if jax.process_index() == 0:
            (self.path / str(step)).rename(self.path / f"unreadable-{step}")

    def reload(self) -> None:
        """Looks at the directory anew."""
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
        whole = sorted(int(p.name) for p in self.path.iterdir() if p.name.isdigit())
        latest = f"checkpoint {whole[-1]} is whole" if whole else "there is none before it"
        return Unwritable(f"a checkpoint could not be written ({_line(error)}); {latest}.")


class _Keep:
    """Orbax's preservation policy: the latest, and those of the lowest loss."""

    def __init__(self, latest: int, best: int, losses: Mapping[int, float]) -> None:
        self.latest, self.best, self.losses = latest, best, dict(losses)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [c.step for c in checkpoints]
        known = sorted((s for s in steps if s in self.losses), key=lambda s: self.losses[s])
        stay = {*steps[-self.latest :], *known[: self.best]}
        return [step in stay for step in steps]


@jax.jit
def fingerprint(tree: PyTree) -> jax.Array:
    """Returns a uint32 sum over the bits of all leaves: the same on any number of devices."""
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        words = leaf.view(f"uint{8 * leaf.dtype.itemsize}") if leaf.dtype != bool else leaf
        total += jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)
    return total


def _line(error: BaseException) -> str:
    """The first line of the innermost cause, at a readable length."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
