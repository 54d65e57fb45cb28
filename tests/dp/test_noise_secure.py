"""Secure noise: ChaCha20's vectors, the sampler's exact law, exact sums, and what is accounted."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from scipy import stats

from dpjax import dp
from dpjax.dp import chacha, secure, seeds
from dpjax.dp.mechanism import epsilon_of

KEY = chacha.key_of(bytes(range(32)))
ALPHA = 1e-6
SIZE = 60_000


# --- The generator -------------------------------------------------------------------------------


def words(text):
    return [int(word, 16) for word in text.split()]


def test_the_block_of_rfc_8439_section_2_3_2():
    got = chacha.blocks(
        jax.random.key_data(KEY), jnp.array([1], jnp.uint32), (0x09000000, 0x4A000000, 0)
    )
    assert got[:, 0].tolist() == words(
        "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 "
        "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2"
    )


def test_the_key_streams_of_rfc_8439_appendix_a_1():
    zero, one = bytes(32), bytes(31) + b"\1"
    for secret, counter, first in (
        (zero, 0, "ade0b876 903df1a0 e56a5d40 28bd8653"),
        (zero, 1, "bee7079f 7a385155 7c97ba98 0d082d73"),
        (one, 1, "2452eb3a 9249f8ec 8d829d9b ddd4ceb1"),
    ):
        key = jax.random.key_data(chacha.key_of(secret))
        got = chacha.blocks(key, jnp.array([counter], jnp.uint32), (0, 0, 0))
        assert got[:4, 0].tolist() == words(first)


def test_keys_fold_split_and_draw_without_reading_a_block_twice():
    made = [KEY, *(jax.random.fold_in(KEY, i) for i in (0, 1, 2**32 - 1)), *jax.random.split(KEY)]
    drawn = {tuple(jax.random.bits(jax.random.clone(k), (8,)).tolist()) for k in made}
    own = {tuple(jax.random.key_data(k).tolist()) for k in made}
    assert len(drawn | own) == 2 * len(made)
    folded = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))(KEY, jnp.arange(2))
    assert (jax.random.key_data(folded)[1] == jax.random.key_data(made[2])).all()
    with pytest.raises(TypeError, match="256 bits"):
        jax.random.key(0, impl=chacha.IMPL)


def test_every_bit_of_a_256_bit_seed_counts_and_streams_differ():
    seed = seeds.draw_private_seed()
    assert seed.bit_length() > 230
    keys = {
        bytes(np.asarray(jax.random.key_data(seeds.noise_key(s, name, secure=True))))
        for s in (seed, seed ^ 1, seed ^ 2**255)
        for name in ("noise", "count")
    }
    assert len(keys) == 6
    assert all(len(key) == 32 for key in keys)


# --- The law -------------------------------------------------------------------------------------


def masses(scale):
    """The law that the alias table has, in units of 2^-85."""
    first, middle, last = ([int(w) for w in row] for row in secure._table(scale)[0])
    law = [0] * 2**15
    for column in range(2**15):
        below = ((first[column] & 0x1FFFF) << 53) | (middle[column] << 21) | last[column]
        law[column] += below
        law[first[column] >> 17] += 2**70 - below
    return law


@pytest.fixture(scope="module")
def laws():
    return masses(secure._OUTER), masses(secure._INNER)


def test_the_tables_are_discrete_gaussians(laws):
    with mpmath.workdps(60):
        for scale, law in zip((secure._OUTER, secure._INNER), laws):
            assert sum(law) == 2**85
            weights = [mpmath.exp(-mpmath.mpf(j * j) / (2 * scale**2)) for j in range(2**14 + 1)]
            total = weights[0] + 2 * sum(weights[1:])
            exact = [weights[abs(j)] / total for j in range(-(2**14), 2**14)]
            gap = sum(abs(m / mpmath.mpf(2) ** 85 - p) for m, p in zip(law, exact)) / 2
            assert gap == pytest.approx(secure._table(scale)[1], rel=1e-6)
            assert gap < 2.0**-73


def test_the_distance_from_the_rounded_gaussian_is_below_the_bound(laws):
    """Terms of the sum over all integers, from the exact law, against mpmath's."""
    outer, inner = laws
    half = 2**14
    with mpmath.workdps(60):
        sd = mpmath.sqrt(mpmath.mpf(secure._S2) - mpmath.mpf(1) / 12)
        assert float(sd) == pytest.approx(secure.STDDEV, rel=1e-14)
        for m in (0, 1, 255, 511, 1000, 524_288, -524_289, 1_234_567, -2_000_001):
            places = range((m - half) // secure._FACTOR + 1, (m + half) // secure._FACTOR + 1)
            got = sum(outer[j + half] * inner[m - secure._FACTOR * j + half] for j in places)
            low, high = ((m + mpmath.mpf(side) / 2) / sd for side in (-1, 1))
            want = mpmath.ncdf(high) - mpmath.ncdf(low)
            off = abs(got / mpmath.mpf(2) ** 170 - want)
            # Were every integer within 12 standard deviations off by as much as this one:
            assert off * 24 * sd / 2 < secure.GAP
    # The three parts of the proof.
    t = secure._OUTER * secure._INNER / math.sqrt(secure._S2)
    smooth, tables = 2.1 * math.exp(-2 * math.pi**2 * t**2), secure._table(1024)[1]
    assert tables + secure._table(896)[1] + smooth + 2.0**-80 < secure.GAP


def test_a_discrete_gaussian_of_the_matched_variance_is_the_rounded_one():
    with mpmath.workdps(80):
        s2 = mpmath.mpf(secure._S2)
        sd = mpmath.sqrt(s2 - mpmath.mpf(1) / 12)
        for z in (0.0, 0.5, 1.0, 3.0, 8.0):
            m = round(z * secure.STDDEV)
            rounded = mpmath.ncdf((m + 0.5) / sd) - mpmath.ncdf((m - 0.5) / sd)
            discrete = mpmath.exp(-m * m / (2 * s2)) / mpmath.sqrt(2 * mpmath.pi * s2)
            # The fourth cumulant, and next to nothing else.
            fourth = (z**4 - 6 * z**2 + 3) / 2880 / secure.STDDEV**4
            assert rounded / discrete - 1 == pytest.approx(-fourth, rel=1e-3)
        assert 300 / 2880 / secure.STDDEV**4 < 2.0**-79


@pytest.fixture(scope="module")
def numbers():
    return np.asarray(jax.jit(secure.rounded_gaussian, static_argnums=1)(KEY, SIZE))


def rejects(samples, scale):
    statistic = (samples.astype(np.float64) ** 2).sum() / scale**2
    law = stats.chi2(samples.size)
    return 2 * min(law.cdf(statistic), law.sf(statistic)) < ALPHA


def test_numbers_have_the_scale_and_neither_two_thirds_nor_three_halves(numbers):
    assert not rejects(numbers, secure.STDDEV)
    assert rejects(numbers, secure.STDDEV * 2 / 3)
    assert rejects(numbers, secure.STDDEV * 3 / 2)
    assert stats.kstest(numbers / secure.STDDEV, "norm").pvalue > ALPHA


def test_low_bits_are_fair_and_neighbors_independent(numbers):
    for bit in range(0, 18):
        ones = int(((numbers >> bit) & 1).sum())
        assert stats.binomtest(ones, SIZE).pvalue > ALPHA
    for lag in (1, 2, SIZE // 3):  # three numbers share a block
        assert abs(np.corrcoef(numbers[lag:], numbers[:-lag])[0, 1]) < 5 / np.sqrt(SIZE - lag)


def test_a_number_is_the_draw_of_its_85_bits():
    """`_look_up` against the table's law, at thresholds and beside them."""
    table = jnp.asarray(secure._table(secure._INNER)[0])
    first, middle, last = (np.asarray(row).astype(object) for row in table)
    columns = [i for i in range(2**15) if first[i] >> 17 != i][::997]
    for column in columns:
        high, low = int(first[column] & 0x1FFFF), int(last[column])
        threshold = (high << 53) | (int(middle[column]) << 21) | low
        for bits, want in ((threshold - 1, column), (threshold, int(first[column]) >> 17)):
            if 0 <= bits < 2**70:
                parts = (column << 17) | (bits >> 53), (bits >> 21) & 0xFFFFFFFF, bits & 0x1FFFFF
                got = secure._look_up(table, *(jnp.uint32(part) for part in parts))
                assert int(got) == want - 2**14


# --- The sum, and the mean -----------------------------------------------------------------------


def loss(params, example):
    return jnp.sum(params["w"] * example[:6].reshape(2, 3)) + params["b"] * example[6]


PARAMS = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(())}
ROWS = jnp.asarray(np.random.default_rng(0).normal(size=(64, 7)) * 3, jnp.float32)
EVERYONE = jnp.ones(64, bool)


@functools.partial(jax.jit, static_argnames="microbatch_size")
def summed(rows, mask, sigma=1.0, microbatch_size=None):
    grad = dp.clipped_sum(loss, dp.flat(0.5), secure_noise=sigma, microbatch_size=microbatch_size)
    return grad(PARAMS, rows, mask)[0]


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.int64).ravel() for leaf in jax.tree.leaves(tree)])


def test_the_sum_is_exact_in_any_order_and_chunks():
    whole = summed(ROWS, EVERYONE)
    order = np.random.default_rng(1).permutation(64)
    shuffled = summed(ROWS[order], EVERYONE, microbatch_size=8)
    halves = summed(ROWS[:32], EVERYONE[:32]) + summed(ROWS[32:], EVERYONE[32:])
    one_by_one = sum(flat(summed(ROWS, jnp.arange(64) == i).value) for i in range(64))
    for other in (shuffled.value, halves.value):
        np.testing.assert_array_equal(flat(whole.value), flat(other))
    np.testing.assert_array_equal(flat(whole.value), one_by_one)
    plain, _ = dp.clipped_sum(loss, dp.flat(0.5))(PARAMS, ROWS, EVERYONE)
    for got, want in zip(jax.tree.leaves(whole.value), jax.tree.leaves(plain.value)):
        np.testing.assert_allclose(got * whole.unit, want, atol=64 * float(whole.unit))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 40.0])
def test_neighboring_sums_differ_by_at_most_the_limit(sigma):
    """As integers, exactly: the limit is the standard deviation over sigma."""
    whole = flat(summed(ROWS, EVERYONE, sigma).value)
    for leaver in range(0, 64, 7):
        rest = flat(summed(ROWS, EVERYONE.at[leaver].set(False), sigma).value)
        moved = math.sqrt(sum(int(x) ** 2 for x in whole - rest))
        assert 0.99 * secure.STDDEV / sigma < moved <= secure.STDDEV / sigma


def test_a_contribution_that_rounding_would_make_too_long_is_cut():
    """Every entry at .5 and a bit: to the nearest, the norm grows by far more than the margin."""
    grid = secure.Grid(jnp.float32(1.0), jnp.float32(100.0))
    vector = jnp.full((1, 30_000), 0.501)  # of norm 87
    assert np.linalg.norm(np.round(vector)) > 100
    (got,) = secure.on_grid([vector], grid)
    assert not got.any()
    (got,) = secure.on_grid([vector[:, :9000]], grid)
    assert got.all()


def test_an_example_that_is_not_finite_and_padding_count_for_nothing():
    broken = ROWS.at[3, 0].set(jnp.nan)
    without = summed(ROWS, EVERYONE.at[3].set(False))
    np.testing.assert_array_equal(flat(summed(broken, EVERYONE).value), flat(without.value))
    assert not flat(summed(ROWS, ~EVERYONE).value).any()


def test_the_mean_has_the_accounted_noise():
    params, sigma, batch = {"w": jnp.zeros((300, 40))}, 1.7, 16.0
    grad = dp.clipped_sum(lambda p, x: jnp.sum(p["w"]) * x, dp.flat(0.25), secure_noise=sigma)
    total, _ = grad(params, jnp.zeros(4), jnp.ones(4, bool))
    tx = dp.gaussian(sigma, batch, key=KEY)
    state = tx.init(params)
    draws = []
    for _ in range(2):
        mean, state = jax.jit(tx.update)(total, state)
        draws.append(np.asarray(mean["w"]).ravel())
        scale = sigma * 0.25 / batch
        assert not rejects(draws[-1], scale * 1.002) or not rejects(draws[-1], scale)
        assert rejects(draws[-1], scale * 2 / 3)
        assert rejects(draws[-1], scale * 3 / 2)
    assert abs(np.corrcoef(draws)[0, 1]) < 5 / np.sqrt(12_000)
    resumed = tx.init(params)._replace(step=jnp.asarray(1, jnp.int32))
    np.testing.assert_array_equal(np.asarray(tx.update(total, resumed)[0]["w"]).ravel(), draws[1])


def test_noise_is_the_same_on_one_device_and_on_eight():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    tree = {"a": jnp.zeros((5, 16), jnp.int32), "b": jnp.zeros(64, jnp.int32)}
    total = dp.ClippedSum(tree, jnp.float32(1.0), unit=jnp.float32(1 / secure.STDDEV))
    tx = dp.gaussian(1.0, 1.0, key=KEY)
    update = lambda total: tx.update(total, tx.init(tree))[0]  # noqa: E731
    one = jax.jit(update)(total)
    value = total.value | {"b": jax.device_put(tree["b"], spread)}
    placed = dataclasses.replace(total, value=value)
    jax.tree.map(np.testing.assert_array_equal, one, jax.jit(update)(placed))


def test_a_sum_for_less_noise_gives_nothing_but_nan():
    total = summed(ROWS, EVERYONE, sigma=1.0)
    for sigma, finite in ((1.0, True), (0.9, True), (1.01, False)):
        tx = dp.gaussian(sigma, 64, key=KEY)
        mean, _ = jax.jit(tx.update)(total, tx.init(PARAMS))
        assert bool(jnp.isfinite(mean["b"])) == finite
    mixed = total + summed(ROWS, EVERYONE, sigma=2.0)
    assert jnp.isnan(mixed.unit)


def test_exact_sums_and_secure_keys_go_together():
    plain, _ = dp.clipped_sum(loss, dp.flat(0.5))(PARAMS, ROWS, EVERYONE)
    exact = summed(ROWS, EVERYONE)
    for total, key in ((plain, KEY), (exact, jax.random.key(0))):
        tx = optax.chain(dp.gaussian(1.0, 64, key=key), optax.sgd(0.1))
        with pytest.raises(TypeError, match="go together"):
            tx.update(total, tx.init(PARAMS))
    with pytest.raises(ValueError, match=r"noise_multiplier=0\.0 must be > 0"):
        dp.gaussian(0.0, 64, key=KEY)
    with pytest.raises(TypeError, match="do not add"):
        plain + exact
    with pytest.raises(ValueError, match="bookkeeping"):
        dp.clipped_sum(loss, dp.flat(0.5), secure_noise=1.0, method="bookkeeping")


def test_a_users_own_gradients_get_secure_noise_too():
    grads = {"w": jnp.asarray(np.random.default_rng(2).normal(size=(8, 5)), jnp.float32)}
    plain = dp.aggregate(0.5, 1e-2, 8, key=jax.random.key(0))
    exact = dp.aggregate(0.5, 1e-2, 8, key=KEY)
    params = {"w": jnp.zeros(5)}
    one, two = (jax.jit(tx.update)(grads, tx.init(params))[0]["w"] for tx in (plain, exact))
    assert np.abs(one - two).max() < 12 * 1e-2 * 0.5 / 8
    assert (one != two).all()


# --- What is accounted ---------------------------------------------------------------------------

BUDGET = {"epsilon": 2.0, "delta": 1e-5, "num_examples": 10_000, "batch_size": 200, "steps": 100}


def test_delta_pays_for_the_samplers_law():
    plain, made = dp.calibrated(**BUDGET), dp.calibrated(**BUDGET, secure_size=10**6)
    assert 1.0 < made.noise_multiplier / plain.noise_multiplier < 1.001
    assert made.epsilon(1e-5) <= 2.0
    assert made.epsilon(1e-5) == dataclasses.replace(made, secure_size=None).epsilon(0.99e-5)
    needed = (1 + math.exp(2.0)) * 100 * 10**6 * secure.GAP
    assert needed < 0.01 * 1e-5
    ledger = dp.Ledger((dp.Phase("train", made),), epsilon=2.0, delta=1e-5).charge(0, 100)
    assert ledger.spent() == made.epsilon(1e-5)
    said = dp.statement(ledger, clipping="", seed_policy="os_entropy", released=[], not_charged=[])
    assert "ChaCha20" in said["noise"]
    assert "not cryptographic" in said["noise"]  # of the batches
    assert said["phases"][0]["secure_size"] == 10**6


def test_a_delta_that_cannot_pay_is_refused():
    made = dp.calibrated(**BUDGET, secure_size=10**6)
    with pytest.raises(ValueError, match=r"delta=1e-12: secure noise of 1e\+08 numbers needs"):
        made.epsilon(1e-12)
    assert epsilon_of([made, made], [50, 50], 1e-5) == made.epsilon(1e-5)


@pytest.mark.parametrize(
    ("sigma", "batch", "size", "text"),
    [
        (0.5, 10_000, 10, "batch_size must be below 2040"),
        (1000.0, 100, 10**6, "1000000 trainable parameters are too many"),
    ],
)
def test_what_the_grid_has_no_room_for_is_refused(sigma, batch, size, text):
    with pytest.raises(ValueError, match=text):
        secure.check(sigma, batch, size)
    secure.check(1.0, 2000, 10**8)


def test_a_mechanism_gives_its_own_kind_of_noise():
    plain, made = dp.calibrated(**BUDGET), dp.calibrated(**BUDGET, secure_size=7)
    made.transform(key=KEY)
    for mechanism, key in ((plain, KEY), (made, jax.random.key(0))):
        with pytest.raises(TypeError, match="secure_size="):
            mechanism.transform(key=key)
    with pytest.raises(ValueError, match="count_noise"):
        dataclasses.replace(made, count_noise=50.0)
