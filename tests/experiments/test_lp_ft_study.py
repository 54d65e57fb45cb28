"""The study of linear probing then fine-tuning, run at its smallest size, and its report."""

import math

import pytest
from finished_study import of_runs, report_rebuilt, smoke, table

from experiments import study
from experiments.lp_ft import study as lp_ft


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return smoke("lp_ft", tmp_path_factory.mktemp("study") / "w")


@of_runs
def test_the_report_is_whole_and_rebuilt_from_the_files(finished):
    text = report_rebuilt(
        finished,
        figures=("shares", "distortion", "theory_shares", "theory_curves"),
        tables=("shares", "best_share", "gains", "zero_head", "published", "theory_best", "theory"),
    )
    assert "missing" not in text


@of_runs
def test_both_phases_share_the_budget_and_sigma(finished):
    found = study.read(finished)
    assert len(found) == 4
    for result in found:
        share = result.config["lp"]["fraction"]
        assert len(result.privacy["phases"]) == (2 if 0 < share < 1 else 1)
        assert isinstance(result.privacy["noise_multiplier"], float)  # one number for all phases
        assert result.privacy["steps_done"] == result.privacy["steps_planned"] == 8
        assert 1.9 < result.privacy["epsilon"] <= 2


@of_runs
def test_distortion_tells_the_ways_apart(finished):
    rows = {(r["then"], r["head"], float(r["LP share"])): r for r in table(finished, "shares")}
    zero, lora = rows["full", "zero", 0.0], rows["lora:8", "random", 0.5]
    random, probed = rows["full", "random", 0.0], rows["full", "random", 0.5]
    assert float(zero["alignment at start"]) == 0 != float(random["alignment at start"])
    assert float(lora["feature shift"]) < float(random["feature shift"])
    assert 0 < float(probed["feature shift"]) < float(random["feature shift"])
    for row in rows.values():
        assert 0 < float(row["CKA to initial"]) <= 1


@of_runs
def test_simulated_losses_are_inside_the_bounds(finished):
    rows = table(finished, "theory_best")
    assert len(rows) == 8  # networks, heads, epsilons
    for row in rows:
        assert row["outside the bounds"] == "0"
        assert float(row["left the tube, largest"]) < 0.1
    for row in table(finished, "theory"):
        error = abs(float(row["linearized"]) - float(row["measured"]))
        assert error < 2 * float(row["2 s.e."]) + 0.2 * float(row["measured"])


@of_runs
def test_a_larger_budget_wants_no_more_probing(finished):
    best = {
        (r["network"], r["head"], float(r["epsilon"])): float(r["predicted, linearized"])
        for r in table(finished, "theory_best")
    }
    for network in ("linear", "ReLU"):
        for head in ("random", "zero"):
            assert best[network, head, 8.0] < best[network, head, 0.5]


@pytest.mark.parametrize("size", lp_ft._TUNED)
def test_a_tuned_size_tries_every_rate_once_and_repeats_the_preferred_ones(size):
    grid = lp_ft._TUNED[size]
    points = list(lp_ft.sweep(size))
    tuning = [p for p in points if p["seed"] == lp_ft._TUNING_SEED]
    results = [p for p in points if p["seed"] != lp_ft._TUNING_SEED]
    rates = {
        (head, share): (grid.probing_rates if share == 1 else grid.rates)[head]
        for head in grid.rates
        for share in grid.shares
    }
    cells = len(grid.epsilons) * len(grid.shares)
    assert len(tuning) == len(grid.epsilons) * sum(map(len, rates.values()))
    assert {p["data.test_split"] for p in tuning} == {grid.splits[0]}
    assert {p["data.test_split"] for p in results} <= {grid.splits[1]}
    for point in results:
        tried = rates[point["model.head_init"], point["lp.fraction"]]
        assert point["optimizer.learning_rate"] in tried
    assert len(results) == cells * len(grid.rates) * grid.seeds
    for (head, epsilon), rate in grid.probing.items():  # as share 1 preferred it
        assert grid.chosen[head, epsilon][-1] == rate
        probed = [p for p in points if (p["model.head_init"], p["dp.epsilon"]) == (head, epsilon)
                  and 0 < p["lp.fraction"] < 1]  # fmt: skip
        assert {p["lp.learning_rate"] for p in probed} == {rate}
    assert lp_ft.theory(size) == {}


@of_runs
def test_the_rate_is_chosen_by_the_tuning_seed_and_shares_are_compared_by_the_others(finished):
    base = next(r for r in study.read(finished) if r.config["finetune"] == "full")

    def result(epsilon, head, share, rate, seed, accuracy):
        config = {
            **base.config, "seed": seed, "dp": {**base.config["dp"], "epsilon": epsilon},
            "model": {**base.config["model"], "head_init": head},
            "lp": {**base.config["lp"], "fraction": share},
            "optimizer": {**base.config["optimizer"], "learning_rate": rate},
        }  # fmt: skip
        return base._replace(config=config, evaluation={"accuracy": accuracy / 100})

    tuned = lp_ft._TUNING_SEED
    found = [
        result(0.5, "random", 0.0, 0.1, tuned, 60), result(0.5, "random", 0.0, 0.2, tuned, 50),
        result(0.5, "random", 0.7, 0.1, tuned, 50), result(0.5, "random", 0.7, 0.2, tuned, 60),
        result(8.0, "random", 0.0, 0.2, tuned, 70), result(8.0, "random", 0.7, 0.2, tuned, 70),
        result(0.5, "zero", 0.0, 0.2, tuned, 50),
        *(result(0.5, "random", 0.0, 0.1, seed, 40 + seed) for seed in (0, 1)),
        *(result(0.5, "random", 0.0, 0.2, seed, 99) for seed in (0, 1)),  # not the best rate
        *(result(0.5, "random", 0.7, 0.2, seed, 46 + 3 * seed) for seed in (0, 1)),
        *(result(8.0, "random", share, 0.2, seed, 80 - share) for seed in (0, 1)
          for share in (0.0, 0.7)),
        *(result(0.5, "zero", 0.0, 0.2, seed, 48 + 3 * seed) for seed in (0, 1)),
    ]  # fmt: skip
    kept, rates = lp_ft._at_tuned_rates(found)
    assert [(row["best rate"], row["of those tried"]) for row in rates[:2]] == [
        (0.1, "the lowest"), (0.2, "the highest"),
    ]  # fmt: skip
    assert {r.config["seed"] for r in kept} == {0, 1}
    assert len(kept) == 10
    accuracies = lp_ft._by_share(kept)
    tight, loose = lp_ft._gains(accuracies)
    assert tight["gain over share 0 [points]"] == pytest.approx(7)  # 6 and 8
    assert loose["gain over share 0 [points]"] == pytest.approx(-0.7)
    assert tight["minus that at the largest epsilon"] == pytest.approx(7.7)
    (best,) = [
        row for row in lp_ft._best(accuracies) if (row["epsilon"], row["head"]) == (0.5, "random")
    ]
    assert (best["best LP share"], best["seeds"]) == (0.7, 2)
    assert best["gain over share 0 [points]"] == pytest.approx(7)
    assert math.isnan(best["gain over share 1 [points]"])  # which nobody ran
    zero = lp_ft._zero_head(accuracies)
    assert zero[0]["best LP share, random head"] == 0.7
    assert zero[0]["zero head gains [points]"] == pytest.approx(2)
    assert lp_ft._at_tuned_rates(kept) == (kept, [])
