"""The study of calibration, run at its smallest size, and its report."""

import json

import numpy as np
import pytest
from finished_study import ROOT, of_runs, report_rebuilt, smoke, table

from experiments import cached_heads, run_study, study
from experiments.calibration import tables


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return smoke("calibration", tmp_path_factory.mktemp("study") / "w")


@of_runs
def test_the_report_is_whole_and_rebuilt_from_the_files(finished):
    text = report_rebuilt(
        finished,
        figures=("grid_2", "reliability_2", "dynamics"),
        tables=(
            "grid",
            "equal",
            "best",
            "large",
            "large_nll",
            "clipping",
            "clipping_best",
            "clipping_differences",
            "remedies",
            "late_switch",
            "temperature",
            "kernels",
            "dynamics",
            "published",
        ),
    )
    assert "not for release" in text
    assert "missing" not in text


@of_runs
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


@of_runs
def test_all_variants_are_in_their_tables(finished):
    styles = {r["clipping"] for r in table(finished, "clipping")}
    assert styles == {"flat", "global", "per_layer"}
    schedules = [r["bound schedule"] for r in table(finished, "late_switch")]
    assert sorted(map(json.loads, schedules)) == [[], [[0.0, 0.1], [0.95, 20.0]]]
    (row,) = table(finished, "temperature")
    assert float(row["temperature"]) != 1
    assert float(row["NLL [nats]"]) != float(row["NLL before [nats]"])


@of_runs
def test_differences_are_paired_by_seed(finished):
    (row, *_) = (r for r in table(finished, "large") if float(r["R"]) == 10)
    small = next(r for r in table(finished, "best") if float(r["R"]) == 0.1)
    runs = study.read(finished)
    nll = {
        (r.overrides["dp.bound"], r.overrides["private_seed"]): r.evaluation["nll"]
        for r in tables.where(runs, bound=0.1, learning_rate=float(small["eta"]))
        + tables.where(runs, bound=10.0, learning_rate=float(row["eta R"]) / 10)
        if r.config["dp"]["clipping"] == "flat" and not r.config["dp"]["normalized"]
    }
    gaps = [nll[10.0, seed] - nll[0.1, seed] for seed in (0, 1)]
    mean, half = study.interval(gaps)
    assert (float(row["NLL [nats]"]), float(row["NLL [nats] ±"])) == pytest.approx((mean, half))


@of_runs
def test_the_next_bound_trains_alike_only_while_all_is_clipped(finished):
    rows = {(float(r["R"]), float(r["eta R"])): r for r in table(finished, "equal")}
    assert set(rows) == {(0.1, 1.0), (1.0, 1.0), (0.1, 0.1), (1.0, 10.0)}
    assert abs(float(rows[0.1, 1.0]["NLL [nats]"])) < 1e-3
    assert abs(float(rows[1.0, 1.0]["NLL [nats]"])) > 0.05


def test_the_best_rate_of_a_bound_may_depend_on_the_metric():
    common = {"epsilon": 2.0, "R": 1.0, "runs": 2, "diverged": 0}
    right = {**common, "eta": 1.0, "accuracy [%]": 90.0, "NLL [nats]": 0.9}
    calm = {**common, "eta": 0.1, "accuracy [%]": 80.0, "NLL [nats]": 0.5}
    lost = {**common, "eta": 9.0, "accuracy [%]": 99.0, "NLL [nats]": 0.1, "diverged": 2}
    assert tables.best([calm, right, lost]) == {(2.0, 1.0): right}
    assert tables.best([calm, right, lost], "NLL [nats]") == {(2.0, 1.0): calm}


def test_all_runs_on_text_train_heads_on_features(tmp_path):
    jobs = run_study.plan(f"{ROOT}/experiments/calibration/study.py:text", tmp_path)
    batched = [job for job in jobs if cached_heads.fits(job.config)]
    rest = [job for job in jobs if job not in batched]
    on_features = [job for job in rest if cached_heads.fits_loop(job.config)]
    assert (len(batched), len(on_features), len(jobs)) == (545, 40, 585)
    assert len(cached_heads.groups(batched)) == 4  # flat, per layer, global, normalized


@of_runs
def test_the_late_switch_costs_no_privacy(finished):
    late = [r for r in study.read(finished) if r.config["dp"]["normalized"]]
    epsilons = {r.privacy["epsilon"] for r in late if not r.config["dp"]["temperature"]["share"]}
    assert max(epsilons) - min(epsilons) < 1e-6


@of_runs
def test_predictions_are_near_the_measured_losses(finished):
    for row in table(finished, "dynamics"):
        assert float(row["largest gap, relative to the start"]) < 0.04
        error = abs(float(row["excess by noise, measured"]) - float(row["excess predicted"]))
        assert error < float(row["excess predicted"]) + 2 * float(row["2 s.e."])


@of_runs
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
