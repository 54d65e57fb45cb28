"""Noise in whole numbers, for releases whose low bits an adversary may read: `dp.noise="secure"`.

A float32 Gaussian is no Gaussian: its low bits may tell sums apart (Mironov 2012), and float32 sums
of neighboring batches differ by more than the clip bound. Here nothing is rounded after clipping.

**The sum is exact.** A public grid of step `unit` is laid over the numbers. The engine computes
each example's clipped gradient a with |a| <= S, and contributes the integer vector y nearest to
a / unit if |y| <= L, and a / unit cut toward zero otherwise, which is no longer than a / unit.
Integers add up exactly modulo 2^32, in any order, so two sums that differ in one example differ by
one vector of norm at most L. L = S / unit (1 + margin), with a margin that nearly always suffices.

**The noise is a rounded Gaussian.** Let Z be N(0, STDDEV^2 I) over the reals. As y is integer,
y + round(Z) = round(y + Z): a function of the Gaussian mechanism's output on y. With unit such that
L = STDDEV / sigma, releasing y + round(Z) therefore costs what the Gaussian mechanism of noise
multiplier sigma costs, whatever sampling, composition and adaptivity surround it, and so does any
function of it: reduction modulo 2^32, conversion to float32, the optimizer.

**The sampler's law is that of round(Z), up to a total variation of GAP per number.** It draws
X = K x + y with x and y from discrete Gaussians on the integers, P[x = j] ~ exp(-j^2 / 2 s_x^2):

1. P[X = m] ~ sum_j exp(-j^2 / 2 s_x^2 - (m - K j)^2 / 2 s_y^2)
           = exp(-m^2 / 2 s^2) sum_j exp(-(j - c m)^2 / 2 t^2),
   with s^2 = K^2 s_x^2 + s_y^2, t = s_x s_y / s and some c. By Poisson's summation the last sum is
   t sqrt(2 pi) (1 + e), |e| <= 2.1 exp(-2 pi^2 t^2): X is the discrete Gaussian of parameter s up
   to a total variation of 2.1 exp(-2 pi^2 t^2) < 2^-85.
2. The discrete Gaussian of s and the rounded one of STDDEV^2 = s^2 - 1/12 differ by the fourth
   cumulant of the rounding, 1/120: |P / P' - 1| ~ |z^4 - 6 z^2 + 3| / (2880 s^4) at m = z s, in
   total variation below 2^-80.
3. Each of x and y comes from an alias table (Walker 1977) of 2^15 columns with thresholds of 70
   bits, so every probability is a multiple of 2^-85, which is off by less than that; the table's
   own distance, below 2^-73, is computed in integers when it is made (`_table`).

Over T steps of d numbers the total variation is at most T d GAP, and (epsilon, delta) becomes
(epsilon, delta + (1 + e^epsilon) T d GAP). `RESERVE` of delta is set aside for it.

**What is assumed.** ChaCha20 with a secret key of 256 random bits cannot be told from random bits.
The gradient of an example is computed to the same bits in whatever row of a chunk it stands, beside
whatever others; `microbatch=1` makes a program of one example of it. Batches are still drawn by
Philox, which is not cryptographic.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.dp import chacha

__all__ = ["GAP", "RESERVE", "STDDEV", "Grid", "check", "grid", "on_grid", "rounded_gaussian"]

_FACTOR, _OUTER, _INNER = 512, 1024, 896  # K, s_x, s_y
_S2 = (_FACTOR * _OUTER) ** 2 + _INNER**2

STDDEV = math.sqrt(_S2 - 1 / 12)
"""Standard deviation of the Gaussian that is rounded, in units of the grid: 2^19 and a bit."""

GAP = 2.0**-71
"""Bound on the total variation between one number of noise and the rounded Gaussian."""

RESERVE = 0.01
"""Share of delta that is set aside for the sampler's distance from the Gaussian."""

_INDEX, _THRESHOLD = 15, 70  # bits of a column's number, and of its threshold

# A number beyond 2^31 wraps around, which no guarantee minds, but training does.
_LARGEST_SUM = 2.0**31 - 16 * STDDEV

_CHUNK = {"cpu": 4096}  # blocks at once, which stay in the cache; on accelerators all
_SLACK = 2.0**-15  # more than the rounding of the squared norms that are compared with L^2


class Grid(NamedTuple):
    """The grid of a sum, float32 scalars.

    Attributes:
        unit: its step, in units of gradient norm.
        limit: L, the largest norm of a contribution, in steps.
    """

    unit: jax.Array
    limit: jax.Array

    @property
    def sensitivity(self) -> jax.Array:
        """L in units of gradient norm, slightly above the clipping rule's."""
        return self.unit * self.limit


def grid(
    sensitivity: jax.typing.ArrayLike, noise_multiplier: jax.typing.ArrayLike, size: int
) -> Grid:
    """Returns the grid on which noise of `STDDEV` steps has the wanted noise multiplier.

    Args:
        sensitivity: S of the clipping rule.
        noise_multiplier: sigma > 0, of the gradient.
        size: d, how many numbers the sum has.
    """
    limit = jnp.float32(STDDEV) / jnp.asarray(noise_multiplier, jnp.float32)
    # Rounding adds d/12 to the squared norm in the mean, and some units of |a| by chance.
    margin = size / 20 / jnp.square(limit) + 8 / limit
    return Grid(sensitivity * (1 + margin) / limit, limit)


def on_grid(vectors: list[jax.Array], grid: Grid) -> list[jax.Array]:
    """Rounds clipped gradients to the grid.

    Args:
        vectors: `[n, entries]` float32 each, of examples of total norm at most the sensitivity.
        grid: where to.

    Returns:
        int32 arrays of the same shapes; the norm of an example over all of them is at most
        `grid.limit`.
    """
    scaled = [vector / grid.unit for vector in vectors]
    near = [jnp.round(vector) for vector in scaled]
    square = sum(jnp.sum(jnp.square(vector), 1) for vector in near)
    fits = (square <= jnp.square(grid.limit) * (1 - _SLACK))[:, None]
    return [
        jnp.where(fits, to_nearest, jnp.trunc(vector)).astype(jnp.int32)
        for to_nearest, vector in zip(near, scaled)
    ]


def check(noise_multiplier: float, batch_size: float, size: int) -> None:
    """Refuses what the grid has no room for.

    Raises:
        ValueError: the sum may leave 32 bits, or rounding would add noise of its own.
    """
    limit = STDDEV / noise_multiplier
    most = batch_size + 12 * math.sqrt(batch_size) + 12
    if most * limit > _LARGEST_SUM:
        raise ValueError(
            f"noise='secure': a sum of batch_size={batch_size:g} examples at noise multiplier "
            f"{noise_multiplier:.4g} may exceed 32 bits: batch_size must be below "
            f"{_LARGEST_SUM / STDDEV * noise_multiplier:.0f}, or the noise larger."
        )
    if size / 20 / limit**2 > 0.05:
        raise ValueError(
            f"noise='secure': {size} trainable parameters are too many for noise multiplier "
            f"{noise_multiplier:.4g}: rounding them would move a sum by more than 5 % of the bound."
        )


def rounded_gaussian(key: jax.Array, size: int) -> jax.Array:
    """Draws round(N(0, STDDEV^2)), int32 `[size]`, up to a total variation of size * GAP.

    Args:
        key: typed key of `chacha`, used for nothing else.
        size: how many.

    Guarantees:
        A number depends on key and position alone. One block gives three numbers.
    """
    words = jax.random.key_data(key)
    outer, inner = (jnp.asarray(_table(s)[0]) for s in (_OUTER, _INNER))
    number = -(-size // 3)
    chunk = min(_CHUNK.get(jax.default_backend(), 1 << 22), number)

    def draw(counter: jax.Array) -> jax.Array:
        bits = chacha.blocks(words, counter)
        return jnp.stack([_number(bits, place, outer, inner) for place in range(3)], 1)

    counters = jnp.arange(-(-number // chunk) * chunk, dtype=jnp.uint32).reshape(-1, chunk)
    return jax.lax.map(draw, counters).reshape(-1)[:size]


def _number(bits: jax.Array, place: int, outer: jax.Array, inner: jax.Array) -> jax.Array:
    """Makes a number of 5 words and 10 bits of each block, `[16, n]`: 85 bits for each table."""
    first, second, shared, third, fourth = bits[5 * place : 5 * place + 5]
    rest = (bits[15] >> (10 * place)) & 0x3FF
    x = _look_up(outer, first, second, (shared >> 16 << 5) | (rest >> 5))
    y = _look_up(inner, third, fourth, ((shared & 0xFFFF) << 5) | (rest & 0x1F))
    return _FACTOR * x + y


def _look_up(table: jax.Array, first: jax.Array, second: jax.Array, third: jax.Array) -> jax.Array:
    """Takes 15 bits for the column and 17 + 32 + 21 bits to compare with its threshold."""
    column = (first >> 17).astype(jnp.int32)
    high, middle, low = (words[column] for words in table)
    own = first & 0x1FFFF
    threshold = high & 0x1FFFF  # above it stands the alias, in 15 bits
    below = (own < threshold) | (
        (own == threshold) & ((second < middle) | ((second == middle) & (third < low)))
    )
    chosen = jnp.where(below, column, (high >> 17).astype(jnp.int32))
    return chosen - (1 << (_INDEX - 1))


@functools.cache
def _table(scale: int) -> tuple[np.ndarray, float]:
    """The alias table of the discrete Gaussian of parameter `scale`.

    Returns:
        uint32 `[3, 2^15]`: the alias (15 bits) and the threshold's upper 17 bits, its next 32 and
        its last 21; and the table's total variation from the discrete Gaussian.
    """
    half, columns = 1 << (_INDEX - 1), 1 << _INDEX
    whole = 1 << (_INDEX + _THRESHOLD)
    weights = _weights(scale, half)
    total = weights[0] + 2 * sum(weights[1:])
    # Sums from the left are rounded, not the masses: those then add up to one, and no single one
    # takes the rounding of all.
    ends, end = [0], 0
    for j in range(-half, half):
        end += weights[abs(j)]
        ends.append(_divided(min(end, total) * whole, total))
    ends[-1] = whole
    mass = [b - a for a, b in itertools.pairwise(ends)]
    exact = (abs(m * total - weights[abs(j)] * whole) for j, m in zip(range(-half, half), mass))
    gap = sum(exact) / total / whole / 2

    # Walker's method in integers: a column holds 2^70, its own share first and then its alias's.
    capacity = 1 << _THRESHOLD
    threshold, alias = [0] * columns, list(range(columns))
    poor = [i for i in range(columns) if mass[i] < capacity]
    rich = [i for i in range(columns) if mass[i] >= capacity]
    while poor and rich:
        i, donor = poor.pop(), rich[-1]
        threshold[i], alias[i] = mass[i], donor
        mass[donor] -= capacity - mass[i]
        if mass[donor] < capacity:
            poor.append(rich.pop())
    # What is left is full: its threshold may be anything, for its alias is itself.
    packed = [
        [(a << 17) | (t >> 53), (t >> 21) & 0xFFFFFFFF, t & 0x1FFFFF]
        for a, t in zip(alias, threshold)
    ]
    return np.array(packed, np.uint32).T.copy(), gap


def _weights(scale: int, number: int) -> list[int]:
    """exp(-j^2 / 2 scale^2) for j = 0 .. number, in units of 2^-256, off by less than 2^-200."""
    one, places = 1 << 256, 256
    ratio = _exp_minus(one // (2 * scale**2), places)  # of the first two weights
    step = ratio * ratio >> places
    weights = [one]
    for _ in range(number):
        weights.append(weights[-1] * ratio >> places)
        ratio = ratio * step >> places
    return weights


def _exp_minus(x: int, places: int) -> int:
    """exp(-x) for small x >= 0, both in units of 2^-places."""
    total = term = 1 << places
    for n in range(1, 64):
        term = -term * x // n >> places
        total += term
    return total


def _divided(a: int, b: int) -> int:
    """a / b to the nearest integer."""
    return (2 * a + b) // (2 * b)
