"""Reads a state dict that torch saved, with NumPy only and without running code from the file."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

__all__ = ["read_torch_pickle"]

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "BFloat16Storage": ml_dtypes.bfloat16,
}


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _View(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild(storage: _Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> _View:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor has no storage")
    return _View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


def _rebuild_parameter(view: _View, *rest: Any) -> _View:
    return view


class _Unpickler(pickle.Unpickler):
    """Accepts an ordered dict, tensors and their storages, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in _DTYPES:
            return np.dtype(_DTYPES[name])
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a weight file")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, _, view = (*pid, None)[:6]  # torch 1.6 dropped the view
        if kind != "storage" or view is not None or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"{kind!r} is not a plain storage")
        return _Storage(str(key), dtype)


def _materialize(view: _View, storages: dict[str, np.ndarray]) -> np.ndarray:
    data = storages[view.storage.key]
    if len(view.shape) != len(view.stride) or min((view.offset, *view.shape, *view.stride)) < 0:
        raise pickle.UnpicklingError("a tensor has an impossible layout")
    last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.stride, strict=True))
    if math.prod(view.shape) and last >= len(data):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    strides = tuple(step * data.itemsize for step in view.stride)
    tensor = np.lib.stride_tricks.as_strided(data[view.offset :], view.shape, strides)
    return np.ascontiguousarray(tensor).reshape(view.shape)


def _read_storages(file: BinaryIO, dtypes: dict[str, np.dtype]) -> dict[str, np.ndarray]:
    storages = {}
    for key in _Unpickler(file).load():
        dtype = dtypes[str(key)].newbyteorder("<")
        count = int.from_bytes(file.read(8), "little")
        content = file.read(count * dtype.itemsize)
        storages[str(key)] = np.frombuffer(content, dtype, count)
    return storages


def _views(state: Any) -> dict[str, _View]:
    if not isinstance(state, dict):
        raise pickle.UnpicklingError(f"it holds a {type(state).__name__}, not tensors")
    views = {str(k): v for k, v in state.items() if isinstance(v, _View)}
    other = sorted(str(key) for key in state if str(key) not in views)
    if other:
        raise pickle.UnpicklingError(
            f"not every entry is a tensor: {', '.join(other[:4])}; save the state dict alone, with "
            "torch.save(model.state_dict(), FILE)"
        )
    return views


def _read_legacy(file: BinaryIO) -> dict[str, np.ndarray]:
    if _Unpickler(file).load() != _MAGIC or _Unpickler(file).load() != _PROTOCOL:
        raise pickle.UnpicklingError("the magic number is wrong")
    _Unpickler(file).load()  # the writer's word sizes
    views = _views(_Unpickler(file).load())
    dtypes = {view.storage.key: view.storage.dtype for view in views.values()}
    storages = _read_storages(file, dtypes)
    return {name: _materialize(view, storages) for name, view in views.items()}


def _read_zip(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    (pickled,) = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    folder = pickled.removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise pickle.UnpicklingError("it was written on a big-endian machine")
    with archive.open(pickled) as file:
        views = _views(_Unpickler(file).load())
    storages = {
        key: np.frombuffer(archive.read(f"{folder}data/{key}"), dtype)
        for key, dtype in {view.storage for view in views.values()}
    }
    return {name: _materialize(view, storages) for name, view in views.items()}


def read_torch_pickle(path: str) -> dict[str, np.ndarray]:
    """Reads the tensors of a state dict, in the zip format of torch 1.6 or the one before it.

    Raises:
        ValueError: the file has another format, is damaged, or contains anything but tensors.
    """
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                return _read_zip(archive)
        with open(path, "rb") as file:
            return _read_legacy(file)
    except Exception as error:  # a pickle of anything can raise anything
        kind = "torch file" if zipped else "legacy torch file"
        raise ValueError(f"{path} cannot be read as a {kind}: {error}.") from error
