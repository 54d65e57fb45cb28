"""Sweeps: the same points locally and in array jobs; typos cost nothing; failures are listed."""

import csv
import json
import os
import sys

import pytest
from tiny import on_devices, tiny_config

from dpjax.commands import cli
from dpjax.search import sweep

STUDY = """
from tiny import tiny_config

def get_config(arg=None):
    return tiny_config(finetune="head", epochs=0.3)

def sweep():
    for rate in (1e-3, 1e38, 2e-3):
        yield {"optimizer.learning_rate": rate, "optimizer.name": "sgd"}
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    here = os.path.dirname(os.path.dirname(__file__))
    monkeypatch.setenv("PYTHONPATH", f"{here}:{os.path.dirname(here)}")
    monkeypatch.setenv("XLA_FLAGS", on_devices(1)["XLA_FLAGS"])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    file = tmp_path / "study.py"
    file.write_text(STUDY)
    return file


def test_overrides_are_applied_under_the_lock():
    config = tiny_config()
    sweep.apply(config, {"dp.epsilon": 1, "finetune": "head", "model.options": {"depth": 2}})
    assert (config.dp.epsilon, config.finetune) == (1, "head")
    assert config.model.options.to_dict() == {"depth": 2}
    assert config.is_locked
    sweep.apply(config, {"dp": None})
    assert config.dp is None


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"dp.epsilno": 1.0}, "config.dp has no field 'epsilno': did you mean 'epsilon'?"),
        ({"epochs": "many"}, "config.epochs='many' must be a number"),
        ({"finetune.head": True}, "config.finetune has no fields"),
    ],
)
def test_mistakes_name_the_point_and_the_field(overrides, text, tmp_path):
    with pytest.raises(ValueError, match="config") as caught:
        sweep.apply(tiny_config(), overrides)
    assert text in str(caught.value)
    file = tmp_path / "s.py"
    file.write_text(f"def sweep():\n    yield {{}}\n    yield {overrides!r}\n")
    with pytest.raises(ValueError, match="point 1 of"):
        sweep.points(str(file), tiny_config())


@pytest.mark.parametrize(
    ("source", "text"),
    [("", "defines no sweep"), ("def sweep():\n    return []", "yields no points")],
)
def test_a_sweep_has_points(source, text, tmp_path):
    (tmp_path / "s.py").write_text(source)
    with pytest.raises(ValueError, match=text):
        sweep.points(str(tmp_path / "s.py"), tiny_config())


def test_points_are_numbered():
    assert sweep.point([{"a": 1}, {"a": 2}], 1) == {"a": 2}
    for index in (-1, 2):
        with pytest.raises(ValueError, match=rf"sweep_index={index} must be in \[0, 2\)"):
            sweep.point([{"a": 1}, {"a": 2}], index)


def test_a_typo_fails_before_anything_runs(study, tmp_path, capsys):
    study.write_text(STUDY.replace('"optimizer.name"', '"optimizer.nmae"'))
    assert cli.main(["sweep", f"--config={study}", f"--workdir={tmp_path / 'w'}"]) == 2
    assert "did you mean 'name'?" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_local_sweep_lists_failures_and_does_what_is_missing(study, tmp_path, capsys):
    out = tmp_path / "w"
    arguments = [f"--config={study}", f"--workdir={out}"]
    assert cli.main(["sweep", *arguments, "--table_only"]) == 0
    assert capsys.readouterr().out.count("waiting") == 3
    # One point as an array job runs it, then the rest.
    command = [sys.executable, "-m", "dpjax", "train", *arguments, "--sweep_index=2"]
    assert sweep.run_point(command, out / "002") == 0
    before = (out / "002" / "weights.safetensors").stat().st_mtime_ns
    assert cli.main(["sweep", *arguments, "--config.seed=3"]) == 1
    assert (out / "002" / "weights.safetensors").stat().st_mtime_ns == before
    with open(out / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"].split(":")[0] for row in rows] == ["finished", "exit 3", "finished"]
    assert "learning_rate=1e+38" in rows[1]["status"]
    assert (out / "sweep.md").read_text().count("\n") == 5
    for row, directory in zip(rows, ("000", "001", "002")):
        config = json.loads((out / directory / "config.json").read_text())
        assert config["optimizer"]["learning_rate"] == float(row["optimizer.learning_rate"])
        assert config["seed"] == (0 if directory == "002" else 3)
        assert (row["epsilon"] == "") == (directory == "001")
    # Three learning rates, one program.
    for name in ("accumulate", "update"):
        assert len(list((tmp_path / "xla").glob(f"jit_{name}-*-cache"))) == 1


def test_a_part_of_the_points_is_listed_and_run(tmp_path, capsys):
    rows = [{"dp.epsilon": e, "private_seed": s} for e in (1.0, 2.0) for s in (0, 1, 2)]
    rows.append({"finetune": "head"})  # epsilon 2 by the config
    config = tiny_config()
    assert sweep.select(rows, config) == list(range(7))
    assert sweep.select(rows, config, ["dp.epsilon=2"]) == [3, 4, 5, 6]
    assert sweep.select(rows, config, ["dp.epsilon=2.0", "private_seed=1"]) == [4]
    parts = [sweep.select(rows, config, chunk=f"{k}/3") for k in (1, 2, 3)]
    assert sorted(number for part in parts for number in part) == list(range(7))
    assert {len(part) for part in parts} == {2, 3}
    for options, text in (
        ({"filters": ["dp.epsilno=1"]}, "'epsilon'"),
        ({"filters": ["dp.epsilon"]}, "FIELD=VALUE"),
        ({"filters": ["dp.epsilon=one"]}, "must be a number"),
        ({"filters": ["dp.epsilon=3"]}, "none of the 7 points"),
        ({"chunk": "4/3"}, "K in 1..N"),
        ({"chunk": "2"}, "K in 1..N"),
    ):
        with pytest.raises(ValueError, match=text):
            sweep.select(rows, config, **options)
    (tmp_path / "s.py").write_text(STUDY)
    argv = ["sweep", f"--config={tmp_path / 's.py'}", f"--workdir={tmp_path / 'w'}", "--list"]
    assert cli.main([*argv, "--chunk=2/2"]) == 0
    out = capsys.readouterr().out
    assert "| 1 | 1e+38 | sgd | waiting |" in out
    assert "1 of 3 points" in out
    assert not (tmp_path / "w").exists()
