"""The command that runs a study: what is missing, once; then theory and report."""

import json
import os
import signal

import pytest
from tiny import tiny_config

from dpjax import build
from dpjax.build import fields
from dpjax.runtime import Workdir
from dpjax.search import sweep
from dpjax.training import loop
from experiments import run_study, study

STUDY = """
from tiny import tiny_config
from experiments import study

def get_config(arg=None):
    return tiny_config(finetune="head", epochs=0.4, optimizer__name="sgd")

def sweep(arg=None):
    yield {"optimizer.learning_rate": 0.1 if arg == "smoke" else 0.2}
    yield {"optimizer.learning_rate": 0.1, "dp.bound_schedule": ((0.0, 1.0), (0.5, 2.0))}
    yield {"optimizer.learning_rate": 1e38, "lp.fraction": 0.5}

def measure(run, initial, final):
    return {"rate": run.config.optimizer.learning_rate,
            "moved": bool((final["head"]["kernel"] != initial["head"]["kernel"]).any())}

def theory(arg=None):
    return {"size": arg}

def report(workdir):
    results = study.read(workdir)
    rows = study.summarize(results, {"rate": "optimizer.learning_rate"}, {})
    return study.write(workdir, "Title", [study.Table("t", "Caption", rows)], results)
"""
HERE = os.path.dirname(os.path.dirname(__file__))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a_study.py"
    path.write_text(STUDY)
    return path


def test_a_study_runs_once(file, tmp_path, capsys, monkeypatch):
    work = tmp_path / "w"
    arguments = [f"--config={file}:smoke", f"--workdir={work}"]
    assert run_study.main(arguments) == 0
    found = study.read(work)
    assert [r.status for r in found] == ["finished", "finished", "diverged"]
    assert [r.measured for r in found[:2]] == [{"rate": 0.1, "moved": True}] * 2
    assert found[1].config["dp"]["bound_schedule"] == [[0.0, 1.0], [0.5, 2.0]]
    assert not (work / "000" / "checkpoints").exists()  # cached
    assert (work / "001" / "checkpoints").exists()  # the loop
    assert json.loads((work / "theory.json").read_text()) == {"size": "smoke"}
    assert "1 diverged" in (work / "report.md").read_text()
    # Again: nothing is trained. A measurement that was lost is made from the weights.
    (work / "001" / "measured.json").unlink()
    for module, name in ((run_study.loop, "train"), (run_study.cached_heads, "train_group")):
        monkeypatch.setattr(module, name, None)
    assert run_study.main(arguments) == 0
    assert study.read(work)[1].measured == {"rate": 0.1, "moved": True}
    # Another size has other points.
    assert run_study.main([f"--config={file}:laptop", f"--workdir={work}"]) == 2
    assert "holds another study" in capsys.readouterr().err


def test_a_failed_point_fails_the_command_and_is_told(file, tmp_path, capsys):
    file.write_text(STUDY.replace('"lp.fraction": 0.5', '"lp.fraction": 1.5'))
    work = tmp_path / "w"
    arguments = [f"--config={file}:smoke", f"--workdir={work}"]
    assert run_study.main(arguments) == 1
    assert "missing: 002, exit 2: lp.fraction=1.5" in (work / "report.md").read_text()
    assert run_study.main(["--config=nothing.py", f"--workdir={work}"]) == 2
    assert "config='nothing.py' is neither a file nor" in capsys.readouterr().err


def test_a_stop_saves_and_the_command_goes_on(file, tmp_path):
    work, before = tmp_path / "w", signal.getsignal(signal.SIGTERM)
    arguments = [f"--config={file}:smoke", f"--workdir={work}"]
    assert run_study.main(arguments, stop=lambda step: step == 1) == 75
    assert study.read(work)[1].status == "interrupted"
    assert run_study.main(arguments) == 0
    assert study.read(work)[1].status == "finished"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", ["calibration", "lp_ft"])
@pytest.mark.parametrize("size", study.SIZES)
def test_points_of_every_size_are_valid(name, size):
    path = f"{HERE}/../experiments/{name}/study.py:{size}"
    base = fields.load(path)
    points = sweep.points(path, base)
    assert len({json.dumps(p, sort_keys=True) for p in points}) == len(points)
    assert all(p["private_seed"] is not None for p in points)


@pytest.mark.slow
def test_runs_that_differ_in_values_share_functions_and_nothing_else(tmp_path):
    def config(**changes):
        return tiny_config(**{"epochs": 0.4, "dp__method": "vmap", **changes})

    first = run_study._build(config())
    changes = {
        "seed": 1, "private_seed": 6, "dp__epsilon": 4.0, "model__head_init": "random",
        "optimizer__learning_rate": 0.02,
    }  # fmt: skip
    shared, alone = run_study._build(config(**changes)), build.build(config(**changes))
    assert shared.loss_fn is first.loss_fn
    assert shared.phases[0].optimizer is first.phases[0].optimizer
    weights = []
    for name, run in (("shared", shared), ("alone", alone)):
        loop.train(run, Workdir(tmp_path / name))
        weights.append((tmp_path / name / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1]
    for other in ({"finetune": "film"}, {"batch_size": 100}, {"data__shift": 1}, {"dp": None}):
        assert run_study._build(config(**other)).loss_fn is not first.loss_fn
