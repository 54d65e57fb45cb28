"""Privacy accounting: epsilon and delta of events, and calibration of one quantity from the rest.

A thin layer over `dp_accounting`. It fixes one convention of the noise multiplier (`events`),
refuses impossible inputs by name, and finds parameters that provably fit the budget: whatever a
`calibrate_*` function returns was evaluated by the very accountant that was asked for.
Results are cached on disk (`cache`).
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Required, TypeAlias, TypedDict, Unpack

import dp_accounting as dpa
from dp_accounting import pld, rdp

from dpjax.dp.cache import cached
from dpjax.dp.events import (
    count,
    doubled,
    fixed_size,
    fraction,
    full_batch,
    map_leaves,
    num_sampled,
    poisson,
    positive,
    truncated_poisson,
    untruncated,
)
from dpjax.dp.search import falling_root, largest_integer

__all__ = [
    "ACCOUNTANTS", "RELATIONS", "BudgetArgs", "Events", "calibrate_batch_size", "calibrate_epochs",
    "calibrate_noise_multiplier", "calibrate_sampling_prob", "calibrate_steps", "check_budget",
    "delta", "epsilon", "fixed_size", "full_batch", "poisson", "truncated_poisson",
]  # fmt: skip

Events: TypeAlias = "dpa.DpEvent | Sequence[dpa.DpEvent]"

ACCOUNTANTS = ("pld", "rdp")
RELATIONS = {
    "add_or_remove_one": dpa.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": dpa.NeighboringRelation.REPLACE_ONE,
}
_ROUGH_ORDERS = (*range(2, 64), 128, 256, 512, 1024)  # integers: quick, and never warn
# dp_accounting's default orders, and some more for the without-replacement bound, whose numerics
# give out above order 110 or so: without them it certifies no epsilon below 0.1.
_ORDERS = (
    *(1 + x / 10 for x in range(1, 100)),
    *range(11, 64),
    *range(64, 120, 8),
    *_ROUGH_ORDERS[-4:],
)


class BudgetArgs(TypedDict, total=False):
    """The keywords of every `calibrate_*`; meanings and defaults as in `epsilon`."""

    epsilon: Required[float]
    delta: Required[float]
    accountant: str
    relation: str
    num_examples: int | None
    grid: float | None


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
      grid: PLD discretisation interval in nats; None picks one that costs about 1e-4 of epsilon
        (dp_accounting's own default is 1e-4). Every choice gives an upper bound.
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


def check_budget(epsilon: float, delta: float, num_examples: int | None = None) -> None:
    """Raises ValueError, naming field and value, for a budget that no mechanism can be held to."""
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon} must be > 0 and finite.")
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} must be in (0, 1).")
    if num_examples is not None and delta >= 1 / count("num_examples", num_examples):
        raise ValueError(
            f"delta={delta} must be < 1/num_examples = {1 / num_examples:.3g}: at 1/N, publishing "
            "one random example in full would count as private."
        )


def calibrate_noise_multiplier(
    make_event: Callable[[float], Events], *, tol: float = 1e-4, **budget: Unpack[BudgetArgs]
) -> float:
    """Smallest noise multiplier within the budget, up to a relative `tol`; never below it.

    Args:
      make_event: noise multiplier -> event(s), epsilon falling as it grows.
      tol: relative; the result r keeps the budget and r * (1 - tol) does not.
      **budget: epsilon, delta; accountant, relation, num_examples, grid as in `epsilon`.
    Raises:
      ValueError: impossible budget, or no noise reaches it.
    Example:
      >>> from dpjax.dp import accounting
      >>> sigma = accounting.calibrate_noise_multiplier(
      ...     lambda s: accounting.full_batch(s, 8), epsilon=1.0, delta=1e-5)
      >>> round(sigma, 2)
      10.55
    """
    limit, tol = _Budget.checked(**budget), positive("tol", tol)
    event_at = lambda x: _compose(make_event(math.exp(x)))  # noqa: E731
    solve = lambda: math.exp(_solve(event_at, limit, tol))  # noqa: E731
    return _calibrated("noise_multiplier", make_event, (0.7, 1.0, 31.4), limit, solve, tol)


def calibrate_sampling_prob(
    make_event: Callable[[float], Events], *, tol: float = 1e-4, **budget: Unpack[BudgetArgs]
) -> float:
    """Largest sampling probability within the budget (1.0 if that fits), up to a relative `tol`."""
    limit, tol = _Budget.checked(**budget), positive("tol", tol)
    event_at = lambda x: _compose(make_event(math.exp(-x)))  # noqa: E731
    solve = lambda: math.exp(-_solve(event_at, limit, tol, start=4.6, floor=0.0))  # noqa: E731
    return _calibrated("sampling_prob", make_event, (0.001, 0.1, 1.0), limit, solve, tol)


def calibrate_steps(
    make_event: Callable[[int], Events],
    *,
    maximum: int = 10_000_000,
    **budget: Unpack[BudgetArgs],
) -> int:
    """Largest number of steps in 1..maximum within the budget; `make_event` maps steps to event(s).

    Raises:
      ValueError: impossible budget, or not even 1 step fits.
    """
    limit, top = _Budget.checked(**budget), count("maximum", maximum)
    solve = lambda: _largest(lambda n: _compose(make_event(n)), limit, top)  # noqa: E731
    probes = sorted({1, min(2, top), min(7, top), top})
    return int(_calibrated("integer", make_event, probes, limit, solve, top))


def calibrate_batch_size(make_event: Callable[[int], Events], **budget: Unpack[BudgetArgs]) -> int:
    """Largest expected batch size in 1..num_examples within the budget; else as `calibrate_steps`.

    `make_event` decides what stays fixed as B grows: steps, or epochs (T = round(E N / B)). In the
    latter case rounding makes epsilon slightly uneven in B; the result still keeps the budget.
    """
    if budget.get("num_examples") is None:
        raise ValueError("num_examples=None must be given: it bounds the batch size.")
    return calibrate_steps(make_event, maximum=budget["num_examples"] or 0, **budget)


def calibrate_epochs(
    noise_multiplier: float, *, batch_size: int, **budget: Unpack[BudgetArgs]
) -> float:
    """Epochs E = T B / N of the longest Poisson-sampled run within the budget, with q = B / N.

    The budget needs num_examples, N. Raises as `calibrate_steps`, for a field out of range too.
    """
    total = count("num_examples", budget.get("num_examples") or 0)
    prob = fraction("batch_size / num_examples", count("batch_size", batch_size) / total)
    steps = calibrate_steps(lambda n: poisson(noise_multiplier, prob, n), **budget)
    return steps * batch_size / total


class _Budget(NamedTuple):
    """What is allowed, and how it is measured."""

    epsilon: float
    delta: float
    accountant: str = "pld"
    relation: str = "add_or_remove_one"
    grid: float | None = None

    @classmethod
    def checked(cls, num_examples: int | None = None, **kwargs: Any) -> _Budget:
        new = cls(**kwargs)
        check_budget(new.epsilon, new.delta, num_examples)
        _known("accountant", new.accountant, ACCOUNTANTS)
        _known("relation", new.relation, tuple(RELATIONS))
        grid = None if new.grid is None else positive("grid", new.grid)
        return new._replace(epsilon=float(new.epsilon), delta=float(new.delta), grid=grid)

    def spent(self, event: dpa.DpEvent, at_epsilon: float | None = None) -> float:
        """Epsilon of `event` at this delta (or its delta at `at_epsilon`), through the cache."""

        def compute() -> float:
            made = self._accounted(event)
            if at_epsilon is None:
                value = made.get_epsilon(self.delta)
            else:
                value = made.get_delta(at_epsilon)
            if math.isnan(value):
                raise ValueError(f"accountant={self.accountant!r} returned NaN for {event!r}.")
            return float(value)

        at = ("delta", at_epsilon) if at_epsilon is not None else ("epsilon", self.delta)
        return cached((*at, *self[2:], event), compute)

    def _accounted(self, event: dpa.DpEvent) -> dpa.PrivacyAccountant:
        relation = RELATIONS[self.relation]
        if self.accountant == "pld":
            made = pld.PLDAccountant(relation, self.grid or _grid(event, self.delta))
        else:
            made = rdp.RdpAccountant(_ORDERS, relation)
            event = map_leaves(event, doubled) if self.relation == "replace_one" else event
        try:
            return made.compose(event)
        except dpa.UnsupportedEventError as error:
            raise ValueError(
                f"accountant={self.accountant!r} with relation={self.relation!r} cannot account "
                f"for {event!r} (fixed_size needs 'rdp' with 'replace_one'; truncated_poisson "
                "needs 'pld'; poisson under 'replace_one' needs 'pld')."
            ) from error


def _compose(events: Events) -> dpa.DpEvent:
    if isinstance(events, dpa.DpEvent):
        return events
    for event in events:
        if not isinstance(event, dpa.DpEvent):
            raise TypeError(f"events must be DpEvents, got {type(event).__name__}: {event!r}.")
    return dpa.ComposedDpEvent(list(events))


def _rough(event: dpa.DpEvent, delta: float) -> float:
    """Quick RDP epsilon under a relation that RDP knows; inf if there is none. Not a bound."""
    event = map_leaves(event, untruncated)
    for relation in RELATIONS.values():
        made = rdp.RdpAccountant(_ROUGH_ORDERS, relation)
        if made.supports(event):
            return float(made.compose(event).get_epsilon(delta))
    return math.inf


def _grid(event: dpa.DpEvent, delta: float) -> float:
    """PLD interval h. Rounding T losses to a grid adds about T h^2 / 6 to their variance, which is
    kept near 1e-4 of (epsilon/4)^2; bounded above (1e-3, more for enormous epsilons) and below."""
    rough = _rough(event, delta)
    if not 0 < rough < math.inf:
        return 1e-4
    wanted = rough * math.sqrt(4e-5 / max(1, num_sampled(event)))
    return max(1e-5, min(wanted, 1e-3 * max(1.0, rough / 100)))


def _solve(
    event_at: Callable[[float], dpa.DpEvent],
    budget: _Budget,
    tol: float,
    *,
    start: float = 0.0,
    floor: float = -30.0,
) -> float:
    """Smallest x >= floor, up to tol, with event_at(x) within the budget; epsilon falls with x.

    A rough RDP search first: it keeps the accountant itself away from parameters at which it is
    slow, and leaves it three to five evaluations. Only the accountant itself decides.
    """

    def gap(spent: Callable[[dpa.DpEvent], float], x: float) -> float:
        value = spent(event_at(x))
        return math.log(value / budget.epsilon) if value > 0 else -math.inf

    rough = functools.partial(gap, lambda event: _rough(event, budget.delta))
    found = falling_root(rough, start, slope=-1.0, tol=0.01, floor=floor)
    start, slope = found or (start, -1.0)
    found = falling_root(functools.partial(gap, budget.spent), start, slope, tol=tol, floor=floor)
    flat = False
    if found and budget.accountant == "rdp" and found[0] > floor:
        # Far below its reach RDP stays on one value until the noise is absurd.
        flat = gap(budget.spent, found[0] - 1.4) < gap(budget.spent, found[0] - 0.7) + 5e-4
    if found is None or flat:
        raise ValueError(
            f"epsilon={budget.epsilon} at delta={budget.delta} is out of reach of "
            f"accountant={budget.accountant!r} here."
        )
    return found[0]


def _largest(event_at: Callable[[int], dpa.DpEvent], budget: _Budget, top: int) -> int:
    fits = lambda n: budget.spent(event_at(n)) <= budget.epsilon  # noqa: E731
    if not fits(1):
        raise ValueError(f"epsilon={budget.epsilon} at delta={budget.delta} does not allow even 1.")
    rounded = lambda x: max(1, min(top, round(math.exp(-x))))  # noqa: E731
    near = _solve(lambda x: event_at(rounded(x)), budget, 0.003, start=-4.6, floor=-math.log(top))
    return largest_integer(fits, guess=rounded(near), top=top)


def _calibrated(
    kind: str,
    make_event: Callable[[Any], Events],
    probes: Sequence[float],
    budget: _Budget,
    solve: Callable[[], float],
    extra: float,
) -> float:
    """solve() through the cache, where `make_event` is known by its events at the probes."""
    events = [_compose(make_event(p)) for p in probes]
    value = cached((kind, *budget, extra, events), solve)
    value = int(value) if kind == "integer" else value
    within = budget.spent(_compose(make_event(value))) <= budget.epsilon
    return value if within else solve()  # not within: another make_event, alike at the probes


def _known(field: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        nearest = difflib.get_close_matches(str(name), known, 1, 0.0)[0]
        raise ValueError(f"{field}={name!r} is unknown; did you mean {nearest!r}?")
