"""Privacy losses of one release, on a grid, as an upper bound by construction.

A release is described by a dominating pair (P, Q). Its delta at e^epsilon is an expectation over Q
of a convex function of the likelihood ratio R = P/Q: (R - e^epsilon)+ in one direction, and
(1 - e^epsilon R)+ in the other. A mean-preserving spread of R raises both, and so raises delta
after any composition. So each cell of a grid of losses l = ln R gives its mass to its two ends,
with the mean of R kept ("connecting the dots", arXiv 2207.04380). Below the grid, mass is divided
between the lowest point and R = 0; above it, what exceeds the highest point counts as an infinite
loss. One discretization serves both directions, because P = R Q holds at every grid point. Moving
the mass of each cell to its mean, a contraction, gives a lower bound in the same way.

Masses come from logarithms of normal distribution functions, so they keep their relative precision
in the far tail.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np
from scipy import special

__all__ = ["Atoms", "Law", "Mixture", "SubsampledGaussian", "integers"]

_TOLERANCE = 2e-5
_COARSE = 3000  # points of a coarse grid
# Spacing of a grid far from zero, relative to the distance: it adds (1/1024)^2 / 6 = 2e-7 of the
# second moment of the loss to its variance.
_RELATIVE_SPACING = 1024


class Atoms(NamedTuple):
    """A discrete pair.

    Attributes:
        loss: `[atoms]` rising privacy losses ln(P/Q), in nats.
        log_p: `[atoms]` logarithms of their masses under P.
        log_q: `[atoms]` the same under Q.
        p_infinite: mass of P where Q has none.
        q_infinite: mass of Q where P has none.
    """

    loss: np.ndarray
    log_p: np.ndarray
    log_q: np.ndarray
    p_infinite: float
    q_infinite: float

    def reversed(self) -> Atoms:
        """Returns the pair (Q, P)."""
        return Atoms(
            -self.loss[::-1], self.log_q[::-1], self.log_p[::-1], self.q_infinite, self.p_infinite
        )


class Law(Protocol):
    """The pair of one release."""

    @property
    def tolerance(self) -> float:
        """The relative error of epsilon for which a grid is chosen."""

    def cost(self, t: float, reverse: bool) -> float:
        """Returns what a grid of interval h adds to ln E_P[R^t], divided by h^2.

        One spread has the variance h^2 / 6, relative to R^2, and E_P[R^t] = E_Q[R^(1 + t)].
        """

    def coarse(self, log_tail: float) -> Atoms:
        """Returns a cheap discretization, on a grid of its own. Also an upper bound."""

    def contracted(self, interval: float, log_tail: float) -> Atoms:
        """Returns a discretization that is a lower bound: cells contracted to their means."""

    def on_grid(self, interval: float, log_tail: float) -> tuple[np.ndarray, Atoms]:
        """Discretizes the pair on multiples of `interval`.

        Args:
            interval: in nats.
            log_tail: logarithm of the mass that may count as an infinite loss.

        Returns:
            The multiples, integers `[atoms]`, and the atoms.
        """


def integers(low: int, high: int) -> np.ndarray:
    """Rising integers from `low` or less to `high` or more: all near zero, and fewer far from it.

    >>> integers(-2, 3)
    array([-2, -1,  0,  1,  2,  3])
    """

    def rising(end: int) -> np.ndarray:
        near = np.arange(min(end, _RELATIVE_SPACING) + 1)
        if end <= _RELATIVE_SPACING:
            return near
        steps = 1 + int(_RELATIVE_SPACING * np.log(end / _RELATIVE_SPACING))
        far = _RELATIVE_SPACING * np.exp(np.arange(1, steps + 1) / _RELATIVE_SPACING)
        return np.unique(np.concatenate([near, np.ceil(far).astype(np.int64), [end]]))

    below, above = -rising(max(0, -low))[::-1], rising(max(0, high))
    whole = np.concatenate([below[:-1], above])
    return whole[(whole >= low) & (whole <= high)]


@dataclasses.dataclass(frozen=True)
class SubsampledGaussian:
    """One Gaussian sum over a Poisson sample; q = 1 is the Gaussian mechanism.

    Attributes:
        sigma: noise over the bound on one example's contribution.
        q: sampling probability, in (0, 1].
        replaced: P = (1-q) N(0) + q N(1) against Q = (1-q) N(0) + q N(-1), for replacing an
            example, in place of Q = N(0), for removing one. Both ratios rise with the outcome x
            (arXiv 1805.06530, 2106.08567).
    """

    sigma: float
    q: float = 1.0
    replaced: bool = False
    tolerance = _TOLERANCE

    def cost(self, t: float, reverse: bool) -> float:
        return t * (1 + t) / 12

    def coarse(self, log_tail: float) -> Atoms:
        lowest, highest = self._range(log_tail)
        return self._spread(np.unique(self._loss(np.linspace(lowest, highest, _COARSE))))

    def on_grid(self, interval: float, log_tail: float) -> tuple[np.ndarray, Atoms]:
        lowest, highest = self._loss(np.array(self._range(log_tail)))
        k = integers(int(np.floor(lowest / interval)), int(np.ceil(highest / interval)))
        return k, self._spread(k * interval)

    def on_every_multiple(self, interval: float, log_tail: float) -> Atoms:
        """As `on_grid`, with no multiple left out far from zero."""
        lowest, highest = self._loss(np.array(self._range(log_tail))) / interval
        return self._spread(np.arange(np.floor(lowest), np.ceil(highest) + 1) * interval)

    def _range(self, log_tail: float) -> tuple[float, float]:
        reach = -self.sigma * float(special.ndtri_exp(log_tail))
        return (-1 - reach if self.replaced else -reach), 1 + reach

    def _loss(self, x: np.ndarray) -> np.ndarray:
        """ln(1 - q + q e^v) at v = (x - 1/2) / sigma^2, or the two-sided loss."""

        def mixed(x: np.ndarray) -> np.ndarray:
            v = (x - 0.5) / self.sigma**2
            return np.where(
                v < 30,
                np.log1p(self.q * np.expm1(np.minimum(v, 30.0))),
                v + np.log(self.q) + np.log1p((1 / self.q - 1) * np.exp(-np.maximum(v, 30.0))),
            )

        with np.errstate(divide="ignore"):  # q = 1 far below zero
            if self.q == 1:
                return 2 * x / self.sigma**2 if self.replaced else (x - 0.5) / self.sigma**2
            return mixed(x) - mixed(-x) if self.replaced else mixed(x)

    def _outcome(self, loss: np.ndarray) -> np.ndarray:
        """The x of a loss; -inf where the loss is below all losses."""
        variance = self.sigma**2
        if self.q == 1:
            return variance * loss / 2 if self.replaced else variance * loss + 0.5
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if self.replaced:
                # With y = e^(x / variance), R (1-q + b/y) = 1-q + b y is quadratic in y, and
                # y = sqrt(R) e^asinh(z), z = (1-q) sinh(l/2) / b, b = q e^(-1 / (2 variance)).
                size = np.abs(loss) / 2
                log_z = np.log((1 - self.q) / self.q) + 0.5 / variance
                log_z = log_z + size + np.log(-np.expm1(-2 * size)) - np.log(2)
                asinh = np.where(log_z < 30, np.arcsinh(np.exp(np.minimum(log_z, 30.0))),
                                 log_z + np.log(2))  # fmt: skip
                return variance * np.sign(loss) * (size + asinh)
            small = np.log1p(np.maximum(np.expm1(np.minimum(loss, 30.0)) / self.q, -1.0))
            large = loss - np.log(self.q) + np.log1p(-(1 - self.q) * np.exp(-loss))
            return variance * np.where(loss < 30, small, large) + 0.5

    def contracted(self, interval: float, log_tail: float) -> Atoms:
        lowest, highest = self._loss(np.array(self._range(log_tail)))
        k = integers(int(np.floor(lowest / interval)), int(np.ceil(highest / interval)))
        return _contract(*self._cells(k * interval))

    def _spread(self, loss: np.ndarray) -> Atoms:
        return _spread(loss, *self._cells(loss))

    def _cells(self, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of the masses under P and Q below, between and above losses."""
        edges = np.concatenate([[-np.inf], self._outcome(loss), [np.inf]])
        moved = _log_masses((edges - 1) / self.sigma)
        unmoved = _log_masses(edges / self.sigma)
        with np.errstate(divide="ignore", invalid="ignore"):
            absent, present = np.log1p(-self.q), np.log(self.q)
            log_m = np.logaddexp(absent + unmoved, present + moved)
            log_w = unmoved
            if self.replaced:
                opposite = _log_masses((edges + 1) / self.sigma)
                log_w = np.logaddexp(absent + unmoved, present + opposite)
        return log_m, log_w


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Pairs of which one is picked at random, in view of everybody.

    Attributes:
        weights: of the pairs; they sum to 1.
        laws: the pairs.
    """

    weights: tuple[float, ...]
    laws: tuple[Law, ...]

    tolerance = _TOLERANCE

    def cost(self, t: float, reverse: bool) -> float:
        return max(law.cost(t, reverse) for law in self.laws)

    def coarse(self, log_tail: float) -> Atoms:
        return self._mixed([law.coarse(log_tail) for law in self.laws])

    def on_grid(self, interval: float, log_tail: float) -> tuple[np.ndarray, Atoms]:
        parts = [law.on_grid(interval, log_tail) for law in self.laws]
        mixed = self._mixed([atoms for _, atoms in parts])
        return np.rint(mixed.loss / interval).astype(np.int64), mixed

    def contracted(self, interval: float, log_tail: float) -> Atoms:
        return self._mixed([law.contracted(interval, log_tail) for law in self.laws])

    def _mixed(self, parts: list[Atoms]) -> Atoms:
        """The atoms of all; several may have one loss."""
        logs = np.log(self.weights)
        loss = np.concatenate([part.loss for part in parts])
        log_p = np.concatenate([log + part.log_p for log, part in zip(logs, parts)])
        log_q = np.concatenate([log + part.log_q for log, part in zip(logs, parts)])
        order = np.argsort(loss, kind="stable")
        infinite = [
            sum(w * mass for w, mass in zip(self.weights, masses))
            for masses in zip(*((part.p_infinite, part.q_infinite) for part in parts))
        ]
        return Atoms(loss[order], log_p[order], log_q[order], infinite[0], infinite[1])


def _log_masses(edges: np.ndarray) -> np.ndarray:
    """Logarithms of a standard normal's masses between neighboring edges, `[edges - 1]`.

    Differences are taken of the smaller tail, on either side of zero.
    """
    left, right = special.log_ndtr(edges), special.log_ndtr(-edges)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = left[1:] + np.log(-np.expm1(left[:-1] - left[1:]))
        above = right[:-1] + np.log(-np.expm1(right[1:] - right[:-1]))
        masses = np.where(edges[1:] + edges[:-1] < 0, below, above)
    masses = np.nan_to_num(masses, nan=-np.inf, neginf=-np.inf)
    return np.where(edges[1:] > edges[:-1], masses, -np.inf)


def _contract(log_m: np.ndarray, log_w: np.ndarray) -> Atoms:
    """Atoms at the means of R in cells, from the logarithms of their masses under P and Q."""
    some = np.isfinite(log_m) & np.isfinite(log_w)
    log_m, log_w = log_m[some], log_w[some]
    return Atoms(log_m - log_w, log_m, log_w, 0.0, 0.0)


def _spread(loss: np.ndarray, log_m: np.ndarray, log_w: np.ndarray) -> Atoms:
    """Gives the masses of cells to their ends.

    Args:
        loss: `[points]`, rising: the ends.
        log_m: `[points + 1]`, logarithms of the masses under P of the cells below the first point,
            between neighbors, and above the last.
        log_w: the same under Q.
    """
    inner = slice(1, -1)
    low, width = loss[:-1], np.diff(loss)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # ln(mean of R in the cell) - ln(R at its lower end), in [0, width].
        above = np.clip(np.nan_to_num(log_m[inner] - log_w[inner] - low), 0.0, width)
        p_up = np.clip(np.expm1(-above) / np.expm1(-width), 0.0, 1.0)
        q_up = np.clip(np.expm1(above) / np.expm1(width), 0.0, 1.0)
        log_p = np.logaddexp(
            np.append(log_m[inner] + np.log1p(-p_up), log_w[-1] + loss[-1]),
            np.append(log_m[0], log_m[inner] + np.log(p_up)),
        )
        log_q = np.logaddexp(
            np.append(log_w[inner] + np.log1p(-q_up), log_w[-1]),
            np.append(log_m[0] - loss[0], log_w[inner] + np.log(q_up)),
        )
        p_infinite = max(0.0, float(np.exp(log_m[-1]) - np.exp(log_w[-1] + loss[-1])))
        q_infinite = max(0.0, float(np.exp(log_w[0]) - np.exp(log_m[0] - loss[0])))
    return Atoms(loss, log_p, log_q, p_infinite, q_infinite)
