"""Rows of a run go to TensorBoard, to W&B or to a function of the user's, under their names."""

import contextlib
import json
import math
import struct

import pytest

from dpjax.runtime import rows

SEEN = []
ROWS = [
    (0, {"eval/accuracy": 0.5}),
    (1, {"nonprivate/loss": 2.0, "clip_bound": 1.0}),
    (2, {"nonprivate/loss": math.inf}),
]


@contextlib.contextmanager
def own(folder, *, name, after):
    SEEN.append((folder.name, name, after))
    yield lambda step, values: SEEN.append((step, dict(values)))
    SEEN.append("closed")


def broken(folder, *, name, after):
    raise RuntimeError("no login")


def write(log_to, folder, after=0):
    with rows.opened(log_to, folder, name="0" * 32, after=after) as one:
        for step, values in ROWS:
            one(step, values)


def test_a_function_of_the_users_gets_every_row(tmp_path):
    SEEN.clear()
    write("test_rows:own+test_rows:own", tmp_path, after=7)
    assert SEEN[:2] == 2 * [(tmp_path.name, "0" * 32, 7)]
    assert SEEN[2:] == [row for row in ROWS for _ in range(2)] + 2 * ["closed"]
    write(None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_opened_is_named(tmp_path):
    rows.check("test_rows:own")
    with pytest.raises(ValueError, match=r"log_to='tensorbord' must be one of .*Did you mean"):
        rows.check("tensorbord")
    with pytest.raises(rows.CannotWrite, match="log_to='test_rows:broken' cannot be opened: no l"):
        write("test_rows:broken", tmp_path)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match="log_to='wandb' needs wandb: pip install wandb"):
        rows.check("wandb")


def events(folder):
    """(step, tag, value) of the event files of a folder: records of length, check, data, check."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.*")):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            yield from ((event.step, v.tag, v.simple_value) for v in event.summary.value)
            content = content[16 + size :]


def test_tensorboard_shows_the_rows_to_their_owner(tmp_path):
    pytest.importorskip("tensorboardX")
    write("tensorboard", tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    want = [(step, tag, value) for step, row in ROWS for tag, value in row.items()]
    assert list(events(folder)) == want


@pytest.mark.peers
def test_wandb_keeps_the_rows_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    write("wandb", tmp_path)
    wandb.teardown()  # waits for the process that writes the file
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    (path,) = folder.glob("offline-run-*/*.wandb")
    content, seen, kinds = path.read_bytes()[7:], {}, set()
    while content:  # records of LevelDB: check, length, type, data
        size, kind = struct.unpack("<HB", content[4:7])
        assert kind == 1  # whole; longer ones would be cut at blocks
        record = Record.FromString(content[7 : 7 + size])
        kinds.add(record.WhichOneof("record_type"))
        for item in record.history.item:
            key = item.key or "/".join(item.nested_key)
            if key[0] != "_":
                seen[record.history.step.num, key] = float(json.loads(item.value_json))
        content = content[7 + size :]
    assert seen == {(step, key): value for step, row in ROWS for key, value in row.items()}
    assert not kinds & {"output", "output_raw"}  # what was printed
