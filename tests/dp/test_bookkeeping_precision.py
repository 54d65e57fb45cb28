"""The book-keeping engine on poisoned examples and in low precision; its work and its memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare_engines import MASK, agree, assert_close, both, routes
from jax.extend import core
from losses import (
    SIZE,
    all_in_half,
    as_loss,
    half_way,
    hidden,
    in_half,
    mlp,
    normal,
    poisonable,
)

from dpjax import dp
from dpjax.dp.clipping import by_leaf, per_layer
from dpjax.dp.engines import bookkeeping, parts

pytestmark = pytest.mark.usefixtures("without_margins")


POISONS = {
    "nan input": ("add", np.nan),
    "inf input": ("add", np.inf),
    "nan late": ("late", np.nan),
    "inf late": ("late", np.inf),
    "infinite weight": ("weight", np.inf),
    "nan weight": ("weight", np.nan),
    "huge weight": ("weight", 1e30),
}


@pytest.fixture(scope="module")
def poisoned_sum():
    loss_fn, params, batch = poisonable()
    rule = per_layer(0.5, grouping=by_leaf)

    @jax.jit
    def run(batch, mask):
        return bookkeeping.microbatch_sum(loss_fn, rule, params, batch, mask)

    assert sorted(routes(loss_fn, params, batch)) == ["conv", "dense", "embed", "wide"]
    return run, batch


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("rows", [[0], [2, 5]])
def test_poisoned_example_leaves_the_others_unchanged(poisoned_sum, poison, rows):
    run, batch = poisoned_sum
    name, value = POISONS[poison]
    bad = {k: np.copy(v) for k, v in batch.items()}
    if name == "weight":
        bad[name][rows] = value
    else:
        bad[name][rows, 3, 1] = value
    clean, facts = run(batch, ~np.isin(np.arange(6), rows))
    total, other = run(bad, np.ones(6, bool))
    assert (other.factors[np.array(rows)] == 0).all()
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(total), strict=True):
        np.testing.assert_array_equal(a, b)
    masked, _ = run(bad, ~np.isin(np.arange(6), rows))
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(masked), strict=True):
        np.testing.assert_array_equal(a, b)
    rest = ~np.isin(np.arange(6), rows)
    np.testing.assert_array_equal(facts.norms[rest], other.norms[rest])


def test_infinite_input_whose_cotangent_is_zero():
    """The loss and the other leaf's gradient are finite; 0 * inf is not."""

    def loss_fn(params, x):
        return jnp.sum(jnp.where(x > 1e9, 0.0, x @ params["a"])) + jnp.sum(params["b"])

    batch = np.array([[1.0], [np.inf]], np.float32)
    params = {"a": np.ones((1, 1), np.float32), "b": np.ones(2, np.float32)}
    agree(loss_fn, params, batch[:, None], dp.flat(10.0), mask=np.array([True, True]))


@pytest.mark.parametrize("tokens", [3, 24, 400], ids=["few", "some", "many"])
def test_bfloat16_is_as_exact_as_vmap(tokens):
    """Against float64: norms to 1%, sums to 2% of the largest entry, and no worse than vmap."""
    numbers = np.random.default_rng(0)
    shapes = {"a": (16, 32), "a0": (32,), "b": (32, 8), "b0": (8,)}
    params = {k: 0.3 * numbers.standard_normal(v) for k, v in shapes.items()}
    batch = (
        numbers.standard_normal((SIZE, tokens, 16)),
        numbers.standard_normal((SIZE, tokens, 8)),
    )
    rule = per_layer(0.02, grouping=by_leaf)
    single = jax.tree.map(np.float32, (params, batch))
    with jax.enable_x64(True):
        exact = dp.clipped_sum(mlp(jnp.float64), rule, method="vmap")
        (want, facts) = jax.tree.map(np.asarray, jax.jit(exact)(params, batch, MASK))
    errors = []
    for total, found in both(mlp(jnp.bfloat16), rule, *single):
        real = np.asarray(found.real)
        norm = np.max(np.abs(found.norms[real] / facts.norms[real] - 1))
        pairs = zip(jax.tree.leaves(want.value), jax.tree.leaves(total.value), strict=True)
        errors.append((norm, max(np.max(np.abs(a - b)) / np.max(np.abs(a)) for a, b in pairs)))
    (vmap_norm, vmap_sum), (norm, total) = errors
    assert norm < 0.01
    assert total < 0.02
    assert norm < 1.5 * vmap_norm + 1e-3
    assert total < 1.5 * vmap_sum + 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_summed_gradients_are_those_that_were_measured(dtype):
    """One example's clipped sum has the norm that its factor promises, in low precision too."""
    loss_fn, params, batch = poisonable()
    batch = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float32 else x, batch)
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), params)
    rule = dp.flat(1e-2)
    run = jax.jit(lambda mask: bookkeeping.microbatch_sum(loss_fn, rule, params, batch, mask))
    for i in range(3):
        total, facts = run(np.arange(6) == i)
        assert facts.norms[i, 0] > 1
        norm = np.sqrt(sum(np.sum(np.square(np.float64(g))) for g in jax.tree.leaves(total)))
        # Lower by the margin for numbers that are cut in two parts of 16 bits, never higher.
        assert 1e-2 * (1 - 1e-4) < norm <= 1e-2


@pytest.mark.parametrize("method", ["bookkeeping", "vmap"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("make", [in_half, all_in_half, half_way, hidden])
@pytest.mark.one_in(3)
def test_many_examples_move_no_sum_by_more_than_the_bound(make, dtype, method):
    """A sum that is rounded to few bits moves by its own rounding, which grows with its size."""
    numbers = np.random.default_rng(0)
    kernel = numbers.standard_normal((3, 3, 2, 4), np.float32)
    batch = 1.0 + 0.1 * numbers.standard_normal((512, 4, 4, 2), np.float32)

    def loss_fn(params, x):
        weight = make(params["kernel"], dtype)
        out = jax.lax.conv_general_dilated(
            x[None].astype(weight.dtype), weight, (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return 100 * jnp.sum(jnp.sin(out.astype(jnp.float32)))

    params = {"kernel": jnp.asarray(kernel)}
    clip = jax.jit(dp.clipped_sum(loss_fn, dp.flat(1.0), method=method))
    whole = clip(params, batch, np.ones(512, bool))[0].value["kernel"]
    assert jnp.linalg.norm(whole) > 100
    moved = [
        np.linalg.norm(whole - clip(params, batch, np.arange(512) != out)[0].value["kernel"])
        for out in range(0, 512, 64)
    ]
    assert max(moved) < 1.001


def test_frozen_parameters_cost_nothing():
    """The engine's work on a subset is that of an ordinary gradient of the same subset."""
    loss_fn, params, batch = poisonable()

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    def costs(names):
        frozen = {k: jnp.asarray(v) for k, v in params.items() if k not in names}
        own = {k: params[k] for k in names}

        def subset(own, example):
            return loss_fn({**frozen, **own}, example)

        def mean(own, batch):
            return jnp.mean(jax.vmap(lambda e: subset(own, e))(batch))

        clipped = dp.clipped_sum(subset, dp.flat(1.0), method="bookkeeping")
        # XLA counts the loop over doubtful examples as one turn. It takes none here.
        turn = flops(jax.grad(mean), own, jax.tree.map(lambda x: x[:1], batch))
        ours = flops(clipped, own, batch, np.ones(6, bool)) - turn
        return ours, flops(jax.grad(mean), own, batch)

    ours, plain = costs(["bias"])
    assert ours < 1.05 * plain
    assert ours < 0.5 * costs(list(params))[1]


def all_equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(inner, "jaxpr"):
                yield from all_equations(inner.jaxpr)


CHUNKED = {
    "patches": (nn.Conv(5, (3, 3)), normal(6, 6, 2), 36 * 18),
    "patches and kept gradients": (
        nn.Conv(6, (3, 3), feature_group_count=2),
        normal(9, 9, 4),
        2 * 81 * 18,
    ),
    "gradients": (nn.Dense(16), normal(50, 16), 16 * 16),
}


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.one_in(4)
def test_chunks_of_examples(monkeypatch, name, chunk):
    """What is too large for all examples at once is done a few at a time, with the same result."""
    layer, inputs, size = CHUNKED[name]
    loss_fn, params = as_loss(layer, inputs)
    whole = both(loss_fn, dp.flat(0.5), params, inputs)
    monkeypatch.setitem(parts._CHUNK, "cpu", chunk * size)
    agree(loss_fn, params, inputs)
    assert_close(whole[0], both(loss_fn, dp.flat(0.5), params, inputs)[1])

    def run(params):
        return bookkeeping.microbatch_sum(loss_fn, dp.flat(0.5), params, inputs, MASK)

    loops = [e.params["cond_jaxpr"].eqns for e in all_equations(jax.make_jaxpr(run)(params).jaxpr)
             if e.primitive.name == "while"]  # fmt: skip
    ends = [x.val for (compared,) in loops for x in compared.invars if isinstance(x, core.Literal)]
    assert ends == ([] if chunk == SIZE else [SIZE // chunk])
