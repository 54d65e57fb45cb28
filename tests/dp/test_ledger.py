"""Executed steps, the budget they must not pass, and the statement."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from dpjax import dp
from dpjax.dp import accounting

MECHANISM = dp.calibrated(epsilon=2.0, delta=1e-4, num_examples=1000, batch_size=50, steps=40)


def ledger(*mechanisms, epsilon=2.0):
    phases = tuple(dp.Phase(f"p{i}", m) for i, m in enumerate(mechanisms or (MECHANISM,)))
    return dp.Ledger(phases, epsilon=epsilon, delta=1e-4)


def statement(book, **changes):
    arguments = {
        "clipping": "flat, bound 1.0",
        "seed_policy": "fixed",
        "released": ["weights"],
        "not_charged": ["search"],
        **changes,
    }
    return dp.statement(book, **arguments)


def test_only_executed_steps_are_spent():
    book = ledger()
    assert book.spent() == 0
    book = book.charge(0, 10)
    assert book.spent() == MECHANISM.epsilon(1e-4, steps=10)
    assert book.charge(0, 30).spent() == MECHANISM.epsilon(1e-4)


def test_a_run_that_ends_early_claims_its_plan():
    """Whatever made it end: it may have been what it released."""
    planned = MECHANISM.epsilon(1e-4)
    for steps, claim in ((1, planned), (39, planned), (40, planned)):
        book = ledger().charge(0, steps)
        facts = statement(book)
        assert facts["epsilon"] == max(book.guaranteed_by_part().values()) == claim
        assert facts["epsilon_of_steps_done"] == book.spent()
        text = dp.to_markdown(facts)
        assert f"({claim:.4g}, 0.0001)-differentially private" in text
        early = f"cost epsilon {book.spent():.4g}"
        assert (early in text and f"{steps} of 40 steps" in text) == (steps < 40)


def test_no_step_past_the_budget():
    book = ledger().charge(0, 40)
    with pytest.raises(dp.BudgetExceeded, match="step 41 of 40"):
        book.charge(0)


@pytest.mark.parametrize(
    ("phase", "steps", "text"),
    [
        (0, -1, "steps=-1"), (0, -20, "steps=-20"), (0, 0, "steps=0"), (0, 0.5, "steps=0.5"),
        (0, 2.0, r"steps=2\.0"), (0, True, "steps=True"), (0, float("nan"), "steps=nan"),
        (-1, 5, "phase=-1"), (1, 5, r"phase=1 must be a whole number in 0\.\.0"),
        (0.0, 5, r"phase=0\.0"),
    ],
)  # fmt: skip
def test_only_whole_steps_of_a_phase_can_be_charged(phase, steps, text):
    book = ledger().charge(0, 20)
    with pytest.raises(ValueError, match=text):
        book.charge(phase, steps)
    assert book.charge(np.int64(0), np.int64(5)).steps_done == 25


@pytest.mark.parametrize("steps", [-1, 0.5, 1.0, True])
def test_no_ledger_begins_with_steps_that_are_no_count(steps):
    with pytest.raises(ValueError, match=f"steps_done={steps}"):
        dp.Ledger((dp.Phase("p", MECHANISM, steps),), epsilon=2.0, delta=1e-4)


def test_a_ledger_that_nobody_charged_has_no_statement():
    book = ledger()
    for _ in range(40):
        book.charge(0)  # the mistake: the new ledger is dropped
    with pytest.raises(ValueError, match=r"0 of 40 steps.*ledger = ledger\.charge"):
        statement(book)


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(tx, optax.adam(1e-3))])
def test_a_statement_covers_every_draw_of_noise(wrap):
    """The mistake: the first charged ledger is kept, and later ones are dropped."""
    tx = wrap(MECHANISM.transform(key=jax.random.key(0)))
    params = {"w": jnp.zeros(3)}
    state, book = tx.init(params), ledger().charge(0)
    for _ in range(3):
        book.charge(0)
        _, state = tx.update(dp.ClippedSum(params, jnp.float32(1.0)), state, params)
    assert dp.noise_draws(state) == 3
    assert dp.noise_draws([state, state]) == 6
    with pytest.raises(ValueError, match="3 steps drew noise, but 1 are charged"):
        statement(book, state=state)
    assert statement(book.charge(0, 2), state=state)["steps_done"] == 3
    assert statement(book.charge(0, 9), state=state)["steps_done"] == 10  # charged, not yet run
    with pytest.raises(ValueError, match="no state of a noise transform"):
        statement(book, state=optax.adam(1e-3).init(params))


def test_a_plan_beyond_the_budget_cannot_be_made():
    with pytest.raises(ValueError, match="more than the budget"):
        ledger(epsilon=1.9)
    with pytest.raises(ValueError, match="more than the budget"):
        ledger(MECHANISM, MECHANISM)


def test_phases_compose():
    half = dataclasses.replace(MECHANISM, steps=20)
    book = ledger(half, half).charge(0, 20).charge(1, 20)
    assert book.spent() == MECHANISM.epsilon(1e-4)


def test_unequal_phases_compose():
    first, second = dp.calibrated_phases(
        epsilon=2.0, delta=1e-4, num_examples=1000, batch_size=50, steps=[10, 30],
        noise_ratios=[2.0, 1.0],
    )  # fmt: skip
    book = ledger(first, second).charge(0, 10).charge(1, 5)
    direct = accounting.epsilon([first.event(), second.event(5)], 1e-4)
    assert book.spent() == direct


def test_phases_of_one_relation_only():
    fixed = dp.calibrated(
        epsilon=1.0, delta=1e-4, num_examples=1000, batch_size=50, steps=4, sampler="fixed_size"
    )
    with pytest.raises(ValueError, match="neighboring relation"):
        ledger(MECHANISM, fixed, epsilon=50.0)


def test_statement_has_what_others_rely_on():
    facts = json.loads(json.dumps(statement(ledger().charge(0, 10))))
    for key in (
        "epsilon", "delta", "noise_multiplier", "sampling_prob", "expected_batch_size",
        "num_examples", "steps_done", "steps_planned", "neighboring_relation", "sampler",
        "accountant", "clipping", "seed_policy",
    ):  # fmt: skip
        assert key in facts
    assert (facts["steps_done"], facts["steps_planned"]) == (10, 40)
    assert facts["epsilon_of_steps_done"] == MECHANISM.epsilon(1e-4, steps=10)
    assert facts["seed_policy"] == "fixed seed: for study, not for release"
    book = ledger().charge(0, 10)
    assert "OS entropy" in statement(book, seed_policy="os_entropy")["seed_policy"]
    with pytest.raises(ValueError, match="seed_policy='weak'"):
        statement(book, seed_policy="weak")


def test_markdown_says_the_same():
    facts = statement(ledger().charge(0, 40))
    text = dp.to_markdown(facts)
    assert "fixed seed: for study, not for release" in text
    assert f"{facts['epsilon']:.4g}" in text
    assert "adding or removing one training example" in text
    assert "threefry2x32 (not a cryptographic generator)" in text
    assert "40 of 40" in text
    assert "- search" in text


def in_parts(*done):
    """Training, and half of its cost on examples of their own."""
    small = dp.calibrated(epsilon=1.0, delta=1e-4, num_examples=100, batch_size=100, steps=5)
    mechanisms = [("train", MECHANISM, "train"), ("temperature", small, "temperature")]
    phases = tuple(
        dp.Phase(name, mechanism, steps, part)
        for (name, mechanism, part), steps in zip(mechanisms, done)
    )
    return dp.Ledger(phases, epsilon=2.0, delta=1e-4)


def test_disjoint_parts_cost_what_the_dearest_does():
    book = in_parts(40, 0)
    assert book.spent() == MECHANISM.epsilon(1e-4)
    book = book.charge(1, 5)
    assert book.spent_by_part() == {
        "train": MECHANISM.epsilon(1e-4),
        "temperature": pytest.approx(1.0, rel=1e-2),
    }
    assert book.spent() == MECHANISM.epsilon(1e-4)
    assert in_parts(0, 5).spent() == pytest.approx(1.0, rel=1e-2)
    facts = statement(book)
    assert facts["epsilon"] == max(facts["epsilon_by_part"].values())
    text = dp.to_markdown(facts)
    assert "disjoint parts" in text
    assert "- temperature: epsilon" in text
    assert "disjoint parts" not in dp.to_markdown(statement(ledger().charge(0, 40)))


def test_a_replaced_example_may_change_two_parts():
    fixed = dp.calibrated(
        epsilon=2.0, delta=1e-4, num_examples=1000, batch_size=50, steps=40, sampler="fixed_size"
    )
    phases = [dp.Phase(part, fixed, part=part) for part in ("a", "b")]
    with pytest.raises(ValueError, match=r"parts=\['a', 'b'\] must be one part"):
        dp.Ledger(tuple(phases), epsilon=2.0, delta=1e-4)
    assert dp.Ledger((phases[0],), epsilon=2.0, delta=1e-4).charge(0, 40).spent() <= 2.0


@pytest.mark.parametrize("steps", [1, 25])
def test_what_a_guess_may_know_is_that_of_the_gaussian_mechanism(steps):
    """Full batches are exactly Gaussian: mu = sqrt(T) / sigma, and the trade-off has a formula."""
    mechanism = dp.calibrated(
        epsilon=2.0, delta=1e-4, num_examples=1000, batch_size=1000, steps=steps
    )
    known = ledger(mechanism).membership()
    mu = steps**0.5 / mechanism.noise_multiplier
    assert known["gdp_mu"] == pytest.approx(mu, rel=3e-3)
    assert known["gdp_mu"] >= mu * (1 - 1e-6)
    exact = stats.norm.cdf(stats.norm.ppf(0.001) + mu)
    assert exact <= known["tpr_at_fpr_0.001"] < 2 * exact
    text = dp.to_markdown(statement(ledger(mechanism).charge(0)))
    assert f"{100 * known['tpr_at_fpr_0.001']:.2g} % of members at most" in text
    assert f"mu = {known['gdp_mu']:.3g}" in text


def test_more_budget_lets_a_guess_know_more():
    known = [
        ledger(dataclasses.replace(MECHANISM, noise_multiplier=s), epsilon=50.0).membership()
        for s in (4.0, 1.0, 0.6)
    ]
    for name in known[0]:
        values = [each[name] for each in known]
        assert values == sorted(values)
        assert 0 < values[0] < values[-1]
    assert known[-1]["tpr_at_fpr_0.001"] <= 1


def test_one_part_composes_and_no_part_may_pass_the_budget():
    with pytest.raises(ValueError, match="more than the budget"):
        dp.Ledger((dp.Phase("a", MECHANISM), dp.Phase("b", MECHANISM)), epsilon=2.0, delta=1e-4)
    dear = dp.calibrated(epsilon=3.0, delta=1e-4, num_examples=100, batch_size=100, steps=5)
    parts = (dp.Phase("a", MECHANISM), dp.Phase("b", dear, part="other"))
    with pytest.raises(ValueError, match="more than the budget"):
        dp.Ledger(parts, epsilon=2.0, delta=1e-4)
    with pytest.raises(dp.BudgetExceeded, match="'temperature'"):
        in_parts(0, 0).charge(1, 6)


def test_delta_is_small_for_the_largest_part_and_there_is_a_part():
    few = dp.calibrated(epsilon=2.0, delta=1e-2, num_examples=20, batch_size=20, steps=5)
    parts = (dp.Phase("a", MECHANISM), dp.Phase("b", few, part="other"))
    with pytest.raises(ValueError, match=r"delta=0\.01"):
        dp.Ledger(parts, epsilon=2.0, delta=1e-2)
    with pytest.raises(ValueError, match=r"phases=\(\)"):
        dp.Ledger((), epsilon=2.0, delta=1e-4)


def test_the_statement_knows_the_noise_of_the_count():
    (mechanism,) = dp.calibrated_phases(
        epsilon=2.0, delta=1e-4, num_examples=1000, batch_size=50, steps=[40], count_noises=[1.0]
    )
    facts = statement(ledger(mechanism).charge(0, 40))
    assert facts["epsilon"] == MECHANISM.epsilon(1e-4)
    assert facts["gradient_noise_multiplier"] > facts["noise_multiplier"]
    assert facts["phases"][0]["count_noise"] == 1.0
    assert "of it, for gradients" in dp.to_markdown(facts)
    assert "of it, for gradients" not in dp.to_markdown(statement(ledger().charge(0)))


def test_what_all_phases_share_is_one_number():
    some = dataclasses.replace(MECHANISM, noise_multiplier=3.0)
    mechanisms = [dataclasses.replace(some, steps=n) for n in (5, 10)]
    made = statement(ledger(*mechanisms).charge(0))
    assert made["noise_multiplier"] == 3.0
    assert made["sampling_prob"] == 0.05
    loud = dataclasses.replace(some, steps=5, noise_multiplier=4.0)
    made = statement(ledger(*mechanisms, loud).charge(0))
    assert made["noise_multiplier"] == [3.0, 3.0, 4.0]
    assert made["num_examples"] == 1000


def test_a_plan_may_spend_the_budget_to_its_last_digit():
    assert ledger(epsilon=MECHANISM.epsilon(1e-4)).spent() == 0


def test_a_ledger_cannot_be_edited():
    book = ledger().charge(0, 10)
    for part, name in ((book, "epsilon"), (book, "phases"), (book.phases[0], "mechanism")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, None)
