"""Composition of privacy losses by a tilted Fourier transform, with its rounding bounded.

A composition's loss is the sum of independent losses. A plain FFT computes its law to about 1e-15
*absolutely*, which is far too coarse for a delta of 1e-15, and grows with the number T of steps.
Tilting cures that: for t > 0 the law of the sum L under P satisfies

    P(l) = e^(K(t) - t l) P_t(l),      K(t) = sum over the steps of ln E_P[e^(t loss)],

where P_t is the law of the sum of *tilted* losses, each with masses proportional to P e^(t loss).
With t such that P_t has its mean near the epsilon in question, a small absolute error of P_t is a
small relative error of
    delta(eps) = E_P[(1 - e^(eps - L))+]
               = e^(K(t) - t eps) E_t[e^(-t (L - eps)) (1 - e^(eps - L))+].

The error of P_t is bounded and added, so that every result is an upper bound. Let u be the unit of
rounding, n the length of the transform, x one tilted law, F x its transform.
- A computed transform is off by at most eta ||F x||_2 = eta sqrt(n) ||x||_2 in the 2-norm, with
  eta = 10 u log2(n) (Higham, Accuracy and Stability of Numerical Algorithms, theorem 24.2, where
  the constant is about 7).
- Raising F x to the power c, and multiplying by other factors, turns an error e_j at frequency j
  into at most c (|F x_j| + e)^(c-1) e_j times the other factors. By Cauchy and Schwarz its mean
  over j, the largest change of a mass, is at most ||c (|F x| + e)^(c-1) ...||_2 ||e||_2 / n.
- Powers are computed through logarithms: a relative error of at most 8 u c (1 + |ln F x_j|).
- The inverse transform adds eta ||P_t||_2.
- Losses beyond the window of the transform come back at its other end. That only adds mass inside
  the window, and what lies above the window is bounded by Chernoff.
- Masses and K themselves carry rounding of a few u for every step: `_STEP_ROUNDING`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import fft, optimize, special

from dpjax.dp.accounting.losses import Atoms, Law

__all__ = [
    "Released", "delta", "epsilon", "gaussian_delta", "gaussian_epsilon", "lower_epsilon",
]  # fmt: skip

_UNIT = 2.0**-53
_LONGEST = 2**20  # of a transform
_STEP_ROUNDING = 5e-15  # of one step's ln E[e^(t loss)], times 1 + t
_STEEPEST = 1e9  # tilts above it see the largest loss alone
_OUTSIDE = 40.0  # minus the logarithm of the tilted mass outside the window


class Released(NamedTuple):
    """A pair and how often it is released."""

    law: Law
    times: int


class _Cumulants:
    """K(t) and its first two derivatives, of the sum of coarsely discretized losses under P."""

    def __init__(self, released: Sequence[Released], reverse: bool, log_tail: float) -> None:
        self.parts = []
        self.infinite = self.highest = 0.0
        for law, count in released:
            atoms = law.coarse(log_tail)
            atoms = atoms.reversed() if reverse else atoms
            self.parts.append((atoms.loss, atoms.log_p, count))
            self.infinite += atoms.p_infinite * count
            self.highest += float(atoms.loss[-1]) * count

    def __call__(self, t: float) -> tuple[float, float, float]:
        value = mean = variance = 0.0
        for loss, log_p, count in self.parts:
            tilted = log_p + t * loss
            top = float(np.max(tilted))
            weights = np.exp(tilted - top)
            total = float(np.sum(weights))
            center = float(weights @ loss) / total
            value += count * (top + math.log(total))
            mean += count * center
            variance += count * float(weights @ (loss - center) ** 2) / total
        return value, mean, variance

    def tilt_of_delta(self, delta: float) -> float:
        """Returns the tilt whose mean loss is about the epsilon of `delta`, by a saddle point."""

        def gap(log_t: float) -> float:
            t = math.exp(log_t)
            value, mean, variance = self(t)
            width = t * (1 + t) * math.sqrt(2 * math.pi * variance)
            return math.log(delta) - (value - t * mean - math.log1p(width))

        return _rising_root(gap)

    def tilt_of_epsilon(self, epsilon: float) -> float:
        """Returns the tilt whose mean loss is epsilon; 0 where no tilt is needed."""
        if self(0.0)[1] >= epsilon:
            return 0.0
        return _rising_root(lambda log_t: self(math.exp(log_t))[1] - epsilon)

    def epsilon(self, delta: float, near: float) -> float:
        """Returns the best epsilon by Renyi divergence at orders 1 + t, with t near a given tilt.

        The largest value of (1 - e^-x) e^(-t x) over x > 0 is t^t / (1 + t)^(1 + t), so that delta
        is at most e^(K(t) - t epsilon) times that (arXiv 2004.00010, proposition 12).
        """
        log_delta = math.log(delta - self.infinite)
        return min(
            (self(t)[0] - log_delta - math.log1p(t)) / t - math.log1p(1 / t)
            for t in near * np.exp(np.linspace(-1.0, 0.5, 13))
        )

    def window(self, t: float) -> tuple[float, float]:
        """Returns losses outside which the tilted sum has mass below e^-_OUTSIDE (Chernoff)."""
        value, _, variance = self(t)
        steps = math.sqrt(2 * _OUTSIDE / variance) * 2.0 ** np.arange(-4.0, 4.0)
        high = min((self(t + s)[0] - value + _OUTSIDE) / s for s in steps)
        low = max((value - self(t - s)[0] - _OUTSIDE) / s for s in steps)
        return low, high


def epsilon(
    released: Sequence[Released],
    delta: float,
    *,
    interval: float | None = None,
    coarser: float = 1.0,
    directions: Sequence[bool] = (False, True),
) -> float:
    """Returns an upper bound on epsilon of a composition.

    Args:
        released: the pairs (P, Q) and their counts.
        delta: in (0, 1).
        interval: of the grid, in nats; None chooses one that costs about the largest of the laws'
            tolerances.
        coarser: factor on that cost.
        directions: False stands for P against Q, True for Q against P; the largest epsilon counts.

    Returns:
        Epsilon >= 0 in nats, inf where it is out of reach.
    """
    worst = 0.0
    for reverse in directions:
        cumulants = _Cumulants(released, reverse, min(-60.0, math.log(delta) - 40))
        if delta <= cumulants.infinite:
            return math.inf
        t = cumulants.tilt_of_delta(delta)
        # The directions share a grid: what is slow to compute is then kept from the first.
        interval = interval or _interval(released, cumulants, t, reverse, coarser)
        best = min(cumulants.epsilon(delta, t), cumulants.highest)
        for _ in range(2):
            if best <= worst or t > _STEEPEST:
                break  # another direction decides, or the largest possible loss does
            fine = _Composed(released, cumulants, t, math.log(delta), reverse, interval)
            value = fine.epsilon(delta)
            best = min(best, value)
            if fine.error_share(value) < 1e-4:
                break
            t = cumulants.tilt_of_epsilon(best)  # the saddle point was a poor guess
        worst = max(worst, best)
    return worst


def lower_epsilon(
    released: Sequence[Released],
    delta: float,
    *,
    interval: float | None = None,
    directions: Sequence[bool] = (False, True),
) -> float:
    """Returns a lower bound on epsilon: cells are contracted to their means.

    The losses of the contracted pairs are then rounded down to a fine grid, which lowers delta too.

    Args:
        released: the pairs (P, Q) and their counts.
        delta: in (0, 1).
        interval: of the cells, in nats; None chooses it as `epsilon` does.
        directions: as in `epsilon`.
    """
    worst = 0.0
    log_tail = math.log(delta) - 40
    for reverse in directions:
        if interval is None:
            upper = _Cumulants(released, reverse, min(-60.0, log_tail))
            interval = 0.6 * _interval(released, upper, upper.tilt_of_delta(delta), reverse)
        pairs = [
            Released(_RoundedDown(atoms.reversed() if reverse else atoms), count)
            for atoms, count in ((law.contracted(interval, log_tail), c) for law, c in released)
        ]
        cumulants = _Cumulants(pairs, False, log_tail)
        t = cumulants.tilt_of_delta(delta)
        if t > _STEEPEST:
            continue
        fine = 1e-4 * max(cumulants(t)[1], 1e-9) / sum(count for _, count in pairs)
        composed = _Composed(pairs, cumulants, t, math.log(delta), False, fine)
        # What is computed is above the truth by the error's share and the margin for rounding.
        value = composed.epsilon(delta * (1 + 1e-5))
        if composed.error_share(value) < 5e-6:
            worst = max(worst, value)
    return worst


class _RoundedDown:
    """A pair of which one direction alone is wanted, its losses rounded down."""

    tolerance = 1.0

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms

    def cost(self, t: float, reverse: bool) -> float:
        return 0.0

    def coarse(self, log_tail: float) -> Atoms:
        return self.atoms

    def contracted(self, interval: float, log_tail: float) -> Atoms:
        return self.atoms

    def on_grid(self, interval: float, log_tail: float) -> tuple[np.ndarray, Atoms]:
        k = np.floor(self.atoms.loss / interval).astype(np.int64)
        return k, self.atoms._replace(loss=k * interval)


def delta(
    released: Sequence[Released],
    epsilon: float,
    *,
    interval: float | None = None,
    directions: Sequence[bool] = (False, True),
) -> float:
    """Returns an upper bound on delta of a composition at an epsilon >= 0; see `epsilon`."""
    worst = 0.0
    for reverse in directions:
        cumulants = _Cumulants(released, reverse, -250.0)  # delta may be tiny
        if cumulants.highest <= epsilon or cumulants.infinite >= 1:  # losses are bounded, or not
            worst = max(worst, min(1.0, cumulants.infinite))
            continue
        t = cumulants.tilt_of_epsilon(epsilon)
        interval = interval or _interval(released, cumulants, t, reverse)
        log_bound = min(0.0, cumulants(t)[0] - t * epsilon)
        bound = math.exp(log_bound) + cumulants.infinite
        if t > _STEEPEST:
            worst = max(worst, min(1.0, bound))
            continue
        fine = _Composed(released, cumulants, t, log_bound, reverse, interval)
        worst = max(worst, min(1.0, bound, fine.delta(epsilon)))
    return worst


def _interval(
    released: Sequence[Released],
    cumulants: _Cumulants,
    t: float,
    reverse: bool,
    coarser: float = 1.0,
) -> float:
    """Returns the interval whose spreads cost about the laws' tolerance, times `coarser`.

    What is added to K(t) is added to epsilon over t.
    """
    _, mean, variance = cumulants(t)
    t = max(t, 1e-6)
    scale = max(mean, 0.1 * math.sqrt(variance))
    costs = sum(count * law.cost(t, reverse) for law, count in released)
    tolerance = coarser * max(law.tolerance for law, _ in released)
    return math.sqrt(tolerance * scale * t / costs)


def _rising_root(gap: Callable[[float], float]) -> float:
    """Returns e^x at the root x of a rising function; an end of [-12, 41] where there is none."""
    low, high = -12.0, 2.0
    while gap(high) < 0 and high < 41:
        low, high = high, high + 3
    if gap(low) >= 0 or gap(high) < 0:
        return math.exp(low if gap(low) >= 0 else high)
    return math.exp(optimize.brentq(gap, low, high, xtol=1e-3))


class _Composed:
    """The tilted law of the composition's loss, on a grid, with a bound on its error."""

    def __init__(
        self,
        released: Sequence[Released],
        cumulants: _Cumulants,
        t: float,
        log_delta: float,
        reverse: bool,
        interval: float,
    ) -> None:
        _, mean, variance = cumulants(t)
        low, high = cumulants.window(t)
        total = sum(count for _, count in released)
        interval = max(interval, (high - low) / (_LONGEST - 4))
        size = 2 ** max(6, math.ceil(math.log2((high - low) / interval + 4)))
        eta = 10 * _UNIT * math.log2(size)
        transforms = []
        self.t, self.center, self.width = t, mean, math.sqrt(variance)
        self.log_scale, self.infinite = -t * mean, 0.0
        for law, count in released:
            k, atoms = law.on_grid(interval, log_delta - math.log(total) - 14)
            if reverse:
                k, atoms = -k[::-1], atoms.reversed()
            tilted = atoms.log_p + t * atoms.loss
            log_norm = float(special.logsumexp(tilted))
            self.log_scale += count * log_norm
            self.infinite += count * atoms.p_infinite
            x = np.bincount(k % size, np.exp(tilted - log_norm), size)
            error = eta * math.sqrt(size) * float(np.linalg.norm(x))
            transforms.append((count, fft.rfft(x), error))
        # A bound on the product's modulus, which is negligible almost everywhere.
        log_reach = sum(c * np.log(np.abs(f) + error) for c, f, error in transforms)
        most = max(count for count, *_ in transforms)
        used = np.flatnonzero(log_reach > -60 - math.log(most))
        self.error = 2 * math.exp(-60)
        log_reach, spectrum = log_reach[used], np.zeros(size // 2 + 1, complex)
        log_product, rounding = np.zeros(len(used), complex), np.zeros(len(used))
        for count, transform, error in transforms:
            factor = np.log(transform[used])
            log_product += count * factor
            rounding += 8 * _UNIT * count * (1 + np.abs(factor))
            others = np.exp(log_reach - np.log(np.abs(transform[used]) + error))
            # Both halves of the spectrum count; the two entries without a mirror image count twice.
            self.error += count * error * math.sqrt(2) * float(np.linalg.norm(others)) / size
        spectrum[used] = np.exp(log_product)
        self.error += 2 * float(np.abs(spectrum[used]) @ np.minimum(rounding, 1.0)) / size
        masses = fft.irfft(spectrum, size)
        self.error += eta * float(np.linalg.norm(masses))
        first = math.floor(low / interval)
        self.mass = np.maximum(np.roll(masses, -(first % size)), 0.0)
        self.loss = (first + np.arange(size)) * interval
        self.log_scale += total * _STEP_ROUNDING * (1 + t) + 1e-12
        # What lies above the window, in units of e^log_scale, has losses above its end.
        self.log_above = -_OUTSIDE - t * float(self.loss[-1] - mean)

    def delta(self, epsilon: float) -> float:
        """Returns the upper bound on delta at an epsilon."""
        return math.exp(min(0.0, self.log_scale + self._log_excess(epsilon))) + self.infinite

    def epsilon(self, delta: float) -> float:
        """Returns the upper bound on epsilon at a delta; inf if delta is out of reach."""
        if delta <= self.infinite:
            return math.inf
        log_wanted = math.log(delta - self.infinite) - self.log_scale

        def gap(epsilon: float) -> float:
            return self._log_excess(epsilon) - log_wanted

        first, last, step = float(self.loss[0]), float(self.loss[-1]), self.width
        low = high = min(max(self.center, first), last)
        while gap(low) <= 0:
            if low <= first:
                return first
            low, step = max(first, low - step), 2 * step
        step = self.width
        while gap(high) > 0:
            if high >= last:
                return math.inf
            low, high, step = high, min(last, high + step), 2 * step
        root = float(optimize.brentq(gap, low, high, xtol=1e-8 * self.width))
        while gap(root) > 0:  # brentq stops on either side
            root += 1e-8 * self.width
        return root

    def error_share(self, epsilon: float) -> float:
        """Returns which share of delta is the bound on the error; 1 outside the window."""
        if not self.loss[0] < epsilon < self.loss[-1]:
            return 1.0
        return -math.expm1(self._log_excess(epsilon, exact=True) - self._log_excess(epsilon))

    def _log_excess(self, epsilon: float, *, exact: bool = False) -> float:
        """ln of E_t[e^(-t (L - center)) (1 - e^(epsilon - L))+], with the bound on its error."""
        begin = int(np.searchsorted(self.loss, epsilon, side="right"))
        span = (self.loss[1] - self.loss[0]) * max(self.t, 1e-9)
        end = min(len(self.loss), begin + math.ceil(_OUTSIDE / span))
        mass, gain = self.mass[begin:end], self.loss[begin:end] - epsilon
        weights = -np.exp(-self.t * gain) * np.expm1(-gain)
        inside = float(mass @ weights)
        if not exact:
            inside += self.error * float(np.sum(weights))
            rest = 1.0 + self.error * (len(self.loss) - end) if end < len(self.loss) else 0.0
            inside += math.exp(-_OUTSIDE) * rest
        log_inside = math.log(inside) if inside > 0 else -math.inf
        return float(np.logaddexp(log_inside - self.t * (epsilon - self.center), self.log_above))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Returns delta of a Gaussian mechanism of sensitivity / sigma = mu, exact and not below.

    It is Phi(-z) - e^epsilon Phi(-z - mu) at z = epsilon / mu - mu / 2 (arXiv 1805.06530, theorem
    8). In terms of the scaled tail erfcx, both have the factor e^(-z^2 / 2): no digit is lost far
    out.
    """
    z = epsilon / mu - mu / 2
    z -= 4 * _UNIT * (epsilon / mu + mu)  # its rounding: as of a slightly smaller epsilon
    scale = math.exp(-z * z / 2)
    other = scale * float(special.erfcx((z + mu) / math.sqrt(2)))
    if z <= 0:
        return min(1.0, float(special.ndtr(-z)) - other / 2 + 1e-15)
    one = scale * float(special.erfcx(z / math.sqrt(2)))
    return (one - other + (8 + z * z) * _UNIT * one) / 2


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Returns epsilon of a Gaussian mechanism of sensitivity / sigma = mu, exact and not below."""
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0

    def gap(epsilon: float) -> float:
        value = gaussian_delta(mu, epsilon)
        return math.log(value / delta) if value > 0 else -1e3

    high = mu * mu / 2 + mu * math.sqrt(-2 * math.log(delta))  # there delta is below Phi(-z)
    root = float(optimize.brentq(gap, 0.0, high * (1 + 1e-9), xtol=1e-14 * high, rtol=1e-13))
    while gaussian_delta(mu, root) > delta:
        root += 1e-13 * high
    return root
