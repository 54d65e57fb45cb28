"""Privacy events of every sampler: what is handed to an accountant, and nothing else.

The convention of `noise_multiplier` (the same for every sampler and relation): the standard
deviation of the noise divided by the bound C on the norm of ONE example's contribution to the sum,
    std = noise_multiplier * C,        C = `ClippedSum.sensitivity` = `ClipRule.sensitivity(tree)`.
Under "add_or_remove_one" the sum then moves by at most C. Under "replace_one" it moves by up to 2C,
and the *accounting* knows about the 2; nobody else multiplies by it. dp_accounting does not treat
this evenly, so it is done here: its PLD accountant doubles by itself; its RDP accountant does not,
so Gaussian events are halved on the way in (`accounting.epsilon`); and its without-replacement
event measures noise in units of the sensitivity 2C, so `fixed_size` stores noise_multiplier / 2.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Callable, Collection

import dp_accounting as dpa

__all__ = [
    "AllocationDpEvent", "allocation", "count", "doubled", "fixed_size", "fraction",
    "full_batch", "known", "leaves", "map_leaves", "neighbors", "normal", "poisson", "positive",
    "truncated_poisson",
]  # fmt: skip


def poisson(noise_multiplier: float, sampling_prob: float, steps: int) -> dpa.DpEvent:
    """`steps` Gaussian sums over Poisson samples: each example joins each step independently.

    Args:
        noise_multiplier: noise standard deviation / C (see the module), > 0.
        sampling_prob: q = expected batch size / N, in (0, 1].
        steps: number of noised sums released, >= 1 (empty batches included).
    Raises:
        ValueError: a field is out of range.
    """
    gaussian = dpa.GaussianDpEvent(positive("noise_multiplier", noise_multiplier))
    sampled = dpa.PoissonSampledDpEvent(fraction("sampling_prob", sampling_prob), gaussian)
    return dpa.SelfComposedDpEvent(sampled, count("steps", steps))


def full_batch(noise_multiplier: float, steps: int) -> dpa.DpEvent:
    """`steps` Gaussian sums over all examples.

    Args:
        noise_multiplier: noise standard deviation / C (see the module), > 0.
        steps: number of noised sums released, >= 1.
    Raises:
        ValueError: a field is out of range.
    """
    gaussian = dpa.GaussianDpEvent(positive("noise_multiplier", noise_multiplier))
    return dpa.SelfComposedDpEvent(gaussian, count("steps", steps))


def fixed_size(
    noise_multiplier: float, sample_size: int, num_examples: int, steps: int
) -> dpa.DpEvent:
    """`steps` Gaussian sums, each over `sample_size` distinct examples, drawn uniformly.

    Only for accountant="rdp", relation="replace_one" (Wang, Balle, Kasiviswanathan, 1808.00087,
    theorem 27). Adding or removing an example changes every batch's law, which no accountant here
    covers. The noise to add is noise_multiplier * C, as always; the stored event is expressed in
    units of the sensitivity under replacement, 2C, and so carries noise_multiplier / 2.
    dp_accounting evaluates that bound reliably up to order 110 or so, which leaves epsilons below
    0.06 or so (at delta = 1e-5) out of reach.

    Args:
        noise_multiplier: noise standard deviation / C (see the module), > 0.
        sample_size: B, the size of every batch.
        num_examples: N.
        steps: number of noised sums released, >= 1.
    Raises:
        ValueError: a field is out of range, or sample_size > num_examples.
    """
    size, total = count("sample_size", sample_size), count("num_examples", num_examples)
    if size > total:
        raise ValueError(f"sample_size={size} must be <= num_examples={total}.")
    gaussian = dpa.GaussianDpEvent(positive("noise_multiplier", noise_multiplier) / 2)
    sampled = dpa.SampledWithoutReplacementDpEvent(total, size, gaussian)
    return dpa.SelfComposedDpEvent(sampled, count("steps", steps))


def truncated_poisson(
    noise_multiplier: float,
    sampling_prob: float,
    max_batch_size: int,
    num_examples: int,
    steps: int,
) -> dpa.DpEvent:
    """As `poisson`, but a sample above `max_batch_size` is cut to a random subset (2508.15089).

    Only for accountant="pld". A newcomer may displace another example, so truncation well above
    the expected size costs more than `poisson`; far below it, fewer are sampled, and it costs less.
    dp_accounting's `dataset_size` is that of the larger of the two neighbors. The larger one has
    N + 1 examples where one is added and N where one is removed; either may be the more expensive,
    so the event holds N + 1 and `accounting.epsilon` takes the maximum (`neighbors`).

    Args:
        noise_multiplier: noise standard deviation / C (see the module), > 0.
        sampling_prob: q in (0, 1], before truncation.
        max_batch_size: where a sample is cut.
        num_examples: N.
        steps: number of noised sums released, >= 1 (empty batches included).
    Raises:
        ValueError: a field is out of range.
    """
    event = dpa.TruncatedSubsampledGaussianDpEvent(
        dataset_size=count("num_examples", num_examples) + 1,
        sampling_probability=fraction("sampling_prob", sampling_prob),
        truncated_batch_size=count("max_batch_size", max_batch_size),
        noise_multiplier=positive("noise_multiplier", noise_multiplier),
    )
    return dpa.SelfComposedDpEvent(event, count("steps", steps))


@dataclasses.dataclass(frozen=True)
class AllocationDpEvent(dpa.DpEvent):
    """The Gaussian sums of one epoch, or of its first steps, each example in one random step.

    Attributes:
        noise_multiplier: noise standard deviation / C.
        steps_per_epoch: t >= 2.
        steps: how many of them are taken, in 1 .. t.
    """

    noise_multiplier: float
    steps_per_epoch: int
    steps: int

    def __post_init__(self) -> None:
        positive("noise_multiplier", self.noise_multiplier)
        count("steps_per_epoch", self.steps_per_epoch)
        if count("steps", self.steps) > self.steps_per_epoch:
            raise ValueError(
                f"steps={self.steps} must be <= steps_per_epoch={self.steps_per_epoch}."
            )


def allocation(noise_multiplier: float, steps_per_epoch: int, steps: int) -> dpa.DpEvent:
    """`steps` Gaussian sums; in each epoch, an example is in one step, which is drawn uniformly.

    Only for accountant="pld", relation="add_or_remove_one". The module `allocation` has the law and
    the derivation of the bound (2412.16802, 2502.08202).

    Args:
        noise_multiplier: noise standard deviation / C (see the module), > 0.
        steps_per_epoch: t; the expected batch size is N / t. At t = 1 all batches are full.
        steps: number of noised sums released, >= 1. They begin an epoch and may end inside one.
    Raises:
        ValueError: a field is out of range.
    """
    sigma = positive("noise_multiplier", noise_multiplier)
    t = count("steps_per_epoch", steps_per_epoch)
    if t == 1:
        return full_batch(sigma, steps)
    epochs, rest = divmod(count("steps", steps), t)
    parts: list[dpa.DpEvent] = []
    if epochs:
        parts.append(dpa.SelfComposedDpEvent(AllocationDpEvent(sigma, t, t), epochs))
    if rest:
        parts.append(AllocationDpEvent(sigma, t, rest))
    return parts[0] if len(parts) == 1 else dpa.ComposedDpEvent(parts)


def map_leaves(event: dpa.DpEvent, leaf: Callable[[dpa.DpEvent], dpa.DpEvent]) -> dpa.DpEvent:
    """Applies `leaf` below compositions and repetitions, not below sampling."""
    if isinstance(event, dpa.ComposedDpEvent):
        return dpa.ComposedDpEvent([map_leaves(e, leaf) for e in event.events])
    if isinstance(event, dpa.SelfComposedDpEvent):
        return dpa.SelfComposedDpEvent(map_leaves(event.event, leaf), event.count)
    if isinstance(event, dpa.dp_event.RepeatAndSelectDpEvent):
        inner = map_leaves(event.event, leaf)
        return dpa.dp_event.RepeatAndSelectDpEvent(inner, event.mean, event.shape)
    return leaf(event)


def neighbors(event: dpa.DpEvent) -> tuple[dpa.DpEvent, ...]:
    """Returns the events of adding and of removing an example, the worse of which is `event`.

    They differ for truncated sampling only, whose law depends on the number of examples.
    """
    truncated = []

    def smaller(leaf: dpa.DpEvent) -> dpa.DpEvent:
        if not isinstance(leaf, dpa.TruncatedSubsampledGaussianDpEvent):
            return leaf
        truncated.append(leaf)
        return dpa.TruncatedSubsampledGaussianDpEvent(
            leaf.dataset_size - 1,
            leaf.sampling_probability,
            leaf.truncated_batch_size,
            leaf.noise_multiplier,
        )

    removed = map_leaves(event, smaller)
    return (event, removed) if truncated else (event,)


def doubled(event: dpa.DpEvent) -> dpa.DpEvent:
    """Noise in units of 2C, where the RDP accountant would forget it under replace-one."""
    if isinstance(event, dpa.GaussianDpEvent | dpa.LaplaceDpEvent):
        return type(event)(event.noise_multiplier / 2)
    return event


def leaves(event: dpa.DpEvent) -> dict[dpa.DpEvent, int]:
    """Returns the events in a composition, and how often each occurs.

    Raises:
        ValueError: one occurs less than 0 times, or a number of times that is not whole.
    """
    counts: dict[dpa.DpEvent, int] = {}

    def add(event: dpa.DpEvent, count: int) -> None:
        if isinstance(event, dpa.ComposedDpEvent):
            for inner in event.events:
                add(inner, count)
        elif isinstance(event, dpa.SelfComposedDpEvent):
            if not isinstance(event.count, numbers.Integral) or event.count < 0:
                raise ValueError(f"count={event.count} must be an integer >= 0 in {event!r}.")
            add(event.event, count * int(event.count))
        elif not isinstance(event, dpa.NoOpDpEvent) and count:
            counts[event] = counts.get(event, 0) + count

    add(event, 1)
    return counts


def normal(event: dpa.DpEvent) -> dpa.DpEvent:
    """Returns a composition with equal events counted together; the order does not matter."""
    try:
        repeated = [dpa.SelfComposedDpEvent(leaf, n) for leaf, n in leaves(event).items()]
    except TypeError:  # an event that cannot be hashed
        return event
    ordered = sorted(repeated, key=repr)
    return ordered[0] if len(ordered) == 1 else dpa.ComposedDpEvent(ordered)


def positive(field: str, value: float) -> float:
    """Returns a positive finite number as float, else a ValueError that names the field."""
    if not 0 < value < math.inf:
        raise ValueError(f"{field}={value} must be > 0 and finite.")
    return float(value)


def fraction(field: str, value: float) -> float:
    """Returns a number in (0, 1] as float, else a ValueError that names the field."""
    if not 0 < value <= 1:
        raise ValueError(f"{field}={value} must be in (0, 1].")
    return float(value)


def count(field: str, value: int) -> int:
    """Returns an integer >= 1 as int, else a ValueError that names the field."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < 1:
        raise ValueError(f"{field}={value} must be an integer >= 1.")
    return int(value)


def known(field: str, name: str, names: Collection[str]) -> str:
    """Returns a name that is known, else a ValueError that names the field and the nearest one."""
    if name not in names:
        nearest = difflib.get_close_matches(str(name), names, 1, 0.0)[0]
        raise ValueError(f"{field}={name!r} is unknown; did you mean {nearest!r}?")
    return name
