"""The estimate of temporaries against XLA's, and the parts that batches are taken in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import classify

from dpjax import dp
from dpjax.dp.engines import memory
from dpjax.dp.engines.plans import make_plan
from experiments.bench import idioms

WIDTH, TOKENS, SIZE = 192, 32, 16


def deep(params, x):
    """Products and little else: what the engine records is twice what a plain gradient keeps."""
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.sum(x)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


LAYERS = [normal(WIDTH, WIDTH) / WIDTH**0.5] * 4
BATCH = normal(SIZE, TOKENS, WIDTH)


def sizes_of(loss_fn, params, batch):
    example = jax.tree.map(lambda x: x[0], batch)
    return memory.sizes_of(make_plan(loss_fn, params, example), params)


def temporaries(loss_fn, params, batch, **options):
    """Bytes of a plain and of a clipped gradient."""
    mask = jnp.ones(jax.tree.leaves(batch)[0].shape[0], bool)

    def plain(params, batch):
        return jax.grad(lambda p: jnp.mean(jax.vmap(lambda x: loss_fn(p, x))(batch)))(params)

    def clipped(params, batch):
        return dp.clipped_sum(loss_fn, dp.flat(1.0), **options)(params, batch, mask)[0].value

    programs = [jax.jit(f).lower(params, batch).compile() for f in (plain, clipped)]
    return [program.memory_analysis().temp_size_in_bytes for program in programs]


def test_gradients_that_are_kept_take_the_place_of_what_they_are_formed_from():
    """Nor does the loop over chunks hold memory before the first gradient is there."""
    plain, ours = temporaries(*idioms.resnet(idioms._Draw(small=False)))
    assert ours < 1.5 * plain


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("tied", "queries", "experts")]


@pytest.mark.parametrize("name", ["sliced", "gru", *SLOW])
def test_the_estimate_is_near_xlas_temporaries(name):
    loss_fn, params, batch = idioms.IDIOMS[name](idioms._Draw(small=False))
    n = jax.tree.leaves(batch)[0].shape[0]
    plain, whole = temporaries(loss_fn, params, batch, microbatch_size=n)
    estimate = sizes_of(loss_fn, params, batch)
    assert 0.6 < n * estimate.plain / plain < 1.5
    assert 0.6 < (n * estimate.ours + estimate.fixed) / whole < 1.5


def test_a_batch_taken_in_parts_stays_near_a_plain_gradient():
    sizes = sizes_of(deep, LAYERS, BATCH)
    assert sizes.whole(SIZE) > 1.5
    assert memory.microbatch(sizes, SIZE) < SIZE
    plain, whole = temporaries(deep, LAYERS, BATCH, microbatch_size=SIZE)
    parts = temporaries(deep, LAYERS, BATCH)[1]
    assert whole > 1.6 * plain
    assert parts < 1.4 * plain


def test_parts_add_up_to_the_whole():
    mask = jnp.arange(SIZE) != 3
    run = lambda **options: jax.jit(  # noqa: E731
        dp.clipped_sum(deep, dp.flat(1.0), **options)
    )(LAYERS, BATCH, mask)
    (total, facts), (want, all_facts) = run(), run(microbatch_size=SIZE)
    for a, b in zip(total.value, want.value):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(facts.norms, all_facts.norms, rtol=1e-5)
    np.testing.assert_array_equal(facts.real, all_facts.real)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("n", [7, 8, 24, 1000, 1024])
def test_parts_are_equal_and_at_most_eight(n, platform, monkeypatch):
    monkeypatch.setattr(memory, "backend", lambda: platform)
    sizes = memory.Sizes(plain=10**6, ours=10**8, fixed=10**6, convolves=False)
    part = memory.microbatch(sizes, n)
    assert n % part == 0
    assert n // part == max(k for k in range(1, 9) if n % k == 0)


def test_models_of_which_a_plain_gradient_keeps_more_are_taken_whole(monkeypatch):
    loss_fn, params, batch = classify("vit")
    sizes = sizes_of(loss_fn, params, batch)
    n = jax.tree.leaves(batch)[0].shape[0]
    assert memory.microbatch(sizes, n) == n
    large = memory.Sizes(plain=10**8, ours=12 * 10**7, fixed=10**8, convolves=False)
    # A CPU takes less time for parts, as long as they are large beside the parameters.
    assert memory.microbatch(large, 32) == 4
    assert memory.microbatch(large._replace(fixed=10**9), 32) == 16
    monkeypatch.setattr(memory, "backend", lambda: "gpu")
    assert memory.microbatch(large, 32) == 32


def test_on_a_cpu_convolutions_stay_outside_of_loops(monkeypatch):
    sizes = memory.Sizes(plain=10**7, ours=10**8, fixed=10**6, convolves=True)
    assert memory.microbatch(sizes, 32) == 32
    monkeypatch.setattr(memory, "backend", lambda: "gpu")
    assert memory.microbatch(sizes, 32) == 4
    loss_fn, params, batch = idioms.small("resnet")
    assert sizes_of(loss_fn, params, batch).convolves
    assert not sizes_of(deep, LAYERS, BATCH).convolves
