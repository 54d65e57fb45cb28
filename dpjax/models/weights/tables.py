"""Weight files: reading and writing ours, and putting published ones in by a table of names.

A loader is a table from our parameter paths to `Source`s: the tensor's name and shape in the file
and how to turn it into ours. `translate` checks the table against the file in both directions, so
that a file either fits exactly or is refused with every difference named.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from dpjax.files import replacing
from dpjax.models.model import Params, flatten, unflatten
from dpjax.models.weights.torch_pickle import read_torch_pickle

__all__ = [
    "Source",
    "Tensors",
    "load_plain",
    "load_weights",
    "read_tensors",
    "save_weights",
    "translate",
]

Tensors = dict[str, np.ndarray]

_log = logging.getLogger(__name__)


def _identity(tensor: np.ndarray) -> np.ndarray:
    return tensor


@dataclass(frozen=True)
class Source:
    """Where one of our parameters comes from.

    Args:
      name: the tensor's name in the file.
      shape: its shape in the file; None stands for any length.
      convert: makes our array of it. It is given the file's tensors named in `others` too.
      others: further tensors, each with the shape it must have.
    """

    name: str
    shape: tuple[int | None, ...]
    convert: Callable[..., np.ndarray] = _identity
    others: tuple[tuple[str, tuple[int | None, ...]], ...] = ()

    def tensors(self) -> tuple[tuple[str, tuple[int | None, ...]], ...]:
        """All names with their shapes."""
        return ((self.name, self.shape), *self.others)


def read_tensors(path: str | os.PathLike[str]) -> Tensors:
    """All tensors of a `.npz`, `.safetensors` or legacy torch `.pth` file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is of another kind, or broken.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no weight file {path}.")
    suffix = os.path.splitext(path)[1]
    if suffix == ".pth":
        return read_torch_pickle(path)
    try:
        if suffix == ".npz":
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        if suffix == ".safetensors":
            return dict(safetensors_numpy.load_file(path))
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as {suffix}: {error}") from error
    raise ValueError(f"{path} must end in .npz, .safetensors or .pth.")


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        want is None or got == want for got, want in zip(shape, wanted, strict=True)
    )


def _show(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"


def translate(
    params: Params,
    tensors: Mapping[str, np.ndarray],
    table: Mapping[str, Source],
    *,
    origin: str,
    head: str | None = "head",
    ignore: str | None = None,
) -> Params:
    """Puts the tensors of a file into a parameter tree.

    Args:
      params: the tree; gives the wanted paths and shapes.
      tensors: the file's content.
      table: for every path of `params`, where it comes from.
      origin: the file, for messages.
      head: top-level key to be kept from `params` whatever the file says, or None to take the
        file's head like every other parameter.
      ignore: regular expression for names in the file that are known and have no use here.

    Returns:
      A tree like `params`, float32.

    Guarantees:
      Every parameter outside a kept head is from the file, and every tensor of the file was used,
      belongs to the kept head, or matches `ignore`.

    Raises:
      ValueError: names every tensor that is missing, unexpected, misshapen or not finite.
    """
    wanted = flatten(params)
    kept = {path for path in wanted if head is not None and path.split("/")[0] == head}
    allowed = {name for source in table.values() for name, _ in source.tensors()}
    problems = [f"no rule for parameter {path}" for path in sorted(set(wanted) - set(table) - kept)]
    for name in sorted(set(tensors) - allowed):
        if ignore is None or not re.search(ignore, name):
            problems.append(f"unexpected {name} {_show(tensors[name].shape)}")
    flat = {}
    for path, leaf in wanted.items():
        if path in kept or path not in table:
            flat[path] = leaf
            continue
        found = [_find(tensors, name, shape, problems) for name, shape in table[path].tensors()]
        if any(tensor is None for tensor in found):
            continue
        value = np.asarray(table[path].convert(*found), np.float32)
        if value.shape != tuple(leaf.shape):
            problems.append(f"{path} is {_show(value.shape)} in the file, {_show(leaf.shape)} here")
            continue
        flat[path] = jnp.asarray(value)
    if problems:
        # One tensor can feed several parameters; say it once.
        unique = list(dict.fromkeys(problems))
        raise ValueError(f"{origin} does not fit the model: {'; '.join(unique)}.")
    if kept:
        _log.info("%s: head %r keeps its own initial values on purpose.", origin, head)
    return unflatten(flat)


def _find(
    tensors: Mapping[str, np.ndarray],
    name: str,
    shape: tuple[int | None, ...],
    problems: list[str],
) -> np.ndarray | None:
    if name not in tensors:
        problems.append(f"missing {name} {_show(shape)}")
        return None
    tensor = tensors[name]
    if not _fits(tensor.shape, shape):
        problems.append(f"misshapen {name} {_show(tensor.shape)}, must be {_show(shape)}")
        return None
    tensor = np.asarray(tensor, np.float32)
    if not np.isfinite(tensor).all():
        problems.append(f"not finite {name}")
        return None
    return tensor


def save_weights(params: Params, path: str | os.PathLike[str]) -> None:
    """Writes a parameter tree, one tensor for each path, as `.npz` or `.safetensors`.

    Guarantees:
      The file appears whole or not at all.

    Raises:
      ValueError: the suffix is another one.
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1]
    if suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path} must end in .npz or .safetensors.")
    arrays = {name: np.asarray(jax.device_get(leaf)) for name, leaf in flatten(params).items()}
    with replacing(path, secret=True) as partial:
        if suffix == ".npz":
            with partial.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
        else:
            safetensors_numpy.save_file(arrays, partial)


def load_weights(path: str | os.PathLike[str], like: Params, *, head: str | None = None) -> Params:
    """Reads what `save_weights` wrote, into a tree of the same paths and shapes.

    Args:
      path: the file.
      like: gives the paths and shapes that must be there (arrays or `ShapeDtypeStruct`s).
      head: top-level key to be kept from `like` instead, or None.

    Raises:
      ValueError: names every tensor that is missing, unexpected, misshapen or not finite.
    """
    table = {name: Source(name, tuple(leaf.shape)) for name, leaf in flatten(like).items()}
    return translate(like, read_tensors(path), table, origin=os.fspath(path), head=head)


def load_plain(params: Params, path: str, *, head: bool = False) -> Params:
    """The `Loader` of a model that has no layout but its own: reads what `save_weights` wrote."""
    return load_weights(path, params, head=None if head else "head")
