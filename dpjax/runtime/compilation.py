"""Programs: compilations are cached on disk between runs and counted, jaxprs are told apart."""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.extend
import numpy as np

from dpjax import files

__all__ = ["Counter", "arrays_of", "content", "counting", "keep_on_disk"]


def keep_on_disk() -> None:
    """Caches compiled programs in $DPJAX_CACHE_DIR/xla, or ~/.cache/dpjax/xla.

    Runs with equal shapes, such as the points of a sweep over learning rates or epsilon, then
    compile once. An empty DPJAX_CACHE_DIR turns the cache off; JAX_COMPILATION_CACHE_DIR takes
    precedence.
    """
    if not files.caching() or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(files.cache_dir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class Counter:
    """Counts how often each jitted function was compiled, or loaded from the disk cache."""

    def __init__(self) -> None:
        self.times: collections.Counter[str] = collections.Counter()

    def __call__(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        """Receives an event from `jax.monitoring`."""
        if event == "/jax/core/compile/backend_compile_duration":
            name = str(kwargs.get("fun_name"))  # such as "jit(update)"
            self.times[name.removeprefix("jit(").removesuffix(")")] += 1

    def beyond_first(self, *names: str) -> int:
        """Returns how often the named functions were compiled again."""
        return sum(max(0, n - 1) for name, n in self.times.items() if name in names)


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """Counts the compilations inside the `with` block."""
    counter = Counter()
    jax.monitoring.register_event_duration_secs_listener(counter)
    try:
        yield counter
    finally:
        jax.monitoring.unregister_event_duration_listener(counter)


def arrays_of(node: Any) -> Iterator[Any]:
    """All arrays inside of a jaxpr that its print abbreviates or names only, in order.

    Those are the constants of closed jaxprs, of which jit, scan, cond, ... hold more, arrays that
    stand in an equation as literals, and arrays among the parameters of an equation.
    """
    if isinstance(node, (jax.extend.core.ClosedJaxpr, jax.extend.core.Jaxpr)):
        yield from getattr(node, "consts", ())
        inner: Any = getattr(node, "jaxpr", node)  # from jax 0.12 on it is the same object
        for equation in inner.eqns:
            yield from _literals(equation.invars)
            for _, parameter in sorted(equation.params.items()):
                yield from arrays_of(parameter)
        yield from _literals(inner.outvars)
    elif isinstance(node, (np.ndarray, jax.Array)):
        yield node
    elif isinstance(node, Mapping):
        yield from arrays_of(list(node.values()))
    elif isinstance(node, (tuple, list)):
        for item in node:
            yield from arrays_of(item)


def _literals(variables: Iterable[Any]) -> Iterator[Any]:
    return (v.val for v in variables if isinstance(v, jax.extend.core.Literal))


def content(array: Any) -> bytes:
    """Shape, dtype and bits of an array, or of a key, to be hashed."""
    keys = isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
    host = np.asarray(jax.random.key_data(array) if keys else array)
    return f"{host.shape} {host.dtype}".encode() + np.ascontiguousarray(host).tobytes()
