"""Products in parts, as accelerators have them: emulated bit by bit, and held to their bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_engine_bound
from test_engine_bound import check, linear

from dpjax import dp
from dpjax.dp.engines import arithmetic, bookkeeping, products, summation
from dpjax.dp.engines.forms import Tokens

UNIT = 2.0**-24
CUT = 8  # products that a tensor core adds at a time


def cut_off(numbers, exponent):
    """Float64 numbers without what is below 24 bits of a number with this exponent."""
    step = np.ldexp(1.0, np.maximum(exponent - 24, -149))
    return np.trunc(numbers / step) * step


def tensor_core(a, b):
    """[..., m, k] times [..., n, k] as on the worst tensor core: what is added is cut off.

    Products of bfloat16 numbers are exact in float64. In groups of `CUT` and the sum so far, all
    addends are cut off where the largest one's 24 bits end, and so is what they add up to.
    """
    a, b = np.float64(a), np.float64(b)
    total = np.zeros((*a.shape[:-1], b.shape[-2]))
    for k in range(0, a.shape[-1], CUT):
        each = a[..., :, None, k : k + CUT] * b[..., None, :, k : k + CUT]
        each = np.concatenate([total[..., None], each], -1)
        largest = np.frexp(np.max(np.abs(each), -1))[1]
        total = np.sum(cut_off(each, largest[..., None]), -1)
        total = cut_off(total, np.frexp(total)[1])
    with np.errstate(over="ignore"):
        return np.float32(total)


def emulated(a, b, contract, batch, precision):
    """`arithmetic._dot`, on tensor cores where the operands have 16 bits."""
    own, axes = arithmetic.jax.lax.dot_general, tuple(range(batch))
    if a.dtype != jnp.bfloat16:
        numbers = (contract, (axes, axes))
        return own(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)

    def rows(x, contracted):
        free = [i for i in range(batch, x.ndim) if i not in contracted]
        sizes = [x.shape[i] for i in free]
        x = x.transpose(*axes, *free, *contracted)
        return x.reshape(*x.shape[:batch], -1, np.prod([x.shape[-len(contracted) :]])), sizes

    (a, m), (b, n) = rows(a, contract[0]), rows(b, contract[1])
    shape = jax.ShapeDtypeStruct((*a.shape[:batch], a.shape[-2], b.shape[-2]), jnp.float32)
    out = jax.pure_callback(tensor_core, shape, a, b, vmap_method="sequential")
    return out.reshape(*a.shape[:batch], *m, *n)


@pytest.fixture
def tensor_cores(monkeypatch):
    monkeypatch.setattr(arithmetic, "backend", lambda: "gpu")
    monkeypatch.setattr(arithmetic, "_dot", emulated)
    monkeypatch.setattr(test_engine_bound, "program", test_engine_bound.program.__wrapped__)


# Halfway between two numbers of 8 bits: the second part is as large as it may be, and has the
# other sign in LESS. MOST has a large second part and a large remainder.
MORE, LESS, MOST = 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 - 2.0**-17


def worst(rng, *shape):
    return np.float32(rng.choice([-1.0, 1.0], shape) * rng.choice([MORE, LESS, MOST], shape))


def operands(kind, terms):
    rng = np.random.default_rng(terms)
    if kind == "worst parts":
        return np.abs(worst(rng, 5, terms)), np.abs(worst(rng, 6, terms))
    a, b = (rng.standard_normal((n, terms)).astype(np.float32) for n in (5, 6))
    if kind == "cancelling":
        b = worst(rng, 6, terms)
        b[:, 1::2] = -b[:, : terms // 2 * 2 : 2]
        a[:, 1::2] = a[:, : terms // 2 * 2 : 2]
    if kind == "all scales":
        scale = np.exp2(rng.integers(-58, 58, terms))
        a, b = np.float32(a * scale), np.float32(b / scale)
    if kind == "tiny":
        a, b = a * np.float32(2.0**-120), b * np.float32(2.0**20)
    return a, b


def off(kind, terms):
    """What `dot` is off by, and what a sum's roundings are counted in."""
    a, b = operands(kind, terms)
    found = np.float64(arithmetic.dot(jnp.asarray(a), jnp.asarray(b), ((1,), (1,)), 0))
    a, b = np.float64(a), np.float64(b)
    # Parts below 2^-126 may be lost.
    lost = 2.0**-126 * (np.sum(np.abs(a), 1)[:, None] + np.sum(np.abs(b), 1))
    return np.abs(found - a @ b.T), UNIT * (np.abs(a) @ np.abs(b).T), lost + terms * 2.0**-126


@pytest.mark.parametrize("kind", ["worst parts", "cancelling", "random", "all scales", "tiny"])
@pytest.mark.parametrize("terms", [1, 7, 64, 1000])
def test_a_sum_of_products_is_off_by_less_than_its_bound(kind, terms, tensor_cores):
    error, unit, lost = off(kind, terms)
    assert np.all(error <= arithmetic.roundings(terms) * unit + lost)


def test_float32s_bound_would_not_do(tensor_cores):
    error, unit, _ = off("worst parts", 1)
    assert np.max(error / unit) > 200


def test_truncation_needs_more_than_one_unit_a_term(tensor_cores):
    """Positive numbers of full bits, whose every addition is cut off."""
    a = np.float32(1 + 127 / 128 * np.ones((1, 4000)))
    b = np.float32(1 + np.arange(4000) % 128 / 128)[None]
    found = arithmetic.dot(jnp.bfloat16(a), jnp.bfloat16(b), ((1,), (1,)), 0)
    exact = np.float64(a) @ np.float64(b).T
    assert 0.1 * 4000 * UNIT * exact < exact - found <= arithmetic.roundings(4000) * UNIT * exact


def test_both_parts_of_a_number_survive_the_compiler():
    """A conversion to 16 bits and back may be left out, which would leave nothing to the second."""
    x = worst(np.random.default_rng(0), 64)
    program = jax.jit(arithmetic.halves).lower(x)
    assert "reduce_precision" in program.as_text()
    high, low = (np.float64(part) for part in program.compile()(x))
    assert np.all(np.abs(x - high - low) <= 2.0**-17 * np.abs(x))
    assert np.max(np.abs(x - high)) == 2.0**-8


def lowered(function, *args):
    """The products of a program for an NVIDIA device, as text."""
    program = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    return [line for line in program.as_text().splitlines() if "dot_general" in line]


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_the_backend_decides(backend, monkeypatch):
    """All routes: Gram matrices, gradients that are formed and dropped, sums, penalties."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, g = jnp.zeros((4, 2, 6, 64)), jnp.zeros((4, 2, 6, 70))
    t = Tokens(x, g, d=64)

    def norms_and_sums(x, g):
        t = Tokens(x, g, d=64)
        found = (
            products.gram_measure(products.gram(t)),
            products.outer_measure(products.outer(t)[0]),
        )
        found += (products.inner_product(t, jnp.ones((2, 64, 70))),)
        return found, summation.weighted_sum(t, jnp.ones(4), jnp.ones(4, bool))

    text = lowered(norms_and_sums, x, g)
    full = [line for line in text if "HIGHEST, HIGHEST" in line and "f32>, tensor" in line]
    parts = [line for line in text if "DEFAULT" in line and "bf16>, tensor" in line]
    assert (len(full), len(parts)) == ((5, 0) if backend == "cpu" else (0, 15))
    # What is in memory is summed as it is.
    (line,) = lowered(
        lambda x: summation.weigh(x, jnp.ones(4), jnp.ones(4, bool)),
        jnp.zeros((4, summation.BIAS + 1)),
    )
    assert "HIGHEST" in line
    assert t.d == 64


def test_a_default_device_is_the_backend(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert arithmetic.backend() == "gpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert arithmetic.backend() == "cpu"
    with jax.default_device("cpu"):
        assert arithmetic.backend() == "cpu"


# The clipping bound in that arithmetic


BOUND_TESTS = {
    "tokens that cancel": lambda: test_engine_bound.test_tokens_that_cancel(16, 32, 64, "gram"),
    "two tokens that cancel": lambda: test_engine_bound.test_tokens_that_cancel(2, 3, 2, "gram"),
    "the ends of float32": lambda: test_engine_bound.test_the_ends_of_float32(2),
    "half precision": lambda: test_engine_bound.test_half_precision(16, jnp.bfloat16),
    "lookups": test_engine_bound.test_lookups_that_cancel,
}


@pytest.mark.parametrize("name", BOUND_TESTS)
@pytest.mark.one_in(2)
def test_no_contribution_exceeds_the_bound(name, tensor_cores, monkeypatch):
    # Of numbers below 2^-117 the second part may be lost.
    monkeypatch.setattr(test_engine_bound, "check", functools.partial(check, rtol=2.0**-7))
    BOUND_TESTS[name]()


def opposed(tokens, route):
    """Equal tokens whose norms come out too small and whose products come out too large.

    The squares of second parts are missing in Gram matrices. In the products of one side with the
    other, second parts have opposite signs, so that what is missing is negative.
    """
    rng = np.random.default_rng(0)
    x, g = (by * rng.choice([-1.0, 1.0], (2, 1, n)) for by, n in ((MORE, 40), (LESS, 50)))
    odd = {"x": np.float32(np.tile(x, (1, tokens, 1))), "g": np.float32(np.tile(g, (1, tokens, 1)))}
    params = {"w": np.zeros((40, 50), np.float32)}
    # The factor is just below a power of two, which leaves the parts of what it scales as they are.
    size = tokens * 2000**0.5 * MORE * LESS
    rule = dp.flat(size * (1 - 2.0**-12 + 2.0**-17) / 64)
    check(functools.partial(linear), params, None, odd, rule=rule, route=route)


@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_what_is_missing_is_covered(tokens, tensor_cores):
    opposed(tokens, "gram")


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_missing_margin_is_seen(tokens, tensor_cores, monkeypatch):
    """With float32's margins a contribution exceeds its bound."""
    for module in (products, summation):
        monkeypatch.setattr(module, "roundings", lambda terms, *operands: terms)
    with pytest.raises(AssertionError, match="bookkeeping"):
        opposed(tokens, "gram")


@pytest.mark.parametrize("route", ["gram", "outer again"])
@pytest.mark.parametrize(("tokens", "d", "p"), [(2, 40, 50), (16, 24, 24)])
def test_tokens_that_nearly_cancel(tokens, d, p, route, tensor_cores, monkeypatch):
    """Pairs of tokens that cancel but for a share of them, of numbers whose parts lack the most."""
    monkeypatch.setattr(products, "cheapest", lambda form: route)
    rng = np.random.default_rng(0)
    shares = [1.0, 0.3, 0.1, 1e-2, 1e-3, 1e-5]
    x, g = [], []
    for share in shares:
        a = worst(rng, d)
        b = a * (1 + share * rng.standard_normal(d))
        x.append(np.tile(np.stack([a, b]), (tokens // 2, 1)))
        g.append(worst(rng, p) * np.tile([1, -1], tokens // 2)[:, None])
    odd = {"x": np.float32(x), "g": np.float32(g)}
    rtol = np.maximum(5e-3, 4 * arithmetic.roundings(tokens) * UNIT / np.array(shares))
    params = {"w": np.zeros((d, p), np.float32)}
    check(functools.partial(linear), params, None, odd, rtol=rtol)


@pytest.mark.parametrize(("tokens", "d", "p"), [(197, 192, 768), (511, 64, 64), (1024, 64, 96)])
def test_ordinary_examples_are_trusted(tokens, d, p, monkeypatch):
    """Independent tokens; otherwise each example would be taken by itself, at a high price."""
    monkeypatch.setattr(arithmetic, "backend", lambda: "gpu")
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((1, 1, tokens, n)).astype(np.float32) for n in (d, p))
    t = Tokens(jnp.asarray(x), jnp.asarray(g), d=d)
    measures = [products.outer_measure(products.outer(t)[0])]
    if tokens < 1000:
        measures.append(products.gram_measure(products.gram(t)))
    exact = np.linalg.norm(np.float64(x[0, 0]).T @ np.float64(g[0, 0]))
    for m in measures:
        bounded = np.sqrt(np.float64(m.square[0] + m.error[0])) + m.spread[0]
        assert exact <= bounded <= (1 + 0.75 * bookkeeping._MARGIN) * exact
    total = summation.weighted_sum(t, jnp.ones(1), jnp.ones(1, bool))
    assert np.linalg.norm(np.float64(total)) <= bounded
    assert jnp.all(measures[0].mass < bookkeeping._cancellation(tokens) * exact)


def test_both_engines_agree_in_parts(monkeypatch):
    """A whole step, in the arithmetic of an accelerator."""
    monkeypatch.setattr(arithmetic, "backend", lambda: "gpu")
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape).astype(np.float32) * 0.3
              for name, shape in {"a": (16, 40), "b": (40, 8)}.items()}  # fmt: skip
    batch = rng.standard_normal((4, 60, 16)).astype(np.float32)

    def loss_fn(params, x):
        return jnp.sum(jnp.square(jnp.tanh(x @ params["a"]) @ params["b"]))

    mask = np.ones(4, bool)
    (a, facts), (b, other) = (
        jax.jit(dp.clipped_sum(loss_fn, dp.flat(1.0), method=m))(params, batch, mask)
        for m in ("vmap", "bookkeeping")
    )
    np.testing.assert_allclose(other.norms, facts.norms, rtol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-4), a.value, b.value)
