"""Epsilon far out in the tail, against computations that do not share its Fourier transform."""

import itertools
import math

import dp_accounting as dpa
import numpy as np
import pytest
from dp_accounting import rdp
from scipy import special

from dpjax.dp import accounting
from dpjax.dp.accounting import composition

ORDERS = [1 + x / 10 for x in range(1, 100)] + [*range(11, 64), 80, 96, 128, 192, 256, 512]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("DPJAX_CACHE_DIR", "")


def log_tail(x):
    """ln of a standard normal's mass above x."""
    return special.log_ndtr(-x)


def one_step(sigma, q, loss, *, removed):
    """ln of the hockey stick of one Poisson step, from tails alone: the law is explicit in x.

    Both terms are close in the far tail; what cancels is of the order of the loss's slope.
    """
    level = loss if removed else -loss
    x = sigma**2 * math.log1p(math.expm1(level) / q) + 0.5
    sign = 1 if removed else -1
    base = log_tail(sign * x / sigma)
    moved = log_tail(sign * (x - 1) / sigma)
    mixed = np.logaddexp(math.log1p(-q) + base, math.log(q) + moved)
    first, second = (mixed, base) if removed else (base, mixed)
    return first + math.log(-math.expm1(loss + second - first))


@pytest.mark.parametrize("delta", [1e-5, 1e-12, 1e-20, 1e-30, 1e-100])
@pytest.mark.parametrize(("sigma", "q"), [(1.0, 0.1), (0.5, 0.01), (3.0, 0.6)])
def test_one_step_against_its_explicit_tail(sigma, q, delta):
    epsilon = accounting.epsilon(accounting.poisson(sigma, q, 1), delta)
    truth = one_step(sigma, q, epsilon, removed=True)
    assert math.log(delta) - 0.05 < truth <= math.log(delta) + 1e-6


@pytest.mark.parametrize(
    ("mu", "delta"),
    [(1.0, 1e-30), (0.01, 1e-14), (6.0, 1e-200), (1.0, 0.2), (2e4, 1e-10), (2e4, 0.7)],
)
def test_the_gaussian_mechanism_to_many_digits(mu, delta):
    mpmath = pytest.importorskip("mpmath")
    epsilon = accounting.epsilon(accounting.full_batch(1 / mu, 1), delta)
    with mpmath.workdps(400):
        at = mpmath.mpf(epsilon)
        exact = mpmath.ncdf(mu / 2 - at / mu) - mpmath.exp(at) * mpmath.ncdf(-mu / 2 - at / mu)
        assert 0 <= float(delta / exact) - 1 < 1e-6


def convolved(sigma, q, steps, epsilon, interval):
    """delta of removing, by sums of positive products only; losses rounded up and down."""
    edges = np.arange(math.floor(math.log1p(-q) / interval), round(14 / interval)) * interval
    inside = np.expm1(edges) / q
    x = np.where(inside > -1, sigma**2 * np.log1p(np.maximum(inside, -1 + 1e-15)) + 0.5, -np.inf)
    above = np.exp(np.logaddexp(math.log1p(-q) + log_tail(x / sigma),
                                math.log(q) + log_tail((x - 1) / sigma)))  # fmt: skip
    law = above[:-1] - above[1:]
    total = law
    for _ in range(int(math.log2(steps))):
        total = np.convolve(total, total)
    first = steps * round(edges[0] / interval)
    deltas = []
    for up in (0, steps):  # every cell's mass at its lower end, and at its upper end
        loss = (first + up + np.arange(len(total))) * interval
        gain = np.where(loss > epsilon, -np.expm1(np.minimum(epsilon - loss, 0)), 0.0)
        deltas.append(float(total @ gain))
    return deltas


@pytest.mark.parametrize("delta", [1e-6, 1e-18, 1e-30])
def test_several_steps_against_convolution_without_a_transform(delta):
    """Sums of positive terms keep their relative precision, however small."""
    sigma, q, steps = 1.0, 0.1, 8
    epsilon = accounting.epsilon(accounting.poisson(sigma, q, steps), delta)
    low, high = convolved(sigma, q, steps, epsilon, 0.006)
    assert low <= delta <= high * 1.001
    assert high < 2 * low


def test_the_reported_case():
    """prv_accountant#17: 0.734, 0.775, 0.841, 0.840, inf for delta from 1e-12 to 1e-16."""
    deltas = [1e-12, 1e-13, 1e-14, 1e-15, 1e-16, 1e-20, 1e-30]
    values = [accounting.epsilon(accounting.poisson(2, 0.00512, 1562), d) for d in deltas]
    truth = [0.7342, 0.7740, 0.8123, 0.8491, 0.8848, 1.0176]
    assert values[:-1] == pytest.approx(truth, rel=2e-4)
    assert 1.30 < values[-1] < 1.31


@pytest.mark.parametrize(
    ("sigma", "steps", "delta"),
    [
        (1000.0, 10**6, 3e-11),
        (632.0, 10**5, 1e-11),
        (20.0, 100, 1e-14),
        pytest.param(3000.0, 10**7, 1e-30, marks=pytest.mark.slow),
    ],
)
def test_almost_certain_sampling_costs_what_a_full_batch_does(sigma, steps, delta):
    """An error of the transform that grows with the steps once made it cheaper."""
    full = accounting.epsilon(accounting.full_batch(sigma, steps), delta)
    for q in (1 - 1e-9, 1 - 1e-12):
        sampled = accounting.epsilon(accounting.poisson(sigma, q, steps), delta)
        assert full * (1 - 1e-7) <= sampled <= full  # sampling never costs more
    # And without that ceiling, by the transform alone.
    law = composition.Released(accounting.releases.SubsampledGaussian(sigma, 1 - 1e-9), steps)
    bound = composition.epsilon([law], delta, directions=(False,))
    assert full * (1 - 1e-8) <= bound <= full * (1 + 5e-4)


EVENTS = {
    "poisson": lambda sigma, q, steps: accounting.poisson(sigma, q, steps),
    "truncated": lambda sigma, q, steps: accounting.truncated_poisson(
        sigma, q, round(1.3 * q * 1000), 1000, steps
    ),
    "allocation": lambda sigma, q, steps: accounting.allocation(sigma, round(1 / q), steps),
}


@pytest.mark.parametrize("name", EVENTS)
def test_epsilon_is_monotone_in_every_argument(name):
    make, base = EVENTS[name], dict(sigma=1.5, q=0.05, steps=50)
    deltas = [1e-30, 1e-18, 1e-14, 1e-10, 1e-5]
    values = [accounting.epsilon(make(**base), d) for d in deltas]
    assert all(a > b for a, b in itertools.pairwise(values))
    for field, rising in (
        ("sigma", [3.0, 1.5, 1.499, 0.8]), ("q", [0.01, 0.04, 0.05, 0.2]),
        ("steps", [10, 49, 50, 200]),
    ):  # fmt: skip
        values = [accounting.epsilon(make(**{**base, field: x}), 1e-20) for x in rising]
        assert all(a <= b * (1 + 1e-4) for a, b in itertools.pairwise(values)), (field, values)


@pytest.mark.parametrize("delta", [1e-30, 1e-14, 1e-6])
@pytest.mark.parametrize(
    ("sigma", "q", "steps"),
    [(2.0, 0.005, 1500), (0.7, 0.001, 10**6), (300.0, 0.5, 10**7), (0.4, 0.2, 50), (30.0, 1.0, 5)],
)
@pytest.mark.one_in(4)
def test_never_looser_than_renyi_accounting(sigma, q, steps, delta):
    event = accounting.poisson(sigma, q, steps)
    loose = rdp.RdpAccountant(ORDERS).compose(event).get_epsilon(delta)
    epsilon = accounting.epsilon(event, delta)
    assert epsilon <= loose
    assert accounting.delta(event, epsilon) == pytest.approx(delta, rel=0.02)


def test_a_transform_that_is_less_exact_gives_a_larger_bound(monkeypatch):
    event = accounting.poisson(20.0, 0.2, 10_000)
    exact = accounting.epsilon(event, 1e-9)
    monkeypatch.setattr(composition, "_UNIT", 2.0**-33)
    assert accounting.epsilon(event, 1e-9) > exact * (1 + 1e-6)


def test_what_is_not_ours_is_refused_where_rounding_would_decide():
    event = dpa.SelfComposedDpEvent(dpa.LaplaceDpEvent(5.0), 10)
    assert accounting.epsilon(event, 1e-8) == pytest.approx(
        dpa.pld.PLDAccountant().compose(event).get_epsilon(1e-8), rel=1e-3
    )
    with pytest.raises(ValueError, match=r"delta=1e-15 must be >= 1e-11 for .*Laplace"):
        accounting.epsilon(event, 1e-15)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (dpa.SelfComposedDpEvent(dpa.GaussianDpEvent(1.0), -4), "count=-4"),
        (dpa.SelfComposedDpEvent(dpa.GaussianDpEvent(1.0), 0.5), "count=0.5"),
        (dpa.PoissonSampledDpEvent(1.5, dpa.GaussianDpEvent(1.0)), "sampling_probability=1.5"),
        (dpa.PoissonSampledDpEvent(math.nan, dpa.GaussianDpEvent(1.0)), "probability=nan"),
        (dpa.PoissonSampledDpEvent(0.1, dpa.GaussianDpEvent(-1.0)), "noise_multiplier=-1.0"),
        (dpa.GaussianDpEvent(math.nan), "noise_multiplier=nan"),
        (dpa.TruncatedSubsampledGaussianDpEvent(10, 1.5, 5, 1.0), "sampling_probability=1.5"),
    ],
)
def test_events_that_cannot_be_are_refused_by_name(event, text):
    with pytest.raises(ValueError, match=text):
        accounting.epsilon([accounting.full_batch(1.0, 5), event], 1e-5)


def test_an_epoch_has_no_more_steps_than_it_has():
    with pytest.raises(ValueError, match="steps=5 must be <= steps_per_epoch=4"):
        accounting.events.AllocationDpEvent(1.0, 4, 5)


def test_a_tiny_delta_plans_a_sensible_noise():
    make = lambda s: accounting.poisson(s, 256 / 50_000, 1562)  # noqa: E731
    sigma = accounting.calibrate_noise_multiplier(make, epsilon=1.0, delta=1e-15)
    assert 1.6 < sigma < 4.15  # and not 119,137; by Renyi divergences it is 4.15
