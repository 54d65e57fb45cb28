"""The closed-form clipped sum of a linear head equals the general engine's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax import dp
from dpjax.dp import linear_head

WIDTH, CLASSES, BATCH = 6, 4, 9

RULES = {
    "flat": dp.flat(0.7),
    "flat normalized": dp.flat(0.7, normalized=True),
    "per layer": dp.per_layer(0.9),
    "per layer bounds": dp.per_layer(jnp.array([0.2, 0.6]), normalized=True),
    "automatic": dp.automatic(),
    "global": dp.global_(1.5),
}


def loss_fn(params, example):
    head = params["head"]
    logits = example["input"] @ head["kernel"] + head["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])


@pytest.fixture
def case():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "head": {
            "kernel": jax.random.normal(keys[0], (WIDTH, CLASSES)),
            "bias": jax.random.normal(keys[1], (CLASSES,)),
        }
    }
    inputs = jax.random.normal(keys[2], (BATCH, WIDTH)) * jnp.arange(BATCH)[:, None]
    labels = jax.random.randint(keys[3], (BATCH,), 0, CLASSES)
    return params, inputs, labels, jnp.arange(BATCH) != 4


def both(rule, params, inputs, labels, mask):
    made = linear_head.clipped_head_sum(params, rule, linear_head.rows(inputs, labels), mask)
    batch = {"input": inputs, "label": labels}
    return made, dp.clipped_sum(loss_fn, rule, method="vmap")(params, batch, mask)


@pytest.mark.parametrize("name", RULES)
def test_equals_the_vmap_engine(name, case):
    made, want = both(RULES[name], *case)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), made, want)
    assert jax.tree.structure(made) == jax.tree.structure(want)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 1e30])
def test_non_finite_examples_contribute_nothing(bad, case):
    params, inputs, labels, mask = case
    rule = RULES["flat"]
    without, _ = linear_head.clipped_head_sum(
        params, rule, linear_head.rows(inputs, labels), mask.at[2].set(False)
    )
    with_bad, facts = linear_head.clipped_head_sum(
        params, rule, linear_head.rows(inputs.at[2, 3].set(bad), labels), mask
    )
    jax.tree.map(np.testing.assert_array_equal, with_bad, without)
    assert facts.factors[2] == 0
    assert facts.real[2]


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e18])
@pytest.mark.parametrize("name", RULES)
def test_one_example_moves_the_sum_by_at_most_the_sensitivity(name, scale, case):
    params, inputs, labels, mask = case
    rule, inputs = RULES[name], inputs * scale
    with_all, _ = linear_head.clipped_head_sum(params, rule, linear_head.rows(inputs, labels), mask)
    one = jnp.arange(BATCH) == 8
    alone, _ = linear_head.clipped_head_sum(params, rule, linear_head.rows(inputs, labels), one)
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(alone.value)]
    assert np.linalg.norm(np.concatenate(leaves)) <= float(rule.sensitivity())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(with_all.value))


def test_plain_gradient(case):
    params, inputs, labels, mask = case
    got, facts = linear_head.head_sum(params, linear_head.rows(inputs, labels), mask)

    def total(params):
        losses = jax.vmap(loss_fn, (None, 0))(params, {"input": inputs, "label": labels})
        return jnp.sum(jnp.where(mask, losses, 0.0))

    want_loss, want = jax.value_and_grad(total)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, want)
    np.testing.assert_allclose(facts.loss.sum(), want_loss, rtol=1e-5)
    np.testing.assert_array_equal(facts.norms, np.zeros((len(mask), 1)))
    np.testing.assert_array_equal(facts.factors, np.ones((len(mask), 1)))


def test_other_trees_are_refused():
    made = linear_head.rows(jnp.ones((2, 3)), jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="params must be"):
        linear_head.head_sum({"head": {"kernel": jnp.ones((3, 2))}}, made, jnp.ones(2, bool))


def test_an_example_without_any_loss_is_finite_and_moves_nothing(case):
    params, inputs, _, mask = case
    params = jax.tree.map(lambda leaf: 1e4 * leaf, params)
    labels = jnp.argmax(inputs @ params["head"]["kernel"] + params["head"]["bias"][None], 1)
    (total, facts), _ = both(dp.flat(1.0), params, inputs, labels, mask)
    assert np.all(np.isfinite(facts.norms))
    assert np.all(facts.factors[mask] > 0)
    assert all(np.all(np.abs(leaf) < 1e-6) for leaf in jax.tree.leaves(total.value))
