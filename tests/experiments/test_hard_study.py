"""The study on hard tasks: its search, its lines, its verdicts, and what small classes get."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax import dp, heads
from dpjax.dp import linear_head
from dpjax.step import Hyper, TrainState
from experiments.clip_batch import hard, hard_report, rules, scaled


def made_up(examples, seed):
    """Features of three classes, the last one rare."""
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(examples) < 0.05, 2, rng.integers(0, 2, examples))
    labels[:3] = (0, 1, 2)
    values = 2 * np.eye(3, 6)[labels] + rng.normal(size=(examples, 6))
    return heads.FeatureSet(values, labels, 3, "blobs")


SETS = (made_up(120, 0), made_up(80, 1), made_up(80, 2))


@pytest.fixture(scope="module")
def block():
    line, start = hard.Line("flat", "adam", (0.1, 2.0)), {}
    rows = hard.block(SETS, line, 120, epsilons=(2.0, 8.0), start=start, at_once=4)
    return rows, start


def test_a_search_ends_where_both_neighbors_are_worse(block):
    rows, start = block
    for cell in ((e, c) for e in (2.0, 8.0) for c in (0.1, 2.0)):
        mine = [r for r in rows if (r["epsilon"], r["C"]) == cell]
        tried = {}
        for row in mine:
            if row["role"] == "tuning":
                tried.setdefault(row["rate"], []).append(row["tuning_accuracy"])
        best = start[cell]
        assert {best / 2, best, 2 * best} <= set(tried)
        assert np.mean(tried[best]) == max(map(np.mean, tried.values()))
        results = [r for r in mine if r["role"] == "result"]
        assert [(r["rate"], r["seed"]) for r in results] == [(best, s) for s in hard.SEEDS]
        assert set(hard.SEEDS).isdisjoint(hard.TUNING_SEEDS)


def test_rows_say_what_ran_and_what_classes_got(block):
    row = next(r for r in block[0] if r["role"] == "result" and r["epsilon"] == 8.0)
    mechanism = dp.calibrated(
        epsilon=8.0, delta=hard.DELTA, num_examples=120, batch_size=120, epochs=hard.EPOCHS
    )
    assert (row["T"], row["noise_multiplier"]) == (8, mechanism.noise_multiplier)
    counts = np.bincount(SETS[2].labels)
    whole = sum(counts[int(k)] * v for k, v in row["by_class"].items()) / 80
    assert whole == pytest.approx(row["accuracy"], abs=1e-5)
    assert np.mean(list(row["by_class"].values())) == pytest.approx(row["macro"], abs=1e-5)


@pytest.mark.parametrize("bound", [0.01, 1.0, 100.0])
def test_tanh_clips_smoothly_below_flat(bound):
    norms = np.geomspace(1e-6, 1e6, 9, dtype=np.float32)
    for norm in norms:
        soft, flat = (
            float(rule.factors(np.array([norm]))[0] * norm)
            for rule in (rules.tanh(bound), rules.RULES["flat"](bound))
        )
        assert soft == pytest.approx(math.tanh(norm / bound), rel=1e-4)
        assert soft <= flat * (1 + 1e-5) <= 1 + 2e-5


def row(task="t", **values):
    known = {"task": task, "N": 1000, "line": "flat", "role": "result", "macro": 0.5, "rate": 0.1,
             "by_class": {"0": 1.0, "1": 0.5}}  # fmt: skip
    return {**known, **values}


def lines(accuracies, **common):
    """Runs from {(epsilon, B, C): accuracies in percent, by seed}."""
    return [
        row(epsilon=e, B=b, C=c, seed=seed, accuracy=v / 100, tuning_accuracy=v / 100, **common)
        for (e, b, c), values in accuracies.items()
        for seed, v in enumerate(values)
    ]


FACTS = row(role="nonprivate", accuracy=0.9, class_sizes=[900, 5], held_sizes=[30, 2])
del FACTS["line"]
GRID = {
    (0.5, 100, 0.1): (50, 52, 51), (0.5, 100, 3.0): (60, 63, 61), (0.5, 1000, 3.0): (40, 41, 42),
    (8.0, 100, 0.1): (80, 81, 82), (8.0, 100, 3.0): (70, 74, 72), (8.0, 1000, 0.1): (82, 83, 84.5),
}  # fmt: skip


def test_claims_are_judged_by_paired_differences():
    found = {(r["claim"], r["epsilon"]): r for r in hard_report.claims([FACTS, *lines(GRID)], "t")}
    larger = found["a tighter epsilon wants a larger C", 0.5]
    assert (larger["points"], larger["verdict"]) == (pytest.approx(31 / 3), "shown")
    assert found["a tighter epsilon wants a smaller B", 0.5]["verdict"] == "shown"
    few = "few epochs: the full batch loses"
    assert (found[few, 0.5]["verdict"], found[few, 8.0]["points"]) == ("shown", 0)
    other = {(8.5 - e, b, c): v for (e, b, c), v in GRID.items()}  # the budgets change places
    found = {r["claim"]: r for r in hard_report.claims([FACTS, *lines(other)], "t")[:2]}
    assert {r["verdict"] for r in found.values()} == {"refuted"}


def test_a_best_value_that_the_results_deny_shows_nothing():
    rows = [FACTS, *lines(GRID)]
    for r in rows:  # at 0.5 the tuning half prefers B = 1000, the result does not
        if (r.get("epsilon"), r.get("B")) == (0.5, 1000):
            r["tuning_accuracy"] = 0.9
        if (r.get("epsilon"), r.get("B")) == (8.0, 1000):
            r["tuning_accuracy"] = 0.1
    found = {r["claim"]: r for r in hard_report.claims(rows, "t")[:2]}
    smaller = found["a tighter epsilon wants a smaller B"]
    assert smaller["points"] > 5
    assert smaller["verdict"] == "undecided"


def test_an_optimum_at_an_end_is_called_one():
    found = hard_report.interior([FACTS, *lines(GRID)], "t", 8.0)
    assert (found["B*"], found["B* is"], found["C* is"]) == (1000, "full batch", "lowest")
    assert (found["B* low"], found["rate is"]) == (1000, "at an end")
    tried = [row(epsilon=8.0, B=1000, C=0.1, role="tuning", rate=r, seed=1) for r in (0.05, 0.2)]
    assert hard_report.interior([FACTS, *lines(GRID), *tried], "t", 8.0)["rate is"] == "inside"


def test_the_exponent_of_the_rate_is_read_off_the_best_cells():
    found = [
        r for b in (64, 256, 1024) for e in (1.0, 2.0)
        for r in lines({(e, b, 1.0): (70, 71)}, rate=0.01 * (b / 64) ** 0.5 * (1.0 + (e > 1.5) / 9))
    ]  # fmt: skip
    (slope,) = hard_report.rate_slopes([FACTS, *found], "t")
    assert slope["exponent of B"] == pytest.approx(0.5)
    assert slope["sqrt(B)"] == "shown"


def test_small_classes_are_pooled_by_their_size():
    found = hard_report.small_classes([FACTS, *lines(GRID)], "t")
    assert found[0]["classes of 200 and more [%]"] == 100
    assert found[0]["classes of 1 to 9 [%]"] == 50
    assert "classes of 10 to 49 [%]" not in found[0]


def test_one_bound_for_all_tasks_is_priced():
    other = [
        dict(r, task="u") for r in lines({(8.0, 100, 0.1): (50, 52), (8.0, 100, 3.0): (70, 71)})
    ]
    found = hard_report.one_bound([*lines(GRID), *other], ("t", "u"))
    assert {(r["task"], r["epsilon"]) for r in found} == {("t", 0.5), ("t", 8.0), ("u", 8.0)}
    assert {r["one C"] for r in found} == {3.0}
    (lost,) = [r["lost [points]"] for r in found if (r["task"], r["epsilon"]) == ("t", 8.0)]
    assert lost == pytest.approx((82 - 70 + 83 - 74 + 84.5 - 72) / 3)


def test_a_mix_keeps_its_classes_in_their_order():
    features = heads.FeatureSet(np.arange(10.0).reshape(5, 2), np.array([3, 0, 2, 3, 1]), 4, "t")
    kept = hard._only(features, (3, 1))
    assert (kept.labels.tolist(), kept.num_classes) == ([0, 0, 1], 2)
    assert kept.values[:, 0].tolist() == [0, 6, 8]
    assert hard._only(features, ()) is features


def test_easy_and_hard_classes_are_told_apart_in_a_mix():
    def run(bound, seed, easy, difficult):
        by_class = {str(k): easy if k < 5 else difficult for k in range(10)}
        return row("20newsgroups mix", epsilon=8.0, B=100, C=bound, seed=seed, by_class=by_class,
                   accuracy=difficult, tuning_accuracy=difficult)  # fmt: skip

    rows = [run(0.1, 0, 0.9, 0.5), run(0.1, 1, 0.9, 0.52), run(3.0, 0, 0.9, 0.6),
            run(3.0, 1, 0.92, 0.6)]  # fmt: skip
    (mixed,) = hard_report.class_mix(rows)
    assert (mixed["C*"], mixed["least C"]) == (3.0, 0.1)
    assert mixed["hard, gain over the least C"] == pytest.approx(9)
    assert mixed["easy, gain over the least C"] == pytest.approx(1)
    assert mixed["hard classes [%]"] == pytest.approx(60)


def test_a_run_writes_blocks_once_and_the_report_is_rebuilt(tmp_path, monkeypatch, block):
    monkeypatch.setattr(hard, "opened", lambda task: SETS)
    monkeypatch.setitem(hard.LINES, "flat", hard.Line("flat", "adam", (0.1, 2.0)))
    monkeypatch.setitem(hard.TASKS, "digits", hard.TASKS["digits"]._replace(batches=()))
    for _ in range(2):  # the second time, everything is there
        hard.run(tmp_path, ["digits"], ["flat"], epsilons=(2.0, 8.0), at_once=4)
    rows = hard.read(tmp_path / "runs.jsonl")
    assert len(rows) == 1 + len(block[0])
    written = {p.name for p in hard_report.main(tmp_path)}
    assert {"report.md", "claims.csv", "optima.csv", "difficulty.png", "grid_0.png",
            "nonprivate_gradients.csv"} <= written  # fmt: skip
    text = (tmp_path / "report.md").read_text()
    assert "nonprivate_" not in text.split("## Gradients: NOT private")[0]
    looked = hard.read(tmp_path / "nonprivate.jsonl")
    assert [r["epsilon"] for r in looked] == [2.0, 8.0]
    assert all(len(r["norms"]) == 2 for r in looked)
    assert hard.main([f"--workdir={tmp_path}", "--tasks=nothing"]) == 2


def scaled_state(stability, steps=2):
    """A head and its optimizer's state after some noised gradients, with unequal moments."""
    head = {"head": {"kernel": jnp.ones((6, 3)) / 9, "bias": jnp.arange(3.0)}}
    hyper = Hyper(
        jnp.float32(0.1), jnp.float32(0.5), dp.flat(1.0), jax.random.key(0), jax.random.key(1),
        jnp.float32(4.0),
    )  # fmt: skip
    transform = scaled.optimizer(stability)(hyper)
    state = TrainState(jnp.zeros((), jnp.int32), head, transform.init(head))
    rows = linear_head.rows(SETS[0].values[:8], SETS[0].labels[:8])
    for _ in range(steps):
        total, _ = scaled.clipped_sum(stability)(state, hyper.rule, rows, jnp.ones(8, bool))
        updates, opt = transform.update(total, state.opt)
        state = state._replace(trainable=optax.apply_updates(state.trainable, updates), opt=opt)
    return state, transform


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 3])
def test_scaled_gradients_are_clipped_as_after_a_change_of_variables(steps):
    stability, bound = 1e-2, 0.05
    state, _ = scaled_state(stability, steps)
    scales = scaled.scales(state.opt[1], stability)
    batch = {"x": jnp.asarray(SETS[0].values[:12]), "y": jnp.asarray(SETS[0].labels[:12])}

    def loss(moved, example):
        head = jax.tree.map(lambda w, s, u: w + s * u, state.trainable, scales, moved)["head"]
        return hard._loss(head, example)

    zeros = jax.tree.map(jnp.zeros_like, state.trainable)
    mask = jnp.arange(12) != 5
    rule = dp.flat(bound)
    expected, facts = dp.clipped_sum(loss, rule, method="vmap")(zeros, batch, mask)
    rows = linear_head.rows(batch["x"], batch["y"])
    total, found = scaled.clipped_sum(stability)(state, rule, rows, mask)
    clipped = np.asarray(facts.factors)[np.asarray(mask)]
    assert 0 < np.mean(clipped < 1) <= 1
    assert bool(steps) == (np.ptp(scales["head"]["kernel"]) > 0.01)
    assert total.sensitivity == expected.sensitivity == np.float32(bound)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
        (total.value, found.norms, found.factors, found.loss),
        (expected.value, facts.norms, facts.factors, facts.loss),
    )


def test_scaling_by_almost_nothing_is_adam():
    points = [heads.Point(0.1, 3, dp.flat(0.5), dp.calibrated(
        epsilon=4.0, delta=1e-5, num_examples=120, batch_size=120, epochs=6))]  # fmt: skip
    common = {"steps": 6, "batch_size": 120}
    plain = heads.train_heads(
        SETS[0], points, optimizer=hard._optimizer("adam", 6), **common
    ).params["head"]["kernel"]  # fmt: skip
    for stability, alike in ((1e6, True), (1e-3, False)):
        ways = {"optimizer": scaled.optimizer(stability),
                "clipped_sum": scaled.clipped_sum(stability)}  # fmt: skip
        kernel = heads.train_heads(SETS[0], points, **ways, **common).params["head"]["kernel"]
        assert np.allclose(kernel, plain, atol=1e-4) == alike


def test_of_several_stabilities_the_one_that_tunes_best_is_compared():
    found = [FACTS, *lines(GRID)]
    for line, best in (("scaled 0.1", 59), ("scaled 0.001", 65), ("corrected", 70)):
        accuracies = {(0.5, 100, c): (best - c, best + 1, best) for c in (0.1, 3.0)}
        found += lines(accuracies | {(8.0, 100, 0.1): (80, 81, 82)}, line=line)
    claims = {(r["claim"], r["epsilon"]): r for r in hard_report.claims(found, "t")}
    gain = claims["scale-then-privatize beats flat clipping and Adam", 0.5]
    # C = 0.1 at the stability 0.001, against (60, 63, 61).
    assert gain["points"] == pytest.approx((4.9 + 3 + 4) / 3)
    against = claims["scale-then-privatize beats Adam with corrected moments", 0.5]
    assert (against["points"], against["verdict"]) == (pytest.approx(-5), "refuted")
    table = hard_report.scaling(found, "t")
    assert [(r["epsilon"], r["stability"], r["C"]) for r in table][:4] == [
        (0.5, 0.1, 0.1), (0.5, 0.1, 3.0), (0.5, 0.001, 0.1), (0.5, 0.001, 3.0)
    ]  # fmt: skip
    assert hard_report.scaling([FACTS, *lines(GRID)], "t") == []
