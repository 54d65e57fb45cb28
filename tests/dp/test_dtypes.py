"""Every dtype of parameters, inputs and losses: vmap's numbers, or one error from both engines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax import dp
from dpjax.dp.engines import bookkeeping

pytestmark = pytest.mark.usefixtures("without_margins")

FLOATS = ("float16", "bfloat16", "float32", "float64")
OTHERS = ("complex64", "complex128", "int32", "uint8", "bool", "key")
METHODS = ("vmap", "bookkeeping")


def numbers(dtype, *shape):
    x = np.random.default_rng(0).standard_normal(shape)
    if dtype == "key":
        return jax.random.split(jax.random.key(0), shape[:1])
    if dtype.startswith("complex"):
        x = x + 1j * np.random.default_rng(1).standard_normal(shape)
    if "int" in dtype or dtype == "bool":
        x = 3 * np.abs(x) if dtype == "uint8" else 3 * x if dtype == "int32" else x > 0
    return jnp.asarray(x, dtype)


def loss_of(out):
    def loss_fn(params, x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.normal(x, (6, 5))
        y = x.astype(jnp.promote_types(x.dtype, params["w"].dtype)) @ params["w"]
        y = jnp.sum(jnp.abs(y) ** 2) + jnp.sum(params["b"] * jnp.sum(jnp.real(y), 0))
        return y.astype(out)

    return loss_fn


def sums(loss_fn, params, x):
    def run(method):
        keys = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        batch = jax.random.clone(x) if keys else x  # the same numbers for both
        return jax.jit(dp.clipped_sum(loss_fn, dp.flat(0.5), method=method))(
            params, batch, jnp.arange(3) != 1
        )

    return [run(method) for method in METHODS]


# Two unusual dtypes at a time are enough; every day, a few of them.
CASES = [
    pytest.param(
        dtype, inputs, out, marks=() if dtype == out in FLOATS[::2] else (pytest.mark.slow,)
    )
    for dtype in FLOATS
    for inputs in FLOATS + OTHERS
    for out in FLOATS
    if "float32" in (dtype, out) or inputs == "float32" or dtype == out
]


@pytest.mark.parametrize("dtype, inputs, out", CASES)
@pytest.mark.one_in(3)
def test_engines_agree_on(dtype, inputs, out):
    with jax.enable_x64(any("64" in d or "128" in d for d in (dtype, inputs, out))):
        params = {"w": numbers(dtype, 5, 4), "b": numbers(dtype, 4)}
        x = numbers(inputs, 3, 6, 5)
        (want, facts), (have, other) = sums(loss_of(out), params, x)
    # Norms and sums are float32 at best.
    dtypes = ("float32", dtype, out, inputs if inputs in FLOATS else out)
    unit = max(float(jnp.finfo(d).eps) for d in dtypes)
    np.testing.assert_array_equal(facts.factors > 0, other.factors > 0)
    np.testing.assert_allclose(other.norms, facts.norms, rtol=20 * unit)
    for a, b in zip(jax.tree.leaves(want.value), jax.tree.leaves(have.value), strict=True):
        assert b.dtype == jnp.float32
        np.testing.assert_allclose(b, a, rtol=0, atol=20 * unit * max(np.abs(a).max(), 0.5))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", OTHERS)
def test_other_parameters_are_refused_by_name(dtype, method):
    with jax.enable_x64("128" in dtype):
        params = {"w": numbers("float32", 5, 4), "odd": numbers(dtype, 4)}
        clip = dp.clipped_sum(lambda p, x: jnp.sum(x @ p["w"]), dp.flat(1.0), method=method)
        with pytest.raises(TypeError, match="'odd'"):
            clip(params, numbers("float32", 3, 6, 5), jnp.ones(3, bool))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["complex64", "int32", "bool"])
def test_other_losses_are_refused(dtype, method):
    clip = dp.clipped_sum(lambda w, x: jnp.sum(x @ w).astype(dtype), dp.flat(1.0), method=method)
    with pytest.raises(TypeError, match=r"real|float|differentiate"):
        clip(numbers("float32", 5, 4), numbers("float32", 3, 6, 5), jnp.ones(3, bool))


@pytest.mark.parametrize("make", [
    lambda x, p: jnp.fft.fft(x) @ p,
    lambda x, p: p.T @ jnp.fft.fft(x).T,
    lambda x, p: jnp.einsum("td,dp->tp", x, p * (1 + 2j)),
    lambda x, p: jnp.einsum("dp,td->pt", p, jnp.fft.fft(x)),
    lambda x, p: (x @ p) @ jnp.exp(1j * jnp.arange(4.0)),
    lambda x, p: jax.lax.conv_general_dilated(
        jnp.fft.fft(x)[None], p[None].astype(complex), (1,), "VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
    ),
    lambda x, p: p.astype(jnp.complex64)[jnp.arange(3)] * jnp.fft.fft(x)[:3, :4],
])  # fmt: skip
def test_complex_products(make):
    params = {"w": numbers("float32", 5, 4)}
    x = numbers("float32", 3, 6, 5)
    (want, facts), (have, other) = sums(
        lambda p, x: jnp.sum(jnp.abs(make(x, p["w"])) ** 2), params, x
    )
    np.testing.assert_allclose(other.norms, facts.norms, rtol=1e-5)
    np.testing.assert_allclose(have.value["w"], want.value["w"], atol=1e-6)


@pytest.mark.parametrize(
    "x, g",
    [
        (np.full((2, 1, 3), 1e40), np.full((2, 1, 2), 1e-40)),  # beyond float32
        (np.full((2, 2, 3), 1e5), np.array([1e5, -1e5 + 1e-3])[None, :, None] * np.ones((2, 2, 2))),
    ],
)
@pytest.mark.parametrize("scalar", [False, True])
def test_no_product_drops_the_bits_of_float64(x, g, scalar):
    def loss_fn(w, e):
        return jnp.sum((e["x"] @ w["w"]) * e["g"]) * (w["gain"] if scalar else 1.0)

    with jax.enable_x64(True):
        params = {"w": jnp.ones((3, 2)), "gain": jnp.ones(())}
        mask = jnp.ones(2, bool)
        one, other = (
            dp.clipped_sum(loss_fn, dp.flat(1.0), method=method)(params, {"x": x, "g": g}, mask)
            for method in METHODS
        )
        assert "compute it in float32" in dp.explain(loss_fn, params, {"x": x[0], "g": g[0]})
    assert np.all(one[1].factors > 0)
    np.testing.assert_allclose(other[1].norms, one[1].norms, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(one[0].value), jax.tree.leaves(other[0].value), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6)


def test_products_and_lookups_promote_nothing_implicitly():
    def loss_fn(params, e):
        return jnp.sum((params["table"][e["rows"]] @ params["w"]) * e["x"])

    params = {"table": numbers("float32", 7, 5), "w": numbers("float32", 5, 4)}
    batch = {"rows": jnp.array([[0, 1], [2, 2], [6, 6]]), "x": numbers("float32", 3, 2, 4)}
    with jax.numpy_dtype_promotion("strict"):
        for method in METHODS:
            clip = jax.jit(dp.clipped_sum(loss_fn, dp.flat(1.0), method=method))
            assert np.all(clip(params, batch, jnp.ones(3, bool))[1].factors > 0)


def test_float16_loses_small_numbers_by_vmap_only():
    def loss_fn(w, e):
        return jnp.sum((e["x"] @ w) * e["g"], dtype=jnp.float32)

    batch = {
        "x": jnp.full((1, 1, 2), 1e-5, jnp.float16),
        "g": jnp.full((1, 1, 2), 1e-4, jnp.float16),
    }
    norms = {}
    for method in METHODS:
        total, facts = dp.clipped_sum(loss_fn, dp.automatic(1.0), method=method)(
            jnp.zeros((2, 2), jnp.float16), batch, jnp.ones(1, bool)
        )
        norms[method] = float(facts.norms[0, 0])
        assert np.linalg.norm(total.value) <= 1.0
    assert norms["vmap"] == 0.0
    assert norms["bookkeeping"] == pytest.approx(2e-9, rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_python_numbers_as_parameters(method):
    clip = dp.clipped_sum(lambda p, x: jnp.sum(x) * p["a"], dp.flat(1.0), method=method)
    total, _ = clip({"a": 2.0}, jnp.ones((3, 2)), jnp.ones(3, bool))
    np.testing.assert_allclose(total.value["a"], 3.0, rtol=1e-4)
    with pytest.raises(TypeError, match="'a'"):
        clip({"a": 2}, jnp.ones((3, 2)), jnp.ones(3, bool))


def test_products_of_16_bits_keep_their_route():
    for dtype in FLOATS[:3]:
        params = {"w": numbers(dtype, 5, 4), "b": numbers(dtype, 4)}
        plan = bookkeeping.plan(loss_of("float32"), params, numbers(dtype, 6, 5))
        assert {leaf.path: leaf.route for leaf in plan}["w"] == "gram"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.one_in(2)
def test_a_weakly_typed_batch_promotes_no_weight(dtype):
    """Python numbers are weakly typed, and what JAX makes of them: the product has 16 bits."""
    batch = jnp.full((3, 5), 30.0)
    loss_fn = lambda w, x: jnp.sum(jnp.sin(x @ w)).astype(jnp.float32)  # noqa: E731
    params, mask = numbers(dtype, 5, 4), jnp.ones(3, bool)
    want, found = (
        dp.clipped_sum(loss_fn, dp.flat(1.0), method=method)(params, batch, mask)
        for method in METHODS
    )
    assert batch.weak_type
    np.testing.assert_array_equal(found[1].loss, want[1].loss)
    np.testing.assert_allclose(found[1].norms, want[1].norms, rtol=1e-2)


@pytest.mark.parametrize("promotion", ["standard", "strict"])
@pytest.mark.parametrize("narrow", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("looked_up", [False, True])
@pytest.mark.one_in(3)
def test_uses_of_a_weight_in_several_dtypes(promotion, narrow, looked_up):
    def loss_fn(w, x):
        rows = (x[:, 0] > 0).astype(jnp.int32)
        low = w.astype(narrow)
        one = low[rows] if looked_up else x.astype(narrow) @ low
        return jnp.sum(jnp.sin(one.astype(jnp.float32))) + jnp.sum(jnp.sin(x @ w))

    params, batch, mask = numbers("float32", 5, 5), numbers("float32", 3, 2, 5), jnp.ones(3, bool)
    with jax.numpy_dtype_promotion(promotion):
        want, found = (
            jax.jit(dp.clipped_sum(loss_fn, dp.flat(1.0), method=method))(params, batch, mask)
            for method in METHODS
        )
    # vmap rounds gradients to the few bits of the conversion.
    tolerance = 0.05 if narrow == "float8_e4m3fn" else 0.01
    np.testing.assert_allclose(found[1].loss, want[1].loss, rtol=1e-5)
    np.testing.assert_allclose(found[1].norms, want[1].norms, rtol=tolerance)
    difference = np.linalg.norm(found[0].value - want[0].value)
    assert difference <= tolerance * np.linalg.norm(want[0].value)
