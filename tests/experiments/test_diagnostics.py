"""Diagnostics of clipping against brute force: per-example gradients, every batch there can be."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.clip_batch import diagnostics

EXAMPLES, SIGMA = 6, 0.4


def loss_fn(params, example):
    logits = jnp.tanh(example["x"] @ params["a"]) @ params["b"]
    return -jax.nn.log_softmax(logits)[example["y"]]


def problem(seed=0, examples=EXAMPLES):
    rng = np.random.default_rng(seed)
    params = {"a": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
              "b": jnp.asarray(3 * rng.normal(size=(4, 2)), jnp.float32)}  # fmt: skip
    batch = {"x": jnp.asarray(rng.normal(size=(examples, 3)), jnp.float32),
             "y": jnp.asarray(rng.integers(0, 2, examples))}  # fmt: skip
    return params, batch


@pytest.fixture(scope="module")
def gradients():
    """Flat per-example gradients, one `jax.grad` after the other."""
    params, batch = problem()
    rows = []
    for i in range(EXAMPLES):
        grad = jax.grad(loss_fn)(params, jax.tree.map(lambda x, i=i: x[i], batch))
        rows.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grad)]))
    return np.array(rows, np.float64)


def clip(gradients, bound):
    lengths = np.linalg.norm(gradients, axis=1)
    return gradients * np.minimum(1, bound / lengths)[:, None]


def brute_error(gradients, bound, prob):
    """The expectation over every subset, with the noise's own variance added."""
    examples, dimension = gradients.shape
    clipped, mean = clip(gradients, bound), gradients.mean(axis=0)
    found = (bound * SIGMA) ** 2 * dimension / (prob * examples) ** 2
    for chosen in itertools.product((0, 1), repeat=examples):
        likely = np.prod([prob if c else 1 - prob for c in chosen])
        estimate = np.array(chosen) @ clipped / (prob * examples)
        found += likely * np.sum((estimate - mean) ** 2)
    return found


def test_gram_is_of_the_per_example_gradients(gradients):
    found = diagnostics.gram(loss_fn, *problem())
    np.testing.assert_allclose(found, gradients @ gradients.T, rtol=1e-5, atol=1e-6)
    lengths = np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(diagnostics.norms(found), lengths, rtol=1e-5)


@pytest.mark.parametrize("prob", [1.0, 0.3])
@pytest.mark.parametrize("share", [0.1, 0.5, 2.0])
def test_error_is_the_expected_squared_error(gradients, prob, share):
    bound = share * np.linalg.norm(gradients, axis=1).max()
    found = diagnostics.error(
        gradients @ gradients.T, bound, noise_multiplier=SIGMA, sampling_prob=prob,
        dimension=gradients.shape[1],
    )  # fmt: skip
    assert found.total == pytest.approx(brute_error(gradients, bound, prob), rel=1e-9)
    assert (found.clipping > 0) == (share < 1)
    assert (found.sampling > 0) == (prob < 1)


def test_the_paper_s_formula_at_full_batch(gradients):
    """MSE(C) = C^2 sigma^2 d + |sum over the clipped of (1 - C/|g|) g|^2 (arXiv 2510.20616)."""
    lengths = np.linalg.norm(gradients, axis=1)
    bound = np.median(lengths)
    weight = np.where(lengths > bound, 1 - bound / lengths, 0)
    dimension = gradients.shape[1]
    want = (bound * SIGMA) ** 2 * dimension + np.sum((weight @ gradients) ** 2)
    found = diagnostics.error(
        gradients @ gradients.T, bound, noise_multiplier=SIGMA, dimension=dimension
    )
    assert found.total * EXAMPLES**2 == pytest.approx(want)


@pytest.mark.parametrize("prob", [1.0, 0.3])
@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.4, 3.0])
def test_no_bound_is_better_than_the_best(gradients, prob, sigma):
    options = {"noise_multiplier": sigma, "sampling_prob": prob, "dimension": gradients.shape[1]}
    products = gradients @ gradients.T
    best = diagnostics.best_bound(products, **options)
    least = diagnostics.error(products, best, **options).total
    lengths = np.linalg.norm(gradients, axis=1)
    others = [diagnostics.error(products, c, **options).total
              for c in np.linspace(1e-3, 1.2, 4000) * lengths.max()]  # fmt: skip
    assert least <= min(others) * (1 + 1e-12)
    if sigma == 0 and prob == 1:
        assert best >= lengths.max() * (1 - 1e-9)  # without noise nothing is to be gained


def test_the_best_bound_is_the_paper_s_fixed_point(gradients):
    """C* = <N,G> / (<N,N> + sigma^2 d) over the clipped ones, where it is not one of the norms."""
    lengths, dimension = np.linalg.norm(gradients, axis=1), gradients.shape[1]
    best = diagnostics.best_bound(
        gradients @ gradients.T, noise_multiplier=SIGMA, dimension=dimension
    )
    assert np.abs(lengths - best).min() > 1e-6
    over = lengths > best
    g, n = gradients[over].sum(0), (gradients[over] / lengths[over, None]).sum(0)
    assert best == pytest.approx(n @ g / (n @ n + SIGMA**2 * dimension))


def test_a_sample_is_unbiased_for_the_whole(gradients):
    options = {"noise_multiplier": SIGMA, "sampling_prob": 0.3, "dimension": gradients.shape[1]}
    products, bound = gradients @ gradients.T, np.linalg.norm(gradients, axis=1).mean()
    whole = diagnostics.error(products, bound, **options)
    parts = [
        diagnostics.error(products[np.ix_(rows, rows)], bound, num_examples=EXAMPLES, **options)
        for rows in map(list, itertools.combinations(range(EXAMPLES), 3))
    ]
    np.testing.assert_allclose(np.mean(parts, axis=0), whole, rtol=1e-9)
    naive = [
        diagnostics.error(products[np.ix_(rows, rows)], bound, **options).clipping
        for rows in map(list, itertools.combinations(range(EXAMPLES), 3))
    ]
    assert np.mean(naive) > 1.05 * whole.clipping  # a plain mean of the sample would be biased


def test_a_sample_larger_than_everything_is_refused():
    with pytest.raises(ValueError, match="num_examples=2"):
        diagnostics.error(np.eye(3), 1.0, noise_multiplier=1.0, dimension=3, num_examples=2)


def test_class_weights_against_the_clipped_gradients(gradients):
    """The weight of a class is how much shorter clipping makes its examples on average."""
    labels, bound = np.array([0, 0, 1, 1, 1, 3]), np.linalg.norm(gradients, axis=1).mean()
    short = np.linalg.norm(clip(gradients, bound), axis=1) / np.linalg.norm(gradients, axis=1)
    found = diagnostics.class_weights(np.linalg.norm(gradients, axis=1), labels, bound, 4)
    for label in (0, 1, 3):
        assert found[label] == pytest.approx(short[labels == label].mean())
    assert np.isnan(found[2])
