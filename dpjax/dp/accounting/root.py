"""Searches along one monotone quantity that is costly to evaluate. Knows nothing of privacy."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["falling_root", "largest_integer"]


def falling_root(
    gap: Callable[[float], float],
    start: float,
    slope: float,
    *,
    tol: float,
    floor: float = -30.0,
    ceiling: float = 30.0,
) -> tuple[float, float] | None:
    """Where a falling function crosses zero, from the safe side, in few evaluations.

    Secant steps aim 0.4 tol past the predicted root, on the side that is still missing, so that
    two good predictions end the search.

    Args:
      gap: falling function; may be infinite, not NaN.
      start: first guess.
      slope: expected slope of `gap` there, < 0.
      tol: width of the bracket to reach.
      floor: no x below it is tried.
      ceiling: the search gives up above it.
    Returns:
      (x, slope) with gap(x) <= 0 < gap(y) for some y >= x - tol, or x = floor where even gap(floor)
      <= 0; None where no x up to the ceiling has gap(x) <= 0.
    """
    x, low, high, last = start, None, None, None
    for trial in range(100):
        x = min(max(x, floor), ceiling)
        last, point = (x, gap(x)), last
        if point and point[0] != x and math.isfinite(last[1] - point[1]):
            slope = min(-0.1, max(-10.0, (last[1] - point[1]) / (x - point[0])))
        low, high = (low, last) if last[1] <= 0 else (last, high)
        if high and (high[0] <= floor or (low and high[0] - low[0] <= tol)):
            return high[0], slope
        if low and low[0] >= ceiling:
            return None
        step = -last[1] / slope if math.isfinite(last[1]) else math.copysign(1.0, last[1])
        root = x + max(-3.0, min(3.0, step))
        upwards = high is None or (low is not None and high[0] - root > 0.5 * tol)
        x = root + (0.4 if upwards else -0.4) * tol
        if low is None or high is None:  # a poor slope must not make the search crawl
            least = min(3.0, 0.4 * tol * 2.0**trial)
            x = max(x, last[0] + least) if upwards else min(x, last[0] - least)
        elif (trial > 6 and trial % 4 == 3) or not low[0] < x < high[0]:
            x = (low[0] + high[0]) / 2
    return None


def largest_integer(fits: Callable[[int], bool], *, guess: int, top: int) -> int:
    """Largest n in 1..top with fits(n), for a test that holds up to some n; 0 if it never holds.

    Doubling steps away from the guess until both sides are known, then bisection.
    """
    low, high, n, width = 0, top + 1, min(max(guess, 1), top), 1
    while high - low > 1:
        if fits(n):
            low, n = n, n + width
        else:
            high, n = n, n - width
        n, width = n if low < n < high else (low + high) // 2, 2 * width
    return low
