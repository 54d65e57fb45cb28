"""Many runs of one config: the points of a sweep, and searches over them."""

from dpjax.search import proposals, search, sweep

__all__ = [
    "proposals",
    "search",
    "sweep",
]
