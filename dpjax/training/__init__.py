"""Executes a run: the train loop, its batches, and the files it writes at the end."""

from dpjax.training import capacity, feed, loop, phases, results

__all__ = [
    "capacity",
    "feed",
    "loop",
    "phases",
    "results",
]
