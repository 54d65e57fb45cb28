"""The study of layer sets: equal budgets, sizes, and what the search would have cost."""

import pytest
from finished_study import of_runs
from tiny import tiny_config

from dpjax import build, dp, models
from dpjax.build import fields
from dpjax.commands import cli
from dpjax.dp import repeat_and_select
from dpjax.search import proposals, sweep
from experiments import run_study, study
from experiments.layers import study as layers

FILE = "experiments/layers/study.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The smoke study, run for real."""
    path = tmp_path_factory.mktemp("layers") / "w"
    assert run_study.main([f"--config={FILE}:smoke", f"--workdir={path}"]) == 0
    return path


@of_runs
def test_everything_is_there_and_rebuilt_from_files(finished, capsys):
    text = (finished / "report.md").read_text()
    assert "4 of 4 runs finished" in text
    assert "**not charged**" in text
    assert "The layer sets are ours" in text
    for name in ("report.md", "parameters.png", "sets.md"):
        (finished / name).unlink()
    assert cli.main(["report", str(finished)]) == 0
    capsys.readouterr()
    assert (finished / "report.md").read_text() == text
    assert (finished / "parameters.png").is_file()


@of_runs
def test_all_runs_had_one_mechanism_and_say_what_trained(finished):
    results = study.read(finished)
    assert len({repeat_and_select.mechanisms(r.privacy) for r in results}) == 1
    sizes = {r.config["finetune"]: r.measured["trainable"] for r in results}
    # One block of width 16 on 2x2 patches of 7 x 7 pixels, ten classes.
    assert sizes["head"] == 16 * 10 + 10
    assert sizes["film"] == sizes["head"] + 3 * 2 * 16  # two norms of the block and the last one
    assert len({sum(r.measured.values()) for r in results}) == 1


@of_runs
def test_the_price_is_that_of_repeat_and_select(finished):
    results = study.read(finished)
    rows = layers._costs(results)
    run = repeat_and_select.mechanisms(results[0].privacy)
    for row, mean in zip(rows, layers._MEANS, strict=True):
        assert row["epsilon of the search"] == repeat_and_select.epsilon(run, 1e-4, mean=mean)
        assert row["epsilon of the search"] > row["epsilon of one run"]
    prices = [row["epsilon of one run in a search of 2"] for row in rows]
    assert prices == sorted(prices, reverse=True)
    other = results[0]._replace(privacy={**results[0].privacy})
    other.privacy["phases"] = [{**other.privacy["phases"][0], "steps_planned": 3}]
    with pytest.raises(ValueError, match="differ in their mechanism"):
        layers._costs([*results, other])


@of_runs
def test_the_best_rate_of_each_set_is_shown_and_losses_are_paired(finished):
    base = study.read(finished)[0]

    def result(finetune, rate, seed, accuracy):
        settings = {**base.config, "finetune": finetune, "private_seed": seed}
        settings["optimizer"] = {**base.config["optimizer"], "learning_rate": rate}
        evaluation = {**base.evaluation, "accuracy": accuracy / 100}
        return base._replace(config=settings, evaluation=evaluation, measured={
            "trainable": 10 if finetune == "head" else 20, "frozen": 80})  # fmt: skip

    found = [
        result(name, rate, seed, accuracy)
        for (name, rate), values in {("head", 0.1): (50, 60), ("head", 0.2): (70, 74),
                                     ("full", 0.1): (80, 81), ("full", 0.2): (30, 99)}.items()
        for seed, accuracy in enumerate(values)
    ]  # fmt: skip
    by = {"layers": "finetune", "learning rate": "optimizer.learning_rate"}
    first, second = layers._best_rates(study.summarize(found, by, layers._METRICS), found)
    assert (first["layers"], first["learning rate"], first["trained parameters"]) == (
        "full", 0.1, 20,
    )  # fmt: skip
    assert (second["layers"], second["learning rate"]) == ("head", 0.2)
    assert second["below the best [points]"] == pytest.approx(8.5)
    assert second["share [%]"] == pytest.approx(100 * 10 / 90)


def test_after_a_vote_what_moved_is_what_trained():
    options = {"width": 16, "depth": 3, "heads": 2, "mlp": 16, "image_size": 14}
    run = build.build(tiny_config(finetune="vote:1", model__options=options))
    plain = models.flatten(run.params)
    after = {k: v + 1 if k.startswith(("blocks_2/", "head/")) else v for k, v in plain.items()}
    found = layers.measure(run, run.params, models.unflatten(after))
    want = sum(v.size for k, v in plain.items() if k.startswith(("blocks_2/", "head/")))
    assert found == {"trainable": want, "frozen": sum(v.size for v in plain.values()) - want}


@of_runs
def test_what_a_vote_picked_is_in_the_report_and_not_in_the_price(finished, tmp_path):
    base = study.read(finished)[0]
    phases = [{**base.privacy["phases"][0], "noise_multiplier": s} for s in (9.0, 1.0)]
    voted = base._replace(
        path=tmp_path, config={**base.config, "finetune": "vote:1"},
        privacy={**base.privacy, "phases": phases},
    )  # fmt: skip
    (tmp_path / "vote.json").write_text('{"finetune": "blocks:at:2", "votes": {"blocks_2": 7.5}}')
    sets = [
        {"layers": name, "learning rate": base.config["optimizer"]["learning_rate"]}
        for name in ("vote:1", base.config["finetune"])
    ]
    _, charged, table = layers._votes([base, voted], sets)
    (row,) = charged.rows
    assert row["vote minus best set [points]"] == 0
    assert row["epsilon"] <= 2
    voted.privacy["epsilon"] = 2.1
    with pytest.raises(ValueError, match="above budget"):
        layers._votes([base, voted], sets)
    (row,) = table.rows
    assert (row["picked"], row["votes for blocks_2"], row["sigma of the vote"]) == (
        "blocks:at:2", 7.5, 9.0,
    )  # fmt: skip
    assert layers._costs([base, voted]) == layers._costs([base])
    assert layers._votes([base], sets) == []


@pytest.mark.parametrize("size", [*study.SIZES, "votes", "text", "charged"])
def test_points_are_layer_sets_by_rates_and_can_be_charged(size):
    base = fields.load(f"{FILE}:{size}")
    found = sweep.points(f"{FILE}:{size}", base)
    searched = [point for point in found if "dp.epsilon" in point]
    found = [point for point in found if "dp.epsilon" not in point]
    assert {p["dp.epsilon"] for p in searched} == set(layers._SEARCHES.get(size, {}).values())
    assert not any("vote" in point["finetune"] for point in searched)
    assert {name for point in found for name in point} - {"private_seed"} == {
        "finetune", "optimizer.learning_rate",
    }  # fmt: skip
    assert base.private_seed is None
    assert ("private_seed" not in found[0]) == (size == "charged")
    voted = {point["finetune"] for point in found if "vote" in point["finetune"]}
    has_votes = size in ("laptop", "votes", "text")
    assert voted == (set(layers._VOTES) if has_votes else set())  # no search may charge them
    proposals.axes(found)  # a full product


@of_runs
def test_the_whole_search_would_have_kept_its_budget():
    """The other way round: at the epsilon of one run in the table, the search costs the budget."""
    facts = {"num_examples": 1600, "batch_size": 200, "steps": 16, "delta": 1e-4}
    run = dp.calibrated(epsilon=2.0, **facts)
    one = repeat_and_select.epsilon_of_one([run], budget=2.0, delta=1e-4, mean=10.0)
    spent = repeat_and_select.epsilon([dp.calibrated(epsilon=one, **facts)], 1e-4, mean=10.0)
    assert 1.96 < spent <= 2.0


@of_runs
def test_searches_that_are_charged_are_told_from_the_declared_choice(finished, monkeypatch):
    base = study.read(finished)[0]
    facts = {"num_examples": 2000, "batch_size": 256, "steps": 23, "delta": 1e-5}

    def result(finetune, seed, accuracy, epsilon):
        run = dp.calibrated(epsilon=epsilon, **facts)
        phases = (dp.Phase("train", run),)
        ledger = dp.Ledger(phases, epsilon=epsilon, delta=1e-5).charge(0, run.steps)
        stated = dp.statement(
            ledger, clipping="flat", seed_policy="os_entropy", released=[], not_charged=[]
        )
        settings = {**base.config, "finetune": finetune, "private_seed": seed}
        settings["dp"] = {**base.config["dp"], "epsilon": epsilon}
        return base._replace(
            config=settings, evaluation={"accuracy": accuracy / 100}, privacy=stated
        )

    declared = [result("head", s, 60 + s, 2.0) for s in range(3)]
    declared += [result("full", s, 70 + 2 * s, 2.0) for s in range(3)]
    mine = [result("head", s, 58.0, 1.752) for s in range(3)]
    mine += [result("full", s, 68.0, 1.752) for s in range(3)]
    (table,) = layers._searched(declared, mine)
    (row,) = table.rows
    assert 1.97 < row["epsilon in all"] <= 2
    # Two points, two runs in the mean: P[only the worse one is drawn] = sum of 2^-k 2^-k = 1/3.
    assert row["accuracy [%]"] == pytest.approx(58 / 3 + 68 * 2 / 3)
    assert row["declared choice [%]"] == pytest.approx(72)
    losses = [58 / 3 + 68 * 2 / 3 - other for other in (73, 72, 71)]
    assert row["charged minus declared [points]"] == pytest.approx(sum(losses) / 3)
    for some in (([], mine), (declared[:1], mine), (declared, [])):  # the rest is still to run
        assert layers._searched(*some) == []
    monkeypatch.setitem(layers._SEARCHES, "votes", {3.0: 1.9})
    dearer = [result("head", 0, 68.0, 1.9)]
    with pytest.raises(ValueError, match="costs"):
        layers._searched(declared, dearer)
