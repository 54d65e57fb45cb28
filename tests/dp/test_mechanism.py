"""What is accounted is what runs."""

import dataclasses
import itertools

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax import dp
from dpjax.dp import accounting
from dpjax.dp.sampling import SAMPLERS

BUDGET = {"epsilon": 2.0, "delta": 1e-4}


def make(sampler="poisson", **kwargs):
    if sampler == "truncated_poisson":
        kwargs.setdefault("max_batch_size", 90)
    fields = {"num_examples": 1000, "batch_size": 1000 if sampler == "full_batch" else 50}
    return dp.calibrated(**BUDGET, **{**fields, "steps": 40, **kwargs}, sampler=sampler)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_calibration_meets_the_budget_and_does_not_waste_it(sampler):
    mechanism = make(sampler)
    epsilon = mechanism.epsilon(BUDGET["delta"])
    assert 0.99 * BUDGET["epsilon"] < epsilon <= BUDGET["epsilon"]
    less = dataclasses.replace(mechanism, noise_multiplier=0.98 * mechanism.noise_multiplier)
    assert less.epsilon(BUDGET["delta"]) > BUDGET["epsilon"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_epsilon_grows_with_steps(sampler):
    mechanism = make(sampler)
    spent = [mechanism.epsilon(1e-4, steps=t) for t in (0, 1, 10, 40)]
    assert spent[0] == 0
    assert all(a < b for a, b in itertools.pairwise(spent))


def rate(mechanism, draws=4000):
    """Empirical inclusion probability of the examples."""
    sizes = [len(mechanism.sampler.indices(1, step)) for step in range(draws)]
    return sum(sizes) / draws / mechanism.num_examples


@pytest.mark.parametrize("sampler", ["poisson", "full_batch", "fixed_size"])
def test_accounted_rate_is_configured_rate_is_empirical_rate(sampler):
    mechanism = make(sampler)
    q = mechanism.sampling_prob
    assert q == mechanism.expected_batch_size / mechanism.num_examples
    tolerance = 6 * np.sqrt(q * (1 - q) / (4000 * 1000)) + 1e-12
    assert abs(rate(mechanism) - q) < tolerance
    assert abs(rate(mechanism) - 1.1 * q) > tolerance  # the comparison can tell
    event = mechanism.event()
    assert event.count == mechanism.steps == 40
    if sampler == "poisson":
        assert event.event.sampling_probability == q
        assert event.event.event.noise_multiplier == mechanism.noise_multiplier
    elif sampler == "full_batch":
        assert event.event.noise_multiplier == mechanism.noise_multiplier
    else:
        assert event.event.sample_size == len(mechanism.indices(1, 0)) == 50
        assert event.event.source_dataset_size == 1000
        # Replacing one example moves the sum by up to twice the clip bound.
        assert event.event.event.noise_multiplier == mechanism.noise_multiplier / 2


def test_truncated_event_knows_its_truncation():
    event = make("truncated_poisson").event().event
    assert isinstance(event, dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent)
    assert (event.truncated_batch_size, event.dataset_size) == (90, 1001)  # the larger neighbor


def test_nothing_shuffled_can_be_expressed():
    with pytest.raises(ValueError, match="sampler='shuffle'"):
        make("shuffle")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_noise_that_runs_is_the_noise_accounted(sampler):
    mechanism = make(sampler)
    tx = mechanism.transform(key=jax.random.key(0))
    zero = {"w": jnp.zeros(50_000)}
    updates, _ = tx.update(dp.ClippedSum(zero, jnp.asarray(3.0)), tx.init(zero))
    want = 3.0 * mechanism.noise_multiplier / mechanism.expected_batch_size
    assert abs(float(jnp.std(updates["w"])) / want - 1) < 6 / np.sqrt(2 * 50_000)


def test_batch_of_everyone_is_full_batch():
    mechanism = make(batch_size=1000)
    assert mechanism.sampler == dp.FullBatch(num_examples=1000)
    np.testing.assert_array_equal(mechanism.indices(3, 0), np.arange(1000))


def test_steps_are_rounded_epochs():
    assert dp.num_steps(50_000, 16_384, 8) == 24  # and not 8 * ceil(N / B) = 32
    assert dp.num_steps(10, 10, 0.01) == 1
    for mistake in ({"num_examples": 0}, {"batch_size": 0}, {"epochs": float("inf")}):
        (text,) = (f"{name}={value} must be" for name, value in mistake.items())
        with pytest.raises(ValueError, match=text):
            dp.num_steps(**{"num_examples": 10, "batch_size": 10, "epochs": 1, **mistake})


def test_cumulative_noise_is_that_of_all_steps():
    mechanism = make()
    assert mechanism.cumulative_noise == pytest.approx(mechanism.noise_multiplier * 40**0.5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"epsilon": 0.0}, "epsilon=0"),
        ({"epsilon": -1.0}, "epsilon=-1"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
        ({"delta": 0.0}, "delta=0"),
        ({"delta": 0.01}, "delta=0.01"),
        ({"delta": 1.5}, "delta=1.5"),
        ({"batch_size": 2000}, "batch_size=2000"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 50.0}, "batch_size=50.0 must be an integer"),
        ({"steps": 0}, "steps=0"),
        ({"steps": None}, "steps=None"),
        ({"steps": None, "epochs": 0}, "epochs=0"),
        ({"max_batch_size": 10}, "max_batch_size=10"),
        ({"sampler": "truncated_poisson", "max_batch_size": None}, "max_batch_size=None"),
        ({"sampler": "full_batch"}, "batch_size=50 must be 1000"),
    ],
)
def test_impossible_budgets_name_field_and_value(change, text):
    arguments = {**BUDGET, "num_examples": 1000, "batch_size": 50, "steps": 40, **change}
    with pytest.raises(ValueError, match=text):
        dp.calibrated(**arguments)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier=0.0"),
        ({"noise_multiplier": float("inf")}, "noise_multiplier=inf"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"steps": 0}, "steps=0"),
        ({"sampler": "poisson"}, "sampler='poisson' must be an instance"),
    ],
)
def test_bad_fields(change, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(make(), **change)


def test_equal_phases_cost_what_one_does():
    whole = make(steps=40)
    phases = dp.calibrated_phases(**BUDGET, num_examples=1000, batch_size=50, steps=[10, 30])
    assert [p.steps for p in phases] == [10, 30]
    assert {p.noise_multiplier for p in phases} == {whole.noise_multiplier}


def test_phases_with_noise_of_their_own_meet_the_budget():
    first, second = dp.calibrated_phases(
        **BUDGET, num_examples=1000, batch_size=50, steps=[10, 30], noise_ratios=[2.0, 1.0]
    )
    assert first.noise_multiplier == pytest.approx(2 * second.noise_multiplier)
    spent = accounting.epsilon([first.event(), second.event()], BUDGET["delta"])
    assert 0.99 * BUDGET["epsilon"] < spent <= BUDGET["epsilon"]
    # Straight from dp_accounting, without anything of ours.
    events = [
        dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(
                0.05, dp_accounting.GaussianDpEvent(m.noise_multiplier)
            ),
            m.steps,
        )
        for m in (first, second)
    ]
    accountant = dp_accounting.pld.PLDAccountant()
    for event in events:
        accountant.compose(event)
    assert spent == pytest.approx(accountant.get_epsilon(BUDGET["delta"]), rel=1e-2)


def test_a_batch_of_one_expected_example():
    (phase,) = dp.calibrated_phases(**BUDGET, num_examples=1000, batch_size=[1], steps=[10])
    assert phase.sampling_prob == 1e-3


def test_bad_phases():
    with pytest.raises(ValueError, match="noise_ratios="):
        dp.calibrated_phases(
            **BUDGET, num_examples=10**3, batch_size=50, steps=[1, 2], noise_ratios=[1.0]
        )


def test_phases_of_several_batch_sizes_share_sigma_and_meet_the_budget():
    sizes, steps = [20, 100, 1000, 100], [25, 5, 1, 3]
    phases = dp.calibrated_phases(**BUDGET, num_examples=1000, batch_size=sizes, steps=steps)
    assert [p.expected_batch_size for p in phases] == sizes
    kinds = [type(p.sampler) for p in phases]
    assert kinds == [dp.Poisson, dp.Poisson, dp.FullBatch, dp.Poisson]
    (sigma,) = {p.noise_multiplier for p in phases}
    accountant = dp_accounting.pld.PLDAccountant()
    for size, count in zip(sizes, steps):
        event = dp_accounting.GaussianDpEvent(sigma)
        if size < 1000:
            event = dp_accounting.PoissonSampledDpEvent(size / 1000, event)
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, count))
    spent = accounting.epsilon([p.event() for p in phases], BUDGET["delta"])
    assert 0.99 * BUDGET["epsilon"] < spent <= BUDGET["epsilon"]
    assert spent == pytest.approx(accountant.get_epsilon(BUDGET["delta"]), rel=1e-2)
    with pytest.raises(ValueError, match="batch_size="):
        dp.calibrated_phases(**BUDGET, num_examples=1000, batch_size=[20], steps=[1, 2])


def test_batches_are_cut_at_the_size_accounted():
    mechanism = make("truncated_poisson", max_batch_size=45)
    sizes = [len(mechanism.indices(0, step)) for step in range(40)]
    assert max(sizes) == 45 == mechanism.event().event.truncated_batch_size
    assert min(sizes) < 45


@pytest.mark.slow
def test_batches_can_be_of_one_example():
    assert make(batch_size=1, steps=1).expected_batch_size == 1
    single = make("fixed_size", batch_size=1)
    assert (len(single.indices(0, 0)), single.event().event.sample_size) == (1, 1)
    cut = make("truncated_poisson", max_batch_size=1, steps=5)
    assert all(len(cut.indices(0, step)) <= 1 for step in range(5))


def test_fixed_batches_are_whole_at_every_size_of_the_data():
    for size, total in ((1, 3), (77_777_777, 10**8), (333_333_331, 10**9 + 7)):
        law = dp.FixedSize(num_examples=total, batch_size=size)
        mechanism = dp.Mechanism(sampler=law, steps=1, noise_multiplier=1.0)
        assert mechanism.event().event.sample_size == size
        assert mechanism.expected_batch_size == pytest.approx(size)


def test_no_batch_beyond_the_steps_that_are_paid_for():
    mechanism = make(steps=40)
    for step, first in ((40, 0), (-1, 0), (9, 10), (50, 10)):
        with pytest.raises(ValueError, match=rf"step={step} must be in \[{first}, {first + 40}\)"):
            mechanism.indices(0, step, first=first)
    for step, first in ((0, 0), (39, 0), (10, 10), (49, 10)):  # counted over all phases of a run
        drawn = mechanism.indices(3, step, first=first)
        np.testing.assert_array_equal(drawn, mechanism.sampler.indices(3, step))


def test_phases_share_the_tightest_accountant_that_knows_them_all():
    whole = dp.FullBatch(num_examples=1000)
    cut = dp.TruncatedPoisson(num_examples=1000, sampling_prob=0.05, max_batch_size=90)
    first, second = (
        dp.Mechanism(sampler=law, steps=5, noise_multiplier=20.0) for law in (whole, cut)
    )
    assert dp.Ledger((dp.Phase("a", first),), epsilon=9.0, delta=1e-4).accountant == "pld"
    both = dp.Ledger((dp.Phase("a", first), dp.Phase("b", second)), epsilon=9.0, delta=1e-4)
    assert both.accountant == "pld"
    late = dataclasses.replace(first, sampler=ByRdp(num_examples=1000))
    both = dp.Ledger((dp.Phase("a", first), dp.Phase("b", late)), epsilon=9.0, delta=1e-4)
    assert both.accountant == "rdp"
    assert both.charge(0, 5).spent() == first.epsilon(1e-4, accountant="rdp")
    with pytest.raises(ValueError, match="an accountant, got"):
        dp.Ledger((dp.Phase("a", second), dp.Phase("b", late)), epsilon=9.0, delta=1e-4)


class ByRdp(dp.FullBatch):
    """Full batches that one accountant alone is said to know."""

    accountants = ("rdp",)
