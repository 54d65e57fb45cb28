"""The clipped sum against a loop, on neighboring batches, and on poisoned examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from test_clipping import RULES

from dpjax import dp
from dpjax.dp.engines import bookkeeping
from dpjax.dp.engines.clipped_sum import cut, part

METHODS = ("vmap", "auto")


def loss_fn(params, example):
    hidden = jnp.tanh(example["x"] @ params["w"] + params["b"])
    return jnp.sum(jnp.square(hidden @ params["v"] - example["y"]))


def setup(size=6, dtype=jnp.float32, scale=1.0):
    k = iter(jax.random.split(jax.random.key(1), 5))
    params = {
        "w": jax.random.normal(next(k), (4, 3), dtype),
        "b": jax.random.normal(next(k), (3,), dtype),
        "v": jax.random.normal(next(k), (3, 2), dtype),
    }
    batch = {
        "x": scale * jax.random.normal(next(k), (size, 4), dtype),
        "y": jax.random.normal(next(k), (size, 2), dtype),
    }
    return params, batch


def loop_oracle(rule, params, batch, mask):
    """One gradient at a time, in float64 on the host."""
    total = jax.tree.map(lambda p: np.zeros(p.shape), params)
    groups = rule.groups(params)
    for i in range(len(mask)):
        if not mask[i]:
            continue
        example = {name: rows[i] for name, rows in batch.items()}
        grad = jax.grad(loss_fn)(params, example)
        leaves = [np.asarray(g, np.float64) for g in jax.tree.leaves(grad)]
        norms = [
            np.sqrt(sum((g**2).sum() for g, k in zip(leaves, groups) if k == n))
            for n in range(max(groups) + 1)
        ]
        factors = np.asarray(rule.factors(jnp.asarray(norms)))
        scaled = [factors[k] * g for g, k in zip(leaves, groups)]
        total = jax.tree.map(np.add, total, jax.tree.unflatten(jax.tree.structure(total), scaled))
    return total


def close(a, b, rtol=1e-5):
    scale = max(np.abs(np.asarray(x)).max() for x in jax.tree.leaves(b)) or 1.0
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * scale), a, b)


def gap(rule, one, other):
    """Distance of two clipped sums over the promised sensitivity."""
    diff = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, one.value, other.value)
    norm = np.sqrt(sum((d**2).sum() for d in jax.tree.leaves(diff)))
    return norm / float(one.sensitivity)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.one_in(5)
def test_equals_a_loop(name, method):
    params, batch = setup()
    mask = jnp.array([True, True, False, True, True, True])
    got, _ = jax.jit(dp.clipped_sum(loss_fn, RULES[name], method=method))(params, batch, mask)
    close(got.value, loop_oracle(RULES[name], params, batch, mask))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.one_in(5)
def test_one_example_moves_the_sum_by_at_most_the_sensitivity(name, method):
    rule = RULES[name]
    summed = jax.jit(dp.clipped_sum(loss_fn, rule, method=method))
    for scale in (1e-3, 1.0, 1e3):
        params, batch = setup(scale=scale)
        everyone = jnp.ones(6, bool)
        whole, _ = summed(params, batch, everyone)
        for leaver in range(6):
            without, _ = summed(params, batch, everyone.at[leaver].set(False))
            assert gap(rule, whole, without) <= 1 + 1e-5


def test_neighbor_check_can_fail():
    """Without clipping the same comparison sees a distance beyond the sensitivity."""
    params, batch = setup(scale=1e3)
    loose = dp.clipped_sum(loss_fn, dp.flat(1e6))
    whole, _ = loose(params, batch, jnp.ones(6, bool))
    without, _ = loose(params, batch, jnp.ones(6, bool).at[0].set(False))
    claimed = dp.ClippedSum(whole.value, jnp.asarray(1.0))
    assert gap(dp.flat(1.0), claimed, without) > 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("name", ["flat", "per_layer", "auto_v", "global"])
@pytest.mark.one_in(3)
def test_a_poisoned_example_leaves_the_others_bit_for_bit(name, poison, method):
    params, batch = setup()
    summed = jax.jit(dp.clipped_sum(loss_fn, RULES[name], method=method))
    bad = {"x": batch["x"].at[2].set(poison), "y": batch["y"]}
    nothing = {"x": batch["x"].at[2].set(0.0), "y": batch["y"]}
    others = jnp.ones(6, bool).at[2].set(False)
    got, facts = summed(params, bad, jnp.ones(6, bool))
    want, _ = summed(params, nothing, others)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got.value))
    if np.isfinite(facts.norms[2]).all() and np.isfinite(facts.loss[2]):
        assert gap(RULES[name], got, want) <= 1 + 1e-5
    else:
        jax.tree.map(np.testing.assert_array_equal, got.value, want.value)
        assert (facts.factors[2] == 0).all()


def test_masking_by_multiplication_is_seen():
    """The mistake the test above is for: a factor of 0 does not remove a NaN gradient."""
    params, batch = setup()
    bad = {"x": batch["x"].at[2].set(np.nan), "y": batch["y"]}
    grads = jax.vmap(jax.grad(loss_fn), (None, 0))(params, bad)
    _, facts = dp.clipped_sum(loss_fn, dp.flat(0.7))(params, bad, jnp.ones(6, bool))
    multiplied = jax.tree.map(lambda g: jnp.tensordot(facts.factors[:, 0], g, 1), grads)
    assert not all(np.isfinite(x).all() for x in jax.tree.leaves(multiplied))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.one_in(3)
def test_microbatches_do_not_change_the_sum(size, method):
    params, batch = setup()
    mask = jnp.array([True, True, False, True, True, True])

    def summed(**options):
        return jax.jit(dp.clipped_sum(loss_fn, dp.flat(0.5), method=method, **options))

    whole, facts = summed()(params, batch, mask)
    cut_sum, cut_facts = summed(microbatch_size=size)(params, batch, mask)
    close(cut_sum.value, whole.value)
    close(cut_facts._replace(real=0), facts._replace(real=0))
    np.testing.assert_array_equal(cut_facts.real, mask)


def test_microbatches_are_spread_over_the_batch():
    batch = cut(jnp.arange(6), 2)
    microbatches = [part(batch, i) for i in range(3)]
    np.testing.assert_array_equal(microbatches, [[0, 3], [1, 4], [2, 5]])


@pytest.mark.parametrize("method", METHODS)
def test_padding_alone_gives_zero(method):
    params, batch = setup()
    got, facts = dp.clipped_sum(loss_fn, dp.automatic(), method=method)(
        params, batch, jnp.zeros(6, bool)
    )
    assert all((x == 0).all() for x in jax.tree.leaves(got.value))
    assert (facts.factors == 0).all()
    assert (facts.norms == 0).all()
    assert (facts.loss == 0).all()


def test_a_method_is_what_its_name_says(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("book-keeping")

    params, batch = setup()
    monkeypatch.setattr(bookkeeping, "microbatch_sum", fail)
    dp.clipped_sum(loss_fn, dp.flat(1.0), method="vmap")(params, batch, jnp.ones(6, bool))
    for method in ("bookkeeping", "auto"):
        with pytest.raises(AssertionError, match="book-keeping"):
            dp.clipped_sum(loss_fn, dp.flat(1.0), method=method)(params, batch, jnp.ones(6, bool))


@pytest.mark.parametrize("method", METHODS)
def test_without_parameters_there_is_nothing_to_clip(method):
    batch = jnp.arange(4.0)
    got, facts = dp.clipped_sum(lambda params, x: x**2, dp.flat(1.0), method=method)(
        {}, batch, jnp.ones(4, bool)
    )
    assert got.value == {}
    assert facts.norms.shape == facts.factors.shape == (4, 0)


@pytest.mark.parametrize("method", METHODS)
def test_sums_are_float32_in_a_bfloat16_model(method):
    """The 1024 clipped gradients, each of norm 1, are not lost below bfloat16's 8 bits."""
    params = {"w": jnp.zeros((1,), jnp.bfloat16)}
    batch = jnp.ones((1024, 1), jnp.bfloat16)
    summed = dp.clipped_sum(lambda p, x: jnp.sum(p["w"] * x), dp.flat(1.0), method=method)
    got, facts = summed(params, batch, jnp.ones(1024, bool).at[0].set(False))
    assert got.value["w"].dtype == facts.norms.dtype == jnp.float32
    np.testing.assert_allclose(got.value["w"], [1023.0], rtol=1e-5)


def test_frozen_leaves_do_not_enter_the_norm():
    params, batch = setup()
    frozen = {"w": params["w"], "b": params["b"]}
    head = {"v": params["v"]}
    mask = jnp.ones(6, bool)
    _, facts = dp.clipped_sum(lambda p, e: loss_fn({**frozen, **p}, e), dp.flat(1.0))(
        head, batch, mask
    )
    _, every = dp.clipped_sum(loss_fn, dp.flat(1.0))(params, batch, mask)
    alone = jax.vmap(lambda e: jnp.linalg.norm(jax.grad(loss_fn)(params, e)["v"]))(batch)
    np.testing.assert_allclose(facts.norms[:, 0], alone, rtol=1e-5)
    assert (every.norms[:, 0] > 1.01 * alone).any()  # so the comparison can tell


def test_errors():
    params, batch = setup()
    with pytest.raises(ValueError, match="method='ghost'"):
        dp.clipped_sum(loss_fn, dp.flat(1.0), method="ghost")
    with pytest.raises(ValueError, match="microbatch_size=4 must divide the batch size 6"):
        dp.clipped_sum(loss_fn, dp.flat(1.0), microbatch_size=4)(params, batch, jnp.ones(6, bool))
    with pytest.raises(ValueError, match="microbatch_size=0"):
        dp.clipped_sum(loss_fn, dp.flat(1.0), microbatch_size=0)


def test_equals_jax_privacy():
    jax_privacy = pytest.importorskip("jax_privacy")
    params, batch = setup()
    theirs = jax_privacy.clipped_grad(loss_fn, l2_clip_norm=0.5, keep_batch_dim=False)(
        params, batch
    )
    ours, _ = dp.clipped_sum(loss_fn, dp.flat(0.5))(params, batch, jnp.ones(6, bool))
    close(ours.value, theirs)


@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p, b, m: ({**p, "w": p["w"] * 1j}, b, m), "parameter 'w' is complex64"),
        (lambda p, b, m: ({**p, "n": jnp.arange(2)}, b, m), "parameter 'n' is int32"),
        (lambda p, b, m: ({**p, "k": jax.random.key(0)}, b, m), r"parameter 'k' is key<fry>"),
        (lambda p, b, m: ({**p, "flag": True}, b, m), "parameter 'flag' is bool"),
        (
            lambda p, b, m: (p, b, m.astype(np.float32)),
            "bool array of shape .batch., got float32",
        ),
        (
            lambda p, b, m: (p, b, m[None]),
            r"bool array of shape .batch., got bool of shape \(1, 4\)",
        ),
        (lambda p, b, m: (p, b, [True] * 4), "a bool array of shape .batch., got list"),
        (lambda p, b, m: (p, b, m[:1]), r"of shape \(4, 3\) must have one row for each of the 1"),
    ],
)
def test_what_cannot_be_clipped_is_named(method, change, text):
    params = {"w": np.ones((3, 2), np.float32)}
    args = change(params, np.ones((4, 3), np.float32), np.ones(4, bool))
    clip = dp.clipped_sum(lambda p, x: jnp.sum(x @ p["w"]).real, dp.flat(1.0), method=method)
    with pytest.raises((TypeError, ValueError), match=text):
        clip(*args)


@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
def test_python_floats_and_empty_batches(method):
    clip = dp.clipped_sum(lambda p, x: jnp.sum(x) * p["w"], dp.flat(1.0), method=method)
    total, _ = clip({"w": 2.0}, np.ones((4, 3), np.float32), np.ones(4, bool))
    assert total.value["w"] == pytest.approx(4.0, rel=1e-5)
    total, facts = jax.jit(clip)({"w": 2.0}, np.ones((0, 3), np.float32), np.ones(0, bool))
    assert (total.value["w"], total.sensitivity) == (0.0, 1.0)
    assert (facts.loss.shape, facts.norms.shape) == ((0,), (0, 1))
    with pytest.raises(TypeError, match=r"rule=1\.0 must be a ClipRule"):
        dp.clipped_sum(lambda p, x: 0.0, 1.0)


def contributions(loss_fn, params, batch, rule, method):
    """Norm of each example's contribution over the sensitivity, in float64."""
    engine = jax.jit(dp.clipped_sum(loss_fn, rule, method=method))
    n = jax.tree.leaves(batch)[0].shape[0]
    totals = [engine(params, batch, np.arange(n) == i)[0] for i in range(n)]
    squares = [
        sum(np.sum(np.square(np.float64(leaf))) for leaf in jax.tree.leaves(total.value))
        for total in totals
    ]
    return np.sqrt(squares) / float(rule.sensitivity())


@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
@pytest.mark.parametrize("shape", [(32, 32), (2,) * 14, (50_000,), (3, 3, 64, 64)])
@pytest.mark.parametrize("small", [1.0, 2.0**-12])
def test_a_norm_is_added_up_in_a_tree(method, shape, small):
    """Squares that a running sum would lose: one of 1, and thousands just below its rounding."""
    e = np.full((1, *shape), small, np.float32)
    e.flat[0] = 1.0
    params = {"w": np.zeros(shape, np.float32)}
    found = contributions(
        lambda p, x: jnp.sum(jnp.sin(p["w"]) * x), params, e, dp.flat(0.01), method
    )
    assert 1 - 2e-5 < found[0] <= 1


@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
@pytest.mark.parametrize("large", [lambda n, c: jnp.full_like(n, 1e30), None])
def test_norms_at_the_smallest_that_is_measured(method, large):
    """The squares of x underflow, so that the engine measures 0 where the norm is 1.0075e-9."""
    x = np.full((1, 1, 1), 2.0**-63 * (1 - 1e-6), np.float32)
    g = np.float32(1.0075e-9) / x
    rule = dp.flat(1e-9) if large is None else dp.rule(large, 1e-9)
    loss = lambda p, e: jnp.sum((e["x"] @ p["w"]) * e["g"])  # noqa: E731
    params = {"w": np.zeros((1, 1), np.float32)}
    assert contributions(loss, params, {"x": x, "g": g}, rule, method)[0] <= 1


@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
def test_a_scan_of_no_turns(method):
    def loss_fn(params, x):
        turn = lambda s, _: (jnp.tanh(s @ params["w"]), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(turn, x, length=0)[0])

    params = {"w": np.ones((3, 3), np.float32)}
    found = contributions(loss_fn, params, np.ones((2, 3), np.float32), dp.flat(1.0), method)
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
@pytest.mark.parametrize("poison", [np.nan, 3e38])
@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("where", ["penalty", "custom derivative"])
@pytest.mark.one_in(3)
def test_a_poisoned_example_inside_a_gradient(method, poison, real, where):
    """XLA's batched gradient of a grouped convolution spreads NaN over norms, or losses, of all."""

    @jax.custom_vjp
    def own(w, x):
        return jnp.sum(x) * jnp.sum(w)

    def backward(saved, g):
        w, x = saved
        return g * jax.grad(lambda w: jnp.sum(jnp.square(conv(w, x))))(w), jnp.zeros_like(x)

    own.defvjp(lambda w, x: (own(w, x), (w, x)), backward)

    def conv(w, x):
        return jax.lax.conv_general_dilated(
            x[None], w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=2,
        )  # fmt: skip

    def loss_fn(params, x):
        if where == "custom derivative":
            return own(params["w"], x)
        penalty = jax.grad(lambda w: jnp.sum(jnp.square(conv(w, x))))(params["w"])
        return jnp.sum(jnp.sin(conv(params["w"], x))) + jnp.sum(jnp.square(penalty))

    numbers = np.random.default_rng(0)
    x = numbers.standard_normal((4, 5, 4)).astype(np.float32)
    params = {"w": numbers.standard_normal((2, 2, 4)).astype(np.float32)}
    engine = jax.jit(dp.clipped_sum(loss_fn, dp.flat(1.0), method=method))
    want, facts = engine(params, x, np.arange(4) != 1)
    x[1] = poison
    found, other = engine(params, x, (np.arange(4) != 1) | real)
    assert other.factors[1] == 0
    np.testing.assert_allclose(other.factors, facts.factors, rtol=1e-4)
    np.testing.assert_allclose(found.value["w"], want.value["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
@pytest.mark.parametrize("options", ["as users compile", "without fusion emitters"])
def test_a_gradient_is_computed_once(method, options):
    """Of a standardization little but rounding is left; computed twice, it has two values."""
    if options == "as users compile":
        flags = {}
    elif jax.__version_info__ < (0, 11):
        flags = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    else:
        pytest.skip("newer versions of XLA do not start without fusion emitters")

    def loss_fn(p, x):
        p = p - p.mean((1, 2), keepdims=True)
        return jnp.sum(jnp.sin(p / jnp.sqrt((p * p).mean((1, 2), keepdims=True) + 1e-2) * x))

    numbers = np.random.default_rng(0)
    engine = jax.jit(dp.clipped_sum(loss_fn, dp.flat(1.0), method=method), compiler_options=flags)
    for size in 10 ** numbers.uniform(0, 15, 40):
        params = numbers.standard_normal((1, 2, 3)).astype(np.float32)
        x = (size * numbers.standard_normal((4, 1, 2, 3))).astype(np.float32)
        total, _ = engine(params, x, np.arange(4) == 2)
        assert np.linalg.norm(np.float64(total.value)) <= 1


@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
@pytest.mark.parametrize("coefficient", [lambda x: 0.1, lambda x: x[0]])
def test_a_penalty_without_a_finite_gradient_leaves_the_sum_zero(method, coefficient):
    """That of a norm at zero is NaN, for all examples alike."""

    def loss_fn(w, x):
        return jnp.sum(jnp.tanh(x @ w)) + coefficient(x) * jnp.sqrt(jnp.sum(w**2))

    engine = jax.jit(dp.clipped_sum(loss_fn, dp.flat(1.0), method=method))
    total, facts = engine(
        np.zeros((4, 3), np.float32), np.ones((2, 4), np.float32), np.ones(2, bool)
    )
    np.testing.assert_array_equal(facts.factors, 0)
    np.testing.assert_array_equal(total.value, 0)


def three_layers(params, x):
    centered = params["a"] - jnp.mean(params["a"], 0, keepdims=True)
    scaled = centered / jnp.sqrt(jnp.var(params["a"], 0, keepdims=True) + 1e-5)
    return jnp.sum(jnp.tanh(jnp.tanh(jnp.tanh(x @ scaled) @ params["b"]) @ params["c"]))


THREE_LAYERS = {
    "a": np.random.default_rng(0).standard_normal((8, 40), np.float32),
    "b": np.random.default_rng(1).standard_normal((40, 40), np.float32),
    "c": np.random.default_rng(2).standard_normal((40, 5), np.float32),
}


@pytest.mark.parametrize(
    "mode", [pytest.param(jax.disable_jit, marks=pytest.mark.slow), jax.debug_nans]
)
def test_what_looks_at_every_operation_changes_nothing(mode):
    x = np.random.default_rng(2).standard_normal((4, 3, 8), np.float32)
    engine = dp.clipped_sum(three_layers, dp.flat(1.0))
    want, facts = engine(THREE_LAYERS, x, np.ones(4, bool))
    with mode(True):
        found, other = engine(THREE_LAYERS, x, np.ones(4, bool))
    np.testing.assert_allclose(other.norms, facts.norms, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(want.value), jax.tree.leaves(found.value), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


def test_export_for_batches_of_any_size():
    def loss_fn(params, x):
        return jnp.sum(jnp.tanh(x @ params["b"]) @ params["c"])

    def summed(*args):
        total, facts = dp.clipped_sum(loss_fn, dp.flat(1.0))(*args)
        return total.value, facts.norms

    (n,) = export.symbolic_shape("n")
    params = {name: THREE_LAYERS[name] for name in "bc"}
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    batch = jax.ShapeDtypeStruct((n, 3, 40), jnp.float32), jax.ShapeDtypeStruct((n,), bool)
    exported = export.export(jax.jit(summed))(shapes, *batch)
    x = np.random.default_rng(2).standard_normal((5, 3, 40), np.float32)
    args = params, x, np.ones(5, bool)
    for a, b in zip(*map(jax.tree.leaves, (exported.call(*args), jax.jit(summed)(*args)))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def one_token(p, x):
    return jnp.sum(jnp.tanh(x[0] @ p["w"]) ** 2)


def tokens_and_bias(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"] + p["b"][None]) ** 2)


def looked_up(p, x):
    rows = jnp.argsort(x[:, 0])  # all of them distinct
    return jnp.sum(jnp.tanh(p["w"][rows] * x) ** 2)


def masked(p, x):
    return jnp.sum(jnp.tanh(x @ (p["w"] * (jnp.arange(24.0) % 2)[:, None])) ** 2)


def formed(p, x):
    return jnp.sum(jnp.tanh(x @ jnp.cumsum(p["w"], 1)) ** 2)


DIFFERENTIATED = [one_token, tokens_and_bias, looked_up, masked, formed]


@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
@pytest.mark.parametrize("rule", [dp.flat, dp.per_layer, dp.automatic])
@pytest.mark.parametrize("loss_fn", DIFFERENTIATED)
@pytest.mark.one_in(7)
def test_forward_derivatives(loss_fn, rule, method):
    """Those of a loop over examples; of one that has no gradient, or none that is finite, 0."""
    rng = np.random.default_rng(0)
    params = {"w": 0.3 * rng.standard_normal((24, 24)), "b": np.ones(24)}
    if loss_fn is not tokens_and_bias:
        del params["b"]
    params = jax.tree.map(jnp.float32, params)
    along = jax.tree.map(lambda p: jnp.float32(rng.standard_normal(p.shape)), params)
    x = jnp.asarray(rng.standard_normal((6, 3, 24)), jnp.float32)
    x = x.at[0].set(0.0).at[1].set(jnp.nan).at[2].multiply(0.05)
    mask = jnp.array([True] * 5 + [False])
    clip = rule(2.0)

    def total(params):
        return dp.clipped_sum(loss_fn, clip, method=method)(params, x, mask)[0].value

    def clipped(params, row):
        gradient = jax.grad(loss_fn)(params, x[row])
        squares = jax.tree.map(lambda g: jnp.sum(g * g), gradient)
        groups = clip.groups(params)
        leaves, treedef = jax.tree.flatten(gradient)
        own = jnp.zeros(clip.num_groups(params)).at[jnp.array(groups)]
        own = own.add(jnp.array(jax.tree.leaves(squares)))
        some = own > 0  # a norm has no derivative at 0
        factors = clip.factors(jnp.where(some, jnp.sqrt(jnp.where(some, own, 1.0)), 0.0))
        return treedef.unflatten([f * g for f, g in zip(factors[jnp.array(groups)], leaves)])

    parts = [jax.jvp(lambda p, row=row: clipped(p, row), (params,), (along,)) for row in (2, 3, 4)]
    if loss_fn is tokens_and_bias:
        parts.append(jax.jvp(lambda p: clipped(p, 0), (params,), (along,)))
    value, derivative = jax.tree.map(lambda *own: sum(own), *parts)
    found, tangent = jax.jit(lambda p, t: jax.jvp(total, (p,), (t,)))(params, along)
    for name in params:
        np.testing.assert_allclose(found[name], value[name], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(tangent[name], derivative[name], rtol=1e-3, atol=2e-4)


def gained(p, x):
    return jnp.sum(jnp.tanh(jnp.tanh(x @ (p["w"] * p["b"][None])) @ p["w"]) ** 2)


@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
@pytest.mark.parametrize("loss_fn", [tokens_and_bias, gained])
def test_second_forward_derivatives(loss_fn, method):
    rng = np.random.default_rng(1)
    params = {"w": 0.3 * rng.standard_normal((24, 24), np.float32), "b": np.ones(24, np.float32)}
    x = jnp.asarray(rng.standard_normal((4, 3, 24)), jnp.float32).at[1].set(0.0)
    engine = dp.clipped_sum(loss_fn, dp.per_layer(2.0), method=method)

    def total(scale):
        scaled = jax.tree.map(lambda p: scale * p, params)
        return jnp.sum(engine(scaled, x, jnp.ones(4, bool))[0].value["w"])

    first = jax.jit(jax.jacfwd(total))
    second = jax.jit(jax.jacfwd(jax.jacfwd(total)))(1.0)
    np.testing.assert_allclose(second, (first(1.01) - first(0.99)) / 0.02, rtol=2e-2)
