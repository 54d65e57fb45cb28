"""Many runs of one config: sweeps over points, and searches for the best point."""

from dpjax.search import proposals, search, sweep

__all__ = [
    "proposals",
    "search",
    "sweep",
]
