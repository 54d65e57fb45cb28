"""Floating point: precision of sums, extreme gradients, drift, and the law of the noise on devices.

Statistical checks reject at ALPHA each, divided by the comparisons within it. Some 30 such checks
stand in the suite, so that a sound generator with fresh seeds would fail it once in 30,000 runs;
seeds are fixed, so that a check that passes goes on passing.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpjax import dp
from dpjax.dp.noise import gaussian_noise
from dpjax.runtime import sharding

ALPHA = 1e-6


def mlp_loss(params, example):
    hidden = jnp.tanh(example["x"] @ params["w"])
    return jnp.sum(jnp.square(hidden @ params["v"] - example["y"]))


def mlp(seed=0, size=16):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape)  # noqa: E731
    params = {"w": 0.5 * draw(6, 5), "v": 0.5 * draw(5, 3)}
    return params, {"x": draw(size, 6), "y": draw(size, 3)}


def mlp_clipped_sum_in_float64(params, batch, bound):
    """By hand, with numpy."""
    hidden = np.tanh(batch["x"] @ params["w"])
    error = 2 * (hidden @ params["v"] - batch["y"])
    v = np.einsum("bh,bo->bho", hidden, error)
    w = np.einsum("bi,bh->bih", batch["x"], (error @ params["v"].T) * (1 - hidden**2))
    norms = np.sqrt((v**2).sum((1, 2)) + (w**2).sum((1, 2)))
    factors = np.minimum(1, bound / norms)
    assert (factors < 1).any()
    assert (factors == 1).any()
    return {"w": np.einsum("b,bij->ij", factors, w), "v": np.einsum("b,bij->ij", factors, v)}


def distance(got, want):
    """Relative distance of two trees, in float64."""
    gap = [np.ravel(np.asarray(a, np.float64) - b) for a, b in zip(
        jax.tree.leaves(got), jax.tree.leaves(want))]  # fmt: skip
    size = [np.ravel(b) for b in jax.tree.leaves(want)]
    return np.linalg.norm(np.concatenate(gap)) / np.linalg.norm(np.concatenate(size))


@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
@pytest.mark.parametrize(
    "dtype,tolerance",
    [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)],  # bfloat16 rounds at 2^-9, some ten times over
)
def test_sums_agree_with_float64(dtype, tolerance, method):
    params, batch = mlp()
    # The same numbers in every precision: those that bfloat16 holds.
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (params, batch))
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), rounded)
    cast = jax.tree.map(lambda x: x.astype(dtype), rounded)
    summed = jax.jit(dp.clipped_sum(mlp_loss, dp.flat(6.0), method=method))
    got, _ = summed(*cast, jnp.ones(16, bool))
    want = mlp_clipped_sum_in_float64(*exact, 6.0)
    assert distance(got.value, want) < tolerance
    assert distance(got.value, jax.tree.map(lambda x: 1.1 * x, want)) > tolerance
    # Whatever the precision of the gradients, what is summed of one example is within the bound.
    for one in range(3):
        alone, _ = summed(*cast, jnp.arange(16) == one)
        leaves = [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(alone.value)]
        assert np.linalg.norm(np.concatenate(leaves)) <= 6.0


RULES = {
    "flat": dp.flat(0.5),
    "normalized": dp.flat(0.5, normalized=True),
    "automatic": dp.automatic(0.5),
    "global": dp.global_(0.5),
}
SCALES = 10.0 ** np.arange(-30, 31, 3)


@pytest.mark.parametrize("name", RULES)
def test_gradients_from_1e_30_to_1e_30(name):
    """Of every scale, alone and together, an example moves the sum by at most the sensitivity."""
    rule = RULES[name]
    direction = np.array([0.6, -0.8], np.float32)
    rows = jnp.asarray(SCALES[:, None] * direction, jnp.float32)
    summed = jax.jit(dp.clipped_sum(lambda p, x: jnp.vdot(p, x), rule, method="vmap"))
    everyone = jnp.ones(len(SCALES), bool)
    sums = [summed(jnp.zeros(2), rows, jnp.asarray(SCALES == s))[0].value for s in SCALES]
    alone = np.asarray(sums, np.float64)
    norms = np.linalg.norm(alone, axis=1)
    assert np.isfinite(alone).all()
    assert (norms <= float(rule.sensitivity())).all()
    seen = (norms > 0) & (SCALES > 1e-9)
    np.testing.assert_allclose(
        alone[seen] / norms[seen, None], np.broadcast_to(direction, alone[seen].shape), rtol=1e-5
    )
    if name == "flat":  # beyond 1e19 the square overflows: such an example counts for nothing
        want = np.where(SCALES > 1e19, 0, np.minimum(SCALES, 0.5))
        np.testing.assert_allclose(norms, want, rtol=1e-5)
    together = np.asarray(summed(jnp.zeros(2), rows, everyone)[0].value, np.float64)
    np.testing.assert_allclose(together, alone.sum(axis=0), rtol=1e-5)


MANY = 100_000


@pytest.fixture(scope="module")
def running_sum():
    """100,000 microbatches of one example each, added in float32 as a step adds them."""
    return jax.jit(
        dp.clipped_sum(lambda p, x: jnp.vdot(p, x), dp.flat(1.0), method="vmap", microbatch_size=1)
    )


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_drift_over_a_hundred_thousand_microbatches(running_sum, spread):
    """All gradients alike is the worst case: every addition is rounded the same way."""
    rng = np.random.default_rng(0)
    angle = 0.7 + spread * rng.normal(size=MANY)
    rows = np.stack([3 * np.cos(angle), 3 * np.sin(angle)], axis=1).astype(np.float32)
    mask = jnp.ones(MANY, bool)
    got = np.asarray(running_sum(jnp.zeros(2), rows, mask)[0].value, np.float64)
    exact = rows.astype(np.float64)
    want = (exact / np.linalg.norm(exact, axis=1, keepdims=True)).sum(axis=0)
    assert np.linalg.norm(got - want) < 2e-3 * np.linalg.norm(want)
    # What privacy needs is the distance of neighboring sums, and it does not drift.
    for leaver in (0, MANY // 2):
        rest = running_sum(jnp.zeros(2), rows, mask.at[leaver].set(False))[0].value
        assert np.linalg.norm(got - np.asarray(rest, np.float64)) < 1.02


def test_drift_would_show_in_half_precision():
    """The check above can fail: a sum in bfloat16 stops growing at 256."""
    total = jax.lax.scan(lambda s, _: (s + jnp.bfloat16(1), None), jnp.bfloat16(0), length=1000)[0]
    assert abs(float(total) - 1000) > 2e-3 * 1000


# --- The noise over devices ----------------------------------------------------------------------

LENGTH = 8 * 8192


def blocks(key, devices=8):
    """Noise as the devices hold it, `[devices, LENGTH / devices]`."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    draw = jax.jit(
        lambda k: gaussian_noise(k, jnp.zeros(LENGTH)), out_shardings=sharding.batch_sharding(mesh)
    )
    shards = draw(key).addressable_shards
    return np.stack([np.asarray(s.data, np.float64) for s in shards])


def independent(rows):
    """Whether the rows look independent: correlations, and a chi-square over pairs of signs."""
    rows = np.asarray(rows)
    pairs = list(itertools.combinations(range(len(rows)), 2))
    level = ALPHA / (2 * len(pairs))
    for one, other in pairs:
        z = np.corrcoef(rows[one], rows[other])[0, 1] * np.sqrt(rows.shape[1])
        table = np.histogram2d(rows[one], rows[other], bins=[[-9, -0.7, 0, 0.7, 9]] * 2)[0]
        if 2 * stats.norm.sf(abs(z)) < level or stats.chi2_contingency(table)[1] < level:
            return False
    return True


def test_devices_hold_independent_pieces_of_one_law():
    rows = blocks(jax.random.key(5))
    assert independent(rows)
    for row in rows:
        assert stats.kstest(row, "norm").pvalue > ALPHA / 8
    np.testing.assert_array_equal(rows.ravel(), blocks(jax.random.key(5), devices=1).ravel())


def test_the_same_draw_on_every_device_is_seen():
    rows = blocks(jax.random.key(5))
    rows[3] = rows[1]
    assert not independent(rows)
    # Uncorrelated, and yet not independent.
    rows[3] = rows[1] * np.where(np.random.default_rng(0).random(rows.shape[1]) < 0.5, 1, -1)
    assert not independent(rows)


def test_steps_leaves_and_neighbors_are_independent():
    tx = dp.gaussian(1.0, 1.0, key=jax.random.key(9))
    zeros = {"a": jnp.zeros(16384), "b": jnp.zeros(16384)}
    state, rows = tx.init(zeros), []
    for _ in range(3):
        updates, state = tx.update(dp.ClippedSum(zeros, jnp.asarray(1.0)), state)
        rows += [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(updates)]
    assert independent(rows)
    lagged = [rows[0][lag : lag - 64] for lag in (0, 1, 2, 32)]  # within one leaf
    assert independent(lagged)


def test_the_tails_are_those_of_a_gaussian():
    """Mechanisms live in the tails, where KS sees nothing."""
    draws = np.abs(blocks(jax.random.key(6)).ravel())
    for limit in (2.0, 3.0, 3.5):
        prob = 2 * stats.norm.sf(limit)
        law = stats.binom(draws.size, prob)
        beyond = int((draws > limit).sum())
        assert 2 * min(law.cdf(beyond), law.sf(beyond - 1)) > ALPHA / 3
    assert draws.max() < stats.norm.isf(ALPHA / draws.size / 2)
    narrow = draws[draws < 3]  # truncated noise is seen
    prob = 2 * stats.norm.sf(3.0)
    assert stats.binom(narrow.size, prob).cdf(0) < ALPHA
