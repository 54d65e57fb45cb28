"""Weights that are computed before a loop or a branch and used in it: known, and as by vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare_engines import agree, routes
from test_engine_bound import check, convolve

D = 5
MASK = (np.random.default_rng(0).random((D, D)) < 0.6).astype(np.float32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def masked(w):
    return jax.nn.softplus(w) * MASK


def normed(w):
    return w / jnp.linalg.norm(w, axis=0, keepdims=True)


def mixing(w):
    return jnp.sin(w @ w.T)


def rounded(w):
    return (w * MASK).astype(jnp.bfloat16)


def cell(h, x, u, w):
    return jnp.tanh(x @ w + (h.astype(u.dtype) @ u).astype(jnp.float32))


def in_a_scan(u, w, x):
    return jax.lax.scan(lambda h, x: (cell(h, x, u, w), None), x[0], x)[0]


def in_a_scan_backward_and_after(u, w, x):
    h = jax.lax.scan(lambda h, x: (cell(h, x, u, w), h), x[0], x, reverse=True)[1]
    return jnp.sin(h.astype(u.dtype) @ u).astype(jnp.float32)


def in_nested_scans(u, w, x):
    def outer(h, x):
        return jax.lax.scan(lambda h, _: (cell(h, x, u, w), None), h, None, length=2)[0], None

    return jax.lax.scan(outer, x[0], x)[0]


def in_checkpointed_turns(u, w, x):
    turn = jax.checkpoint(lambda h, x: (jax.jit(cell)(h, x, u, w), None))
    return jax.checkpoint(lambda x: jax.lax.scan(turn, x[0], x)[0])(x)


def in_branches(u, w, x):
    one, other = (lambda x: cell(x, x, u, w)), (lambda x: jnp.sin(cell(-x, x, u, w)))
    return jax.lax.cond(x[0, 0] > 0, one, other, x)


def in_a_branch_of_a_scan(u, w, x):
    def turn(h, x):
        return jax.lax.cond(x[0] > 0, lambda h: cell(h, x, u, w), jnp.sin, h), None

    return jax.lax.scan(turn, x[0], x)[0]


def convolved(u, w, x):
    kernel = jnp.stack([u, u + 0, u])

    def turn(h, _):
        return jnp.sin(convolve(h.astype(u.dtype), kernel).astype(jnp.float32) @ w), None

    return jax.lax.scan(turn, x, None, length=2)[0]


WAYS = [
    in_a_scan, in_a_scan_backward_and_after, in_nested_scans, in_checkpointed_turns, in_branches,
    in_a_branch_of_a_scan, convolved,
]  # fmt: skip
PARAMS = {"u": normal(D, D), "w": normal(D, D, seed=1)}


@pytest.mark.parametrize("kernel", [masked, normed, mixing, rounded])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.one_in(3)
def test_kernels_that_enter(way, kernel, without_margins):
    def loss_fn(params, x):
        return jnp.sum(jnp.sin(way(kernel(params["u"]), params["w"], x)))

    batch = normal(4, 3, D, seed=9)
    own = {"u", "w"} if way is not convolved or kernel is not rounded else {"w"}
    assert set(routes(loss_fn, PARAMS, batch)) == own
    tolerance = 3e-2 if kernel is rounded else 1e-4
    agree(loss_fn, PARAMS, batch, tolerance=tolerance, slack=tolerance)


def test_a_kernel_that_is_computed_in_the_loop_is_direct():
    """Its function cannot be run by itself."""

    def loss_fn(params, x):
        turn = lambda h, x: (cell(h, x, masked(params["u"]), params["w"]), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(turn, x[0], x)[0])

    batch = normal(4, 3, D, seed=9)
    assert set(routes(loss_fn, PARAMS, batch)) == {"w"}
    agree(loss_fn, PARAMS, batch, tolerance=1e-4)


def test_the_bound():
    """Tokens of different turns that cancel, and extreme scales."""

    def loss_fn(params, e):
        u = masked(params["u"])

        def turn(total, pair):
            x, g = pair
            return total + jnp.sum((x @ u) * g), None

        return jax.lax.scan(turn, 0.0, (e["x"], e["g"]))[0]

    x, g = normal(6, 12, D, seed=1), 100 * normal(6, 12, D, seed=2)
    x[0:2, 1::2], g[0:2, 1::2] = x[0:2, :1], -g[0:2, :1]
    x[0:2, ::2], g[0:2, ::2] = x[0:2, :1], g[0:2, :1]
    x[0] += 1e-5 * normal(12, D, seed=3)
    x[1] += 1e-3 * normal(12, D, seed=3)
    for i, scale in enumerate((1e15, 1e-15, 1e30, 1e-30)):
        x[2 + i] *= np.float32(scale)
    ordinary = {"x": normal(12, D), "g": normal(12, D, seed=5)}
    rtol = np.float32([1e9, 0.05] + [1e-3] * 4)
    params = {"u": PARAMS["u"]}
    check(loss_fn, params, ordinary, {"x": x, "g": g}, route="derived", rtol=rtol)
