"""The study of random allocation: its search for a rate, its rules, its report from files."""

import itertools
import json
import math

import finished_study
import numpy as np
import pytest

from dpjax import build, dp, heads
from dpjax.build import planner
from dpjax.config import default
from experiments.allocation import heads as allocation
from experiments.allocation import report
from experiments.allocation.report import Cell


def blobs(seed, examples):
    rng = np.random.default_rng(seed)
    labels = np.arange(examples) % 3
    values = 3 * np.eye(3, 6)[labels] + rng.normal(size=(examples, 6))
    return heads.normalize(heads.FeatureSet(values, labels, 3, "blobs"), scale=8.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The work directory of one made-up task, and its rows."""
    path, rows = tmp_path_factory.mktemp("allocation"), []
    sets = tuple(blobs(seed, n) for seed, n in ((0, 300), (1, 90), (2, 90)))
    for sampler in planner.SAMPLERS:
        start = {4.0: 2.0**-12}  # far too low: the search has to climb
        rows += allocation.block(
            "blobs", sets, sampler, 60, epsilons=(4.0,), start=start, tuning_seeds=(1,),
            seeds=(11, 12),
        )  # fmt: skip
    (path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def test_a_head_is_the_one_of_the_product():
    """All but the noise, which is drawn elsewhere."""
    train = blobs(0, 300)
    law = dp.sampling.make("random_allocation", num_examples=300, batch_size=60)
    mechanism = dp.Mechanism(sampler=law, steps=12, noise_multiplier=1e-6)
    rates = (0.02, 0.1)
    ours = allocation.train_heads(train, [(mechanism, rate) for rate in rates], 3)
    rule = dp.flat(allocation.BOUND, normalized=True)
    theirs = heads.train_heads(
        train, [heads.Point(rate, 3, rule, mechanism) for rate in rates], steps=12, batch_size=60,
        optimizer=build.optimizer.optimizer(default().optimizer, 12, private=True),
    ).params["head"]  # fmt: skip
    for i in range(2):
        np.testing.assert_allclose(ours[:-1, i], theirs["kernel"][i], atol=2e-3 * rates[i])
        np.testing.assert_allclose(ours[-1, i], theirs["bias"][i], atol=2e-3 * rates[i])


def test_the_search_ends_inside_and_the_result_has_seeds_of_its_own(finished):
    for sampler in planner.SAMPLERS:
        rows = [row for row in finished[1] if row["sampler"] == sampler]
        tried = sorted({row["rate"] for row in rows})
        result = [row for row in rows if row["role"] == "result"]
        assert [row["seed"] for row in result] == [11, 12]
        assert tried[0] < result[0]["rate"] < tried[-1]
        assert all(high == 2 * low for low, high in itertools.pairwise(tried))
        assert {row["T"] for row in rows} == {40}
    sigma = {row["sampler"]: row["noise_multiplier"] for row in finished[1]}
    assert sigma["random_allocation"] < sigma["poisson"]


def test_the_report_is_rebuilt_from_the_runs(finished, capsys):
    path, _ = finished
    assert report.main([str(path)]) == 0
    text = (path / "report.md").read_text()
    assert "rate has a higher and a lower one beside it in 2 of them" in text.replace("\n", " ")
    assert (path / "noise.png").stat().st_size > 1000
    (line,) = (line for line in text.splitlines() if line.startswith("| blobs | 4 |"))
    assert "±" in line
    assert report.main([]) == 2


def cell(batch_size, sigma, accuracy, **changes):
    fields = {
        "task": "x", "sampler": "poisson", "epsilon": 1.0, "steps": 8000 // batch_size,
        "num_examples": 1000, "rate": 0.1, "inside": True, **changes,
    }  # fmt: skip
    return Cell(
        batch_size=batch_size, noise_multiplier=sigma, accuracy={1: accuracy, 2: accuracy}, **fields
    )


def test_rules_choose_as_they_say_and_regret_is_what_they_lose():
    noises = {50: 1.0, 100: 0.8, 200: 0.75, 1000: 0.72}
    group = [
        cell(b, noise / math.sqrt(8000 // b), accuracy)
        for (b, noise), accuracy in zip(noises.items(), (0.6, 0.7, 0.75, 0.5))
    ]
    assert report.published(group).batch_size == 200
    assert report.noise_rule(1, 0.02, 0.0)(group).batch_size == 1000
    assert report.noise_rule(80, 0.02, 0.0)(group).batch_size == 100
    assert report.noise_rule(1, 0.02, 10.0)(group).batch_size == 50  # all alike beside sampling
    groups = report.settings(group)
    assert report.regrets(report.noise_rule(80, 0.02, 0.0), groups) == {
        ("x", "poisson", 1.0): pytest.approx(0.05)
    }


def test_a_rule_is_judged_by_other_data_than_it_was_fitted_on():
    """Of x and its subset a few steps are best; of y many are: each gets the other's rule."""

    def group(task, accuracies):
        return [cell(b, 1 / b, accuracy, task=task) for b, accuracy in zip((50, 1000), accuracies)]

    few, many = (0.5, 0.9), (0.8, 0.6)
    groups = report.settings(group("x", few) + group("x_small", few) + group("y", many))
    judged = report.left_out(groups)
    assert judged["x", "poisson", 1.0] == judged["x_small", "poisson", 1.0] == pytest.approx(0.4)
    assert judged["y", "poisson", 1.0] == pytest.approx(0.2)


@pytest.mark.slow
def test_the_study_of_fine_tuning(tmp_path):
    path = finished_study.smoke("allocation", tmp_path / "w")
    text = finished_study.report_rebuilt(path, figures=(), tables=("gains", "rates"))
    assert "2 of 2 runs finished" in text
    (row,) = finished_study.table(path, "gains")
    assert float(row["random_allocation sigma"]) < float(row["poisson sigma"])
    assert row["seeds"] == "1"
