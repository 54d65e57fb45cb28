"""Features of a frozen backbone, computed once and kept on disk.

A head on a frozen backbone sees every example through the same numbers in every step of every run.
They are computed once per (weights, computation, data): a cache entry is a directory of shards
whose name is a digest of all three, so that nothing stale can be read. A shard appears whole or
not at all and carries its own checksums; an interrupted computation goes on where it stopped.

Features are as private as the data they come from, and so are the files that hold them.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from dpjax import data, dp, files
from dpjax.heads.features import FeatureSet
from dpjax.models import InputSpec, Model, Params, check_examples_independent, flatten, probe
from dpjax.runtime import sharding
from dpjax.runtime.compilation import arrays_of, content

__all__ = ["compute_features"]

_DTYPES = ("float32", "float16")
_ROWS = 1024  # of a shard

Prepare = Callable[[jax.Array], jax.Array]


def compute_features(
    model: Model,
    params: Params,
    dataset: data.Dataset,
    *,
    prepare: Prepare | None = None,
    mirror: bool = False,
    batch_size: int = 128,
    dtype: str = "float32",
    cache_dir: str | os.PathLike[str] | None = None,
) -> FeatureSet:
    """Computes what the head of `model` sees for every example, or reads it if it was computed.

    Args:
        model: its `features` is evaluated; the head takes no part.
        params: all parameters, or all but the head's.
        dataset: its examples.
        prepare: maps ONE stored input to the model's input, a pure JAX function; by default images
            are resized (bilinear) and normalized as the model says, and tokens are taken as they
            are.
        mirror: mirror every stored image left to right first.
        batch_size: examples at once, over all local devices.
        dtype: "float32" or, for half the disk space and 3 digits, "float16".
        cache_dir: where entries lie; by default `$DPJAX_CACHE_DIR/features`, else
            `~/.cache/dpjax/features`. An empty DPJAX_CACHE_DIR keeps nothing on disk.

    Returns:
        The features, float32 whatever `dtype`.

    Guarantees:
        An entry is read only for the same weights, the same computation from stored input to
        feature and the same examples in the same order. A second call computes nothing. A shard
        that is damaged or was not written to its end is computed again.

        An example whose features are not finite keeps them, and contributes zero wherever a head
        is trained, as in any other training; how many there are is said on stderr.

    Raises:
        ValueError: an argument out of range, a cache that cannot be written, features of which
            none are finite, or a model in which one example's features depend on another's.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be >= 1.")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {_DTYPES}.")
    body = {name: leaf for name, leaf in params.items() if name != model.head}
    prepare = prepare or _default_prepare(model)

    def function(body: Params, inputs: jax.Array) -> jax.Array:
        ready = jax.vmap(lambda x: prepare(x[:, ::-1] if mirror else x))(inputs)
        return model.features(body, ready).astype(dtype)

    two = jax.ShapeDtypeStruct((2, *dataset.shape), dataset.source.dtype)
    key = _key(function, body, two, dataset, dtype)
    shape = (len(dataset), jax.eval_shape(function, body, two).shape[1])
    shards = _Shards(None if key is None else _folder(cache_dir, dataset, key), shape, dtype)
    values = np.zeros(shape, np.float32)
    missing = []
    for number in range(len(shards)):
        part = shards.read(number)
        if part is None:
            missing.append(number)
        else:
            values[shards.rows(number)] = part
    if missing:
        check_examples_independent(function, body, probe(model.input, dataset.shape))
        for number, part in _computed(function, body, dataset, shards, missing, batch_size):
            values[shards.rows(number)] = part
            if np.isfinite(part).any():  # else these are not the weights of this model
                shards.write(number, part)
    bad = np.count_nonzero(~np.isfinite(values).all(axis=1))
    if bad == len(values):
        raise ValueError(
            f"no example of {dataset.name!r} has finite features: are these the weights of this "
            "model, and is dtype wide enough?"
        )
    if bad:  # a fact about private data, like the others on stderr
        sys.stderr.write(
            f"nonprivate: features of {bad:,} of {len(values):,} examples of {dataset.name!r} are "
            "not finite; these examples contribute zero.\n"
        )
    return FeatureSet(values, dataset.labels, dataset.num_classes, dataset.name)


def _default_prepare(model: Model) -> Prepare:
    spec = model.input
    if not isinstance(spec, InputSpec):
        return lambda tokens: tokens
    return functools.partial(
        data.preprocess,
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
        channels=spec.channels,
    )


def _folder(
    cache_dir: str | os.PathLike[str] | None, dataset: data.Dataset, key: str
) -> Path | None:
    """Where the entry lies; None to keep nothing."""
    if cache_dir is None and not files.caching():
        return None
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{dataset.name}-{dataset.split}")[:60]
    above = files.cache_dir("features") if cache_dir is None else Path(cache_dir).expanduser()
    return above / f"{name}-{key[:40]}"


def _key(
    function: Callable[[Params, jax.Array], jax.Array],
    body: Params,
    two: jax.ShapeDtypeStruct,
    dataset: data.Dataset,
    dtype: str,
) -> str | None:
    """Returns a digest of weights, computation and data; None if the computation has none.

    The computation is identified by its jaxpr, printed, and by the arrays that the print leaves
    out: architecture, readout, resizing and normalization are all in there and cannot be forgotten.
    A callback into Python has no digest.
    """
    closed = jax.make_jaxpr(function)(body, two)
    text = str(closed.jaxpr)
    if "callback" in text:
        return None
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode())
    digest.update(f"\n{dtype}\n{dataset.digest}\n".encode())
    for array in (*arrays_of(closed), *(leaf for _, leaf in sorted(flatten(body).items()))):
        digest.update(content(array))
    digest.update("\n".join(sorted(flatten(body))).encode())
    return digest.hexdigest()


def _computed(
    function: Callable[[Params, jax.Array], jax.Array],
    body: Params,
    dataset: data.Dataset,
    shards: _Shards,
    missing: list[int],
    batch_size: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (shard number, features) of the missing shards, batch by batch over local devices."""
    mesh = sharding.make_mesh(jax.local_devices())
    size = -(-batch_size // mesh.size) * mesh.size
    body = jax.device_put(body, sharding.replicated(mesh))
    step = jax.jit(function, out_shardings=sharding.replicated(mesh))
    cuts = {n: dp.chunks(np.arange(len(dataset))[shards.rows(n)], size) for n in missing}
    stream = data.read_ahead(dataset, (chunk for cut in cuts.values() for chunk in cut))
    total = sum(int(np.sum(cut >= 0)) for cut in cuts.values())
    bar = tqdm(
        total=len(dataset), initial=len(dataset) - total, unit="example", file=sys.stderr,
        desc=f"features of {dataset.name} {dataset.split}", dynamic_ncols=True,
    )  # fmt: skip
    with stream, bar:
        for number, cut in cuts.items():
            parts = []
            for _ in cut:
                batch = next(stream)
                placed = sharding.to_mesh({"input": batch["input"]}, mesh)
                made = np.asarray(step(body, placed["input"]))[batch["mask"]]
                parts.append(made)
                bar.update(len(made))
            yield number, np.concatenate(parts)


class _Shards:
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
        except Exception as error:  # one flipped bit of a zip file raises almost anything
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
            path = self._path(self._folder, number)
            with files.replacing(path, secret=True) as temporary, temporary.open("wb") as file:
                np.savez(file, part.astype(self._dtype))
        except OSError as error:
            raise ValueError(
                f"cache_dir={str(self._folder.parent)!r} cannot be written: {error}."
            ) from error

    @staticmethod
    def _path(folder: Path, number: int) -> Path:
        return folder / f"{number:05d}.npz"
