"""The privacy cost of choosing the best of several private runs (arXiv 2110.03620).

The number of runs is random, each run trains a random point, and only the best run is released: not
the others, not their scores, not their number. The cost then grows slowly with the mean number of
runs. The runs must be independent of one another and of the same mechanism, and the score must read
no private data except through the run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import dp_accounting as dpa
import numpy as np
from dp_accounting import rdp
from dp_accounting.dp_event import RepeatAndSelectDpEvent

from dpjax.dp import accounting
from dpjax.dp.mechanism import Mechanism
from dpjax.dp.sampling import FullBatch, Poisson, Sampler

__all__ = ["charged", "draw", "epsilon", "epsilon_of_one", "mechanisms", "not_charged"]

_GEOMETRIC = 1.0  # dp_accounting's shape parameter: the number of runs is geometric
_ORDERS = (*range(2, 64), *range(64, 257, 8), 512)  # integer orders are fast; any set is valid
# Relative. A run's noise is calibrated to its epsilon only to about 1e-4, and the error must not
# carry the search over its budget.
_MARGIN = 2e-3
# The samplers that a charged search accepts, by the title that a statement gives them.
_SAMPLERS: dict[str, Any] = {kind.title: kind for kind in (Poisson, FullBatch)}
# Start of the line in a run's own statement that the search replaces.
_HYPERPARAMETERS = "the choice of hyperparameters"


def epsilon(run: Sequence[Mechanism], delta: float, *, mean: float) -> float:
    """Returns an upper bound on epsilon (nats) of releasing the best of a geometric number of runs.

    Args:
        run: the mechanisms that one run composes.
        delta: delta of the result.
        mean: mean number of runs, > 1.

    Raises:
        ValueError: `mean` is out of range, or the sampler cannot be charged here.
    """
    if not 1 < mean < math.inf:
        raise ValueError(f"mean={mean} must be > 1 and finite.")
    for mechanism in run:
        _check_title(mechanism.sampler.title)
    composed = dpa.ComposedDpEvent([m.event() for m in run])
    event = RepeatAndSelectDpEvent(composed, mean, _GEOMETRIC)
    accountant = rdp.RdpAccountant(_ORDERS, dpa.NeighboringRelation.ADD_OR_REMOVE_ONE)
    return float(accountant.compose(event).get_epsilon(delta))


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

    root = accounting.falling_root(
        lambda x: math.log(epsilon(scaled(x), delta, mean=mean) / budget),
        -0.1, 1.0, tol=1e-4, limit=5.0,
    )  # fmt: skip
    if root is None:
        raise ValueError(
            f"epsilon={budget} cannot be met by a search of {mean:g} runs on average: lower the "
            "mean or raise the budget."
        )
    events = [m.event() for m in scaled(root)]
    return accounting.epsilon(events, delta, accountant=run[0].accountant) * (1 - _MARGIN)


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
        ValueError: the run divides its data into parts, or draws neither Poisson nor full batches,
            which a charged search does not support.
    """
    phases = statement["phases"]
    if any(phase.get("secure_size") for phase in phases):
        raise ValueError("dp.noise must be 'gaussian' in a charged search.")
    if len({phase["part"] for phase in phases}) > 1:
        raise ValueError("dp.temperature.share must be 0 in a charged search.")

    def sampler(phase: dict[str, Any]) -> Sampler:
        kind = _SAMPLERS[_check_title(phase["sampler"])]
        fields = {field.name: phase[field.name] for field in dataclasses.fields(kind)}
        made: Sampler = kind(**fields)
        return made

    return tuple(
        Mechanism(
            sampler=sampler(phase),
            steps=phase["steps_planned"],
            noise_multiplier=phase["noise_multiplier"],
            count_noise=phase["count_noise"],
        )
        for phase in phases
    )


def _check_title(title: str) -> str:
    if title not in _SAMPLERS:
        raise ValueError(
            f"dp.sampler draws {title!r}, which cannot be charged in a search: use 'poisson' or "
            "'full_batch'."
        )
    return title


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
        "(repeat-and-select, arXiv 2110.03620)"
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
        "accountant": "rdp",
        "released": [*statement["released"], line],
        "not_charged": [*kept, secret],
        "search": {**facts, "charged": True},
    }
