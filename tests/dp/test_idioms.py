"""Idioms of real models: vmap's numbers, and no per-example gradient of a large leaf."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare_engines import agree

from dpjax.dp.engines import bookkeeping, plans
from experiments.bench import idioms

pytestmark = pytest.mark.usefixtures("without_margins")

# Kernels and tables that stay direct, besides biases and scales of norms.
DIRECT = {"queries": ["queries"], "own_derivative": ["w0", "w1", "w2"]}


@pytest.mark.parametrize("name", idioms.IDIOMS)
def test_idiom(name):
    loss_fn, params, batch = idioms.small(name)
    plan = bookkeeping.plan(loss_fn, params, jax.tree.map(lambda x: x[0], batch))
    leaves = zip(plan, jax.tree.leaves(params), strict=True)
    direct = [leaf.path for leaf, p in leaves if leaf.route == "direct" and np.ndim(p) > 1]
    assert direct == DIRECT.get(name, [])
    agree(loss_fn, params, batch, tolerance=3e-5)


def test_the_plan_names_the_line_that_keeps_a_leaf_direct():
    loss_fn, params, batch = idioms.small("own_derivative")
    plan = bookkeeping.plan(loss_fn, params, jax.tree.map(lambda x: x[0], batch))
    lines = pathlib.Path(idioms.__file__).read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if "jnp.tanh(product(x, w))" in text)
    assert {leaf.source for leaf in plan} == {f"idioms.py:{line} (loss_fn)"}


def test_small_gradients_are_formed_on_the_way_back():
    loss_fn, params, batch = idioms.small("blocks")
    planned = plans.make_plan(loss_fn, params, batch[0])
    assert not planned.traced.taps  # nothing is recorded
    assert {leaf.route for leaf in plans.leaf_plans(planned, params)} == {"outer"}
    factors = {"a": np.ones((8, 2), np.float32), "b": np.ones((2, 8), np.float32)}
    merged = plans.make_plan(lambda p, x: jnp.sum(x @ (p["a"] @ p["b"])), factors, np.ones((99, 8)))
    assert not merged.small  # JAX would form the gradient of the product
    few = plans.make_plan(loss_fn, params, batch[0, :4])  # tokens, which are no more than they are
    assert len(few.traced.taps) == 2
    agree(loss_fn, params, batch[:, :4], tolerance=3e-5)
