"""Files of a run and its checkpoints: whole or not at all, checked when read, kept or let go."""

import contextlib
import errno
import fcntl
import json
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dpjax import dp
from dpjax.runtime import (
    Checkpoints,
    OtherRun,
    Unreadable,
    Unwritable,
    Workdir,
    code_digest,
    json_digest,
    read_jsonl,
    sharding,
)
from dpjax.runtime.checkpoints import fingerprint

CONFIG = ConfigDict({"seed": 0, "physical_batch": 64, "dp": {"epsilon": 1.0}})


def tree(value=0.0):
    return {
        "state": {"w": jnp.arange(6000.0).reshape(8, 750) + value, "step": jnp.int32(value)},
        "earlier": {},
    }


def like(layout):
    shapes = jax.eval_shape(tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        layout.shardings(shapes),
    )


ONE = sharding.layout("replicated", jax.devices()[:1])


def saved(path, steps=(1, 2, 3), **options):
    with Checkpoints(path, **{"keep": 9, **options}) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree(step), {"phase": 0, "step": step}, loss=abs(step - 2.0))
    return path


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("c") / "checkpoints")


@pytest.mark.parametrize("text", ["replicated", "fsdp"])
@pytest.mark.parametrize("devices", [1, 8])
def test_the_same_bits_come_back_on_any_number_of_devices(three, text, devices):
    layout = sharding.layout(text, jax.devices()[:devices])
    with Checkpoints(three, keep=9) as checkpoints:
        assert checkpoints.steps() == [3, 2, 1]
        assert checkpoints.about(2) == {"phase": 0, "step": 2}
        got = checkpoints.load(2, like(layout))
    jax.tree.map(np.testing.assert_array_equal, got, tree(2))
    spread = got["state"]["w"].sharding.shard_shape((8, 750)) != (8, 750)
    assert spread == (text == "fsdp" and devices > 1)
    assert fingerprint(got) == fingerprint(tree(2)) != fingerprint(tree(3))


def test_a_save_compiles_nothing_for_each_array(tmp_path, caplog):
    layout = sharding.layout("replicated", jax.devices())
    arrays = {str(n): np.ones((n, 32), np.float32) for n in range(16, 144, 16)}
    arrays = jax.device_put(arrays, layout.shardings(arrays))
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints, jax.log_compiles():
        checkpoints.save(1, arrays, {"step": 1})
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA compil" in r.getMessage()]
    assert len(compiled) == 1, compiled  # the fingerprint


def test_the_latest_and_the_best_are_kept(tmp_path):
    path = saved(tmp_path / "c", steps=(1, 2, 3, 4, 5), keep=2, keep_best=1)
    assert sorted(p.name for p in path.iterdir()) == ["2", "4", "5"]
    # The losses of a run that is resumed come from its metrics.
    with Checkpoints(path, keep=1, keep_best=1, losses={2: 0.0, 4: 2.0, 5: 3.0}) as checkpoints:
        checkpoints.save(6, tree(6), {"phase": 0})
    assert sorted(p.name for p in path.iterdir()) == ["2", "6"]


def data_files(path):
    return [p for p in path.rglob("d/*") if p.is_file()]


def truncate(path):
    for file in data_files(path):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(path):
    file = max(data_files(path), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose_metadata(path):
    (path / "_CHECKPOINT_METADATA").write_text("")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
@pytest.mark.parametrize("harm", [truncate, flip, lose_metadata])
def test_damage_is_noticed_and_set_aside(harm, tmp_path):
    path = saved(tmp_path / "c", steps=(1, 2))
    harm(path / "2")
    with Checkpoints(path, keep=9) as checkpoints:
        with pytest.raises(Unreadable, match="checkpoint 2"):
            assert checkpoints.about(2) == checkpoints.load(2, like(ONE))
        checkpoints.set_aside(2)
        checkpoints.reload()
        assert checkpoints.steps() == [1]
        jax.tree.map(np.testing.assert_array_equal, checkpoints.load(1, like(ONE)), tree(1))
        for attempt in ("unreadable-2", "unreadable-2.1", "unreadable-2.2"):  # damaged again
            checkpoints.save(2, tree(2), {"phase": 0})
            checkpoints.wait()
            assert (path / "2").is_dir()
            if attempt != "unreadable-2":
                checkpoints.set_aside(2)
                checkpoints.reload()
            assert (path / attempt).is_dir()


@contextlib.contextmanager
def files_no_longer_than(size):
    """Stands for a full disk: the system refuses to write more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_a_clear_error_and_harms_nothing(tmp_path):
    path = saved(tmp_path / "c", steps=(1,))
    said = r"could not be written \(.*\); checkpoint 1 is intact"
    with files_no_longer_than(2000), pytest.raises(Unwritable, match=said):
        saved(path, steps=(2,))
    with Checkpoints(path, keep=9) as checkpoints:  # and what was begun is cleared away
        assert checkpoints.steps() == [1]
        checkpoints.save(2, tree(2), {"phase": 0})
    assert sorted(p.name for p in path.iterdir()) == ["1", "2"]


def used(path, config=CONFIG):
    workdir = Workdir(path)
    workdir.check(config)
    workdir.create(config)
    return workdir


def test_fields_that_do_not_change_the_result_may_change(tmp_path):
    used(tmp_path / "w")
    other = ConfigDict(CONFIG.to_dict())
    other.physical_batch = 8
    Workdir(tmp_path / "w").check(other)
    other.dp.epsilon = 2.0
    with pytest.raises(OtherRun, match=r"config.dp.epsilon: 1.0 != 2.0"):
        Workdir(tmp_path / "w").check(other)


def test_a_run_killed_at_its_very_start_is_no_obstacle(tmp_path):
    path = tmp_path / "w"
    path.mkdir()
    (path / ".config.json.tmp").write_text("{")
    used(path)


def test_a_run_that_began_since_the_check_keeps_its_config(tmp_path):
    workdir, late = Workdir(tmp_path / "w"), ConfigDict(CONFIG.to_dict())
    late.dp.epsilon = 2.0
    workdir.check(late)
    used(tmp_path / "w")
    with workdir.lock(), pytest.raises(OtherRun, match=r"config\.dp\.epsilon: 1\.0 != 2\.0"):
        workdir.create(late)
    assert workdir.read("config.json")["dp"]["epsilon"] == 1.0


def test_restart_moves_the_run_aside(tmp_path):
    path = tmp_path / "w"
    assert Workdir(path).move_aside() is None
    for number in (1, 2):
        used(path).write("privacy.json", {"run": number})
        assert Workdir(path).move_aside() == Path(f"{path}.{number}")
        assert not path.exists()
    assert json.loads(Path(f"{path}.1/privacy.json").read_text()) == {"run": 1}
    path.mkdir()
    (path / "thesis.tex").write_text("x")
    with pytest.raises(OtherRun, match="does not contain a dpjax run"):
        Workdir(path).move_aside()


def test_one_process_works_in_a_directory(tmp_path):
    path = tmp_path / "w"
    with Workdir(path).lock():
        for attempt in (Workdir(path).lock, lambda: Workdir(path.parent / "w").lock()):
            with (
                pytest.raises(OtherRun, match=r"another process runs here \(process \d+ on"),
                attempt(),
            ):
                pass
        used(path)
        with pytest.raises(OtherRun, match="another process runs here"):
            Workdir(path).move_aside()
    with Workdir(path).lock():  # free again
        pass
    assert Workdir(path).move_aside() == Path(f"{path}.1")


def test_the_lock_of_a_killed_process_is_no_lock(tmp_path):
    code = (
        "import sys, time; from dpjax.runtime import Workdir\n"
        "with Workdir(sys.argv[1]).lock(): print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "w"], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    with pytest.raises(OtherRun, match=f"process {child.pid} on"), Workdir(tmp_path / "w").lock():
        pass
    child.kill()
    child.communicate()
    with Workdir(tmp_path / "w").lock():
        used(tmp_path / "w")  # the lock's file does not look like somebody else's


def test_a_lock_that_was_moved_aside_is_no_lock(tmp_path, monkeypatch):
    path, lock = tmp_path / "w", fcntl.flock

    def move_first(file, flags):
        path.rename(tmp_path / "w.1")  # another process, with --restart
        lock(file, flags)

    monkeypatch.setattr(fcntl, "flock", move_first)
    with pytest.raises(OtherRun, match="another process runs here"), Workdir(path).lock():
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Workdir(tmp_path / "w").lock():
        assert "cannot be locked" in capsys.readouterr().err


def test_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Workdir("~/run").path == tmp_path / "run"
    for url in ("gs://bucket/run", "s3://b", "file:///tmp/x", "hdfs://h:1/x", "gs:/b/000"):
        with pytest.raises(ValueError, match=r"workdir='[a-z0-9]+:/.* is a URL"):
            Workdir(url)
    assert Workdir("a:b").path.name == "a:b"  # no URL


FACTS = {"data": "d", "weights": None, "code": "c", "config": {"epochs": 1.0, "cut": (1, 2)}}


def test_a_directory_keeps_its_run(tmp_path, capsys):
    name = used(tmp_path).claim(FACTS)
    assert len(name) == 32
    assert Workdir(tmp_path).claim(FACTS) == name
    for field, value in {"data": "e", "weights": "w", "config": {"epochs": 2.0}}.items():
        with pytest.raises(OtherRun, match=rf"belongs to another run: run\.{field}"):
            Workdir(tmp_path).claim({**FACTS, field: value})
    assert capsys.readouterr().err == ""
    for _ in range(2):  # said once
        assert Workdir(tmp_path).claim({**FACTS, "code": "other"}) == name
    assert capsys.readouterr().err.count("the code has changed") == 1
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "identity.json").unlink()
    with pytest.raises(OtherRun, match=r"has checkpoints but no identity\.json"):
        Workdir(tmp_path).claim(FACTS)
    assert used(tmp_path / "other").claim(FACTS) != name


def test_what_may_not_be_published_is_readable_by_its_owner_only(tmp_path):
    workdir = used(tmp_path / "w")
    workdir.append_metrics(1, {})
    contents = {
        "eval.json": {"accuracy": 0.5}, "best.json": {"nonprivate/accuracy": 0.5},
        "privacy.json": {"not_charged": ["rows named nonprivate/..."]},
        "privacy.md": f"- {dp.AUDIT}, audit.json", "search.md": "| accuracy |",
    }  # fmt: skip
    for name, content in contents.items():
        workdir.write(name, content)
    Checkpoints(workdir.path / "checkpoints", keep=1).__exit__(None, None, None)
    modes = {p.name: p.stat().st_mode & 0o077 for p in workdir.path.iterdir()}
    assert {name for name, mode in modes.items() if not mode} == {
        "metrics.jsonl", "best.json", "privacy.md", "search.md", "checkpoints"
    }  # fmt: skip
    workdir.write("config.json", {**CONFIG, "private_seed": 5})
    assert (workdir.path / "config.json").stat().st_mode & 0o077 == 0


def test_private_seed_is_drawn_once_and_hidden(tmp_path):
    workdir = used(tmp_path / "w")
    assert workdir.private_seed(lambda: 17) == 17
    assert Workdir(tmp_path / "w").private_seed(lambda: 18) == 17
    assert (tmp_path / "w" / "private_seed.json").stat().st_mode & 0o777 == 0o600


def test_metrics_survive_a_cut_line(tmp_path):
    workdir = used(tmp_path / "w")
    for step in (1, 2, 3):
        workdir.append_metrics(step, {"eval/nll": float(step)})
    with open(tmp_path / "w" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "eval/n')
    assert workdir.losses() == {1: 1.0, 2: 2.0, 3: 3.0}
    workdir.drop_metrics_after(2)
    workdir.append_metrics(3, {})
    assert [row["step"] for row in read_jsonl(tmp_path / "w" / "metrics.jsonl")] == [1, 2, 3]


def test_digests_tell_contents_apart():
    assert json_digest({"a": 1}) == json_digest({"a": 1}) != json_digest({"a": 2})
    assert len(code_digest()) == 64
    assert code_digest() == code_digest()


@pytest.mark.parametrize("content", ["", '{"seed": 0, ', "[]"])
@pytest.mark.parametrize("name", ["config.json", "identity.json", "privacy.json"])
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(OtherRun, match=rf"{name} is damaged.* Restore it, or move the run aside"):
        Workdir(tmp_path).read(name)


def test_a_damaged_row_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n{"step": 3')
    with pytest.raises(OtherRun, match=r"metrics\.jsonl, line 2 is damaged"):
        Workdir(tmp_path).drop_metrics_after(3)


def test_an_identity_without_a_name_is_no_identity(tmp_path):
    (tmp_path / "identity.json").write_text('{"code": "x"}')
    with pytest.raises(OtherRun, match=r"identity\.json is damaged: it has no name"):
        Workdir(tmp_path).claim({"code": "x"})


def test_a_directory_that_cannot_be_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OtherRun, match=r"cannot be written: see '.*/file'"):
        Workdir(tmp_path / "file" / "below").check({})
    Workdir(tmp_path / "new" / "below").check({})
