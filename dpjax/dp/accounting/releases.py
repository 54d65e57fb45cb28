"""From events to the privacy losses that compose."""

from __future__ import annotations

import dataclasses
import math

import dp_accounting as dpa
from scipy import stats

from dpjax.dp.accounting import composition
from dpjax.dp.accounting.allocation import AllocatedGaussian
from dpjax.dp.accounting.composition import Released
from dpjax.dp.accounting.events import AllocationDpEvent, fraction, leaves, positive
from dpjax.dp.accounting.losses import Law, Mixture, SubsampledGaussian

__all__ = ["Losses", "losses_of"]


@dataclasses.dataclass(frozen=True)
class Losses:
    """A composition in terms of privacy losses.

    Attributes:
        private: False if a release adds no noise.
        released: the pairs and their counts; plain Gaussians are one.
        mu: sensitivity / sigma of the plain Gaussians composed; 0 if there are none.
        ceiling: sensitivity / sigma of a Gaussian mechanism that costs no less; inf if unknown.
            Sampling or allocating examples only mixes the pair of a full batch with equal ones,
            and delta is jointly convex in a pair.
        symmetric: whether both directions cost the same.
    """

    private: bool
    released: tuple[Released, ...]
    mu: float
    ceiling: float
    symmetric: bool

    @property
    def _directions(self) -> tuple[bool, ...]:
        return (False,) if self.symmetric else (False, True)

    def epsilon(self, delta: float, interval: float | None = None, coarser: float = 1.0) -> float:
        """Returns an upper bound on epsilon at delta; see `composition.epsilon`."""
        if not self.private:
            return math.inf
        if not self.released:
            return composition.gaussian_epsilon(self.mu, delta) if self.mu else 0.0
        ceiling = math.inf
        if self.ceiling < math.inf:
            ceiling = composition.gaussian_epsilon(self.ceiling, delta)
        bound = composition.epsilon(
            self._all, delta, interval=interval, coarser=coarser, directions=self._directions
        )
        return min(ceiling, bound)

    def delta(self, epsilon: float, interval: float | None = None) -> float:
        """Returns an upper bound on delta at epsilon."""
        if not self.private:
            return 1.0
        if not self.released:
            return composition.gaussian_delta(self.mu, epsilon) if self.mu else 0.0
        ceiling = 1.0
        if self.ceiling < math.inf:
            ceiling = composition.gaussian_delta(self.ceiling, epsilon)
        bound = composition.delta(
            self._all, epsilon, interval=interval, directions=self._directions
        )
        return min(ceiling, bound)

    def lower_epsilon(self, delta: float) -> float:
        """Returns a lower bound on epsilon at delta."""
        if not self.private or not self.released:
            return self.epsilon(delta)
        return composition.lower_epsilon(self._all, delta, directions=self._directions)

    @property
    def _all(self) -> tuple[Released, ...]:
        gaussian = (Released(SubsampledGaussian(1 / self.mu), 1),) if self.mu else ()
        return self.released + gaussian


def losses_of(event: dpa.DpEvent, relation: str) -> Losses | None:
    """Returns the losses of an event; None if one of its releases is not known here.

    Args:
        event: the composition.
        relation: one of `accounting.RELATIONS`.
    """
    moved = 2.0 if relation == "replace_one" else 1.0
    private, square, ceiling, symmetric = True, 0.0, 0.0, True
    released = []
    try:
        counts = leaves(event)
    except TypeError:  # an event that cannot be hashed
        return None
    for leaf, number in counts.items():
        if isinstance(leaf, dpa.NonPrivateDpEvent):
            private = False
            continue
        gaussian, q = leaf, 1.0
        if isinstance(leaf, dpa.PoissonSampledDpEvent):
            gaussian, q = leaf.event, float(leaf.sampling_probability)
            if q != 0:
                fraction("sampling_probability", q)
        if isinstance(gaussian, dpa.GaussianDpEvent):
            if q == 0:
                continue
            if gaussian.noise_multiplier == 0:
                private = False
                continue
            sigma = float(gaussian.noise_multiplier)
            if sigma != math.inf:
                positive("noise_multiplier", sigma)
            ceiling += number * (moved / sigma) ** 2
            if q == 1:
                square += number * (moved / sigma) ** 2
            else:
                law = SubsampledGaussian(sigma, q, replaced=moved == 2)
                released.append(Released(law, number))
                symmetric = symmetric and moved == 2
        elif isinstance(leaf, AllocationDpEvent):
            if relation != "add_or_remove_one":
                return None
            epoch = AllocatedGaussian(leaf.noise_multiplier, leaf.steps_per_epoch, leaf.steps)
            released.append(Released(epoch, number))
            ceiling, symmetric = ceiling + number / leaf.noise_multiplier**2, False
        elif isinstance(leaf, dpa.TruncatedSubsampledGaussianDpEvent):
            if leaf.noise_multiplier == 0:
                private = False
                continue
            positive("noise_multiplier", leaf.noise_multiplier)
            if leaf.sampling_probability:
                fraction("sampling_probability", leaf.sampling_probability)
            if leaf.sampling_probability and leaf.truncated_batch_size and leaf.dataset_size:
                released.append(Released(_truncated(leaf, replaced=moved == 2), number))
                ceiling, symmetric = math.inf, symmetric and moved == 2
        else:
            return None
    return Losses(private, tuple(released), math.sqrt(square), math.sqrt(ceiling), symmetric)


def _truncated(event: dpa.TruncatedSubsampledGaussianDpEvent, replaced: bool) -> Law:
    """The pair of arXiv 2508.15089, section 4.3 of its supplement.

    With the probability that the others alone fill the batch, an example displaces another, which
    is bounded by a two-sided pair. Otherwise it joins as in a Poisson sample.
    """
    size, q, cut = event.dataset_size, event.sampling_probability, event.truncated_batch_size
    joined = SubsampledGaussian(event.noise_multiplier, q, replaced)
    full = float(stats.binom.sf(cut - 1, size - 1, q))
    if full == 0:
        return joined
    share = float(stats.binom.sf(cut, size, q)) * cut / full / size
    # Displacing moves the sum by up to 2: in units of that, the noise is half.
    displaced = SubsampledGaussian(event.noise_multiplier / 2, min(share, 1.0), replaced=True)
    return Mixture((1 - full, full), (joined, displaced)) if full < 1 else displaced
