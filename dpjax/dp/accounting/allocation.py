"""The privacy loss of random allocation: every example is in one random step of each epoch.

An epoch has t steps, and every example picks one of them uniformly, independently of all others
and of other epochs (balls-and-bins sampling, arXiv 2412.16802; random allocation, 2502.08202).

The pair. Remove the example: an epoch's noised sums, in units of the bound and in the direction of
its contribution, are Q = N(0, sigma^2 I) in R^t. With it, they are
P = (1/t) sum_j N(e_j, sigma^2 I). This pair dominates for contributions of norm at most 1, chosen
adaptively too (2412.16802, section 3; 2502.08202, theorem 3.1). Its likelihood ratio at x ~ Q is

    S = (1/t) sum_j Y_j,      Y_j = exp((2 x_j - 1) / (2 sigma^2)),

where the Y_j are independent lognormal variables of mean 1. An epoch that is cut after j steps
shows x_1 ... x_j only; the factors of the other steps integrate to 1, and
S = (1/t) (Y_1 + ... + Y_j + t - j).

The bound. delta at e^epsilon is E[(S - e^epsilon)+] for removing the example, and
E[(1 - e^epsilon S)+] for adding it: expectations of convex functions of S, hence of each Y_j given
the others. A mean-preserving spread of a Y_j, of a partial sum or of S can only raise them,
whatever is composed with the epoch (`losses`). So:
1. Y is spread onto a grid e^(k h): each cell's mass goes to its two ends, its mean kept. Below the
   grid, mass is divided between the lowest point and 0. Above it, the mean beyond the highest point
   is kept aside as `infinite`: under P, whose masses are S times those of Q, it is the mass of an
   infinite loss.
2. Sums are built by doubling. The mean of two grid variables, alpha e^(i h) + beta e^(j h), equals
   e^(i h) (alpha + beta e^(-d h)), d = i - j. For each difference d the second factor is one
   number, so the products of two shifted slices are spread between the two neighbors of one offset.
   Where d is so large that the offset no longer changes, all smaller terms are summed at once.
3. The last sum is on the grid of the composition.
A spread on a grid of interval h adds h^2 / 6 to the relative variance of what is spread, so coarser
grids serve early sums of few terms: for a sum of m of t terms, h (t / m)^(1/4), to a power of 2.

Every sum has positive terms only, so the far tail keeps its relative precision. Contracting each
cell to its mean, in place of spreading it to its ends, can only lower the same expectations:
`contracted` does so and brackets the truth from below.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
from scipy import special

from dpjax.dp.accounting.losses import Atoms, SubsampledGaussian

__all__ = ["AllocatedGaussian"]


class _Spread(NamedTuple):
    """A nonnegative variable of mean 1 on a grid.

    Attributes:
        interval: h.
        first: index of the lowest point; the points are e^((first + i) h).
        mass: `[points]`.
        zero: mass at 0.
        infinite: the mean that is kept aside.
    """

    interval: float
    first: int
    mass: np.ndarray
    zero: float
    infinite: float

    @property
    def log_values(self) -> np.ndarray:
        return (self.first + np.arange(len(self.mass))) * self.interval

    def trimmed(self, tail: float) -> _Spread:
        """Spreads ends of less than `tail`, in mass at the low end and in mean at the high one."""
        values = np.exp(self.log_values)
        low = int(np.searchsorted(np.cumsum(self.mass), tail))
        high = len(values) - int(np.searchsorted(np.cumsum((self.mass * values)[::-1]), tail))
        if high - low < 2:
            return self
        mass = self.mass[low:high].copy()
        cut, beyond = self.mass[:low], self.mass[high:]
        kept = float(cut @ values[:low]) / values[low]
        mass[0] += kept
        mass[-1] += float(np.sum(beyond))
        return _Spread(
            self.interval,
            self.first + low,
            mass,
            self.zero + max(0.0, float(np.sum(cut)) - kept),
            self.infinite + float(beyond @ (values[high:] - values[high - 1])),
        )


def _lognormal(sigma: float, interval: float, log_tail: float) -> _Spread:
    """Y on a grid: the ratio of a Gaussian mechanism."""
    atoms = SubsampledGaussian(sigma).on_every_multiple(interval, log_tail)
    first = round(float(atoms.loss[0]) / interval)
    return _Spread(interval, first, np.exp(atoms.log_q), atoms.q_infinite, atoms.p_infinite)


def _refined(x: _Spread, factor: int) -> _Spread:
    """The same variable on a grid that is finer by an integer factor."""
    if factor == 1:
        return x
    mass = np.zeros((len(x.mass) - 1) * factor + 1)
    mass[::factor] = x.mass
    return x._replace(interval=x.interval / factor, first=x.first * factor, mass=mass)


def _mean(a: _Spread, b: _Spread, alpha: float, factor: int, tail: float) -> _Spread:
    """alpha a + (1 - alpha) b for independent variables of one grid, on one finer by `factor`."""
    beta = 1 - alpha
    fine = a.interval / factor
    low = min(a.first, b.first) * factor + math.floor(math.log(min(alpha, beta)) / fine) - 1
    high = (max(a.first + len(a.mass), b.first + len(b.mass))) * factor + 2
    out = np.zeros(high - low)
    if a is b and alpha == beta:
        half = _Lead(a, b, alpha, beta, factor, out, low)
        half.add(1)
        out *= 2
        half.add(0, last=0)
    else:
        _Lead(a, b, alpha, beta, factor, out, low).add(0)
        _Lead(b, a, beta, alpha, factor, out, low).add(1)
    for x, other, weight in ((a, b, alpha), (b, a, beta)):
        if other.zero:  # the mean is then weight * x
            offset = math.log(weight) / fine
            _place(out, low, x.mass * other.zero, x.first * factor, factor, offset, fine)
    return _Spread(fine, low, out, a.zero * b.zero, alpha * a.infinite + beta * b.infinite).trimmed(
        tail
    )


def _place(
    out: np.ndarray, low: int, mass: np.ndarray, first: int, step: int, offset: float, fine: float
) -> None:
    """Adds masses at indices first, first + step, ..., all moved by a fractional offset."""
    whole = math.floor(offset)
    up = math.expm1((offset - whole) * fine) / math.expm1(fine)
    begin = first + whole - low
    end = begin + step * (len(mass) - 1) + 1
    out[begin:end:step] += (1 - up) * mass
    out[begin + 1 : end + 1 : step] += up * mass


class _Lead(NamedTuple):
    """Adds the mass of alpha a + beta b where a's index is ahead of b's by given differences."""

    a: _Spread
    b: _Spread
    alpha: float
    beta: float
    factor: int
    out: np.ndarray
    low: int

    def add(self, least: int, last: int | None = None) -> None:
        a, b, h, fine = self.a, self.b, self.a.interval, self.a.interval / self.factor
        largest = a.first + len(a.mass) - 1 - b.first
        smallest = a.first - (b.first + len(b.mass) - 1)
        begin, end = max(least, smallest), largest if last is None else min(last, largest)
        # From `settled` on, the offset stays in the cell that begins at or below ln alpha.
        cell = math.floor(math.log(self.alpha) / fine + 1e-9)
        room = math.exp((cell + 1) * fine) - self.alpha
        settled = math.floor(math.log(self.beta / room) / h) + 2 if room > 0 else largest + 1
        differences = np.arange(begin, min(end, settled - 1) + 1)
        offsets = np.log(self.alpha + self.beta * np.exp(-differences * h)) / fine
        whole = np.floor(offsets).astype(int)
        ups = np.expm1((offsets - whole) * fine) / math.expm1(fine)
        for d, shift, up in zip(differences.tolist(), whole.tolist(), ups.tolist()):
            i = max(a.first, b.first + d)
            stop = min(a.first + len(a.mass), b.first + len(b.mass) + d)
            if i >= stop:
                continue
            product = a.mass[i - a.first : stop - a.first]
            product = product * b.mass[i - d - b.first : stop - d - b.first]
            at = i * self.factor + shift - self.low
            until = at + (stop - i - 1) * self.factor + 1
            raised = up * product
            self.out[at + 1 : until + 1 : self.factor] += raised
            self.out[at : until : self.factor] += product - raised
        if settled <= end:
            self._rest(max(settled, begin), cell)

    def _rest(self, least: int, cell: int) -> None:
        """All differences from `least` on: the share that goes up is linear in e^(-d h)."""
        a, b, h, fine = self.a, self.b, self.a.interval, self.a.interval / self.factor
        i = np.arange(max(a.first, b.first + least), a.first + len(a.mass))
        if not len(i):
            return
        at = np.minimum(i - least - b.first, len(b.mass) - 1)
        values = np.exp((np.arange(len(b.mass)) - len(b.mass)) * h)
        count = np.cumsum(b.mass)[at]
        # e^(-d h) summed with b's masses; the exponent is that of b's end less a's index.
        scaled = np.cumsum(b.mass * values)[at] * np.exp((b.first + len(b.mass) - i) * h)
        base = self.alpha * math.exp(-cell * fine)
        up = (base - 1) * count + self.beta * math.exp(-cell * fine) * scaled
        lead = a.mass[i - a.first]
        up = lead * np.clip(up / math.expm1(fine), 0.0, count)
        begin = int(i[0]) * self.factor + cell - self.low
        end = begin + self.factor * (len(i) - 1) + 1
        self.out[begin : end : self.factor] += lead * count - up
        self.out[begin + 1 : end + 1 : self.factor] += up


@functools.lru_cache(maxsize=32)
def _epoch(sigma: float, t: int, steps: int, interval: float, log_tail: float) -> _Spread:
    """S of an epoch of t steps of which `steps` are taken."""
    tail = math.exp(log_tail)

    def factor_of(m: int) -> int:
        """How much coarser than the last grid is that of a sum of m terms."""
        return 2 ** round(math.log2(t / m) / 4)

    def onto(x: _Spread, factor: int) -> _Spread:
        return _refined(x, round(x.interval / (interval * factor)))

    power, in_power = _lognormal(sigma, interval * factor_of(1), log_tail), 1
    # Masses are those of Q, and what is below 5e-324 is lost. With fewer than 1e12 products the
    # loss under P is below e^(span - 715), which counts as infinite: where that is not negligible,
    # the bound by full batches is all there is.
    span = float(power.log_values[-1] - power.log_values[0])
    if span > 700:
        return _Spread(interval, 0, np.full(2, 0.5), 1.0, 1.0)
    power = power._replace(infinite=power.infinite + math.exp(span - 715))
    total, in_total = power, 0
    for bit in reversed(bin(steps)[2:]):
        coarse = round(power.interval / interval)
        if bit == "1":
            both = in_total + in_power
            if in_total:
                finer = max(1, coarse // factor_of(both))
                total = _mean(onto(total, coarse), power, in_total / both, finer, tail)
            else:
                total = power
            in_total = both
        if in_total < steps:
            power = _mean(power, power, 0.5, coarse // factor_of(2 * in_power), tail)
            in_power *= 2
    if steps == t:
        return onto(total, 1)
    one = _Spread(total.interval, 0, np.ones(1), 0.0, 0.0)  # the steps not taken have the ratio 1
    return onto(_mean(total, one, steps / t, 1, tail), 1)


@dataclasses.dataclass(frozen=True)
class AllocatedGaussian:
    """The Gaussian sums of an epoch, each example in one random step; see the module.

    Attributes:
        sigma: noise over the bound on one example's contribution.
        per_epoch: t, the steps of a whole epoch, at least 2.
        steps: how many of them are taken, in 1 .. t.
    """

    sigma: float
    per_epoch: int
    steps: int

    @property
    def tolerance(self) -> float:
        """Upper and lower bound are to differ by less than 1e-3, also after many doublings."""
        return 3e-4 if self.per_epoch < 1000 else 2e-4

    def cost(self, t: float, reverse: bool) -> float:
        """Measured, from two coarse grids: the error is that of all sums, weighted by the tilt."""
        values = []
        for factor in (1.0, 2.0):
            atoms = self._atoms(factor * self._coarse, -60.0)
            atoms = atoms.reversed() if reverse else atoms
            values.append(float(special.logsumexp(atoms.log_p + t * atoms.loss)))
        return max((values[1] - values[0]) / (3 * self._coarse**2), t * (1 + t) / 12)

    def coarse(self, log_tail: float) -> Atoms:
        return self._atoms(self._coarse, log_tail)

    @property
    def _coarse(self) -> float:
        """A quarter of the loss's standard deviation, or so."""
        scale = math.sqrt(math.expm1(min(1 / self.sigma**2, 50.0)) * self.steps) / self.per_epoch
        return min(scale, 1 / self.sigma) / 4

    def on_grid(self, interval: float, log_tail: float) -> tuple[np.ndarray, Atoms]:
        atoms = self._atoms(interval, log_tail)
        return np.rint(atoms.loss / interval).astype(np.int64), atoms

    def _atoms(self, interval: float, log_tail: float) -> Atoms:
        s = _epoch(self.sigma, self.per_epoch, self.steps, interval, log_tail)
        with np.errstate(divide="ignore"):
            log_q = np.log(s.mass)
        return Atoms(s.log_values, log_q + s.log_values, log_q, s.infinite, s.zero)

    def contracted(self, interval: float, log_tail: float) -> Atoms:
        def coarser(m: int) -> float:  # as for `_epoch`
            return interval * (self.per_epoch / m) ** 0.25

        y = SubsampledGaussian(self.sigma).contracted(coarser(1), log_tail)
        power, in_power = (np.exp(y.loss), np.exp(y.log_q)), 1
        total, in_total = power, 0
        for bit in reversed(bin(self.steps)[2:]):
            if bit == "1":
                both = in_total + in_power
                share = in_total / both
                total = _contracted(total, power, share, coarser(both)) if in_total else power
                in_total = both
            if in_total < self.steps:
                power = _contracted(power, power, 0.5, coarser(2 * in_power))
                in_power *= 2
        rest = 1 - self.steps / self.per_epoch
        log_s = np.log((1 - rest) * total[0] + rest)
        return Atoms(log_s, np.log(total[1]) + log_s, np.log(total[1]), 0.0, 0.0)


def _contracted(
    a: tuple[np.ndarray, np.ndarray],
    b: tuple[np.ndarray, np.ndarray],
    alpha: float,
    interval: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Values and masses of alpha a + (1 - alpha) b, contracted to the means of cells."""
    values = alpha * a[0][:, None] + (1 - alpha) * b[0]
    mass = a[1][:, None] * b[1]
    cell = np.floor(np.log(values) / interval).astype(np.int64)
    cell = (cell - cell.min()).ravel()
    total = np.bincount(cell, mass.ravel())
    mean = np.bincount(cell, (mass * values).ravel())
    some = total > 1e-200
    return mean[some] / total[some], total[some]
