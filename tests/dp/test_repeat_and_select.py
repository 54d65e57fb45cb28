"""The price of releasing the best of a geometric number of runs."""

import dataclasses
import itertools
import json
import math

import dp_accounting as dpa
import numpy as np
import pytest
from dp_accounting import rdp
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from scipy import optimize
from scipy.stats import norm

from dpjax import dp
from dpjax.dp import accounting, repeat_and_select

AT = np.linspace(0.0, 8.0, 161)


def one_run(**changes):
    values = {"epsilon": 1.0, "delta": 1e-5, "num_examples": 1000, "batch_size": 100, "steps": 20}
    return dp.calibrated(**{**values, **changes})


def chosen(law, order, mean):
    """The law of the best of a geometric number of runs; outcomes of one rank are tied.

    Computed from the number of runs that are no better, not from densities.
    """
    rate = 1 / mean

    def no_better(z):  # the generating function of the number of runs
        return rate * z / (1 - (1 - rate) * z)

    found = np.zeros(len(law))
    for rank in set(order):
        tied = np.array([r == rank for r in order])
        up_to, below = law[np.array(order) <= rank].sum(), law[np.array(order) < rank].sum()
        if law[tied].sum():
            share = law[tied] / law[tied].sum()
            found[tied] = (no_better(min(up_to, 1.0)) - no_better(below)) * share
    return found


def worst(one, two, epsilon):
    """delta at an epsilon, of both orders."""
    return max(
        np.maximum(one - math.exp(epsilon) * two, 0).sum(),
        np.maximum(two - math.exp(epsilon) * one, 0).sum(),
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mean", [1.3, 3.0, 20.0])
def test_no_scores_of_any_discrete_mechanism_cost_more(seed, mean):
    """All rankings of four outcomes, with ties, against the bound from their profile alone."""
    rng = np.random.default_rng(seed)
    one, two = rng.dirichlet(np.full(4, 0.5 + seed / 2), size=2) + 1e-3 * (seed % 3)
    one, two = one / one.sum(), two / two.sum()
    if seed == 5:
        two[0] = 0.0  # an outcome that gives everything away
        two /= two.sum()
    deltas = [worst(one, two, x) for x in AT]
    epsilons = [0.0, 0.3, 1.0, 2.0, 4.0, 7.0]
    bounds = [
        repeat_and_select.delta_of_best(AT, deltas, x, mean=mean) for x in epsilons
    ]  # fmt: skip
    tightest = math.inf
    for order in itertools.product(range(4), repeat=4):
        laws = chosen(one, order, mean), chosen(two, order, mean)
        assert laws[0].sum() == pytest.approx(1.0)
        for epsilon, bound in zip(epsilons, bounds, strict=True):
            attained = worst(*laws, epsilon)
            assert attained <= bound * (1 + 1e-12) + 1e-15
            if attained > 1e-6:
                tightest = min(tightest, bound / attained)
    assert tightest < 3  # so that the test could fail


def attained(mu, mean, epsilon):
    """delta of the best of runs of a Gaussian mechanism under scores that betray much.

    The scores put outcomes below `low` first, those above `high` next, and all others last; the
    event is the second group. Probabilities of (first, first or second) are exact.
    """
    rate = 1 / mean

    def delta(cuts):
        low, high = cuts[0], cuts[0] + abs(cuts[1])

        def of(shift):
            first, second = norm.cdf(low - shift), norm.sf(high - shift)
            there = rate + (1 - rate) * first
            return rate * second / (there * (there + (1 - rate) * second))

        return of(mu) - math.exp(epsilon) * of(0.0)

    starts = itertools.product((-4.0, -2.0, -1.0, 0.0), (2.0, 4.0, 6.0))
    found = [optimize.minimize(lambda c: -1e6 * delta(c), s, method="Nelder-Mead") for s in starts]
    return max(delta(f.x) for f in found)


@pytest.mark.slow
@pytest.mark.parametrize("mean", [2.0, 10.0])
def test_scores_exist_that_cost_nearly_as_much(mean):
    sigma, delta = 4.0, 1e-5
    run = dp.Mechanism(sampler=dp.FullBatch(num_examples=100), steps=1, noise_multiplier=sigma)
    bound = repeat_and_select.epsilon([run], delta, mean=mean)
    reached = optimize.brentq(
        lambda x: math.log(max(attained(1 / sigma, mean, x), 1e-30) / delta), 0.1, 4.0
    )
    assert reached <= bound < 1.03 * reached
    assert bound > 1.1 * run.epsilon(delta)


@pytest.mark.parametrize("mean", [
    1.5, 10.0, *(pytest.param(m, marks=pytest.mark.slow) for m in (3.0, 300.0))])  # fmt: skip
@pytest.mark.parametrize("changes", [{}, {"batch_size": 1000}, {"epsilon": 8.0}, {"delta": 1e-9}])
@pytest.mark.one_in(3)
def test_it_is_below_the_general_theorem(mean, changes):
    """Theorem 2 of arXiv 2110.03620, as dp_accounting has it."""
    run, delta = one_run(**changes), changes.get("delta", 1e-5)
    event = RepeatAndSelectDpEvent(run.event(), mean, 1.0)
    orders = (*range(2, 64), *range(64, 257, 8), 512)
    general = rdp.RdpAccountant(orders, dpa.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(event)
    bound = repeat_and_select.epsilon([run], delta, mean=mean)
    assert run.epsilon(delta) < bound < 0.9 * general.get_epsilon(delta)


def test_a_search_of_two_or_three_runs_costs_little():
    run = one_run(batch_size=1000)
    found = [repeat_and_select.epsilon([run], 1e-5, mean=mean) for mean in (2.0, 3.0, 10.0)]
    assert found == pytest.approx([1.17, 1.26, 1.55], abs=0.01)  # the numbers of the docstring


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "random_allocation"},
        pytest.param({"sampler": "fixed_size"}, marks=pytest.mark.slow),
        {"sampler": "truncated_poisson", "max_batch_size": 120},
        {"secure_size": 1000},
    ],
)
def test_every_sampler_and_secure_noise_can_be_charged(changes):
    run = one_run(steps=10, **changes)
    ledger = dp.Ledger((dp.Phase("train", run),), epsilon=1.0, delta=1e-5).charge(0, run.steps)
    stated = dp.statement(
        ledger, clipping="flat", seed_policy="os_entropy", released=[], not_charged=[]
    )
    assert repeat_and_select.mechanisms(json.loads(json.dumps(stated))) == (run,)
    spent = run.epsilon(1e-5)
    assert 1.1 * spent < repeat_and_select.epsilon([run], 1e-5, mean=3.0) < 1.5 * spent


def test_a_subclass_of_a_sampler_is_not_charged_as_its_parent():
    """It has the title and the fields of Poisson, and an event of its own, which costs more."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Blocks(dp.Poisson):
        def event(self, noise_multiplier, steps):
            return accounting.full_batch(noise_multiplier, steps)

    run = dp.Mechanism(
        sampler=Blocks(num_examples=1000, sampling_prob=0.01), steps=10, noise_multiplier=5.0
    )
    ledger = dp.Ledger((dp.Phase("train", run),), epsilon=3.0, delta=1e-5).charge(0, run.steps)
    stated = dp.statement(
        ledger, clipping="flat", seed_policy="os_entropy", released=[], not_charged=[]
    )
    with pytest.raises(ValueError, match="Blocks cannot be charged"):
        repeat_and_select.mechanisms(stated)
    del stated["phases"][0]["sampler_class"]  # as in statements of before
    with pytest.raises(ValueError, match="of unknown class, cannot be charged"):
        repeat_and_select.mechanisms(stated)


def test_so_much_noise_that_epsilon_is_zero():
    run = dp.Mechanism(sampler=dp.FullBatch(num_examples=9), steps=1, noise_multiplier=1e12)
    assert repeat_and_select.epsilon([run], 1e-5, mean=3.0) < 1e-3  # the grid of scores


def test_one_run_of_a_search_keeps_the_whole_within_its_budget():
    spend = repeat_and_select.epsilon_of_one([one_run()], budget=3.0, delta=1e-5, mean=8.0)
    assert 1.5 < spend < 2.5
    spent = repeat_and_select.epsilon([one_run(epsilon=spend)], 1e-5, mean=8.0)
    assert 0.98 * 3.0 < spent <= 3.0
    dearer = repeat_and_select.epsilon([one_run(epsilon=spend)], 1e-5, mean=16.0)
    assert dearer > spent
    with pytest.raises(ValueError, match="mean=1 must be > 1"):
        repeat_and_select.epsilon([one_run()], 1e-5, mean=1)


def test_two_phases_compose():
    one, two = one_run(), one_run(steps=5)
    both = repeat_and_select.epsilon([one, two], 1e-5, mean=3.0)
    assert both > repeat_and_select.epsilon([one], 1e-5, mean=3.0)
    assert both > accounting.epsilon([one.event(), two.event()], 1e-5)


def test_too_few_points_of_a_profile_claim_nothing():
    assert repeat_and_select.delta_of_best([0.0, 1.0], [0.2, 1e-3], 0.5, mean=3.0) == 1.0
    assert repeat_and_select.delta_of_best([0.0, 1.0], [0.2, 1e-3], 9.0, mean=3.0) < 4e-3


def test_the_number_of_runs_is_geometric_and_the_points_uniform():
    generator = np.random.default_rng(0)
    drawn = [repeat_and_select.draw(4, 5.0, generator=generator) for _ in range(4000)]
    lengths = np.array([len(points) for points in drawn])
    assert lengths.min() == 1
    assert lengths.mean() == pytest.approx(5.0, rel=0.1)
    assert lengths.var() == pytest.approx(20.0, rel=0.2)  # Poisson: 5
    counts = np.bincount(np.concatenate(drawn), minlength=4) / lengths.sum()
    np.testing.assert_allclose(counts, 0.25, atol=0.02)
