"""The study of linear probing then fine-tuning, run at its smallest size, and its report."""

import pytest
from finished_study import report_rebuilt, smoke, table

from experiments import study


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return smoke("lp_ft", tmp_path_factory.mktemp("study") / "w")


def test_the_report_is_whole_and_rebuilt_from_the_files(finished):
    text = report_rebuilt(
        finished,
        figures=("shares", "distortion", "theory_shares", "theory_curves"),
        tables=("shares", "best_share", "published", "theory_best", "theory"),
    )
    assert "missing" not in text


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
        error = abs(float(row["linearized"]) - float(row["measured"]))
        assert error < 2 * float(row["2 s.e."]) + 0.2 * float(row["measured"])


def test_a_larger_budget_wants_no_more_probing(finished):
    best = {
        (r["network"], r["head"], float(r["epsilon"])): float(r["predicted, linearized"])
        for r in table(finished, "theory_best")
    }
    for network in ("linear", "ReLU"):
        for head in ("random", "zero"):
            assert best[network, head, 8.0] < best[network, head, 0.5]
