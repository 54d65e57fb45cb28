"""Files of torch, in both formats, written here without torch."""

import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from dpjax import models


class FakeTensor:
    def __init__(self, array, storage, offset=0, stride=None):
        self.array, self.storage, self.offset = array, storage, offset
        self.stride = stride or tuple(s // array.itemsize for s in array.strides)

    def __reduce__(self):
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        args = (self.storage, self.offset, self.array.shape, self.stride, False, OrderedDict())
        return rebuild, args


class FakeStorage:
    def __init__(self, key, values):
        self.key, self.values = key, values


@pytest.fixture
def legacy(monkeypatch, tmp_path):
    """Writes what `torch.save` wrote before 1.6, or in the zip format since, without torch."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})
    rebuild = types.FunctionType((lambda *args: args).__code__, {}, "_rebuild_tensor_v2")
    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2, torch._utils = rebuild, utils
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    def write_zip(state, storages):
        path, content = tmp_path / "new.pth", io.BytesIO()
        pickler = pickle.Pickler(content, protocol=2)
        pickler.persistent_id = lambda value: (
            ("storage", torch.FloatStorage, value.key, "cpu", len(value.values))
            if isinstance(value, FakeStorage)
            else None
        )
        pickler.dump(state)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("new/data.pkl", content.getvalue())
            archive.writestr("new/byteorder", "little")
            for storage in storages:
                archive.writestr(f"new/data/{storage.key}", storage.values.tobytes())
        return path

    def write(state, storages, zipped=False):
        if zipped:
            return write_zip(state, storages)
        path = tmp_path / "legacy.pth"
        with path.open("wb") as file:
            for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
                pickle.dump(value, file, protocol=2)
            pickler = pickle.Pickler(file, protocol=2)
            pickler.persistent_id = lambda value: (
                ("storage", torch.FloatStorage, value.key, "cpu", len(value.values), None)
                if isinstance(value, FakeStorage)
                else None
            )
            pickler.dump(state)
            pickle.dump([storage.key for storage in storages], file, protocol=2)
            for storage in storages:
                file.write(struct.pack("<q", len(storage.values)) + storage.values.tobytes())
        return path

    return write


@pytest.mark.parametrize("zipped", [False, True])
def test_torch_files(legacy, zipped):
    values = np.arange(12, dtype=np.float32)
    storage = FakeStorage("1", values)
    matrix, part = values.reshape(3, 4), values[5:7]
    path = legacy(
        OrderedDict(
            a=FakeTensor(matrix, storage),
            transposed=FakeTensor(matrix.T, storage),
            part=FakeTensor(part, storage, offset=5),
        ),
        [storage],
        zipped,
    )
    tensors = models.read_tensors(path)
    np.testing.assert_array_equal(tensors["a"], matrix)
    np.testing.assert_array_equal(tensors["transposed"], matrix.T)
    np.testing.assert_array_equal(tensors["part"], part)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"cannot be read as a legacy torch file"):
        models.read_tensors(path)


@pytest.mark.parametrize("zipped", [False, True])
def test_torch_files_cannot_reach_outside_their_storage(legacy, zipped):
    values = np.arange(4, dtype=np.float32)
    storage = FakeStorage("1", values)
    for tensor in (
        FakeTensor(values, storage, offset=1),
        FakeTensor(values, storage, stride=(9,)),
        FakeTensor(values, storage, stride=(-1,)),
    ):
        with pytest.raises(ValueError, match="torch file: a tensor"):
            models.read_tensors(legacy({"a": tensor}, [storage], zipped))


def _do_harm():
    raise AssertionError("the file's code ran")


class Harm:
    def __reduce__(self):
        return _do_harm, ()


@pytest.mark.parametrize("zipped", [False, True])
def test_torch_files_run_no_code(legacy, zipped):
    with pytest.raises(ValueError, match=r"_do_harm does not belong in a weight file"):
        models.read_tensors(legacy({"a": Harm()}, [], zipped))
    with pytest.raises(ValueError, match=r"not every entry is a tensor: epoch; save the state"):
        models.read_tensors(legacy({"epoch": 1}, [], zipped))


@pytest.mark.peers
@pytest.mark.parametrize("zipped", [False, True])
def test_files_of_torch_itself(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    matrix = torch.arange(12.0).reshape(3, 4)
    state = {
        "a": matrix, "transposed": matrix.T, "part": matrix[1:, 1:3], "half": matrix.half(),
        "bfloat": matrix.bfloat16(), "parameter": torch.nn.Parameter(matrix),
        "count": torch.tensor(3),
    }  # fmt: skip
    for suffix in ("pth", "pt"):
        path = tmp_path / f"new.{suffix}"
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        tensors = models.read_tensors(path)
        assert set(tensors) == set(state)
        for name, tensor in state.items():
            want = tensor.detach().float().numpy()
            np.testing.assert_array_equal(tensors[name].astype(np.float32), want)
