"""The bound that follows a quantile: its accounting, the law of its count, and where it goes."""

import dataclasses
import functools

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpjax import dp
from dpjax.dp import accounting
from dpjax.dp.adaptive import LARGEST_BOUND, gradient_noise_multiplier

BUDGET = {"epsilon": 2.0, "delta": 1e-4}
PHASE = {"num_examples": 1000, "batch_size": 50, "steps": [40]}


def made(count_noise=2.5, **changes):
    fields = {**BUDGET, **PHASE, "count_noises": [count_noise], **changes}
    return dp.calibrated_phases(**fields)[0]


@pytest.mark.parametrize(("total", "count"), [(1.0, 0.51), (3.0, 2.5), (0.7, 12.8), (20.0, 2500.0)])
def test_gradient_and_count_together_have_the_whole_noise(total, count):
    gradient = gradient_noise_multiplier(total, count)
    assert gradient**-2 + (2 * count) ** -2 == pytest.approx(total**-2, rel=1e-12)
    assert gradient > total


def test_calibration_solves_for_the_whole_release():
    plain, adaptive = made(None, count_noises=None), made()
    assert adaptive.noise_multiplier == plain.noise_multiplier
    assert adaptive.event() == plain.event()
    assert adaptive.epsilon(1e-4) == plain.epsilon(1e-4) <= 2.0
    assert plain.gradient_noise_multiplier == plain.noise_multiplier
    assert adaptive.gradient_noise_multiplier == gradient_noise_multiplier(
        adaptive.noise_multiplier, 2.5
    )


def test_it_costs_what_two_gaussians_on_one_sample_do():
    """Straight from dp_accounting: the count has sensitivity 1/2, so its multiplier is doubled."""
    mechanism = made()
    pair = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.GaussianDpEvent(mechanism.gradient_noise_multiplier),
            dp_accounting.GaussianDpEvent(2 * mechanism.count_noise),
        ]
    )
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(mechanism.sampling_prob, pair), mechanism.steps
    )
    direct = dp_accounting.rdp.RdpAccountant().compose(event).get_epsilon(1e-4)
    assert mechanism.epsilon(1e-4, accountant="rdp") == pytest.approx(direct, rel=1e-3)
    # With less noise on the gradient, or on the count, the same pair costs more than is said.
    for worse in (
        [mechanism.noise_multiplier, 2 * mechanism.count_noise],
        [mechanism.gradient_noise_multiplier, mechanism.count_noise],
    ):
        pair = dp_accounting.ComposedDpEvent([dp_accounting.GaussianDpEvent(z) for z in worse])
        more = dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(mechanism.sampling_prob, pair), mechanism.steps
        )
        assert dp_accounting.rdp.RdpAccountant().compose(more).get_epsilon(1e-4) > 1.01 * direct


def test_full_batches_cost_what_two_full_gaussians_do():
    mechanism = made(batch_size=1000, steps=[5], count_noise=40.0)
    events = [
        accounting.full_batch(mechanism.gradient_noise_multiplier, 5),
        accounting.full_batch(2 * mechanism.count_noise, 5),
    ]
    assert mechanism.epsilon(1e-4) == pytest.approx(accounting.epsilon(events, 1e-4), rel=1e-3)


@pytest.mark.parametrize("sampler", ["poisson", "fixed_size", "truncated_poisson"])
def test_the_gradient_gets_the_larger_noise(sampler):
    cut = {"max_batch_size": 90} if sampler == "truncated_poisson" else {}
    drawn = dp.sampling.make(sampler, num_examples=1000, batch_size=50, **cut)
    mechanism = dp.Mechanism(sampler=drawn, steps=1, noise_multiplier=1.0, count_noise=0.6)
    assert mechanism.event() == dataclasses.replace(mechanism, count_noise=None).event()
    tx = mechanism.transform(key=jax.random.key(0))
    zero = {"w": jnp.zeros(100_000)}
    updates, _ = tx.update(dp.ClippedSum(zero, jnp.asarray(1.0)), tx.init(zero))
    measured = float(jnp.std(updates["w"])) * mechanism.expected_batch_size
    tolerance = 6 / np.sqrt(2 * 100_000)
    assert abs(measured / mechanism.gradient_noise_multiplier - 1) < tolerance
    assert abs(measured / mechanism.noise_multiplier - 1) > tolerance  # the comparison can tell


@pytest.mark.parametrize("count", [0.3, 0.0, -1.0, float("nan"), float("inf")])
def test_a_count_that_leaves_nothing_for_the_gradient_is_refused(count):
    with pytest.raises(ValueError, match="count_noise="):
        dataclasses.replace(made(), noise_multiplier=0.6, count_noise=count)
    with pytest.raises(ValueError, match="count_noise="):
        made(count)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"quantile": 0.0}, "quantile=0.0"),
        ({"quantile": 1.0}, "quantile=1.0"),
        ({"quantile": float("nan")}, "quantile=nan"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"rate": float("inf")}, "rate=inf"),
        ({"lower_bound": 0.0}, "lower_bound=0.0"),
        ({"lower_bound": float("inf")}, "lower_bound=inf"),
        ({"lower_bound": 2e9}, r"lower_bound=2000000000.0 must be in \[1e-09, 1e\+09\]"),
    ],
)
def test_bad_rules(change, text):
    with pytest.raises(ValueError, match=text):
        dp.quantile_bound(**{"quantile": 0.5, "lower_bound": 0.1, **change})


def test_good_rules():
    """The rate of arXiv 1905.03871, and the ends of the range."""
    assert dp.quantile_bound(0.5, lower_bound=1e9) == (0.5, 0.2, 1e9)
    assert dp.quantile_bound(0.5, lower_bound=1e-9).lower_bound == 1e-9


def follow(rule, bound, count, noise, key):
    return rule.following(
        jnp.float32(bound), count, count_noise=noise, expected_batch_size=100.0, key=key
    )


def test_the_law_of_the_noised_count():
    """Read back from the bound, the count is its value plus N(0, count_noise^2)."""
    rule = dp.quantile_bound(0.3, rate=0.5, lower_bound=1e-6)
    keys = jax.random.split(jax.random.key(1), 20_000)
    bounds = jax.vmap(lambda k: follow(rule, 2.0, 12.5, 4.0, k))(keys)
    share = 0.3 - np.log(np.asarray(bounds, np.float64) / 2.0) / 0.5
    noise = (share - 0.5) * 100 - 12.5
    assert stats.kstest(noise / 4.0, "norm").pvalue > 1e-6
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise / (4.0 * wrong), "norm").pvalue < 1e-6


def test_it_stays_within_its_limits():
    rule = dp.quantile_bound(0.5, rate=100.0, lower_bound=0.25)
    assert follow(rule, 1.0, 50.0, 0.0, jax.random.key(0)) == 0.25
    assert follow(rule, 1.0, -50.0, 0.0, jax.random.key(0)) == LARGEST_BOUND
    rule = dp.quantile_bound(0.5, rate=0.2, lower_bound=0.25)
    assert follow(rule, 1.0, 0.0, 0.0, jax.random.key(0)) == 1.0  # an empty batch says nothing


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [0.01, 50.0])
def test_it_finds_the_quantile(quantile, start):
    """Norms are log-normal, batches Poisson of 100, and the count has its usual noise."""
    rule = dp.quantile_bound(quantile, rate=0.2, lower_bound=1e-3)

    def step(bound, key):
        size, norms, noise = jax.random.split(key, 3)
        there = jax.random.uniform(size, (1000,)) < 0.1
        drawn = jnp.exp(jax.random.normal(norms, (1000,)))
        count = jnp.sum(jnp.where(there, jnp.where(drawn <= bound, 0.5, -0.5), 0.0))
        bound = follow(rule, bound, count, 5.0, noise)
        return bound, bound

    scan = jax.jit(functools.partial(jax.lax.scan, step))
    _, bounds = scan(jnp.float32(start), jax.random.split(jax.random.key(3), 300))
    found = np.exp(np.mean(np.log(bounds[150:])))
    assert found == pytest.approx(np.exp(stats.norm.ppf(quantile)), rel=0.15)


def test_a_count_that_is_too_precise_is_told_the_least_noise():
    with pytest.raises(ValueError, match=r"noise_multiplier / 2 = 1\.5:"):
        gradient_noise_multiplier(3.0, 1.5)
