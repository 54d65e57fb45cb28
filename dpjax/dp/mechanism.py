"""The frozen object from which sampler, noise and accounting are all derived.

What is accounted is what ran, because there is one source for both: a training loop takes its
batches from `Mechanism.indices`, its noise from `Mechanism.transform` and its epsilon from
`Mechanism.event`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from dp_accounting import DpEvent

from dpjax.dp import accounting, chacha, sampling, secure
from dpjax.dp.accounting.events import count, positive
from dpjax.dp.adaptive import gradient_noise_multiplier
from dpjax.dp.noise import gaussian
from dpjax.dp.sampling import Factory, RandomAllocation, Sampler

__all__ = [
    "Mechanism", "calibrated", "calibrated_phases", "delta_left", "epsilon_of", "num_steps",
    "shared_accountant",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
    """A subsampled Gaussian mechanism, run for a number of steps. Every field is public.

    Attributes:
        sampler: draws the batches and knows their event, such as `dp.Poisson`; see
            `sampling.Sampler`. A batch that is merely shuffled has none.
        steps: T >= 1, the number of noise draws that are paid for.
        noise_multiplier: sigma > 0 of the whole release of a step, which is what is accounted:
            standard deviation of the noise on the sum over the clip bound (the sum's sensitivity
            to adding or removing one example). Under "replace_one" the sum moves by up to twice
            that; `event()` says so to the accountant.
        count_noise: standard deviation of the noise on the count that an adaptive bound asks for
            in every step, in examples; None where there is none. Gradient and count together have
            `noise_multiplier`, so the gradient gets more noise; see `adaptive`.
        secure_size: how many numbers a sum has, where its noise is secure; None for noise in
            float32. A hundredth of delta then pays for the sampler's law, see `secure`.

    Guarantees:
        `event()` describes exactly the batches that `indices` draws and the noise that
        `transform` adds, at a division by `expected_batch_size`, and the noised count.

    Raises:
        ValueError: a field out of range, naming it and its value, or a sampler that does not keep
            its contract.
    """

    sampler: Sampler
    steps: int
    noise_multiplier: float
    count_noise: float | None = None
    secure_size: int | None = None

    def __post_init__(self) -> None:
        sampling.check(self.sampler)
        count("steps", self.steps)
        positive("noise_multiplier", self.noise_multiplier)
        if self.count_noise is not None:
            gradient_noise_multiplier(self.noise_multiplier, self.count_noise)  # raises
        if self.secure_size is not None:
            if self.count_noise is not None:
                raise ValueError(
                    f"count_noise={self.count_noise} must be None: there is no secure noise for "
                    "the count of an adaptive bound."
                )
            secure.check(
                self.noise_multiplier, self.expected_batch_size, count("size", self.secure_size)
            )

    @property
    def num_examples(self) -> int:
        """N, the number of examples, taken as a public constant."""
        return self.sampler.num_examples

    @property
    def sampling_prob(self) -> float:
        """q in (0, 1], the probability that an example is in a batch."""
        return self.sampler.sampling_prob

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
        """Neighboring relation of the guarantee."""
        return self.sampler.relation

    @property
    def accountant(self) -> str:
        """The tightest accountant that knows this event."""
        return self.sampler.accountants[0]

    @property
    def cumulative_noise(self) -> float:
        """sigma sqrt(T), the first paper's measure for choosing the batch size (2510.20616)."""
        return self.noise_multiplier * math.sqrt(self.steps)

    def event(self, steps: int | None = None) -> DpEvent:
        """Returns the event of `steps` steps (all by default)."""
        return self.sampler.event(self.noise_multiplier, self.steps if steps is None else steps)

    def epsilon(self, delta: float, *, steps: int | None = None, accountant: str = "") -> float:
        """Returns epsilon (nats) after `steps` steps (all by default) at the given delta."""
        if steps == 0:
            return 0.0
        number = self.steps if steps is None else steps
        return epsilon_of([self], [number], delta, accountant=accountant or self.accountant)

    def indices(self, seed: int, step: int, *, first: int = 0) -> np.ndarray:
        """Returns the sorted indices of batch `step`, int64 `[size]`.

        Args:
            seed: secret 128-bit integer.
            step: in [first, first + steps).
            first: number of the mechanism's first step. Where several mechanisms share a seed,
                no two of their steps may have the same number.

        Raises:
            ValueError: a step that is not paid for, a sampler whose epochs begin elsewhere, or one
                that drew no valid batch.
        """
        if not first <= step < first + self.steps:
            raise ValueError(
                f"step={step} must be in [{first}, {first + self.steps}): the mechanism pays for "
                f"{self.steps} steps."
            )
        begin = getattr(self.sampler, "first_step", first)
        if begin != first:
            raise ValueError(
                f"first={first} must be the sampler's first_step={begin}, where its epochs begin: "
                "they are accounted for from there."
            )
        return sampling.draw(self.sampler, seed, step)

    def transform(self, *, key: jax.Array) -> optax.GradientTransformation:
        """Returns the noise transform that this mechanism accounts for.

        Raises:
            TypeError: the key is not of the kind of noise that is accounted for.
        """
        if chacha.is_chacha(key) != (self.secure_size is not None):
            kind = "a ChaCha20 key" if self.secure_size else "a key of JAX's own"
            raise TypeError(f"key={key!r} must be {kind}, for secure_size={self.secure_size}.")
        return gaussian(self.gradient_noise_multiplier, self.expected_batch_size, key=key)


def epsilon_of(
    mechanisms: Sequence[Mechanism],
    steps: Sequence[int],
    delta: float,
    *,
    accountant: str = "",
) -> float:
    """Returns epsilon (nats) of so many steps of each mechanism, composed, at a total delta.

    Where noise is secure, a share of delta pays for the distance between the sampler's law and the
    Gaussian's: delta' = delta + (1 + e^epsilon) * total variation (see `secure`).

    Raises:
        ValueError: that share does not suffice.
    """
    used = [(m, n) for m, n in zip(mechanisms, steps, strict=True) if n]
    if not used:
        return 0.0
    epsilon = accounting.epsilon(
        [m.event(n) for m, n in used] if len(used) > 1 else used[0][0].event(used[0][1]),
        delta_left(delta, mechanisms),
        accountant=accountant or shared_accountant(mechanisms),
        relation=mechanisms[0].relation,
    )
    numbers = sum(n * (m.secure_size or 0) for m, n in used)
    needed = (1 + math.exp(min(epsilon, 700.0))) * numbers * secure.GAP
    if needed > secure.RESERVE * delta:
        raise ValueError(
            f"delta={delta:g}: secure noise of {numbers:.3g} numbers needs {needed:.2g} of it at "
            f"epsilon={epsilon:.4g}, more than the share of {secure.RESERVE:g} that is set aside."
        )
    return epsilon


def delta_left(delta: float, mechanisms: Sequence[Mechanism]) -> float:
    """Returns what of delta is left for the Gaussian mechanisms themselves."""
    used = any(m.secure_size is not None for m in mechanisms)
    return delta * (1 - secure.RESERVE) if used else delta


def shared_accountant(mechanisms: Sequence[Mechanism]) -> str:
    """Returns the tightest accountant that knows the events of all.

    Raises:
        ValueError: there is none, or the mechanisms differ in their neighboring relation.
    """
    names = [
        name for name in mechanisms[0].sampler.accountants
        if all(name in mechanism.sampler.accountants for mechanism in mechanisms)
    ]  # fmt: skip
    if not names or len({mechanism.relation for mechanism in mechanisms}) != 1:
        found = sorted({(m.relation, m.sampler.accountants) for m in mechanisms})
        raise ValueError(
            f"all phases must share one neighboring relation and an accountant, got {found}."
        )
    return names[0]


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
    sampler: str | Factory = "poisson",
    accountant: str = "",
    secure_size: int | None = None,
    **options: Any,
) -> Mechanism:
    """Returns the mechanism with the least noise that meets the budget.

    Args:
        epsilon: budget in nats, > 0.
        delta: in (0, 1/num_examples).
        num_examples: N, a public constant.
        batch_size: expected batch size B in [1, N]; B = N is full batch.
        steps: T; or give `epochs`.
        epochs: E, for T = round(E N / B); for "random_allocation" T = round(E t), with
            t = round(N / B) steps per epoch.
        sampler: a name in `sampling.SAMPLERS`, or a function or class of yours that makes a
            sampler from `num_examples`, `batch_size` and the options; "poisson" with B = N is a
            full batch.
        accountant: "pld" or "rdp"; the tightest one that knows the sampler by default.
        secure_size: how many numbers train, for secure noise; see `Mechanism`.
        **options: of the sampler, such as `max_batch_size` of "truncated_poisson".

    Returns:
        A mechanism with q = B/N; for "random_allocation" q = 1/t.

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
        size: float = batch_size
        if sampler == "random_allocation":  # whole epochs stay whole
            size = num_examples / sampling.whole_steps(num_examples, batch_size)
        steps = num_steps(num_examples, size, epochs or 0.0)
    (mechanism,) = calibrated_phases(
        epsilon=epsilon,
        delta=delta,
        num_examples=num_examples,
        batch_size=batch_size,
        steps=[steps],
        sampler=sampler,
        accountant=accountant,
        secure_sizes=None if secure_size is None else [secure_size],
        **options,
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
    sampler: str | Factory = "poisson",
    count_noises: Sequence[float] | None = None,
    before: Sequence[Mechanism] = (),
    accountant: str = "",
    secure_sizes: Sequence[int] | None = None,
    **options: Any,
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
        count_noises: of each phase, see `Mechanism.count_noise`; none by default. They do not
            change the noise multipliers, which are those of gradient and count together.
        before: mechanisms on the same examples that the budget pays for too, as they are.
        accountant: as for `calibrated`.
        secure_sizes: of each phase, for secure noise; see `Mechanism.secure_size`.
        **options: as for `calibrated`.

    Returns:
        A mechanism for each phase, in order, for phases that all read the same examples.

    Guarantees:
        Their composition, with all of `before`, costs at most `epsilon` at `delta`.

    Raises:
        ValueError: an impossible budget, naming field and value.
    """
    number = len(steps)
    ratios = [1.0] * number if noise_ratios is None else list(noise_ratios)
    sizes = list(batch_size) if isinstance(batch_size, Sequence) else [batch_size] * number
    for name, given in (
        ("noise_ratios", ratios), ("batch_size", sizes), ("count_noises", count_noises or sizes),
    ):  # fmt: skip
        if len(given) != number or not number:
            raise ValueError(f"{name}={given} must have one entry for each of steps={steps}.")
    for size in sizes:
        if count("batch_size", size) > num_examples:
            raise ValueError(f"batch_size={size} must be in [1, num_examples={num_examples}].")
    accounting.check_budget(epsilon, delta, num_examples=num_examples)
    phases: list[Mechanism] = []
    for size, length, ratio in zip(sizes, steps, ratios, strict=True):
        law = sampling.make(sampler, num_examples=num_examples, batch_size=size, **options)
        if isinstance(law, RandomAllocation):  # an epoch does not extend into another phase
            law = dataclasses.replace(law, first_step=sum(p.steps for p in phases))
        phases.append(Mechanism(sampler=law, steps=length, noise_multiplier=ratio))
    # Where all are equal, the event is the one of `calibrated`, and so is what is cached of it.
    scale = ratios[0] if len(set(ratios)) == 1 else 1.0

    def scaled(mechanism: Mechanism, sigma: float) -> Mechanism:
        noise = mechanism.noise_multiplier / scale * sigma
        return dataclasses.replace(mechanism, noise_multiplier=noise)

    sigma = accounting.calibrate_noise_multiplier(
        lambda s: [*(m.event() for m in before), *(scaled(phase, s).event() for phase in phases)],
        epsilon=epsilon,
        delta=delta if secure_sizes is None else delta * (1 - secure.RESERVE),
        accountant=accountant or shared_accountant([*before, *phases]),
        relation=phases[0].relation,
    )
    made = [scaled(phase, sigma) for phase in phases]
    if count_noises is not None:
        made = [dataclasses.replace(m, count_noise=c) for m, c in zip(made, count_noises)]
    if secure_sizes is not None:
        made = [dataclasses.replace(m, secure_size=n) for m, n in zip(made, secure_sizes)]
    return tuple(made)
