"""Lower bounds on epsilon from the outcome of a membership game: statistics in numpy.

If a mechanism is (epsilon, delta)-DP, nobody can infer from its output too well whether an example
took part. An attack that succeeds beyond this limit refutes the claim, and the largest refuted
epsilon is a lower bound on the true one, wrong with probability at most 1 - confidence. A bound far
below the claim proves nothing: the attack may be weak.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import log_ndtr, ndtr, ndtri

__all__ = [
    "ManyRuns", "OneRun", "gaussian_epsilon", "guesses_mu", "many_runs", "moments_mu", "one_run",
    "p_value", "ranks_mu", "upper_limit",
]  # fmt: skip

_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)  # fractions of the canaries to guess as included
_THRESHOLDS = 33  # candidate thresholds: quantiles of the first half of the scores
_HIGHEST = 64.0  # nats; no realistic number of canaries could show more


class OneRun(NamedTuple):
    """The lower bound from one training run with many canaries.

    Attributes:
        epsilon: lower bound, in nats.
        positive: k+, number of canaries guessed as included.
        negative: k-, number guessed as excluded; the attack abstains on the rest.
        correct: how many of the k+ + k- guesses were right.
    """

    epsilon: float
    positive: int
    negative: int
    correct: int


class ManyRuns(NamedTuple):
    """The lower bound from many training runs with and without one canary.

    Attributes:
        epsilon: lower bound, in nats.
        threshold: runs with at least this score were guessed to contain the canary.
        false_positive: upper confidence limit on the rate of wrong guesses without the canary.
        false_negative: upper confidence limit on the rate of wrong guesses with it.
    """

    epsilon: float
    threshold: float
    false_positive: float
    false_negative: float


def one_run(
    scores: np.ndarray,
    included: np.ndarray,
    *,
    delta: float,
    confidence: float = 0.95,
    guesses: Sequence[tuple[int, int]] | None = None,
) -> OneRun:
    """Bounds epsilon from one run in which each canary took part by an independent fair coin.

    Args:
        scores: `[canaries]`; a larger score means that the canary more likely took part. They may
            depend on everything that the mechanism released, and on nothing else.
        included: `[canaries]` bool, the coins.
        delta: delta of the claim, in [0, 1).
        confidence: in (0, 1).
        guesses: pairs (k+, k-) to try, fixed before looking at the scores: the k+ highest scores
            are guessed as included, the k- lowest as excluded. Each pair is tested at significance
            (1 - confidence) / number of pairs (Bonferroni). None tries 1 % to 40 % of the canaries,
            at the top only and at both ends.

    Returns:
        The best of the bounds.

    Guarantees:
        If the mechanism is (e, delta)-DP under adding or removing one example, the bound exceeds
        e with probability at most 1 - confidence over the coins and the mechanism.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: Steinke, Nasr, Jagielski 2023, arXiv 2305.08846, algorithm 1 and theorem 5.2.
    """
    scores, included = np.asarray(scores, np.float64), np.asarray(included, bool)
    _check(delta, confidence, scores)
    if scores.ndim != 1 or scores.shape != included.shape or not scores.size:
        raise ValueError(
            f"scores of shape {scores.shape} and included of shape {included.shape} must be one "
            "per canary."
        )
    if guesses is None:
        tops = sorted({max(1, round(share * scores.size)) for share in _SHARES})
        guesses = [(k, other) for k in tops for other in (0, k) if k + other <= scores.size]
    order = np.argsort(scores, kind="stable")
    best = OneRun(0.0, 0, 0, 0)
    for positive, negative in guesses:
        if min(positive, negative) < 0 or not 1 <= positive + negative <= scores.size:
            raise ValueError(
                f"guesses: k+={positive} and k-={negative} must be between 1 and {scores.size} "
                "together."
            )
        right = included[order[scores.size - positive :]].sum()
        right += (~included[order[:negative]]).sum()
        bound = _refuted(
            scores.size, positive + negative, int(right), delta, (1 - confidence) / len(guesses)
        )
        if bound > best.epsilon:
            best = OneRun(bound, positive, negative, int(right))
    return best


def ranks_mu(inside: np.ndarray, reference: np.ndarray, *, confidence: float = 0.95) -> float:
    """Bounds mu of a mu-GDP mechanism from below, by where scores rank among those of nobody.

    Let F be the law of the score of a canary that took no part, and U = F(score) of one that did.
    If the pair is mu-GDP, every test of level a finds it with probability at most
    Phi(Phi^-1(a) + mu), so Phi^-1(U) is stochastically below N(mu, 1), whatever the score is. The
    mean of n independent ones exceeds mu + z / sqrt(n) with probability at most 1 - confidence. F
    is estimated by the reference, which adds its variance.

    Args:
        inside: `[n]` scores of canaries that took part, independent given the mechanism's own
            randomness, as those of directions with independent noise are.
        reference: `[R]` scores of directions that nobody moved, of the same law as that of a canary
            that took no part; R much larger than n.
        confidence: in (0, 1).

    Returns:
        The largest mu that is refuted; 0 if none.

    Source: the trade-off functions of Dong, Roth, Su 2019 (arXiv 1905.02383); that all canaries and
        unseen directions come from one run is Andrew et al. 2023 (arXiv 2302.03098); the normal
        scores are van der Waerden's.
    """
    below = np.searchsorted(np.sort(reference), inside, "left")
    upto = np.searchsorted(np.sort(reference), inside, "right")
    rank = ((below + upto) / 2 + 0.5) / (len(reference) + 1)
    return _mean_above_chance(ndtri(rank), len(reference), confidence)


def moments_mu(inside: np.ndarray, reference: np.ndarray, *, confidence: float = 0.95) -> float:
    """As `ranks_mu`, of scores that are taken to be Gaussian (arXiv 2302.03098): no guarantee."""
    spread = float(np.std(reference))
    if not spread > 0:  # no noise, and no Gaussian
        return 0.0
    z = (np.asarray(inside) - np.mean(reference)) / spread
    return _mean_above_chance(z, len(reference), confidence)


def _mean_above_chance(z: np.ndarray, others: int, confidence: float) -> float:
    if not len(z) or not others:
        return 0.0
    error = math.sqrt(1 / len(z) + 1 / others)
    return max(0.0, float(np.mean(z)) - float(ndtri(confidence)) * error)


def guesses_mu(scores: np.ndarray, included: np.ndarray, *, confidence: float = 0.95) -> float:
    """Bounds mu of a mu-GDP mechanism from the right guesses in one run, as `one_run` does epsilon.

    Nothing is assumed of the dependence between canaries.

    Source: Mahloujifar, Melis, Chaudhuri 2024, arXiv 2410.22235, algorithm 3, with the trade-off
        function of the Gaussian mechanism.
    """
    scores, included = np.asarray(scores, np.float64), np.asarray(included, bool)
    order, m = np.argsort(scores, kind="stable"), scores.size
    tops = sorted({max(1, round(share * m)) for share in _SHARES})
    pairs = [(k, other) for k in tops for other in (0, k) if k + other <= m]
    best = 0.0
    for positive, negative in pairs:
        right = included[order[m - positive :]].sum() + (~included[order[:negative]]).sum()
        level = (1 - confidence) / len(pairs)
        refutes = functools.partial(
            _guesses_refute, m=m, made=positive + negative, correct=int(right), level=level
        )
        if refutes(best):
            best = _bisect(refutes, best, _HIGHEST)
    return best


def _guesses_refute(mu: float, m: int, made: int, correct: int, level: float) -> bool:
    """Whether so many right guesses are too many for mu-GDP."""
    r, h = level * correct / m, level * (made - correct) / m
    for i in range(correct - 1, -1, -1):
        above = max(h, float(ndtr(ndtri(r) - mu)))
        if above == h:
            break
        r, h = min(r + i / (made - i) * (above - h), 1.0), above
    return r + h > made / m


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Returns the epsilon (nats) at which mu-GDP is (epsilon, delta)-DP; 0 where delta suffices.

    >>> round(gaussian_epsilon(1.0, 1e-5), 3)
    4.377
    """

    def costs_more(epsilon: float) -> bool:  # arXiv 1905.02383, corollary 2.13
        tail = epsilon + log_ndtr(-epsilon / mu - mu / 2)
        return bool(ndtr(-epsilon / mu + mu / 2) - math.exp(min(tail, 0.0)) > delta)

    if mu <= 0 or not costs_more(0.0):
        return 0.0
    return _bisect(costs_more, 0.0, 16 * _HIGHEST)


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Bounds the probability of `correct` right guesses if the mechanism is (epsilon, delta)-DP.

    Args:
        canaries: m, number of canaries, each included by a fair coin.
        guesses: r <= m, number of guesses; the attack abstained on the other canaries.
        correct: v <= r, number of right guesses.
        epsilon: epsilon of the claim, in nats.
        delta: delta of the claim.

    Returns:
        P[W >= v] + 2 m delta max_i (P[W >= v - i] - P[W >= v]) / i, at most 1, where W is the
        number of heads in r tosses of a coin with odds e^epsilon.

    Source: arXiv 2305.08846, theorem 5.2.

    >>> round(p_value(100, 10, 10, epsilon=0.0, delta=0.0) * 2**10, 6)
    1.0
    """
    tails = _tails(guesses, epsilon)
    beta = tails[correct]
    i = np.arange(1, correct + 1)
    alpha = np.max((tails[correct - i] - beta) / i, initial=0.0)
    return float(min(1.0, beta + 2 * canaries * delta * alpha))


def many_runs(
    with_canary: np.ndarray, without: np.ndarray, *, delta: float, confidence: float = 0.95
) -> ManyRuns:
    """Bounds epsilon from runs on two data sets that differ in one example.

    The threshold is chosen on the first half of the runs, and the bound is computed from the second
    half, so that choosing costs no confidence.

    Args:
        with_canary: `[runs]` scores of independent runs with the canary, at least 2.
        without: `[runs]` scores of independent runs without it, at least 2.
        delta: delta of the claim, in [0, 1).
        confidence: in (0, 1).

    Returns:
        The bound max(ln((1 - delta - FNR) / FPR), ln((1 - delta - FPR) / FNR)), at upper
        Clopper-Pearson limits of both rates, each at confidence (1 + confidence) / 2, so that both
        hold together with the confidence asked for.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: Jagielski et al. 2020, arXiv 2006.07709; Nasr et al. 2021, arXiv 2101.04535, section 4.
    """
    worlds = [np.asarray(world, np.float64) for world in (with_canary, without)]
    for name, world in zip(("with_canary", "without"), worlds):
        _check(delta, confidence, world)
        if world.ndim != 1 or world.size < 2:
            raise ValueError(f"{name} has shape {world.shape}, but must hold 2 scores or more.")
    halves = [(world[: len(world) // 2], world[len(world) // 2 :]) for world in worlds]
    (first_in, second_in), (first_out, second_out) = halves

    def bound(threshold: float, inside: np.ndarray, outside: np.ndarray) -> ManyRuns:
        level = (1 + confidence) / 2
        fnr = upper_limit(int((inside < threshold).sum()), inside.size, level)
        fpr = upper_limit(int((outside >= threshold).sum()), outside.size, level)
        refuted = [
            math.log((1 - delta - miss) / rate) if 1 - delta > miss else 0.0
            for miss, rate in ((fnr, fpr), (fpr, fnr))
        ]
        return ManyRuns(max(0.0, *refuted), threshold, fpr, fnr)

    candidates = np.quantile(np.concatenate([first_in, first_out]), np.linspace(0, 1, _THRESHOLDS))
    best = max((bound(float(t), first_in, first_out) for t in candidates), key=lambda b: b[0])
    return bound(best.threshold, second_in, second_out)


def upper_limit(successes: int, trials: int, confidence: float) -> float:
    """Returns the one-sided Clopper-Pearson upper limit on a probability.

    >>> round(upper_limit(0, 59, 0.95), 3)  # the rule of three
    0.05
    """
    if successes >= trials:
        return 1.0
    # The limit is the p at which seeing at most k of n has probability 1 - confidence. Counting
    # failures, P[at most k of n at p] = P[at least n - k of n at 1 - p], which falls as p grows.
    logit = _bisect(
        lambda x: _tails(trials, -x)[trials - successes] >= 1 - confidence, -_HIGHEST, _HIGHEST
    )
    return 1 / (1 + math.exp(-logit))


def _refuted(m: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """Returns the largest epsilon that `correct` right guesses refute; 0 if none."""

    def refutes(epsilon: float) -> bool:
        return p_value(m, guesses, correct, epsilon, delta) <= significance

    return _bisect(refutes, 0.0, _HIGHEST) if refutes(0.0) else 0.0


def _bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Returns the largest number in [low, high] at which `holds`, to rounding; it holds at `low`.

    `low` is returned, so the result is one at which `holds` was checked.
    """
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _tails(trials: int, logit: float) -> np.ndarray:
    """P[Binomial(trials, logistic(logit)) >= k] for k = 0 .. trials + 1, each to full precision."""
    k = np.arange(trials + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    log_choose = log_factorial[-1] - log_factorial - log_factorial[::-1]
    log_prob = -np.logaddexp(0.0, -logit)
    mass = np.exp(log_choose + k * log_prob + (trials - k) * (log_prob - logit))
    # Summed from the far end, so that small terms are added first and keep their digits.
    return np.append(np.minimum(np.cumsum(mass[::-1])[::-1], 1.0), 0.0)


def _check(delta: float, confidence: float, scores: np.ndarray) -> None:
    if not 0 <= delta < 1:
        raise ValueError(f"delta={delta} must be in [0, 1).")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be in (0, 1).")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite.")
