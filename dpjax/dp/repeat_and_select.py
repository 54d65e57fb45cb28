"""The privacy cost of releasing the best of several private runs.

The number K of runs is geometric, each run trains a random point, and only the best run is
released: not the others, not their scores, not their number. The runs must be independent of one
another, with one mechanism, and the score must read no private data except through the run.

**The bound.** Let Q and Q' be the laws of one run on neighboring data, its point and score
included, and delta(e) the larger of sup_E Q(E) - exp(e) Q'(E) and the same with Q and Q' swapped.
Ties of scores count as broken at random. For an outcome o let S and S' be the probabilities under Q
and Q' of a better score. With g = 1 / mean, the released run has under Q the density

    sum_k P[K = k] k (1 - S)^(k - 1) = h(S),      h(S) = g / (g + (1 - g) S)^2,

with respect to Q, since one of k runs has the outcome and the others are no better. So, with
R = dQ / dQ' and for every event E,

    P_Q[released in E] - exp(e) P_Q'[released in E] = E_Q'[1_E (R h(S) - exp(e) h(S'))].

A better score is an event as well: S' <= b(S) = min over x >= 0 of exp(x) S + delta(x). As h falls,

    R h(S) - exp(e) h(S') <= M(R),      M(r) = max over S in [0, 1] of (r h(S) - exp(e) h(b(S)))+.

M is convex, M(r) = 0 for small r, and its slope is at most h(0) = mean. The line through the values
of M at exp(x_0) < exp(x_1) < ..., zero before them and of slope `mean` behind them, is above M. It
is a sum of w_j (r - exp(x_j))+ with w_j >= 0, which add up to `mean`, and whose means under Q' are
at most w_j delta(x_j); outcomes that Q' does not have are paid by the slope. So the released run is
(e, sum_j w_j delta(x_j))-private: a search costs little, because an outcome that reveals an example
gains from it only as far as the better scores suggest the opposite. The points are drawn in the
same way on both data sets: a mixture of runs of one profile has this profile.

At delta = 1e-5, a run of full batches of epsilon 1 costs 1.17, 1.26 and 1.55 in a search of 2, 3
and 10 runs on average, where arXiv 2110.03620 (theorem 2) has 1.70, 1.89 and 2.31. For one Gaussian
release, scores are known that cost all but 3 % as much (`tests/dp/test_repeat_and_select.py`). That
a search costs less than the general theorem was first shown in arXiv 2402.13087; this proof is our
own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize

from dpjax.dp import accounting, sampling, secure
from dpjax.dp.mechanism import Mechanism, shared_accountant
from dpjax.dp.sampling import Sampler

__all__ = [
    "charged", "check_sampler", "delta_of_best", "draw", "epsilon", "epsilon_of_one",
    "mechanisms", "not_charged",
]  # fmt: skip

_POINTS = 64  # at which delta of one run is computed: more would lower an epsilon of 1 by 0.1 %
_SCORES = 4000  # values of S; neighbors differ by a factor of mean^(2 / _SCORES) in h
# Relative. A run's noise is calibrated to its epsilon only to about 1e-4, and the error must not
# carry the search over its budget.
_MARGIN = 2e-3
_ROUNDING = 1e-6  # of delta, relative, for this module's own arithmetic
_SAMPLERS: tuple[type[Any], ...] = (
    sampling.Poisson, sampling.FullBatch, sampling.RandomAllocation, sampling.TruncatedPoisson,
    sampling.FixedSize,
)  # fmt: skip
# Start of the line in a run's own statement that the search replaces.
_HYPERPARAMETERS = "the choice of hyperparameters"


def epsilon(run: Sequence[Mechanism], delta: float, *, mean: float) -> float:
    """Returns an upper bound on epsilon (nats) of releasing the best of a geometric number of runs.

    Args:
        run: the mechanisms that one run composes, on the same examples.
        delta: delta of the result.
        mean: mean number of runs, > 1.

    Raises:
        ValueError: `mean` is out of range, or no accountant knows all mechanisms.
    """
    if not 1 < mean < math.inf:
        raise ValueError(f"mean={mean} must be > 1 and finite.")
    events = [m.event() for m in run]
    known: dict[str, Any] = {"accountant": shared_accountant(run), "relation": run[0].relation}
    # Beyond the last point, delta counts with the full slope of M: it must be negligible there.
    last = accounting.epsilon(events, 1e-4 * delta / mean, **known)
    if last == math.inf:
        return math.inf
    at = np.linspace(0.0, max(last, 1e-6), _POINTS)
    # Total variation between secure noise and a Gaussian, over all numbers of a run.
    gap = secure.GAP * sum(m.steps * (m.secure_size or 0) for m in run)
    deltas = [
        accounting.delta(events, x, **known) + (1 + math.exp(min(x, 700.0))) * gap for x in at
    ]

    def excess(value: float) -> float:
        return math.log(max(delta_of_best(at, deltas, value, mean=mean), 1e-300) / delta)

    highest = float(at[-1]) + 2 * math.log(mean)
    if excess(highest) > 0:
        return math.inf
    root = float(optimize.brentq(excess, 0.0, highest, xtol=1e-7 * highest))
    while excess(root) > 0:  # brentq stops on either side
        root += 1e-7 * highest
    return root


def delta_of_best(
    at: Sequence[float] | np.ndarray, deltas: Sequence[float], epsilon: float, *, mean: float
) -> float:
    """Returns delta, at `epsilon`, of releasing the best of a geometric number of runs.

    Args:
        at: `[points]` epsilons >= 0 of one run, rising, in nats.
        deltas: `[points]` bounds on its delta there, for both orders of neighboring data sets.
        epsilon: of the result.
        mean: mean number of runs, > 1.

    Returns:
        The bound that this module proves; 1.0 where `at` does not suffice for a better one.
    """
    x, profile = np.asarray(at, np.float64), np.asarray(deltas, np.float64)
    rate = 1 / mean
    spread = np.geomspace(rate, 1.0, _SCORES + 1)  # g + (1 - g) S, from S = 0 to S = 1
    better = (spread - rate) / (1 - rate)
    with np.errstate(over="ignore"):
        lines = np.exp(x) * better[:, None] + profile
    other = rate + (1 - rate) * np.minimum(1.0, np.min(lines, axis=1))  # the same of b(S)
    # M needs r h(S) > exp(epsilon) h(b(S)), and h changes by a factor of mean^2 at most.
    begin = max(0, int(np.searchsorted(x, epsilon - 2 * math.log(mean))) - 1)
    r = np.exp(x[begin:] - epsilon)  # in units of exp(epsilon)
    # Between neighbors h(S) is at most its value at the lower one, h(b(S)) at least at the upper.
    best = r[:, None] * (rate / spread[:-1] ** 2) - rate / other[1:] ** 2
    values = np.maximum(0.0, np.max(best, axis=1))
    if values[0] > 0:
        return 1.0
    slopes = np.concatenate([[0.0], np.diff(values) / np.diff(r), [mean]])
    weights = np.maximum(0.0, np.diff(slopes))
    return min(1.0, (1 + _ROUNDING) * float(weights @ profile[begin:]))


def epsilon_of_one(run: Sequence[Mechanism], *, budget: float, delta: float, mean: float) -> float:
    """Returns the epsilon of a single run with which the whole search meets its budget.

    Args:
        run: the mechanisms of one run; their noise multipliers are scaled by a common factor.
        budget: epsilon of the search.
        delta: delta of the search, and of a run.
        mean: mean number of runs, > 1.

    Raises:
        ValueError: as for `epsilon`, or no amount of noise meets the budget.
    """

    def scaled(log_factor: float) -> list[Mechanism]:
        factor = math.exp(log_factor)
        # `count_noise` does not enter the event (see `adaptive`), and could be too small for a
        # larger noise multiplier, which would be an error.
        return [
            dataclasses.replace(m, noise_multiplier=factor * m.noise_multiplier, count_noise=None)
            for m in run
        ]

    def gap(log_factor: float) -> float:
        return math.log(epsilon(scaled(log_factor), delta, mean=mean) / budget)

    guess = gap(0.0)  # epsilon is about inversely proportional to the noise
    if guess < math.inf:
        root = accounting.falling_root(gap, guess - 0.05, guess + 0.05, tol=1e-4, limit=5.0)
    else:
        root = accounting.falling_root(gap, 1.0, 2.0, tol=1e-4, limit=5.0)
    if root is None:
        raise ValueError(
            f"epsilon={budget} cannot be met by a search of {mean:g} runs on average: lower the "
            "mean or raise the budget."
        )
    spent = accounting.epsilon(
        [m.event() for m in scaled(root)], delta, accountant=shared_accountant(run),
        relation=run[0].relation,
    )  # fmt: skip
    return spent * (1 - _MARGIN)


def draw(points: int, mean: float, *, generator: np.random.Generator) -> list[int]:
    """Draws the number of runs, and an independent, uniform point for each.

    Args:
        points: number of points.
        mean: mean number of runs; the number is geometric and at least 1.
        generator: must be seeded from the system's entropy if the search is released.
    """
    number = int(generator.geometric(1 / mean))
    return [int(index) for index in generator.integers(points, size=number)]


def mechanisms(statement: dict[str, Any]) -> tuple[Mechanism, ...]:
    """Returns the planned mechanisms of a run from its `privacy.json`.

    Raises:
        ValueError: the run divides its data into parts, or has a sampler that is not dpjax's own,
            which a charged search does not support.
    """
    phases = statement["phases"]
    if len({phase["part"] for phase in phases}) > 1:
        raise ValueError("dp.temperature.share must be 0 in a charged search.")
    return tuple(
        Mechanism(
            sampler=_sampler(phase),
            steps=phase["steps_planned"],
            noise_multiplier=phase["noise_multiplier"],
            count_noise=phase["count_noise"],
            secure_size=phase.get("secure_size"),
        )
        for phase in phases
    )


def check_sampler(kind: str) -> type[Any]:
    """Returns the class of a sampler that a charged search knows, by its full name.

    Raises:
        ValueError: it is not one of dpjax's own. A subclass may cost more than its parent, and a
            privacy statement does not record its event.
    """
    own = {sampling.name_of(sampler): sampler for sampler in _SAMPLERS}
    if kind not in own:
        raise ValueError(
            f"dp.sampler={kind} cannot be charged in a search: use one of dpjax's own samplers."
        )
    return own[kind]


def _sampler(phase: dict[str, Any]) -> Sampler:
    kind = check_sampler(phase.get("sampler_class") or f"{phase['sampler']!r}, of unknown class,")
    fields = {field.name: phase[field.name] for field in dataclasses.fields(kind)}
    sampler: Sampler = kind(**fields)
    return sampler


def not_charged(statement: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Returns the selected run's statement, extended by the search, which is not charged.

    Args:
        statement: `privacy.json` of the run.
        facts: facts of the search: `method`, `points`, `runs`, `metric`.
    """
    line = (
        f"the choice of this run, by its {facts['metric']}, among {facts['runs']} runs of "
        f"{facts['points']} points ({facts['method']} search)"
    )
    kept = [item for item in statement["not_charged"] if not item.startswith(_HYPERPARAMETERS)]
    return {**statement, "not_charged": [line, *kept], "search": {**facts, "charged": False}}


def charged(
    statement: dict[str, Any], others: Sequence[dict[str, Any]], facts: dict[str, Any]
) -> dict[str, Any]:
    """Returns the selected run's statement, with the cost of the search included.

    Args:
        statement: `privacy.json` of the run.
        others: the statements of all runs.
        facts: facts of the search: `method`, `points`, `mean`, `metric`, and the budget `epsilon`.

    Raises:
        ValueError: the runs have different mechanisms, or the search exceeded its budget.
    """
    run = mechanisms(statement)
    if any(mechanisms(other) != run for other in others):
        raise ValueError(
            "the runs differ in sampler, steps or noise and cannot be charged: a charged search "
            "needs the same mechanism for all."
        )
    spent = epsilon(run, statement["delta"], mean=facts["mean"])
    if spent > facts["epsilon"] * (1 + 1e-9):
        raise ValueError(
            f"the search cost epsilon={spent:.6g}, more than its budget of {facts['epsilon']:.6g}."
        )
    line = (
        f"the choice of this run, by its {facts['metric']}, among a geometric number of runs, "
        f"{facts['mean']:g} on average, of {facts['points']} points drawn at random "
        "(repeat-and-select)"
    )
    kept = [item for item in statement["not_charged"] if not item.startswith(_HYPERPARAMETERS)]
    secret = (
        "the other runs, their number and their scores, in trials/, search.md, search.csv and "
        "search_secret.json: keep them as secret as the data"
    )
    one = {name: value for name, value in statement.items() if name != "membership"}  # of one run
    return {
        **one,
        "epsilon": spent,
        "epsilon_of_steps_done": spent,  # every run has executed its plan
        "epsilon_budget": facts["epsilon"],
        "epsilon_by_part": {run_part: spent for run_part in statement["epsilon_by_part"]},
        "epsilon_of_one_run": statement["epsilon"],
        "released": [*statement["released"], line],
        "not_charged": [*kept, secret],
        "search": {**facts, "charged": True},
    }
