"""The study of linear probing then fine-tuning, run at its smallest size, and its report."""

import csv
import os

import pytest

from dpjax import report
from experiments import run_study, study

ROOT = os.path.join(os.path.dirname(__file__), "..")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "w"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        code = run_study.main(["--config=experiments/lp_ft.py:smoke", f"--workdir={path}"])
    assert code == 0
    return path


def table(path, name):
    with (path / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_report_is_whole_and_rebuilt_from_the_files(finished, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = ["report.md"]
    names += [f"{n}.png" for n in ("shares", "distortion", "theory_shares", "theory_curves")]
    names += [f"{n}.{s}" for n in ("shares", "best_share", "published", "theory_best", "theory")
              for s in ("md", "csv")]  # fmt: skip
    before = {name: (finished / name).read_bytes() for name in names}
    assert all(before.values())
    for name in names:
        (finished / name).unlink()
    assert report.main([str(finished)]) == 0
    for name in names:
        assert name.endswith(".png") or (finished / name).read_bytes() == before[name]
    assert "missing" not in before["report.md"].decode()


def test_both_phases_share_the_budget_and_sigma(finished):
    found = study.read(finished)
    assert len(found) == 4
    for result in found:
        share = result.config["lp"]["fraction"]
        assert len(result.privacy["phases"]) == (2 if 0 < share < 1 else 1)
        assert isinstance(result.privacy["noise_multiplier"], float)  # one number for all phases
        assert result.privacy["steps_done"] == result.privacy["steps_planned"] == 8
        assert 1.9 < result.privacy["epsilon"] <= 2


def test_distortion_tells_the_ways_apart(finished):
    rows = {(r["then"], r["head"], float(r["LP share"])): r for r in table(finished, "shares")}
    zero, lora = rows["full", "zero", 0.0], rows["lora:8", "random", 0.5]
    random, probed = rows["full", "random", 0.0], rows["full", "random", 0.5]
    assert float(zero["alignment at start"]) == 0 != float(random["alignment at start"])
    assert float(lora["feature shift"]) < float(random["feature shift"])
    assert 0 < float(probed["feature shift"]) < float(random["feature shift"])
    for row in rows.values():
        assert 0 < float(row["CKA to initial"]) <= 1


def test_simulated_losses_are_inside_the_bounds(finished):
    rows = table(finished, "theory_best")
    assert len(rows) == 8  # networks, heads, epsilons
    for row in rows:
        assert row["outside the bounds"] == "0"
        assert float(row["left the tube, largest"]) < 0.1
    for row in table(finished, "theory"):
        error = abs(float(row["linearised"]) - float(row["measured"]))
        assert error < 2 * float(row["2 s.e."]) + 0.2 * float(row["measured"])


def test_a_larger_budget_wants_no_more_probing(finished):
    best = {
        (r["network"], r["head"], float(r["epsilon"])): float(r["predicted, linearised"])
        for r in table(finished, "theory_best")
    }
    for network in ("linear", "ReLU"):
        for head in ("random", "zero"):
            assert best[network, head, 8.0] < best[network, head, 0.5]
