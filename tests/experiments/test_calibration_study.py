"""The study of calibration, run at its smallest size, and its report."""

import json

import numpy as np
import pytest
from finished_study import report_rebuilt, smoke, table

from experiments import study


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return smoke("calibration", tmp_path_factory.mktemp("study") / "w")


def test_the_report_is_whole_and_rebuilt_from_the_files(finished):
    text = report_rebuilt(
        finished,
        figures=("grid", "reliability", "dynamics"),
        tables=(
            "grid",
            "clipping",
            "late_switch",
            "temperature",
            "kernels",
            "dynamics",
            "published",
        ),
    )
    assert "not for release" in text
    assert "missing" not in text


def test_equal_products_of_rate_and_bound_train_alike_while_all_is_clipped(finished):
    cells = {(float(r["R"]), float(r["eta"])): r for r in table(finished, "grid")}
    assert len(cells) == 9
    for one, other in (((0.1, 1.0), (1.0, 0.1)), ((0.1, 10.0), (1.0, 1.0))):
        assert float(cells[one]["NLL [nats]"]) == pytest.approx(
            float(cells[other]["NLL [nats]"]), rel=1e-3
        )
    # A large bound clips nothing, and the product stops to matter.
    loose, tight = (float(cells[c]["NLL [nats]"]) for c in ((10.0, 0.1), (1.0, 1.0)))
    assert abs(loose - tight) > 0.05


def test_all_variants_are_in_their_tables(finished):
    styles = {r["clipping"] for r in table(finished, "clipping")}
    assert styles == {"flat", "global", "per_layer"}
    schedules = [r["bound schedule"] for r in table(finished, "late_switch")]
    assert sorted(map(json.loads, schedules)) == [[], [[0.0, 0.1], [0.95, 20.0]]]
    (row,) = table(finished, "temperature")
    assert float(row["temperature"]) != 1
    assert float(row["NLL [nats]"]) != float(row["NLL before [nats]"])


def test_the_late_switch_costs_no_privacy(finished):
    late = [r for r in study.read(finished) if r.config["dp"]["normalized"]]
    epsilons = {r.privacy["epsilon"] for r in late if not r.config["dp"]["temperature"]["share"]}
    assert max(epsilons) - min(epsilons) < 1e-6


def test_predictions_are_near_the_measured_losses(finished):
    for row in table(finished, "dynamics"):
        assert float(row["largest gap, relative to the start"]) < 0.04
        error = abs(float(row["excess by noise, measured"]) - float(row["excess predicted"]))
        assert error < float(row["excess predicted"]) + 2 * float(row["2 s.e."])


def test_bins_are_pooled_over_seeds(finished):
    """The report's pooled diagram has the accuracy of all seeds together."""
    flat = [r for r in study.read(finished) if r.overrides.get("dp.bound") == 10.0
            and r.overrides["optimizer.learning_rate"] == 1.0]  # fmt: skip
    assert len(flat) == 2
    counts = sum(np.asarray(r.evaluation["reliability"]["count"]) for r in flat)
    right = sum(
        np.dot(r.evaluation["reliability"]["count"], r.evaluation["reliability"]["accuracy"])
        for r in flat
    )
    assert right / counts.sum() == pytest.approx(np.mean([r.evaluation["accuracy"] for r in flat]))
