"""Sweeps: the same points locally and in array jobs; typos cost nothing; failures are listed."""

import csv
import json
import os
import sys

import pytest
from tiny import tiny_config

from dpjax.commands.sweep import main
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
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # quicker
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
        ({"epochs": "many"}, "config.epochs='many'"),
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
    assert main([f"--config={study}", f"--workdir={tmp_path / 'w'}"]) == 2
    assert "did you mean 'name'?" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_local_sweep_lists_failures_and_does_what_is_missing(study, tmp_path, capsys):
    out = tmp_path / "w"
    arguments = [f"--config={study}", f"--workdir={out}"]
    assert main([*arguments, "--table_only"]) == 0
    assert capsys.readouterr().out.count("waiting") == 3
    # One point as an array job runs it, then the rest.
    command = [sys.executable, "-m", "dpjax.train", *arguments, "--sweep_index=2"]
    assert sweep.run_point(command, out / "002") == 0
    before = (out / "002" / "weights.safetensors").stat().st_mtime_ns
    assert main([*arguments, "--config.seed=3"]) == 1
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
