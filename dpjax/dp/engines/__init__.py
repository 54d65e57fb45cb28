"""Clipped sums of gradients: example by example, or all from one backward pass."""

from dpjax.dp.engines import bookkeeping
from dpjax.dp.engines.check import EngineMismatch, check_engine
from dpjax.dp.engines.clipped_sum import METHODS, clipped_sum
from dpjax.dp.engines.explain import explain, route_shares
from dpjax.dp.engines.held import Held
from dpjax.dp.engines.memory import estimate_memory

__all__ = [
    "METHODS",
    "EngineMismatch",
    "Held",
    "bookkeeping",
    "check_engine",
    "clipped_sum",
    "estimate_memory",
    "explain",
    "route_shares",
]
