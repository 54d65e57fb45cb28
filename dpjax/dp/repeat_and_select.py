"""What choosing the best of several private runs costs: repeat-and-select (arXiv 2110.03620).

The number of runs is drawn at random, each run takes a point drawn at random, and only the best run
is released: not the others, not their scores, not their number. The cost then grows slowly with the
mean number of runs. It holds for runs of one mechanism that are independent of one another, and for
a score that reads no private data besides the run itself.
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

__all__ = ["charged", "draw", "epsilon", "epsilon_of_one", "mechanisms", "not_charged"]

_GEOMETRIC = 1.0  # shape of the number of runs, in dp_accounting's terms
_ORDERS = (*range(2, 64), *range(64, 257, 8), 512)  # integers are quick; any give an upper bound
_MARGIN = 2e-3  # relative; a run is calibrated to about 1e-4 of its epsilon
_UNKNOWN = "the choice of hyperparameters"  # how a run's own statement begins the line


def epsilon(run: Sequence[Mechanism], delta: float, *, mean: float) -> float:
    """Returns epsilon (nats) of releasing the best of a geometric number of runs, an upper bound.

    Args:
        run: the mechanisms that one run composes.
        delta: of the result.
        mean: of the number of runs, > 1.

    Raises:
        ValueError: `mean` is out of range, or a sampler has no account here.
    """
    if not 1 < mean < math.inf:
        raise ValueError(f"mean={mean} must be > 1 and finite.")
    composed = dpa.ComposedDpEvent([m.event() for m in run])
    event = RepeatAndSelectDpEvent(composed, mean, _GEOMETRIC)
    accountant = rdp.RdpAccountant(_ORDERS, dpa.NeighboringRelation.ADD_OR_REMOVE_ONE)
    if run[0].relation != "add_or_remove_one" or not accountant.supports(event):
        raise ValueError(
            f"dp.sampler={run[0].sampler!r} cannot be charged in a search: only 'poisson' and "
            "'full_batch' can."
        )
    return float(accountant.compose(event).get_epsilon(delta))


def epsilon_of_one(run: Sequence[Mechanism], *, budget: float, delta: float, mean: float) -> float:
    """Returns the epsilon that a single run may have, so that the whole search keeps the budget.

    Args:
        run: the mechanisms of one run; their noise is scaled together.
        budget: epsilon of the search.
        delta: of the search, and of a run.
        mean: of the number of runs, > 1.

    Raises:
        ValueError: as for `epsilon`, or no noise reaches the budget.
    """

    def scaled(log_factor: float) -> list[Mechanism]:
        factor = math.exp(log_factor)
        # A count's noise is no part of the event, and may be too small for a scaled one.
        return [
            dataclasses.replace(m, noise_multiplier=factor * m.noise_multiplier, count_noise=None)
            for m in run
        ]

    found = accounting.falling_root(
        lambda x: math.log(epsilon(scaled(x), delta, mean=mean) / budget),
        -0.1, 1.0, tol=1e-4, limit=5.0,
    )  # fmt: skip
    if found is None:
        raise ValueError(f"epsilon={budget} is out of reach of a search of {mean:g} runs.")
    events = [m.event() for m in scaled(found)]
    return accounting.epsilon(events, delta, accountant=run[0].accountant) * (1 - _MARGIN)


def draw(points: int, mean: float, *, generator: np.random.Generator) -> list[int]:
    """Draws how many runs there are, and the point of each, independently and uniformly.

    Args:
        points: to choose from.
        mean: of the number of runs, which is geometric and at least 1.
        generator: seeded from the system's entropy in a search that is released.
    """
    number = int(generator.geometric(1 / mean))
    return [int(index) for index in generator.integers(points, size=number)]


def mechanisms(statement: dict[str, Any]) -> tuple[Mechanism, ...]:
    """Returns the mechanisms of a run, as planned, from its `privacy.json`.

    Raises:
        ValueError: the run splits its data into parts, which a charged search does not support.
    """
    phases = statement["phases"]
    if len({phase["part"] for phase in phases}) > 1:
        raise ValueError("dp.temperature.share must be 0 in a search that is charged.")
    names = {f.name for f in dataclasses.fields(Mechanism)} - {"steps"}
    return tuple(
        Mechanism(
            steps=phase["steps_planned"], **{name: phase[name] for name in names if name in phase}
        )
        for phase in phases
    )


def not_charged(statement: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Returns the chosen run's statement, saying that the search is not in it.

    Args:
        statement: `privacy.json` of the run.
        facts: of the search: `method`, `points`, `runs`, `metric`.
    """
    line = (
        f"the choice of this run, by its {facts['metric']}, among {facts['runs']} runs of "
        f"{facts['points']} points ({facts['method']} search)"
    )
    kept = [item for item in statement["not_charged"] if not item.startswith(_UNKNOWN)]
    return {**statement, "not_charged": [line, *kept], "search": {**facts, "charged": False}}


def charged(
    statement: dict[str, Any], others: Sequence[dict[str, Any]], facts: dict[str, Any]
) -> dict[str, Any]:
    """Returns the chosen run's statement with the search's cost in it.

    Args:
        statement: `privacy.json` of the run.
        others: those of all runs.
        facts: of the search: `method`, `points`, `mean`, `metric`, and `epsilon`, the budget.

    Raises:
        ValueError: the runs were not of one mechanism, or the search cost more than its budget.
    """
    run = mechanisms(statement)
    if any(mechanisms(other) != run for other in others):
        raise ValueError("the runs differ in sampler, steps or noise: they cannot be charged.")
    spent = epsilon(run, statement["delta"], mean=facts["mean"])
    if spent > facts["epsilon"] * (1 + 1e-9):
        raise ValueError(f"the search cost epsilon={spent:.6g}, over its {facts['epsilon']:.6g}.")
    line = (
        f"the choice of this run, by its {facts['metric']}, among a geometric number of runs, "
        f"{facts['mean']:g} in the mean, of {facts['points']} points drawn at random "
        "(repeat-and-select, arXiv 2110.03620)"
    )
    kept = [item for item in statement["not_charged"] if not item.startswith(_UNKNOWN)]
    secret = (
        "the other runs, their number and their scores, in trials/, search.md, search.csv and "
        "search_secret.json: they must be kept as secret as the data"
    )
    return {
        **statement,
        "epsilon": spent,
        "epsilon_budget": facts["epsilon"],
        "epsilon_by_part": {run_part: spent for run_part in statement["epsilon_by_part"]},
        "epsilon_of_one_run": statement["epsilon"],
        "accountant": "rdp",
        "released": [*statement["released"], line],
        "not_charged": [*kept, secret],
        "search": {**facts, "charged": True},
    }
