"""Both engines on one loss, and the routes that the book-keeping engine takes."""

import jax
import jax.numpy as jnp
import numpy as np
from losses import SIZE

from dpjax import dp
from dpjax.dp.clipping import by_leaf, per_layer
from dpjax.dp.engines import bookkeeping

MASK = np.arange(SIZE) != 1


def both(loss_fn, rule, params, batch, mask=MASK, **kwargs):
    """The results of the vmap engine and of the book-keeping engine."""

    def run(params, batch, mask):
        return [
            dp.clipped_sum(loss_fn, rule, method=method, **kwargs)(params, batch, mask)
            for method in ("vmap", "bookkeeping")
        ]

    return jax.jit(run)(params, batch, mask)


def assert_close(expected, found, tolerance=1e-5, slack=1e-6):
    """Norms, factors and sums agree; a sum relative to its own leaf's size."""
    (want, facts), (have, other) = expected, found
    np.testing.assert_allclose(other.loss, facts.loss, rtol=tolerance, atol=slack)
    largest = float(np.max(facts.norms, where=np.isfinite(facts.norms), initial=0.0))
    for a, b in ((facts.norms, other.norms), (facts.factors, other.factors)):
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=slack * largest)
    np.testing.assert_array_equal(other.real, facts.real)
    assert have.sensitivity == want.sensitivity
    size = lambda leaf: float(jnp.max(jnp.abs(leaf), initial=0.0))  # noqa: E731
    scale = max(map(size, jax.tree.leaves(want.value)))
    for a, b in zip(jax.tree.leaves(want.value), jax.tree.leaves(have.value), strict=True):
        assert b.dtype == jnp.float32
        bound = tolerance * size(a) + slack * scale
        np.testing.assert_allclose(b, a, rtol=0, atol=bound)


def agree(loss_fn, params, batch, rule=None, mask=MASK, **kwargs):
    """By default clips every leaf on its own, so that each leaf's norm is compared."""
    rule = per_layer(0.5, grouping=by_leaf) if rule is None else rule
    assert_close(*both(loss_fn, rule, params, batch, mask), **kwargs)


def routes(loss_fn, params, batch):
    """The leaves that are not direct."""
    example = jax.tree.map(lambda x: x[0], batch)
    plan = bookkeeping.plan(loss_fn, params, example)
    return {leaf.path: leaf.route for leaf in plan if leaf.route != "direct"}


def set_apart(monkeypatch, loss_fn, params, batch):
    """How many examples the book-keeping engine does not trust."""
    found, clip = [], bookkeeping._clip

    def noted(*args):
        found.append(clip(*args))
        return found[-1]

    monkeypatch.setattr(bookkeeping, "_clip", noted)
    n = jax.tree.leaves(batch)[0].shape[0]
    engine = dp.clipped_sum(loss_fn, dp.flat(1e-3), microbatch_size=n)
    engine(params, batch, np.ones(n, bool))
    monkeypatch.undo()
    return int(np.sum(~found[0].usable))
