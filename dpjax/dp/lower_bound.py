"""Lower bounds on epsilon from the outcome of a membership game: statistics in numpy.

If a mechanism is (epsilon, delta)-DP, nobody can infer from its output too well whether an example
took part. An attack that succeeds beyond this limit refutes the claim, and the largest refuted
epsilon is a lower bound on the true one, wrong with probability at most 1 - confidence. A bound far
below the claim proves nothing: the attack may be weak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["ManyRuns", "OneRun", "many_runs", "one_run", "p_value", "upper_limit"]

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
