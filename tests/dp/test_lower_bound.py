"""The statistics of audits: against the definitions, another library, and mechanisms of known
epsilon."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from dpjax.dp import lower_bound


def exact_p_value(m, r, v, epsilon, delta):
    """Theorem 5.2 of arXiv 2305.08846 term by term, with scipy's binomial."""
    law = stats.binom(r, 1 / (1 + math.exp(-epsilon)))
    at_least = lambda k: law.sf(k - 1)  # noqa: E731
    i = np.arange(1, m + 1)
    slope = max(0.0, ((at_least(v - i) - at_least(v)) / i).max())
    return min(1.0, at_least(v) + 2 * m * delta * slope)


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 5.0, 40.0])
@pytest.mark.parametrize(
    "m,r,v",
    [
        (50, 50, 40),
        (300, 40, 40),
        (300, 40, 0),
        (1000, 700, 460),
        (40, 1, 1),
        (40, 2, 2),
        (40, 5, 1),
        (40, 5, 2),
    ],
)
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-2])
def test_p_value_is_the_theorem(m, r, v, epsilon, delta):
    want = exact_p_value(m, r, v, epsilon, delta)
    assert lower_bound.p_value(m, r, v, epsilon, delta) == pytest.approx(want, rel=1e-8, abs=1e-300)


@pytest.mark.parametrize("k,n", [(0, 10), (3, 50), (49, 50), (50, 50), (7, 4000)])
@pytest.mark.parametrize("confidence", [0.9, 0.975, 1 - 1e-6])
def test_upper_limit_is_clopper_pearson(k, n, confidence):
    want = stats.beta.ppf(confidence, k + 1, n - k) if k < n else 1.0
    assert lower_bound.upper_limit(k, n, confidence) == pytest.approx(want, rel=1e-8)


def gaussian_game(mu, m, seed):
    """Scores of canaries of a Gaussian mechanism of sensitivity over noise mu, and their coins."""
    rng = np.random.default_rng(seed)
    coins = rng.random(m) < 0.5
    return rng.normal(size=m) + mu * coins, coins


@pytest.mark.parametrize("mu", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("delta", [1e-6, 1e-3])
def test_against_jax_privacy(mu, delta):
    """At the same guess (one side, one threshold), the same bound; likewise Clopper-Pearson."""
    auditing = pytest.importorskip("jax_privacy.auditing")
    scores, coins = gaussian_game(mu, 400, seed=1)
    for count in (10, 60, 200):
        threshold = auditing.Explicit(float(np.sort(scores)[-count]))
        theirs = auditing.CanaryScoreAuditor(scores[coins], scores[~coins]).epsilon_one_run(
            0.05, delta, threshold_strategy=threshold
        )
        ours = lower_bound.one_run(scores, coins, delta=delta, guesses=[(count, 0)])
        assert ours.epsilon == pytest.approx(theirs, abs=2e-6)
    inside, outside = scores[coins], scores[~coins]
    ours = lower_bound.many_runs(inside, outside, delta=delta)
    second = lambda x: x[len(x) // 2 :]  # noqa: E731
    theirs = auditing.CanaryScoreAuditor(second(inside), second(outside)).epsilon_clopper_pearson(
        0.05, delta, one_sided=False, threshold_strategy=auditing.Explicit(ours.threshold)
    )
    assert ours.epsilon == pytest.approx(theirs, abs=1e-6)


def gaussian_epsilon(mu, delta):
    """Balle and Wang 2018 (1805.06530), theorem 8."""

    def excess(eps):
        lower = eps + stats.norm.logcdf(-mu / 2 - eps / mu)
        return stats.norm.cdf(mu / 2 - eps / mu) - math.exp(lower) - delta

    return optimize.brentq(excess, 0.0, 200.0)


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_bounds_hold_on_a_correct_mechanism(mu):
    """20 games each: at 95 % confidence, 9 bounds above the truth have a probability below 1e-6."""
    truth = gaussian_epsilon(mu, 1e-5)
    games = [gaussian_game(mu, 500, seed) for seed in range(20)]
    one = [lower_bound.one_run(*game, delta=1e-5).epsilon for game in games]
    many = [lower_bound.many_runs(s[c], s[~c], delta=1e-5).epsilon for s, c in games]
    assert sum(e > truth for e in one) < 9
    assert sum(e > truth for e in many) < 9
    if mu == 2.0:
        assert np.median(one) > 0.7  # and they are not empty
        assert np.median(many) > 0.7


def test_bounds_refute_a_false_claim():
    scores, coins = gaussian_game(40.0, 500, seed=0)
    claimed = 2.0
    assert lower_bound.one_run(scores, coins, delta=1e-5).epsilon > claimed
    assert lower_bound.many_runs(scores[coins], scores[~coins], delta=1e-5).epsilon > claimed


def test_randomized_response_is_bounded_tightly():
    """The worst mechanism of its epsilon: guesses are right with odds e^1, and no more is shown."""
    rng = np.random.default_rng(0)
    coins = rng.random(20_000) < 0.5
    lie = rng.random(20_000) < 1 / (1 + math.e)
    scores = np.where(coins ^ lie, 1.0, -1.0) + 1e-6 * rng.normal(size=20_000)
    assert 0.9 < lower_bound.one_run(scores, coins, delta=0.0).epsilon < 1.0


def test_guesses_that_are_tried_cost_confidence():
    scores, coins = gaussian_game(3.0, 300, seed=2)
    alone = lower_bound.one_run(scores, coins, delta=1e-5, guesses=[(30, 0)])
    among = lower_bound.one_run(scores, coins, delta=1e-5, guesses=[(30, 0)] * 12)
    assert among.epsilon < alone.epsilon
    assert alone[1:] == (30, 0, int(coins[np.argsort(scores)[-30:]].sum()))


def test_both_ends_count():
    scores, coins = gaussian_game(8.0, 200, seed=3)
    top = lower_bound.one_run(scores, coins, delta=1e-5, guesses=[(80, 0)])
    both = lower_bound.one_run(scores, coins, delta=1e-5, guesses=[(80, 80)])
    assert both.epsilon > top.epsilon
    assert both.correct == 160


def test_nothing_is_shown_by_chance_scores():
    rng = np.random.default_rng(5)
    scores, coins = rng.normal(size=400), rng.random(400) < 0.5
    assert lower_bound.one_run(scores, coins, delta=1e-5).epsilon < 0.3
    assert lower_bound.many_runs(scores[coins], scores[~coins], delta=1e-5).epsilon < 0.5


TWO = np.array([0.0, 1.0])


@pytest.mark.parametrize(
    "call,text",
    [
        (lambda: lower_bound.one_run(TWO, TWO > 0, delta=1.0), "delta=1.0"),
        (lambda: lower_bound.one_run(TWO, TWO > 0, delta=0.0, confidence=1.0), "confidence=1.0"),
        (lambda: lower_bound.one_run(TWO, TWO > 0, delta=0.0, confidence=0.0), "confidence=0.0"),
        (lambda: lower_bound.one_run(TWO, np.array([True]), delta=0.0), "one per canary"),
        (lambda: lower_bound.one_run(np.zeros(0), np.zeros(0, bool), delta=0.0), "one per canary"),
        (lambda: lower_bound.one_run(TWO * np.nan, TWO > 0, delta=0.0), "finite"),
        (lambda: lower_bound.one_run(TWO, TWO > 0, delta=0.0, guesses=[(2, 1)]), "k[+]=2 and k-=1"),
        (lambda: lower_bound.one_run(TWO, TWO > 0, delta=0.0, guesses=[(0, 0)]), "k[+]=0"),
        (
            lambda: lower_bound.one_run(TWO, TWO > 0, delta=0.0, guesses=[(2, -1)]),
            "k[+]=2 and k-=-1",
        ),
        (lambda: lower_bound.many_runs(TWO, TWO[:1], delta=0.0), "without has shape"),
        (lambda: lower_bound.many_runs(TWO, TWO, delta=-0.1), "delta=-0.1"),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_all_canaries_can_be_guessed():
    scores, coins = gaussian_game(8.0, 40, seed=1)
    found = lower_bound.one_run(scores, coins, delta=0.0, guesses=[(20, 20)])
    assert found.epsilon > 1


def test_equal_scores_show_nothing():
    """Scores of runs that diverged are all equal: a threshold at them has them all above it."""
    assert lower_bound.many_runs(np.zeros(40), np.zeros(40), delta=0.0).epsilon == 0


def test_guesses_without_a_bound_are_not_named():
    coins = np.arange(40) % 2 == 0
    assert lower_bound.one_run(-1.0 * coins, coins, delta=0.0) == (0.0, 0, 0, 0)


def test_a_single_guess_and_two_canaries_are_enough():
    scores, coins = np.array([0.0, 1.0]), np.array([False, True])
    assert lower_bound.one_run(scores, coins, delta=0.0) == (0.0, 0, 0, 0)
    assert lower_bound.one_run(scores, coins, delta=0.0, confidence=0.1, guesses=[(1, 0)])[1:] == (
        1,
        0,
        1,
    )


def test_the_runs_that_chose_the_threshold_are_not_counted():
    """Else it would be chosen for the errors that it is judged by, and the bound could be false."""
    first, second = gaussian_game(2.0, 200, seed=1), gaussian_game(2.0, 200, seed=2)
    inside, outside = first[0][first[1]][:80], first[0][~first[1]][:80]
    found = [
        lower_bound.many_runs(np.append(inside, a), np.append(outside, a), delta=0.0)
        for a in (second[0][:80], second[0][80:160] + 9.0, np.full(80, -5.0))
    ]
    assert len({bound.threshold for bound in found}) == 1
    assert found[2].false_negative == 1.0
    assert found[2].false_positive == lower_bound.upper_limit(0, 80, 0.975)


def directions(mu, seed, canaries=250, unused=20_000):
    rng = np.random.default_rng(seed)
    return mu + rng.normal(size=canaries), rng.normal(size=unused)


@pytest.mark.parametrize("mu", [0.0, 0.5, 2.0])
def test_ranks_hold_and_are_nearly_all_that_a_gaussian_shows(mu):
    """200 games: 5 % may exceed the truth; 26 do with a probability below 1e-5."""
    games = [directions(mu, seed) for seed in range(200)]
    ranks = np.array([lower_bound.ranks_mu(*game) for game in games])
    assert (ranks > mu).sum() < 26
    if mu:
        assert (ranks > mu).any()
        assert np.median(ranks) == pytest.approx(mu - 1.645 * math.sqrt(1 / 250), abs=0.04)


def test_ranks_see_no_more_than_the_trade_off_allows():
    """Scores that are no Gaussians: one in twenty canaries is certain, the others are noise."""
    inside, unused = directions(0.0, 0)
    inside[:12] = 50.0
    # The mu of (0, 1/20): total variation 1/20.
    assert lower_bound.ranks_mu(inside, unused) < 2 * stats.norm.ppf(0.5 + 1 / 40) + 0.15
    assert lower_bound.ranks_mu(np.exp(inside / 9), np.exp(unused / 9)) == pytest.approx(
        lower_bound.ranks_mu(inside, unused)
    )
    assert lower_bound.moments_mu(inside, unused) > 2  # what a shape that is assumed may do
    assert lower_bound.ranks_mu(np.zeros(250), np.zeros(20_000)) == 0.0
    assert lower_bound.ranks_mu(np.zeros(0), unused) == 0.0


@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_guesses_of_a_gaussian_hold_and_show_more(mu):
    games = [gaussian_game(mu, 500, seed) for seed in range(20)]
    found = [lower_bound.guesses_mu(*game) for game in games]
    assert sum(m > mu for m in found) < 9
    if mu == 2.0:
        epsilons = [lower_bound.gaussian_epsilon(m, 1e-5) for m in found]
        plain = [lower_bound.one_run(*game, delta=1e-5).epsilon for game in games]
        assert np.median(epsilons) > 1.5 * np.median(plain)


@pytest.mark.parametrize("mu", [1.0, 2.0])
def test_guesses_of_a_gaussian_against_jax_privacy(mu):
    auditing = pytest.importorskip("jax_privacy.auditing")
    scores, coins = gaussian_game(mu, 400, seed=1)
    for count in (60, 160):
        right = int(coins[np.argsort(scores)[-count:]].sum())
        theirs = auditing._epsilon_one_run_fdp(0.0, 400, count, right, 0.05, 1e-5)
        own = optimize.brentq(
            lambda m, count=count, right=right: (
                0.5 - lower_bound._guesses_refute(m, 400, count, right, 0.05)
            ), 1e-6, 20.0,
        )  # fmt: skip
        assert lower_bound.gaussian_epsilon(own, 1e-5) == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("mu", [0.1, 1.0, 8.0])
def test_epsilon_of_a_gaussian(mu):
    assert lower_bound.gaussian_epsilon(mu, 1e-6) == pytest.approx(gaussian_epsilon(mu, 1e-6))
    assert lower_bound.gaussian_epsilon(0.0, 1e-6) == 0.0
    assert lower_bound.gaussian_epsilon(1e-9, 1e-6) == 0.0
