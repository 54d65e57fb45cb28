"""Many runs of one config: sweeps over points, and searches for the best point."""

from dpjax.search import proposals, sweep, trials

__all__ = [
    "proposals",
    "sweep",
    "trials",
]
