"""The law of the noise, its keys, and the one division."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from dpjax import dp
from dpjax.dp import noise
from dpjax.dp.noise import gaussian_noise, standard_normal

SHAPES = {"a": jnp.zeros((300, 40)), "b": jnp.zeros((8000,))}
ALPHA = 1e-6  # false alarms of one test


def clipped(value, sensitivity=1.0):
    return dp.ClippedSum(value, jnp.asarray(sensitivity, jnp.float32))


def draws(noise_multiplier, sensitivity=1.0, batch=1.0, steps=3, key=0):
    tx = dp.gaussian(noise_multiplier, batch, key=jax.random.key(key))
    state, out = tx.init(SHAPES), []
    for _ in range(steps):
        updates, state = tx.update(clipped(SHAPES, sensitivity), state)
        out.append(updates)
    return out


def rejects(samples, scale):
    """Whether a chi-square test on the variance rejects N(0, scale^2)."""
    n = samples.size
    statistic = (samples.astype(np.float64) ** 2).sum() / scale**2
    return 2 * min(stats.chi2.cdf(statistic, n), stats.chi2.sf(statistic, n)) < ALPHA


@pytest.mark.parametrize(("sigma", "sensitivity", "batch"), [(1, 1, 1), (2.5, 0.3, 64)])
def test_variance_is_that_of_sigma_and_neither_two_thirds_nor_three_halves(
    sigma, sensitivity, batch
):
    for updates in draws(sigma, sensitivity, batch):
        for leaf in jax.tree.leaves(updates):
            samples = np.asarray(leaf).ravel()
            scale = sigma * sensitivity / batch
            assert not rejects(samples, scale)
            assert rejects(samples, scale * 2 / 3)
            assert rejects(samples, scale * 3 / 2)
            assert stats.kstest(samples / scale, "norm").pvalue > ALPHA


def test_leaves_and_steps_are_uncorrelated():
    flat = [np.asarray(x).ravel()[:8000] for u in draws(1.0) for x in jax.tree.leaves(u)]
    correlation = np.corrcoef(flat)
    off = correlation[~np.eye(len(flat), dtype=bool)]
    assert np.abs(off).max() < 5 / np.sqrt(8000)
    # The same check sees a reused key.
    again = [np.asarray(draws(1.0, steps=1)[0]["b"]), flat[1]]
    assert np.corrcoef(again)[0, 1] > 0.99


def test_noise_is_a_function_of_key_and_step():
    first, second = draws(1.0), draws(1.0)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    other = draws(1.0, key=1)
    assert (np.asarray(other[0]["b"]) != np.asarray(first[0]["b"])).mean() > 0.99


def test_resumed_state_continues_the_noise():
    tx = dp.gaussian(1.0, 1.0, key=jax.random.key(0))
    state = tx.init(SHAPES)._replace(step=jnp.asarray(2, jnp.int32))
    updates, _ = tx.update(clipped(SHAPES), state)
    jax.tree.map(np.testing.assert_array_equal, updates, draws(1.0)[2])


def test_noise_is_float32_for_bfloat16_parameters():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), SHAPES)
    tx = dp.gaussian(1.0, 1.0, key=jax.random.key(0))
    updates, _ = tx.update(clipped(half), tx.init(half))
    values = np.asarray(updates["b"])
    assert values.dtype == np.float32
    assert len(np.unique(values)) > 0.95 * values.size  # bfloat16 has some 600 values here


def noiseless_update(realized, expected=4.0):
    """Update for a batch of `realized` equal gradients of 1."""
    loss = lambda p, x: p["w"] * x  # noqa: E731
    params, batch = {"w": jnp.zeros(())}, jnp.ones(8)
    summed, _ = dp.clipped_sum(loss, dp.flat(1.0))(params, batch, jnp.arange(8) < realized)
    tx = dp.gaussian(0.0, expected, key=jax.random.key(0))
    return float(tx.update(summed, tx.init(params))[0]["w"])


def divides_by_the_expected_size(update):
    """Whether sizes 0, 1, B and 2B give that many gradients over B = 4."""
    # Each of n clipped gradients is smaller by the rules' reserve for rounding, 2**-17.
    return all(abs(update(n) - n / 4) < 1e-5 * max(1, n / 4) for n in (0, 1, 4, 8))


def test_the_division_is_by_the_expected_size():
    assert divides_by_the_expected_size(noiseless_update)


def test_division_by_the_realized_or_padded_size_is_seen():
    assert not divides_by_the_expected_size(lambda n: noiseless_update(n, max(n, 1)))
    assert not divides_by_the_expected_size(lambda n: noiseless_update(n, 8))


def test_an_empty_batch_is_a_step_of_pure_noise():
    params = {"w": jnp.zeros(1000)}
    summed, _ = dp.clipped_sum(lambda p, x: jnp.sum(p["w"]) * x, dp.flat(1.0))(
        params, jnp.ones(4), jnp.zeros(4, bool)
    )
    tx = dp.gaussian(2.0, 4.0, key=jax.random.key(0))
    updates, state = tx.update(summed, tx.init(params))
    assert not rejects(np.asarray(updates["w"]), 0.5)
    assert rejects(np.zeros(1000), 0.5)  # what a skipped step would give
    assert state.step == 1


@pytest.mark.parametrize("wrong", [{"w": jnp.ones(2)}, jnp.ones(2), None])
def test_plain_gradients_are_refused(wrong):
    tx = optax.chain(dp.gaussian(1.0, 1.0, key=jax.random.key(0)), optax.sgd(0.1))
    with pytest.raises(TypeError, match="ClippedSum"):
        tx.update(wrong, tx.init({"w": jnp.ones(2)}))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((-1.0, 1.0, jax.random.key(0)), ValueError, "noise_multiplier=-1.0"),
        ((np.nan, 1.0, jax.random.key(0)), ValueError, "noise_multiplier=nan"),
        ((np.inf, 1.0, jax.random.key(0)), ValueError, "noise_multiplier=inf must be >= 0"),
        ((1.0, 0.0, jax.random.key(0)), ValueError, "expected_batch_size=0.0 must be > 0"),
        ((1.0, 1.0, 0), TypeError, "typed key"),
        ((1.0, 1.0, jax.random.PRNGKey(0)), TypeError, "typed key"),
        ((1.0, 1.0, jax.random.split(jax.random.key(0))), TypeError, "single key"),
    ],
)
def test_bad_arguments(arguments, error, text):
    sigma, batch, key = arguments
    with pytest.raises(error, match=text):
        dp.gaussian(sigma, batch, key=key)


def test_a_key_is_required():
    with pytest.raises(TypeError):
        dp.gaussian(1.0, 1.0)


def test_aggregate_is_optax_without_its_noise():
    grads = {
        "w": jax.random.normal(jax.random.key(1), (8, 5)),
        "b": 3 * jax.random.normal(jax.random.key(2), (8,)),
    }
    params = jax.tree.map(lambda g: g[0], grads)
    theirs = optax.contrib.differentially_private_aggregate(0.5, 0.0, key=jax.random.key(0))
    with jax.numpy_rank_promotion("allow"):
        want, _ = theirs.update(grads, theirs.init(params))
    ours = dp.aggregate(0.5, 0.0, 8, key=jax.random.key(0))
    got, _ = ours.update(grads, ours.init(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)


def test_aggregate_survives_what_optax_does_not():
    grads = {"w": jnp.array([[1.0, 0.0], [jnp.nan, 0.0]])}
    ours = dp.aggregate(1.0, 0.0, 2, key=jax.random.key(0))
    got, _ = ours.update(grads, ours.init({"w": jnp.zeros(2)}))
    np.testing.assert_allclose(got["w"], [0.5, 0.0], rtol=1e-5)


def test_values_do_not_depend_on_the_number_of_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    draw = lambda key: gaussian_noise(key, SHAPES)  # noqa: E731
    one = jax.jit(draw)(jax.random.key(0))
    shardings = {"a": jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data")),
                 "b": spread}  # fmt: skip
    eight = jax.jit(draw, out_shardings=shardings)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, one, eight)


def test_aggregate_takes_more_examples_than_numbers():
    grads = {"a": jnp.ones((5, 3)), "b": jnp.ones((5, 2))}
    tx = dp.aggregate(1.0, 0.0, 5, key=jax.random.key(0))
    updates, _ = tx.update(grads, tx.init({"a": jnp.zeros(3), "b": jnp.zeros(2)}))
    np.testing.assert_allclose(updates["a"], jnp.full(3, 5**-0.5), rtol=1e-5)


def words(seed, number=200_000):
    """Pairs of random words whose first is of any size: tails of every depth are as frequent."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 2**32, number, dtype=np.uint64) >> rng.integers(
        0, 32, number, np.uint64
    )
    second = rng.integers(0, 2**32, number, dtype=np.uint64)
    return first.astype(np.uint32), second.astype(np.uint32)


def of_words(first, second, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(jax.random, "bits", lambda *_: jnp.stack([first, second]))
        return np.asarray(standard_normal(None, np.shape(first)), np.float64)


def test_numbers_are_the_quantiles_of_their_64_bits(monkeypatch):
    first, second = words(0)
    got = of_words(first, second, monkeypatch)
    tail = (first >> 1) * 2.0**-32 + (second + 0.5) * 2.0**-64
    want = stats.norm.ppf(tail) * np.where(first & 1, 1, -1)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert (np.abs(want) > 6).any()


def test_the_range_is_nine_standard_deviations_and_symmetric(monkeypatch):
    ends = of_words(np.array([0, 1], np.uint32), np.zeros(2, np.uint32), monkeypatch)
    np.testing.assert_allclose(ends, [9.155294, -9.155294], rtol=1e-6)
    middle = of_words(*np.full((2, 1), 2**32 - 1, np.uint32), monkeypatch)
    np.testing.assert_allclose(middle, 0.0, atol=1e-6)
    first, second = words(1)
    np.testing.assert_array_equal(
        of_words(first, second, monkeypatch), -of_words(first ^ 1, second, monkeypatch)
    )


def test_a_short_range_is_seen():
    """Of JAX's own normal numbers, made of a float below 1."""
    largest = jnp.nextafter(jnp.float32(1), jnp.float32(0))
    assert 5 < jnp.sqrt(2.0) * jax.scipy.special.erfinv(largest) < 6 < 9.155


@pytest.mark.parametrize("threshold", [2.0, 3.0, 4.0, 4.8])
def test_tails_are_those_of_the_normal_law(threshold):
    """Two million numbers; the last threshold is passed by one in 600,000 on each side."""
    z = np.asarray(jax.jit(standard_normal, static_argnums=1)(jax.random.key(9), (2_000_000,)))
    for side in (z, -z):
        beyond = int((side > threshold).sum())
        assert stats.binomtest(beyond, z.size, stats.norm.sf(threshold)).pvalue > ALPHA


def test_every_draw_for_privacy_has_these_tails():
    """JAX's own normal numbers stop at 5.2 to 5.4 standard deviations."""
    lines = [
        line
        for path in Path(noise.__file__).parent.rglob("*.py")
        for line in path.read_text().splitlines()
        if "random.normal(" in line and not line.startswith(">>>")
    ]
    assert lines == []


def test_aggregate_sums_in_full_precision():
    """On other hardware a product of matrices has fewer bits, and a sum could pass the bound."""
    tx = dp.aggregate(1.0, 0.0, 2, key=jax.random.key(0))
    params = {"w": jnp.zeros(3)}
    made = jax.make_jaxpr(lambda g: tx.update(g, tx.init(params))[0])({"w": jnp.ones((2, 3))})
    assert "reduce_sum[" in str(made)
    assert "dot_general[" not in str(made)
