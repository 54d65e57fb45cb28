"""Weight files: reads and writes ours, and loads published ones by a table of names.

A loader is a table from our parameter paths to `Source`s: name and shape of the tensor in the file,
and its conversion to ours. `translate` checks the table against the file in both directions: a file
fits exactly, or is rejected with a message that names every difference.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy
from safetensors import safe_open

from dpjax.files import replacing
from dpjax.models.model import Params, flatten, unflatten
from dpjax.models.weights.torch_pickle import read_torch_pickle

__all__ = [
    "Source",
    "Tensors",
    "load_plain",
    "load_weights",
    "loader",
    "read_tensors",
    "save_weights",
    "translate",
]

Tensors = dict[str, np.ndarray]

_TORCH = (".pth", ".pt")

_log = logging.getLogger(__name__)


def _identity(tensor: np.ndarray) -> np.ndarray:
    return tensor


@dataclass(frozen=True)
class Source:
    """Where one of our parameters comes from.

    Args:
        name: name of the tensor in the file.
        shape: its shape in the file; None matches any length.
        convert: converts it to our array; receives the tensors of `others` too.
        others: names of further tensors, with their shapes.
    """

    name: str
    shape: tuple[int | None, ...]
    convert: Callable[..., np.ndarray] = _identity
    others: tuple[tuple[str, tuple[int | None, ...]], ...] = ()

    def tensors(self) -> tuple[tuple[str, tuple[int | None, ...]], ...]:
        """Returns all names with their shapes."""
        return ((self.name, self.shape), *self.others)


def read_tensors(path: str | os.PathLike[str]) -> Tensors:
    """Reads all tensors of a `.npz`, `.safetensors` or `.gguf` file, or of torch's state dict.

    A `.safetensors.index.json` stands for all the files that it names, which lie beside it.

    Raises:
        FileNotFoundError: the file does not exist.
        ImportError: a `.gguf` file needs the `gguf` package.
        ValueError: it has another suffix, is damaged, is a git-LFS pointer or a web page in place
            of the file, or holds tensors of a type that NumPy does not have.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no weight file {path}.")
    suffix = os.path.splitext(path)[1]
    if path.endswith(".safetensors.index.json"):
        return _read_sharded(path)
    if suffix not in (".npz", ".safetensors", ".gguf", *_TORCH):
        raise ValueError(f"{path} must end in .npz, .safetensors, .gguf, {', '.join(_TORCH)}.")
    with open(path, "rb") as file:
        start = file.read(256).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-LFS pointer to the weights: run git lfs pull.")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(
            f"{path} is a web page, not weights: the download needs a direct link or a sign-in."
        )
    if suffix in _TORCH:
        return read_torch_pickle(path)
    if suffix == ".gguf":
        return _read_gguf(path)
    try:
        if suffix == ".npz":
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        return dict(safetensors_numpy.load_file(path))
    except Exception as error:  # a damaged file raises almost anything
        if suffix == ".safetensors" and (kinds := _unknown_types(path)):
            raise ValueError(
                f"{path} holds tensors of type {', '.join(kinds)}, which cannot be read here: save "
                "them as F32 or BF16, with their scales multiplied in."
            ) from error
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read as {suffix}: {reason}. Is it complete?") from error


def _unknown_types(path: str) -> list[str]:
    """Types of the tensors of a safetensors file that NumPy cannot hold, such as F8_E4M3."""
    try:
        with safe_open(path, framework="np") as file:
            names = {file.get_slice(name).get_dtype() for name in file.keys()}
    except Exception:  # damaged
        return []
    return sorted(names - {"F64", "F32", "F16", "BF16", "BOOL", "I8", "I16", "I32", "I64",
                           "U8", "U16", "U32", "U64"})  # fmt: skip


def _read_sharded(path: str) -> Tensors:
    try:
        with open(path, encoding="utf-8") as file:
            names = dict(json.load(file)["weight_map"])
        shards = [str(shard) for shard in dict.fromkeys(names.values())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as an index of weights: {error!r}") from error
    outside = [shard for shard in shards if os.path.basename(shard) != shard]
    if outside:
        raise ValueError(f"{path} names {outside[0]!r}, which does not lie beside it.")
    tensors: Tensors = {}
    for shard in shards:
        tensors |= read_tensors(os.path.join(os.path.dirname(path), shard))
    missing = sorted(set(names) - set(tensors))
    if missing:
        raise ValueError(f"{path} names {missing[0]!r}, which none of its files has.")
    return tensors


def _read_gguf(path: str) -> Tensors:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"{path} needs the gguf package: pip install gguf.") from error
    try:
        return {
            one.name: gguf.dequantize(one.data, one.tensor_type)
            for one in gguf.GGUFReader(path).tensors
        }
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read as .gguf: {error}") from error


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
    """Loads the tensors of a file into a parameter tree.

    Args:
        params: the tree, with the expected paths and shapes.
        tensors: the tensors of the file.
        table: the source of every path of `params`.
        origin: name of the file, for messages.
        head: top-level key that is kept from `params`, whatever the file contains; None loads the
            head like every other parameter.
        ignore: regular expression of names in the file that are known and not used.

    Returns:
        A tree like `params`, float32.

    Guarantees:
        Every parameter outside a kept head comes from the file. Every tensor of the file was used,
        belongs to the kept head, or matches `ignore`.

    Raises:
        ValueError: a tensor is missing, unexpected, misshapen or not finite; the message names all
            of them.
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
        parts = [_find(tensors, name, shape, problems) for name, shape in table[path].tensors()]
        if any(part is None for part in parts):
            continue
        value = np.asarray(table[path].convert(*parts), np.float32)
        if value.shape != tuple(leaf.shape):
            problems.append(f"{path} is {_show(value.shape)} in the file, {_show(leaf.shape)} here")
            continue
        flat[path] = jnp.asarray(value)
    if problems:
        # One tensor can be the source of several parameters, and is reported once.
        unique = list(dict.fromkeys(problems))
        raise ValueError(f"{origin} does not fit the model: {'; '.join(unique)}.")
    if kept:
        _log.info("%s: head %r keeps its initial values, as requested.", origin, head)
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
    """Writes a parameter tree atomically, one tensor per path, as `.safetensors`.

    Raises:
        ValueError: another suffix.
    """
    if os.path.splitext(path)[1] != ".safetensors":
        raise ValueError(f"{os.fspath(path)} must end in .safetensors.")
    arrays = {name: np.asarray(jax.device_get(leaf)) for name, leaf in flatten(params).items()}
    with replacing(path, secret=True) as partial:
        safetensors_numpy.save_file(arrays, partial)


def load_weights(path: str | os.PathLike[str], like: Params, *, head: str | None = None) -> Params:
    """Reads a file of `save_weights` into a tree of the same paths and shapes.

    Args:
        path: the file.
        like: arrays or `ShapeDtypeStruct`s with the expected paths and shapes.
        head: top-level key that is kept from `like` instead, or None.

    Raises:
        ValueError: a tensor is missing, unexpected, misshapen or not finite; the message names all
            of them.
    """
    table = {name: Source(name, tuple(leaf.shape)) for name, leaf in flatten(like).items()}
    return translate(like, read_tensors(path), table, origin=os.fspath(path), head=head)


def loader(
    table: Callable[[Tensors, int], Mapping[str, Source]], *, ignore: str | None = None
) -> Callable[..., Params]:
    """Returns the `Loader` of a model with a published layout; it reads our own files too.

    Args:
        table: maps the tensors of a published file and the number of classes to the table of
            `translate`.
        ignore: see `translate`.
    """

    def load(params: Params, path: str, *, head: bool = False) -> Params:
        tensors, kept = read_tensors(path), None if head else "head"
        if set(tensors) & set(flatten(params)):
            return load_weights(path, params, head=kept)
        sources = table(tensors, int(params["head"]["bias"].shape[0]))
        return translate(params, tensors, sources, origin=path, head=kept, ignore=ignore)

    return load


def load_plain(params: Params, path: str, *, head: bool = False) -> Params:
    """The `Loader` of a model without a published layout: reads files of `save_weights`."""
    return load_weights(path, params, head=None if head else "head")
