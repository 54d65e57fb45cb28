"""Which uses of a weight are products that the book-keeping engine knows, and which are not."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare_engines import MASK, agree, assert_close, both, routes
from jax.experimental import io_callback
from jax.experimental.ode import odeint
from losses import (
    LAYERS,
    MODELS,
    all_in_half,
    as_loss,
    classify,
    half_way,
    hidden,
    in_half,
    normal,
)
from test_engine_bound import check

from dpjax import dp
from dpjax.dp.engines import bookkeeping

pytestmark = pytest.mark.usefixtures("without_margins")

# What must not quietly fall back; every leaf that is not named is direct.
ROUTES = {
    "dense of many tokens": {"kernel": "outer"},
    "dense general odd axes": {"kernel": "gram"},
    "conv groups": {"kernel": "conv"},
    "embed of two axes": {"embedding": "embed"},
    "attention": {f"{name}/kernel": "gram" for name in ("query", "key", "value", "out")},
    "lora": {"a": "gram", "b": "outer"},
    "weight standardization": {"kernel": "conv", "gain": "conv"},
    "weight standardization, twice": {"first": "conv", "second": "conv"},
    "nested scans": {"own": "gram", "inner": "outer", "outer": "outer"},
    "convolutions in nested scans": dict.fromkeys(("own", "inner", "outer", "one"), "conv"),
    "weight under the kernel": {},
    "learned initial state": {},
    "weights out of a scan": {},
    "batch groups": {},
    "lookups in slices": {"tables": "embed"},
    "batched lookups": {"tables": "embed"},
    "scaled view": {"kernel": "gram"},
    "batched weights": {"kernel": "gram"},
    "called twice": {"Dense_0/kernel": "outer"},
    "dense of one feature": {"kernel": "gram"},
    "embedded inside a scan": {"table": "embed"},
    "embedded twice": {"Embed_0/embedding": "embed"},
    "unused": {"Dense_0/kernel": "outer", "unused": "unused"},
    "scan of slices and constants": {"kernel": "outer", "gate": "gram", "filters": "conv"},
    "nn.scan of nn.remat": {"Dense_0/kernel": "gram", "Dense_1/kernel": "gram"},
    "dense after nn.scan": {
        "Dense_0/kernel": "gram",
        "Dense_1/kernel": "gram",
        "last/kernel": "gram",
    },
    "lstm": {f"{side}{gate}/kernel": "gram" for side in "hi" for gate in "fgio"},
    "nn.remat": {"kernel": "gram"},
    "views": {"Conv_0/kernel": "conv"},
    "two forms": {"kernel": "derived"},
    "tied": {"Embed_0/embedding": "outer"},
    "merged lora": {"a": "derived", "b": "derived"},
    "custom vjp": {},
    "cond": {"kernel": "outer"},
    "regularized": {"kernel": "gram"},
}


@pytest.mark.parametrize("name", ROUTES)
def test_route(name):
    module, inputs = LAYERS[name]
    found = routes(*as_loss(module, inputs), inputs)
    short = {"/".join(path.split("/")[-2:]): route for path, route in found.items()}
    assert {path.removeprefix("params/"): route for path, route in short.items()} == ROUTES[name]


def test_a_kernel_that_is_converted_at_the_end_keeps_its_route():
    def loss_fn(make):
        def loss(params, x):
            out = jax.lax.conv_general_dilated(
                x[None], make(params["kernel"], jnp.bfloat16).astype(x.dtype), (1, 1), "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
            return jnp.sum(jnp.square(out.astype(jnp.float32)))

        return loss

    params = {"kernel": jnp.ones((3, 3, 2, 4))}
    example = jnp.ones((4, 4, 2), jnp.bfloat16)
    routes = {
        make.__name__: bookkeeping.plan(loss_fn(make), params, example)[0].route
        for make in (in_half, all_in_half, half_way, hidden)
    }
    assert routes.pop("in_half") == "conv"
    assert set(routes.values()) == {"direct"}


@pytest.mark.parametrize("name", MODELS)
def test_leaves_of_models(name):
    """All large leaves are products; only biases, norms, class token and positions are direct."""
    loss_fn, params, batch = classify(name)
    _, _, products, allowed = MODELS[name]
    plan = bookkeeping.plan(loss_fn, params, jax.tree.map(lambda x: x[0], batch))
    assert len(plan) == len(jax.tree.leaves(params))
    for leaf in plan:
        if re.search(products, leaf.path):
            assert leaf.route in allowed, leaf
        else:
            assert leaf.route == "direct", leaf
            assert re.search(r"bias|scale|cls|pos|token_type", leaf.path), leaf


def test_clipped_indices_look_up_the_last_row():
    def loss_fn(params, rows):
        return jnp.sum(jnp.sin(params["table"].at[rows].get(mode="clip")))

    rows = np.array([[5, 9], [0, 4], [4, 4], [3, 7]])  # a table of five
    params = {"table": normal(5, 3)[0]}
    agree(loss_fn, params, rows)
    _, (total, _) = both(loss_fn, dp.flat(1.0), params, rows)
    assert np.any(total.value["table"][4])


@pytest.mark.parametrize("tokens", [2, 60])  # Gram matrices, and outer products
def test_a_scaled_weight(tokens):
    def loss_fn(params, x):
        return sum(jnp.sum(jnp.tanh(x @ (scale * params[f"{scale}"]))) for scale in (0.25, 2.0))

    agree(loss_fn, {f"{scale}": normal(3, 2)[0] for scale in (0.25, 2.0)}, normal(tokens, 3))


@pytest.mark.parametrize("tokens", [2, 60])
def test_an_example_is_kept_whose_scaled_cotangent_leaves_the_range(tokens):
    """The cotangent of 1e10 * w would be 1e40; the gradient, of inputs near 1e-30, is 1e10."""

    def loss_fn(params, x):
        return jnp.sum(x["x"] @ (1e10 * params["w"]) * x["g"])

    inputs = {"x": normal(tokens, 3), "g": normal(tokens, 2, seed=1)}
    inputs["x"][2:] *= 1e-30
    inputs["g"][2:] *= 1e30
    _, (_, facts) = both(loss_fn, dp.flat(1.0), {"w": normal(3, 2)[0]}, inputs)
    assert np.all(facts.factors[2:] > 0)
    agree(loss_fn, {"w": normal(3, 2)[0]}, inputs)


def test_a_scaled_table():
    def loss_fn(params, rows):
        return jnp.sum(jnp.tanh((0.25 * params["table"])[rows]))

    rows, params = np.array([[0, 1], [2, 2], [1, 0], [2, 1]]), {"table": normal(3, 2)[0]}
    assert routes(loss_fn, params, rows) == {"table": "embed"}
    agree(loss_fn, params, rows)


def test_weights_that_come_out_of_a_scan():
    def loss_fn(params, x):
        _, turned = jax.lax.scan(lambda carry, w: (carry, w.T), 0.0, params["w"])
        return jnp.sum(jnp.tanh(x @ turned[0])) + jnp.sum(jnp.sin(x @ turned[1]))

    agree(loss_fn, {"w": normal(2, 5, 3)[0]}, normal(3))


@pytest.mark.parametrize(
    "loss",
    [
        lambda w, x: x * w,
        lambda w, x: (x.sum() * w, x.sum()),
        lambda w, x: {"loss": x.sum() * w},
        lambda w, x: None,
        lambda w, x: (x.sum() * w).astype(int),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(loss):
    """By one line, from everything that takes a loss."""
    with pytest.raises(TypeError, match=r"loss_fn must return one (real )?scalar"):
        bookkeeping.plan(loss, jnp.float32(1.0), jnp.ones(3))
    for method in ("vmap", "bookkeeping"):
        with pytest.raises(TypeError, match=r"loss_fn must return one (real )?scalar"):
            dp.clipped_sum(loss, dp.flat(1.0), method=method)(
                jnp.float32(1.0), jnp.ones((2, 3)), jnp.ones(2, bool)
            )


def add_to(array):
    return lambda value: jax.ref.addupdate(array, ..., value)


def collects_weight(params, x):
    total = jax.new_ref(jnp.zeros((3, 3)))
    add_to(total)(params["w"])
    return jnp.sum(jnp.sin(x @ total[...]))


def collects_example(params, x):
    scale = jax.new_ref(jnp.ones(3))
    add_to(scale)(x)
    return jnp.sum(jnp.sin(x @ (params["w"] * scale[...][:, None])))


def collects_penalty(params, x):
    penalty = jax.new_ref(jnp.zeros(()))

    @jax.jit
    def layer(w, x, penalty):
        add_to(penalty)(jnp.sum(w**2))
        return x @ w

    return jnp.sum(jnp.sin(layer(params["w"], x, penalty))) + penalty[...]


def collects_in_a_scan(params, x):
    total = jax.new_ref(jnp.zeros((3, 3)))

    def turn(carry, _):
        total[...] = total[...] + jnp.sin(params["w"])
        return carry, None

    jax.lax.scan(turn, 0.0, length=2)
    return jnp.sum(x @ total[...])


@pytest.mark.parametrize(
    "loss_fn", [collects_weight, collects_example, collects_penalty, collects_in_a_scan]
)
@pytest.mark.parametrize("size", [None, 1])
def test_losses_that_write_to_arrays_in_place(loss_fn, size):
    params = {"w": normal(3, 3)[0]}
    rule = dp.flat(0.5)
    assert_close(*both(loss_fn, rule, params, normal(3), microbatch_size=size))
    assert "in place" in dp.explain(loss_fn, params, normal(3)[0])


@pytest.mark.parametrize("function", [lambda w, s: w * s, lambda w, s: jnp.sin(w) * s])
def test_effects_of_a_loss_happen_once(function):
    """Or the loss is that of one number from the host, and the gradient that of another."""
    calls = []

    def number():
        calls.append(1)
        return np.float32(len(calls))

    def loss_fn(params, x):
        jax.debug.callback(lambda w: calls.append(0), params["w"])
        scale = io_callback(number, jax.ShapeDtypeStruct((), jnp.float32))
        return jnp.sum(x @ function(params["w"], scale)) + jnp.sum(jnp.sin(x @ params["v"].T))

    params, batch = {"v": normal(3, 3)[0], "w": normal(3, 3)[0]}, normal(3)
    found = {}
    for method in ("vmap", "bookkeeping"):
        calls.clear()
        _, facts = jax.jit(dp.clipped_sum(loss_fn, dp.flat(1.0), method=method))(
            params, batch, MASK
        )
        jax.effects_barrier()
        found[method] = np.asarray(facts.norms), len(calls), sum(calls)
    np.testing.assert_allclose(found["bookkeeping"][0], found["vmap"][0], rtol=1e-5)
    assert found["bookkeeping"][1:] == found["vmap"][1:] == (2, 1)


@jax.custom_vjp
def times_first(x, t):
    return x * t[0]


times_first.defvjp(lambda x, t: (x * t[0], t), lambda t, g: (g * t.at[0].get(), jnp.zeros_like(t)))


@jax.custom_vjp
def times(x, factor):
    return x * factor


times.defvjp(
    lambda x, factor: (x * factor, factor), lambda factor, g: (g * factor, jnp.zeros_like(factor))
)


@pytest.mark.parametrize(
    "function",
    [
        lambda y, w: times_first(y, jnp.array([2.0, 1.0])),
        lambda y, w: odeint(lambda z, t, w: jnp.tanh(z @ w), y, jnp.array([0.0, 1.0]), w),
        # A Python number promotes nothing.
        lambda y, w: times(y.astype(jnp.bfloat16), 2.0),
    ],
)
def test_rules_of_the_model_see_constants_as_arrays(function):
    agree(lambda p, x: jnp.sum(function(x @ p["w"], p["w"])), {"w": normal(3, 3)[0]}, normal(3))


def test_branches_of_other_platforms_are_not_compiled():
    def elsewhere(x, w):
        return jnp.dot(x, w, precision=jax.lax.DotAlgorithmPreset.TF32_TF32_F32)

    def loss_fn(params, x):
        w = params["w"]
        y = jax.lax.platform_dependent(x, w, cuda=elsewhere, cpu=lambda x, w: jnp.sin(x @ w))
        z = jax.lax.platform_dependent(y, w, cuda=elsewhere, default=jnp.dot)
        return jnp.sum(jnp.tanh(z))

    params = {"w": normal(3, 3)[0]}
    with pytest.raises(Exception, match="TF32"):  # or the test says nothing
        jax.jit(elsewhere)(normal(3)[0], params["w"])
    assert set(routes(loss_fn, params, normal(3))) == {"w"}  # it has sites inside
    agree(loss_fn, params, normal(3))


def test_filled_indices_look_up_nothing():
    """Rows out of range give a constant, which has no gradient."""

    def loss_fn(params, rows):
        found = params["table"].at[rows].get(mode="fill", fill_value=0.5)
        return jnp.sum(jnp.sin(found + params["shift"]))

    rows = np.array([[5, 9], [0, 4], [4, -9], [3, -1]])  # a table of five
    params = {"shift": np.float32(0.5), "table": normal(5, 3)[0]}
    assert routes(loss_fn, params, rows) == {"table": "embed"}
    agree(loss_fn, params, rows)


def test_a_lookup_of_parts_of_rows_is_no_lookup():
    dims = jax.lax.GatherDimensionNumbers(
        offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,)
    )

    def loss_fn(params, rows):
        found = jax.lax.gather(params["table"], rows[:, None], dims, slice_sizes=(1, 2))
        return jnp.sum(jnp.sin(found))

    rows, params = np.array([[0, 4], [1, 1], [2, 3], [3, 0]]), {"table": normal(5, 3)[0]}
    assert routes(loss_fn, params, rows) == {}
    agree(loss_fn, params, rows)


@pytest.mark.parametrize("elsewhere", ["kernel", "gain"])
def test_a_derived_weight_with_a_leaf_of_other_use(elsewhere):
    """The other leaf of the weight, which has no other use, must not be lost."""

    def loss_fn(params, x):
        out = jax.lax.conv_general_dilated(
            x[None], jnp.sin(params["kernel"]) * params["gain"], (1,), "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip
        return jnp.sum(jnp.tanh(out)) + jnp.sum(jnp.sin(params[elsewhere]) * x[0, 0])

    params = {"gain": normal(4)[0, None, None], "kernel": normal(3, 2, 4, seed=1)[0]}
    assert routes(loss_fn, params, normal(7, 2)) == {}
    agree(loss_fn, params, normal(7, 2))


def test_a_product_of_weights_with_a_leaf_of_other_use():
    def loss_fn(params, x):
        out = jnp.tanh(x @ (params["a"] @ params["b"]))
        return jnp.sum(out) + jnp.sum(jnp.sin(params["a"]) * x[:, None])

    agree(loss_fn, {"a": normal(3, 2)[0], "b": normal(2, 5, seed=1)[0]}, normal(3))


def test_weights_in_half_precision_keep_their_route():
    layer = nn.Dense(3, dtype=jnp.bfloat16, use_bias=False)
    found = routes(*as_loss(layer, normal(7, 5)), normal(7, 5))
    assert found == {"params/kernel": "gram"}


def test_the_plan_gives_the_sizes_that_decided():
    want = {
        "dense of many tokens": "T=60 d=5 p=3",
        "batched weights": "T=7 d=5 p=4 B=3",
        "conv groups": "T=25 d=18 p=3 B=2, outer again",
        "weight standardization": "T=36 d=18 p=4, outer, by columns",
        "embed": "T=6 d=11 p=5",
    }
    for name, sizes in want.items():
        loss_fn, params = as_loss(*LAYERS[name])
        plan = bookkeeping.plan(loss_fn, params, LAYERS[name][1][0])
        assert sizes in [leaf.reason for leaf in plan], (name, plan)


def test_inputs_are_recorded_as_the_product_has_them():
    """Rounded to 16 bits, where the layer rounds them."""
    layer = nn.Dense(8, dtype=jnp.bfloat16, use_bias=False)
    inputs = np.full((4, 2, 64), 1.0 + 0.99 * 2.0**-8, np.float32)  # which becomes 1
    loss_fn, params = as_loss(layer, inputs)
    (_, want), (_, found) = both(loss_fn, dp.flat(1.0), params, inputs)
    np.testing.assert_allclose(found.norms, want.norms, rtol=1e-3)


VIEWS = {
    "slices": lambda p, x: jnp.tanh(x @ p["w"][:, :3]) @ p["w"][:3, 3:6],
    "strided": lambda p, x: jnp.tanh(x @ p["w"][:, ::2]) @ p["w"][:3, 1::2],
    "split": lambda p, x: sum(jnp.tanh(x @ w) for w in jnp.split(p["w"], 3, 1)),
    "heads": lambda p, x: x @ p["w"].reshape(-1, 3, 2)[:, 1] + x @ p["w"].reshape(-1, 3, 2)[:, 2],
    "padded": lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 2))),
    "rows": lambda p, x: x[:, :2] @ p["w"][:2] + x[:, 2:] @ p["w"][2:],
    "stacked": lambda p, x: jax.lax.scan(
        lambda s, w: (jnp.tanh(s @ w), None), x, jnp.stack([p["v"], -p["v"].T])
    )[0],
    "stack of two": lambda p, x: jax.lax.scan(
        lambda s, w: (jnp.tanh(s @ w), None), x, jnp.stack([p["v"], 2 * p["u"]])
    )[0],
    "heads joined": lambda p, x: x @ jnp.concatenate(
        [p["w"].reshape(-1, 3, 2), p["v"].reshape(-1, 1, 5)[:, :, :2]], 1
    ).reshape(x.shape[-1], -1),
    "sum of leaves": lambda p, x: jnp.tanh(x @ (p["v"] - p["u"])),
    "frozen and trained": lambda p, x: jnp.tanh(x @ (np.ones((5, 5), np.float32) + p["v"])),
    "lookup and rows": lambda p, x: p["w"][:, :5][(x[:, 0] > 0).astype(int)] @ p["w"][:, :5].T,
    "columns": lambda p, x: jnp.take(p["w"], (x[:, 0] > 0).astype(int), axis=1).T @ p["v"],
    "new rows": lambda p, x: jnp.concatenate([p["v"], p["u"][:1]])[(x > 0).sum(1)],
    "one number": lambda p, x: x * p["w"][1, (x[0, 0] > 0).astype(int)],
    "kernel of channels": lambda p, x: jax.lax.conv_general_dilated(
        x[None], jnp.concatenate([p["k"], p["v"][None]], 2), (1,), "VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
    ),
    "experts": lambda p, x: jnp.einsum("td,tdp->tp", x, p["k2"][(x[:, 0] > 0).astype(int)]),
    "switch in a scan": lambda p, x: jax.lax.scan(
        lambda s, w: (jax.lax.switch((s[0, 0] > 0).astype(int), [
            lambda s: jnp.tanh(s @ w), lambda s: jnp.sin(s @ p["u"]),
        ], s), None), x, jnp.stack([p["v"], p["v"]]),
    )[0],
    "table behind a penalty": lambda p, x: jnp.sum(p["w"][(x[:, 0] > 0).astype(int)] ** 2)
    + x[0, 0] * jnp.sum(p["w"] ** 2) + 0.1 * jnp.sum(p["v"] ** 2) + jnp.sum((x @ p["v"]) ** 2),
    "two penalties": lambda p, x: jnp.sum(jnp.sin(x @ p["v"])) + x[0, 0] * jnp.sum(p["v"] ** 2)
    + x[0, 1] * jnp.sum(jnp.cos(p["v"])),
    "learned query": lambda p, x: (p["u"][:2] @ p["v"]) @ x.T,
    "first rows of a table": lambda p, x: x[:2] * p["v"][jnp.arange(2)],
    "stopped": lambda p, x: x @ (p["v"] + jax.lax.stop_gradient(jnp.sin(p["v"]))),
}  # fmt: skip
ALLOWED = {"learned query": ["u"]}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.one_in(2)
def test_parts_of_leaves(name):
    """No kernel is direct, and all have vmap's numbers."""
    shapes = {"w": (5, 6), "v": (5, 5), "u": (5, 5), "k": (1, 5, 4), "k2": (2, 5, 4)}
    params = {k: normal(*s, seed=i)[0] for i, (k, s) in enumerate(shapes.items())}
    inputs = normal(4, 5, seed=9)

    def loss_fn(params, x):
        return jnp.sum(jnp.sin(VIEWS[name](params, x)))

    plan = bookkeeping.plan(loss_fn, params, inputs[0])
    direct = [leaf.path for leaf in plan if leaf.route == "direct"]
    assert direct == ALLOWED.get(name, [])
    agree(loss_fn, params, inputs, tolerance=3e-5)


def widths(p, x):
    """Heads of several widths, and a layer of several."""
    y = jnp.tanh(x @ p["v"])
    heads = [jnp.sin(y[:, :m] @ p["w"][:m]).sum() for m in (2, 3, 5)]
    wide = [jnp.sin(x[:, :m] @ p["u"][:m, 1:n]).sum() for m, n in ((3, 3), (2, 5))]
    return jnp.stack(heads + wide + [jnp.sin(x @ p["u"]).sum()])


NESTED = {
    "widths": widths,
    "columns": lambda p, x: (x @ p["w"]).sum() + jnp.sin(x @ p["w"][:, 2:5]),
    "turned": lambda p, x: (x @ p["w"].T.T).sum() + jnp.sin(x[:, 1:3] @ p["w"].T[2:5, 1:3].T),
    "scaled": lambda p, x: (x @ (2 * p["w"])).sum() + jnp.sin(x[:, :3] @ -p["w"][:3] / 7),
    "in a scan": lambda p, x: jax.lax.scan(
        lambda s, x: (jnp.sin(s @ p["v"]) + jnp.sin(s[:3] @ p["v"][:3]) + x, None), x[0], x
    )[0],
    "behind a penalty": lambda p, x: jnp.sin(x @ p["v"]).sum() + (x[:, :2] @ p["v"][:2]).sum() ** 2
    + x[0, 0] * jnp.sum(p["v"] ** 2),
    "in halves": lambda p, x: (x.astype(jnp.bfloat16) @ p["v"].astype(jnp.bfloat16)).astype(
        jnp.float32
    ).sum() + jnp.sin(x[:, :2] @ p["v"][:2]),
}  # fmt: skip
OTHERS = {
    "across": lambda p, x: (x[:, :3] @ p["w"][:3]).sum() + jnp.sin(x[:, 2:] @ p["w"][2:]),
    "the other side": lambda p, x: (x @ p["v"]).sum() + jnp.sin(x[:, :3] @ p["v"].T[:3]),
    "every other": lambda p, x: (x @ p["v"]).sum() + jnp.sin(x[:, ::2] @ p["v"][::2]),
}


@pytest.mark.parametrize("name", [*NESTED, *OTHERS])
@pytest.mark.one_in(2)
def test_parts_inside_of_others(name):
    """Rectangles of the largest matrix are uses of it; others are taken together all the same."""
    shapes = {"w": (5, 6), "v": (5, 5), "u": (5, 5)}
    params = {k: normal(*s, seed=i)[0] for i, (k, s) in enumerate(shapes.items())}
    inputs = normal(4, 5, seed=9)

    def loss_fn(params, x):
        return jnp.sum(jnp.sin((NESTED | OTHERS)[name](params, x)))

    plan = bookkeeping.plan(loss_fn, params, inputs[0])
    derived = [leaf.path for leaf in plan if "derived" in leaf.reason]
    assert bool(derived) == (name in OTHERS)
    assert "direct" not in {leaf.route for leaf in plan}
    tolerance = 1e-2 if name == "in halves" else 3e-5
    agree(loss_fn, params, inputs, tolerance=tolerance, slack=tolerance)


def test_the_bound_of_parts_inside_of_others():
    """Uses that cancel but for a rest, and extreme scales."""

    def loss_fn(params, e):
        own = jnp.sum((e["x"] @ params["w"]) * e["g"])
        return own - jnp.sum((e["y"] @ params["w"][:3]) * e["g"])

    draw = np.random.default_rng(1)
    number = lambda *shape: draw.standard_normal(shape, np.float32)  # noqa: E731
    x, g = number(7, 4, 5), 100 * number(7, 4, 6)
    y = x[:, :, :3] * 1.0
    x[:2, :, 3:] = 0
    x[0] += 1e-4 * number(4, 5)
    x[1] += 1e-3 * number(4, 5)
    for i, scale in enumerate((1e15, 1e-15, 1e30, 1e-30)):
        x[3 + i] *= np.float32(scale)
        y[3 + i] *= np.float32(scale)
    odd, params = {"x": x, "y": y, "g": g}, {"w": number(5, 6)}
    ordinary = {"x": number(4, 5), "y": number(4, 3), "g": number(4, 6)}
    check(loss_fn, params, ordinary, odd, route="gram", rtol=np.float32([0.5, 0.05] + [1e-3] * 5))
