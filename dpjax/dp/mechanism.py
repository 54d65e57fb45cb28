"""The frozen object from which sampler, noise and accounting are all derived.

What is accounted is what ran, because there is one source for both: a training loop takes its
batches from `Mechanism.indices`, its noise from `Mechanism.transform` and its epsilon from
`Mechanism.event`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
import optax
from dp_accounting import DpEvent

from dpjax.dp import accounting, sampling
from dpjax.dp.adaptive import gradient_noise_multiplier
from dpjax.dp.noise import gaussian

__all__ = ["SAMPLERS", "Mechanism", "calibrated", "calibrated_phases", "num_steps"]

SAMPLERS = ("poisson", "full_batch", "fixed_size", "truncated_poisson")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
    """A subsampled Gaussian mechanism, run for a number of steps. Every field is public.

    Attributes:
        num_examples: N, the number of examples, taken as a public constant.
        sampling_prob: q in (0, 1], the probability that an example is in a batch.
        steps: T >= 1, the number of noise draws that are paid for.
        noise_multiplier: sigma > 0 of the whole release of a step, which is what is accounted:
            standard deviation of the noise on the sum over the clip bound (the sum's sensitivity
            to adding or removing one example). Under "replace_one" the sum moves by up to twice
            that; `event()` says so to the accountant.
        sampler: "poisson", "full_batch" (q = 1), "fixed_size" (without replacement) or
            "truncated_poisson". A batch that is merely shuffled cannot be expressed.
        max_batch_size: the cut of "truncated_poisson"; None for every other sampler.
        count_noise: standard deviation of the noise on the count that an adaptive bound asks for
            in every step, in examples; None where there is none. Gradient and count together have
            `noise_multiplier`, so the gradient gets more noise; see `adaptive`.

    Guarantees:
        `event()` describes exactly the batches that `indices` draws and the noise that
        `transform` adds, at a division by `expected_batch_size`, and the noised count.

    Raises:
        ValueError: a field out of range, naming it and its value.
    """

    num_examples: int
    sampling_prob: float
    steps: int
    noise_multiplier: float
    sampler: str = "poisson"
    max_batch_size: int | None = None
    count_noise: float | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r} must be one of {SAMPLERS}.")
        for name in ("num_examples", "steps"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name}={value} must be an integer >= 1.")
        if not 0 < self.sampling_prob <= 1:
            raise ValueError(f"sampling_prob={self.sampling_prob} must be in (0, 1].")
        if not 0 < self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier={self.noise_multiplier} must be > 0 and finite.")
        if self.sampler == "full_batch" and self.sampling_prob != 1:
            raise ValueError(f"sampling_prob={self.sampling_prob} must be 1 for full_batch.")
        if self.sampler == "fixed_size":
            size = self.sampling_prob * self.num_examples
            if round(size) < 1 or abs(size - round(size)) > 1e-6:
                raise ValueError(
                    f"sampling_prob={self.sampling_prob} must be a whole batch size over "
                    f"num_examples={self.num_examples} for fixed_size."
                )
        if (self.sampler == "truncated_poisson") != (self.max_batch_size is not None):
            raise ValueError(
                f"max_batch_size={self.max_batch_size} belongs to sampler='truncated_poisson' and "
                f"only to it, got sampler={self.sampler!r}."
            )
        if self.max_batch_size is not None and self.max_batch_size < 1:
            raise ValueError(f"max_batch_size={self.max_batch_size} must be >= 1.")
        if self.count_noise is not None:
            gradient_noise_multiplier(self.noise_multiplier, self.count_noise)  # raises

    @property
    def gradient_noise_multiplier(self) -> float:
        """Noise multiplier of the gradient alone: what is left of the release beside the count."""
        if self.count_noise is None:
            return self.noise_multiplier
        return gradient_noise_multiplier(self.noise_multiplier, self.count_noise)

    @property
    def expected_batch_size(self) -> float:
        """B = q N, the constant that every noisy sum is divided by."""
        return self.sampling_prob * self.num_examples

    @property
    def relation(self) -> str:
        """Neighbouring relation of the guarantee."""
        return "replace_one" if self.sampler == "fixed_size" else "add_or_remove_one"

    @property
    def accountant(self) -> str:
        """The tightest accountant that knows this event."""
        return "rdp" if self.sampler == "fixed_size" else "pld"

    @property
    def cumulative_noise(self) -> float:
        """sigma sqrt(T), the first paper's measure for choosing the batch size (2510.20616)."""
        return self.noise_multiplier * math.sqrt(self.steps)

    def event(self, steps: int | None = None) -> DpEvent:
        """Returns the event of the first `steps` steps (all by default)."""
        steps = self.steps if steps is None else steps
        return _event(
            self.sampler,
            self.noise_multiplier,
            steps,
            num_examples=self.num_examples,
            sampling_prob=self.sampling_prob,
            max_batch_size=self.max_batch_size,
        )

    def epsilon(self, delta: float, *, steps: int | None = None, accountant: str = "") -> float:
        """Returns epsilon (nats) after `steps` steps (all by default) at the given delta."""
        if steps == 0:
            return 0.0
        return accounting.epsilon(
            self.event(steps),
            delta,
            accountant=accountant or self.accountant,
            relation=self.relation,
        )

    def indices(self, seed: int, step: int) -> np.ndarray:
        """Returns the sorted indices of batch `step`, `[size]`; see `dpjax.dp.sampling`."""
        n, q = self.num_examples, self.sampling_prob
        if self.sampler == "poisson":
            return sampling.poisson(seed, step, num_examples=n, sampling_prob=q)
        if self.sampler == "full_batch":
            return sampling.full_batch(num_examples=n)
        if self.sampler == "fixed_size":
            return sampling.fixed_size(seed, step, num_examples=n, batch_size=round(q * n))
        return sampling.truncated_poisson(
            seed, step, num_examples=n, sampling_prob=q, max_batch_size=self.max_batch_size or 1
        )

    def transform(self, *, key: jax.Array) -> optax.GradientTransformation:
        """Returns the noise transform that this mechanism accounts for."""
        return gaussian(self.gradient_noise_multiplier, self.expected_batch_size, key=key)


def num_steps(num_examples: int, batch_size: float, epochs: float) -> int:
    """Returns T = round(E N / B), at least 1.

    Args:
        num_examples: N.
        batch_size: expected batch size B.
        epochs: E, how often an example is drawn in the mean.

    Raises:
        ValueError: an argument is not > 0 and finite, naming it.

    >>> num_steps(50_000, 256, 8)
    1562
    """
    for name, value in (
        ("num_examples", num_examples), ("batch_size", batch_size), ("epochs", epochs),
    ):  # fmt: skip
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be > 0 and finite.")
    return max(1, round(epochs * num_examples / batch_size))


def calibrated(
    *,
    epsilon: float,
    delta: float,
    num_examples: int,
    batch_size: int,
    steps: int | None = None,
    epochs: float | None = None,
    sampler: str = "poisson",
    max_batch_size: int | None = None,
    accountant: str = "",
) -> Mechanism:
    """Returns the mechanism with the least noise that meets the budget.

    Args:
        epsilon: budget in nats, > 0.
        delta: in (0, 1/num_examples).
        num_examples: N, a public constant.
        batch_size: expected batch size B in [1, N]; B = N is full batch.
        steps: T; or give `epochs`.
        epochs: E, for T = round(E N / B).
        sampler: one of `SAMPLERS`; "poisson" with B = N becomes "full_batch".
        max_batch_size: for "truncated_poisson".
        accountant: "pld" or "rdp"; the tightest one that knows the sampler by default.

    Returns:
        A mechanism with q = B/N.

    Guarantees:
        By the accountant that was asked for, its epsilon is at most `epsilon`.

    Raises:
        ValueError: an impossible budget, naming field and value.

    >>> m = calibrated(epsilon=1, delta=1e-5, num_examples=50_000, batch_size=50_000, epochs=8)
    >>> m.steps, round(m.noise_multiplier, 2)
    (8, 10.55)
    """
    if (steps is None) == (epochs is None):
        raise ValueError(f"give one of steps={steps} and epochs={epochs}.")
    if steps is None:
        steps = num_steps(num_examples, batch_size, epochs or 0.0)
    (mechanism,) = calibrated_phases(
        epsilon=epsilon,
        delta=delta,
        num_examples=num_examples,
        batch_size=batch_size,
        steps=[steps],
        sampler=sampler,
        max_batch_size=max_batch_size,
        accountant=accountant,
    )
    return mechanism


def calibrated_phases(
    *,
    epsilon: float,
    delta: float,
    num_examples: int,
    batch_size: int | Sequence[int],
    steps: Sequence[int],
    noise_ratios: Sequence[float] | None = None,
    sampler: str = "poisson",
    max_batch_size: int | None = None,
    count_noises: Sequence[float] | None = None,
    accountant: str = "",
) -> tuple[Mechanism, ...]:
    """Returns one mechanism per phase; their composition has the least noise within one budget.

    Args:
        epsilon: budget of the whole, in nats.
        delta: in (0, 1/num_examples).
        num_examples: N.
        batch_size: expected batch size of every phase, or of each.
        steps: of each phase.
        noise_ratios: noise multipliers of the phases relative to each other; equal by default.
        sampler: as for `calibrated`.
        max_batch_size: as for `calibrated`.
        count_noises: of each phase, see `Mechanism.count_noise`; none by default. They do not
            change the noise multipliers, which are those of gradient and count together.
        accountant: as for `calibrated`.

    Returns:
        A mechanism for each phase, in order, for phases that all read the same examples.

    Guarantees:
        Their composition costs at most `epsilon` at `delta`.

    Raises:
        ValueError: an impossible budget, naming field and value.
    """
    count = len(steps)
    ratios = [1.0] * count if noise_ratios is None else list(noise_ratios)
    sizes = [batch_size] * count if isinstance(batch_size, (int, np.integer)) else list(batch_size)
    for name, given in (
        ("noise_ratios", ratios), ("batch_size", sizes), ("count_noises", count_noises or sizes),
    ):  # fmt: skip
        if len(given) != count or not count:
            raise ValueError(f"{name}={given} must have one entry for each of steps={steps}.")
    for size in sizes:
        if not 1 <= size <= num_examples:
            raise ValueError(f"batch_size={size} must be in [1, num_examples={num_examples}].")
    accounting.check_budget(epsilon, delta, num_examples=num_examples)
    phases = [
        Mechanism(
            num_examples=num_examples,
            sampling_prob=size / num_examples,
            steps=length,
            noise_multiplier=ratio,
            sampler="full_batch" if sampler == "poisson" and size == num_examples else sampler,
            max_batch_size=max_batch_size,
        )
        for size, length, ratio in zip(sizes, steps, ratios, strict=True)
    ]
    # Steps of equal law cost exactly what one phase of all of them does.
    laws: dict[Mechanism, int] = {}
    for phase in phases:
        law = dataclasses.replace(phase, steps=1)
        laws[law] = laws.get(law, 0) + phase.steps
    # Where all are equal, the event is the one of `calibrated`, and so is what is cached of it.
    scale = ratios[0] if len(set(ratios)) == 1 else 1.0

    def scaled(mechanism: Mechanism, sigma: float) -> Mechanism:
        noise = mechanism.noise_multiplier / scale * sigma
        return dataclasses.replace(mechanism, noise_multiplier=noise)

    sigma = accounting.calibrate_noise_multiplier(
        lambda s: [scaled(law, s).event(length) for law, length in laws.items()],
        epsilon=epsilon,
        delta=delta,
        accountant=accountant or phases[0].accountant,
        relation=phases[0].relation,
    )
    made = [scaled(phase, sigma) for phase in phases]
    if count_noises is not None:
        made = [dataclasses.replace(m, count_noise=c) for m, c in zip(made, count_noises)]
    return tuple(made)


def _event(
    sampler: str,
    noise_multiplier: float,
    steps: int,
    *,
    num_examples: int,
    sampling_prob: float,
    max_batch_size: int | None,
) -> DpEvent:
    if sampler == "poisson":
        return accounting.poisson(noise_multiplier, sampling_prob, steps)
    if sampler == "full_batch":
        return accounting.full_batch(noise_multiplier, steps)
    if sampler == "fixed_size":
        size = round(sampling_prob * num_examples)
        return accounting.fixed_size(noise_multiplier, size, num_examples, steps)
    return accounting.truncated_poisson(
        noise_multiplier, sampling_prob, max_batch_size or 1, num_examples, steps
    )
