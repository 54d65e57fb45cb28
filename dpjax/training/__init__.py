"""Executes a run: the loop, what it feeds, and what it leaves."""

from dpjax.training import capacity, feed, loop, phases, results

__all__ = [
    "capacity",
    "feed",
    "loop",
    "phases",
    "results",
]
