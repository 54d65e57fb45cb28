"""Privacy accounting: epsilon and delta of events, and the noise that keeps a budget.

Events are dp_accounting's, with one convention of the noise multiplier (`events`). "pld" composes
privacy losses: ours for Gaussian sums (`losses`, `allocation`, `composition`), which stay upper
bounds down to delta = 1e-300, and dp_accounting's for anything else. "rdp" is dp_accounting's.
Impossible inputs are refused by name. The noise that `calibrate_noise_multiplier` returns was
evaluated by the very accountant that was asked for. Results are cached on disk (`cache`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import dp_accounting as dpa
from dp_accounting import pld, rdp
from scipy import optimize

from dpjax.dp.accounting.cache import cached
from dpjax.dp.accounting.events import (
    allocation,
    count,
    doubled,
    fixed_size,
    full_batch,
    known,
    leaves,
    map_leaves,
    neighbors,
    normal,
    poisson,
    positive,
    truncated_poisson,
)
from dpjax.dp.accounting.releases import losses_of

__all__ = [
    "ACCOUNTANTS", "RELATIONS", "Events", "allocation", "calibrate_noise_multiplier",
    "check_budget", "check_supported", "delta", "epsilon", "falling_root", "fixed_size",
    "full_batch", "lower_epsilon", "poisson", "truncated_poisson",
]  # fmt: skip

Events: TypeAlias = "dpa.DpEvent | Sequence[dpa.DpEvent]"

ACCOUNTANTS = ("pld", "rdp")
RELATIONS = {
    "add_or_remove_one": dpa.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": dpa.NeighboringRelation.REPLACE_ONE,
}
_MOST_EPSILON = 1e6  # e^-epsilon is no number long before
_FFT_ROUNDING = 1e-13  # of delta, for each event that dp_accounting composes
_ROUGH_ORDERS = (*range(2, 64), 128, 256, 512, 1024)  # integers: quick, and never warn
# dp_accounting's default orders, and some more for the without-replacement bound, whose numerics
# give out above order 110 or so: without them it certifies no epsilon below 0.1.
_ORDERS = (
    *(1 + x / 10 for x in range(1, 100)),
    *range(11, 64),
    *range(64, 120, 8),
    *_ROUGH_ORDERS[-4:],
)


def epsilon(
    events: Events,
    delta: float,
    *,
    accountant: str = "pld",
    relation: str = "add_or_remove_one",
    num_examples: int | None = None,
    grid: float | None = None,
) -> float:
    """Epsilon of the (adaptive) composition of `events` at `delta`, an upper bound; cached on disk.

    Args:
        events: one event, or the sequence of what was released.
        delta: in (0, 1), and below 1 / num_examples where that is given.
        accountant: "pld" (tight) or "rdp" (looser; the cross-check).
        relation: "add_or_remove_one" or "replace_one".
        num_examples: N, if known.
        grid: PLD discretization interval in nats; None picks one that costs about 2e-5 of epsilon,
            or 3e-4 with random allocation. Every choice gives an upper bound.
    Returns:
        Epsilon in nats; inf if an event is not private, 0.0 for no events.
    Raises:
        ValueError: a field is out of range, the accountant cannot handle an event, or returned NaN.
    """
    budget = _Budget.checked(
        epsilon=1.0, delta=delta, accountant=accountant, relation=relation,
        num_examples=num_examples, grid=grid,
    )  # fmt: skip
    return budget.spent(_compose(events))


def lower_epsilon(events: Events, delta: float, *, relation: str = "add_or_remove_one") -> float:
    """Returns a lower bound on epsilon of a composition at `delta`, in nats; not cached.

    With `epsilon` it brackets the cost of the dominating pairs, which full-batch, Poisson and
    allocated sums attain. It is tight for up to hundreds of releases, or of epochs.

    Raises:
        ValueError: a field is out of range, or an event is not one of `accounting`'s own.
    """
    budget = _Budget.checked(epsilon=1.0, delta=delta, relation=relation)
    event = normal(_compose(events))
    found = [losses_of(e, relation) for e in neighbors(event)]
    bounds = [losses.lower_epsilon(budget.delta) for losses in found if losses is not None]
    if len(bounds) < len(found):
        raise ValueError(f"no lower bound is known for {event!r} with relation={relation!r}.")
    return max(bounds)


def delta(
    events: Events,
    epsilon: float,
    *,
    accountant: str = "pld",
    relation: str = "add_or_remove_one",
    grid: float | None = None,
) -> float:
    """Delta of the composition of `events` at `epsilon` >= 0; 1.0 if an event is not private."""
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon} must be >= 0 and finite.")
    budget = _Budget.checked(
        epsilon=1.0, delta=1e-5, accountant=accountant, relation=relation, grid=grid
    )
    return budget.spent(_compose(events), at_epsilon=float(epsilon))


def check_supported(events: Events, accountant: str, relation: str) -> None:
    """Raises ValueError, naming all three, where an accountant does not know an event."""
    known("accountant", accountant, ACCOUNTANTS)
    neighboring = RELATIONS[known("relation", relation, RELATIONS)]
    event = _compose(events)
    if accountant == "pld":
        supported = losses_of(event, relation) is not None
        supported = supported or pld.PLDAccountant(neighboring).supports(event)
    else:
        supported = rdp.RdpAccountant(neighboring_relation=neighboring).supports(event)
    if not supported:
        raise ValueError(
            f"accountant={accountant!r} with relation={relation!r} cannot account for {event!r} "
            "(fixed_size needs 'rdp' with 'replace_one'; truncated_poisson and allocation need "
            "'pld'; poisson under 'replace_one' needs 'pld'; allocation is about adding or "
            "removing an example)."
        )


def check_budget(epsilon: float, delta: float, num_examples: int | None = None) -> None:
    """Raises ValueError, naming field and value, for a budget that no mechanism can be held to."""
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon} must be > 0 and finite.")
    if epsilon > _MOST_EPSILON:
        raise ValueError(f"epsilon={epsilon:g} must be <= {_MOST_EPSILON:g}: more is no privacy.")
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} must be in (0, 1).")
    if num_examples is not None and delta >= 1 / count("num_examples", num_examples):
        raise ValueError(
            f"delta={delta} must be < 1/num_examples = {1 / num_examples:.3g}: at 1/N, publishing "
            "one random example in full would count as private."
        )


def calibrate_noise_multiplier(
    make_event: Callable[[float], Events],
    *,
    epsilon: float,
    delta: float,
    accountant: str = "pld",
    relation: str = "add_or_remove_one",
    num_examples: int | None = None,
    grid: float | None = None,
    tol: float = 1e-4,
) -> float:
    """Returns the smallest noise multiplier within the budget, up to a relative `tol`.

    Args:
        make_event: maps a noise multiplier to event(s) whose epsilon falls as it grows.
        epsilon: budget in nats, > 0.
        delta: in (0, 1), and below 1 / num_examples where that is given.
        accountant: as in `epsilon`.
        relation: as in `epsilon`.
        num_examples: N, if known.
        grid: as in `epsilon`.
        tol: relative width of the search.

    Returns:
        r > 0, cached on disk.

    Guarantees:
        By the accountant that was asked for, r keeps the budget and r * (1 - tol) does not.

    Raises:
        ValueError: impossible budget, or no noise reaches it.

    >>> from dpjax.dp import accounting
    >>> sigma = accounting.calibrate_noise_multiplier(
    ...     lambda s: accounting.full_batch(s, 8), epsilon=1.0, delta=1e-5)
    >>> round(sigma, 2)
    10.55
    """
    budget = _Budget.checked(
        epsilon=epsilon, delta=delta, accountant=accountant, relation=relation,
        num_examples=num_examples, grid=grid,
    )  # fmt: skip
    tol = positive("tol", tol)
    budget = budget._replace(coarser=max(1.0, tol / 1e-3))

    def event_at(sigma: float) -> dpa.DpEvent:
        return _compose(make_event(sigma))

    def solve() -> float:
        return _solve(event_at, budget, tol)

    # The function itself cannot be a key: it is known by its events at three points.
    probes = [event_at(sigma) for sigma in (0.7, 1.0, 31.4)]
    sigma = cached(("noise_multiplier", *budget, tol, probes), solve)
    within = budget.spent(event_at(sigma)) <= budget.epsilon
    return sigma if within else solve()  # not within: another function with the same three events


def falling_root(
    gap: Callable[[float], float], low: float, high: float, *, tol: float, limit: float = 30.0
) -> float | None:
    """Returns where a falling function crosses zero, from the side on which it is negative.

    Args:
        gap: falling, finite and slow; the straighter it is, the fewer evaluations.
        low: guess of a point below the root.
        high: guess of a point above it.
        tol: width of the bracket.
        limit: neither side is searched beyond it.

    Returns:
        x with gap(x) <= 0 < gap(x - tol); -limit where even gap(-limit) <= 0, and None where
        gap(limit) > 0.
    """
    gap, width = functools.cache(gap), high - low
    while gap(high) > 0:
        if high >= limit:
            return None
        low, high, width = high, min(high + width, limit), 2 * width
    while gap(low) <= 0:
        if low <= -limit:
            return low
        low, high, width = max(low - width, -limit), low, 2 * width
    # The root is within 0.45 tol of what brentq returns, on either side.
    x = float(optimize.brentq(gap, low, high, xtol=0.45 * tol)) + 0.5 * tol
    while gap(x) > 0:  # where rounding makes the function uneven
        x += 0.5 * tol
    return x


class _Budget(NamedTuple):
    """What is allowed, and how it is measured."""

    epsilon: float
    delta: float
    accountant: str = "pld"
    relation: str = "add_or_remove_one"
    grid: float | None = None
    coarser: float = 1.0  # factor on the error that a grid may cost

    @classmethod
    def checked(cls, num_examples: int | None = None, **kwargs: Any) -> _Budget:
        new = cls(**kwargs)
        check_budget(new.epsilon, new.delta, num_examples)
        known("accountant", new.accountant, ACCOUNTANTS)
        known("relation", new.relation, RELATIONS)
        grid = None if new.grid is None else positive("grid", new.grid)
        return new._replace(epsilon=float(new.epsilon), delta=float(new.delta), grid=grid)

    def spent(self, event: dpa.DpEvent, at_epsilon: float | None = None) -> float:
        """Epsilon of `event` at this delta (or its delta at `at_epsilon`), through the cache."""
        event = normal(event)

        def compute() -> float:
            check_supported(event, self.accountant, self.relation)
            value = max(self._computed(e, at_epsilon) for e in neighbors(event))
            if math.isnan(value):
                raise ValueError(f"accountant={self.accountant!r} returned NaN for {event!r}.")
            return float(value)

        at = ("delta", at_epsilon) if at_epsilon is not None else ("epsilon", self.delta)
        return cached((*at, *self[2:], event), compute)

    def _computed(self, event: dpa.DpEvent, at_epsilon: float | None) -> float:
        if self.accountant == "rdp":
            if self.relation == "replace_one":
                event = map_leaves(event, doubled)
            made = rdp.RdpAccountant(_ORDERS, RELATIONS[self.relation]).compose(event)
            return float(
                made.get_epsilon(self.delta) if at_epsilon is None else made.get_delta(at_epsilon)
            )
        composed = losses_of(event, self.relation)
        if composed is None:
            return self._by_dp_accounting(event, at_epsilon)
        if at_epsilon is None:
            return composed.epsilon(self.delta, self.grid, self.coarser)
        return composed.delta(at_epsilon, self.grid)

    def _by_dp_accounting(self, event: dpa.DpEvent, at_epsilon: float | None) -> float:
        """For events whose losses are not ours, such as Laplace noise, with its rounding added."""
        made = pld.PLDAccountant(RELATIONS[self.relation], self.grid or 1e-4).compose(event)
        rounding = _FFT_ROUNDING * sum(leaves(event).values())
        if at_epsilon is not None:
            return float(min(1.0, made.get_delta(at_epsilon) + rounding))
        if self.delta < 10 * rounding:
            raise ValueError(
                f"delta={self.delta} must be >= {10 * rounding:.2g} for {event!r}: below, rounding "
                "in dp_accounting's Fourier transforms would decide. Use accountant='rdp'."
            )
        return float(made.get_epsilon(self.delta - rounding))

    def rough(self, event: dpa.DpEvent) -> float:
        """Quick guess of epsilon; inf if there is none."""
        composed = losses_of(event, self.relation) if self.accountant == "pld" else None
        if composed is not None:
            return composed.epsilon(self.delta, coarser=20.0 * self.coarser)
        for relation in RELATIONS.values():
            made = rdp.RdpAccountant(_ROUGH_ORDERS, relation)
            if made.supports(event):
                return float(made.compose(event).get_epsilon(self.delta))
        return math.inf


def _compose(events: Events) -> dpa.DpEvent:
    if isinstance(events, dpa.DpEvent):
        return events
    for event in events:
        if not isinstance(event, dpa.DpEvent):
            raise TypeError(f"events must be DpEvents, got {type(event).__name__}: {event!r}.")
    return dpa.ComposedDpEvent(list(events))


def _solve(event_at: Callable[[float], dpa.DpEvent], budget: _Budget, tol: float) -> float:
    """Searches over logarithms, where epsilon is an almost straight function of sigma.

    A quick search comes first: it keeps the accountant itself away from noise so small that it is
    slow, and leaves it a few evaluations (`dp_accounting.calibrate_dp_mechanism` takes eight to
    fifteen). Only the accountant itself decides.
    """

    def gap(spent: Callable[[dpa.DpEvent], float], log_sigma: float) -> float:
        ratio = spent(event_at(math.exp(log_sigma))) / budget.epsilon
        return max(-50.0, min(50.0, math.log(ratio))) if ratio > 0 else -50.0

    exact = functools.partial(gap, budget.spent)
    near = falling_root(functools.partial(gap, budget.rough), -1.0, 1.0, tol=0.001) or 0.0
    # By Renyi divergence the guess is high by up to 0.15; on a coarse grid, by 0.002.
    low = near - (0.15 if budget.accountant == "rdp" else 0.002)
    root = falling_root(exact, low, near, tol=tol)
    flat = False
    if root is not None and budget.accountant == "rdp" and root > -30.0:
        # Far below its reach RDP stays on one value until the noise is absurd.
        flat = exact(root - 1.4) < exact(root - 0.7) + 5e-4
    if root is None or flat:
        raise ValueError(
            f"epsilon={budget.epsilon} at delta={budget.delta} is out of reach of "
            f"accountant={budget.accountant!r} here."
        )
    return math.exp(root)
