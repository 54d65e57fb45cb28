"""`clipped_sum` and the noise on a caller's mesh of eight devices: the numbers of one device."""

import contextlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpjax import dp
from dpjax.dp.engines import parts

SIZE = 16
NUMBERS = np.random.default_rng(0)
PARAMS = {
    "table": NUMBERS.standard_normal((32, 16), np.float32),
    "dense": 0.3 * NUMBERS.standard_normal((16, 8), np.float32),
    "bias": np.zeros(8, np.float32),
}
BATCH = {
    "rows": NUMBERS.integers(0, 32, (SIZE, 5)).astype(np.int32),
    "x": NUMBERS.standard_normal((SIZE, 4), np.float32),
    "image": NUMBERS.standard_normal((SIZE, 6, 6, 2), np.float32),
}
KERNEL = NUMBERS.standard_normal((3, 3, 2, 4), np.float32)
FROZEN = 0.2 * NUMBERS.standard_normal((4, 16), np.float32)
MASK = np.arange(SIZE) < 13
MESHES = {
    "explicit": lambda: jax.make_mesh((8,), ("data",)),
    "auto": lambda: jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
    "plain": lambda: Mesh(np.array(jax.devices()), ("data",)),
}


def loss_fn(frozen):
    def loss(params, example):
        hidden = jnp.tanh(example["x"] @ frozen) + params["table"][example["rows"]].mean(0)
        return jnp.sum(jnp.tanh(hidden @ params["dense"] + params["bias"]) ** 2)

    return loss


def conv_loss(frozen):
    def loss(params, example):
        dims = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(
            example["image"][None], params["kernel"], (1, 1), "SAME", dimension_numbers=dims
        )
        return jnp.sum(jnp.tanh(out)) + jnp.sum(jnp.tanh(example["x"] @ frozen))

    return loss


def train(make_loss, frozen, params, batch, mask, *, method, jit=True, microbatch_size=8):
    """The parameters and the per-example facts after two private optax steps."""
    clipped = dp.clipped_sum(
        make_loss(frozen), dp.flat(1.0), method=method, microbatch_size=microbatch_size
    )
    tx = optax.chain(dp.gaussian(0.5, 20.0, key=jax.random.key(3)), optax.sgd(0.1, momentum=0.9))

    def step(params, state, batch, mask):
        summed, facts = clipped(params, batch, mask)
        updates, state = tx.update(summed, state, params)
        return optax.apply_updates(params, updates), state, facts

    step = jax.jit(step) if jit else step
    state = tx.init(params)
    for _ in range(2):
        params, state, facts = step(params, state, batch, mask)
    return params, facts


def assert_close(have, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-5, atol=2e-5
        ),
        have,
        want,
    )


@pytest.fixture(scope="module")
def one_device():
    params = {"kernel": KERNEL}
    return {
        "dense": train(loss_fn, FROZEN, PARAMS, BATCH, MASK, method="vmap"),
        "conv": train(conv_loss, FROZEN, params, BATCH, MASK, method="vmap"),
    }


@pytest.mark.parametrize(
    ("kind", "where", "method"),
    [
        ("explicit", "replicated", "vmap"),
        ("explicit", "sharded", "bookkeeping"),
        ("explicit", "set_mesh", "bookkeeping"),
        ("auto", "sharded", "bookkeeping"),
        ("plain", "set_mesh", "bookkeeping"),
        *(
            pytest.param(kind, where, method, marks=pytest.mark.slow)
            for kind in MESHES
            for where in ("replicated", "sharded", "set_mesh")
            for method in ("vmap", "bookkeeping")
        ),
    ],
)
def test_a_training_on_a_mesh_is_that_on_one_device(kind, where, method, one_device):
    mesh = MESHES[kind]()

    def put(tree, *spec):
        return jax.device_put(tree, NamedSharding(mesh, P(*spec)))

    params = put(PARAMS)
    if where == "sharded":
        params |= {"dense": put(PARAMS["dense"], "data"), "bias": put(PARAMS["bias"], "data")}
    context = contextlib.nullcontext()
    if where == "set_mesh":
        context = mesh if kind == "plain" else jax.set_mesh(mesh)
    batch, mask = put((BATCH, MASK), "data")
    with context:
        have = train(loss_fn, FROZEN, params, batch, mask, method=method)
    assert_close(have, one_device["dense"])
    if kind == "explicit":
        assert jax.tree.map(lambda x: x.sharding.spec, have[0]) == jax.tree.map(
            lambda x: jax.typeof(x).sharding.spec, params
        )


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_a_loss_may_close_over_arrays_on_the_mesh_and_need_not_be_jitted(kind, one_device):
    mesh = MESHES[kind]()
    whole = NamedSharding(mesh, P())
    frozen, params = jax.device_put((FROZEN, PARAMS), whole)
    batch, mask = jax.device_put((BATCH, MASK), NamedSharding(mesh, P("data")))
    have = train(loss_fn, frozen, params, batch, mask, method="auto")
    assert_close(have, one_device["dense"])
    if kind == "auto":
        return  # outside of jit, JAX places single operations
    clipped = dp.clipped_sum(loss_fn(frozen), dp.flat(1.0))
    eager, jitted = clipped(params, batch, mask), jax.jit(clipped)(params, batch, mask)
    assert_close(eager, jitted)


@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
@pytest.mark.parametrize("kind", ["explicit", "auto"])
@pytest.mark.one_in(3)
def test_examples_of_a_sharded_batch_keep_their_channels_in_convolutions(kind, method, one_device):
    """XLA's partitioner alone mixes them up: a wrong gradient without a word."""
    mesh = MESHES[kind]()
    params = jax.device_put({"kernel": KERNEL}, NamedSharding(mesh, P()))
    batch, mask = jax.device_put((BATCH, MASK), NamedSharding(mesh, P("data")))
    have = train(conv_loss, FROZEN, params, batch, mask, method=method)
    assert_close(have, one_device["conv"])


@pytest.mark.parametrize("method", ["auto", "vmap"])
def test_a_mesh_that_only_jit_knows(method):
    """`in_shardings` divides arrays of one device, of which JAX's tracers say nothing."""

    def loss(scale):
        def loss_fn(params, example):
            dims, noise = ("NHWC", "HWIO", "NHWC"), jax.random.normal(example["key"], (6, 6, 2))
            image, kernel = example["image"] + 0.1 * noise, example["x"][0] * params["kernel"]
            out = jax.lax.conv_general_dilated(
                image[None], kernel, (1, 1), "SAME", None, None, dims
            )
            return scale * jnp.sum(jnp.tanh(out))

        return loss_fn

    def of_scale(scale, *args):
        summed, facts = dp.clipped_sum(loss(scale), dp.flat(0.5), method=method)(*args)
        return summed.value, facts

    def scaled(scales, *args):
        return jax.vmap(of_scale, (0, None, None, None))(scales, *args)

    def args():  # no key is used twice
        return {"kernel": KERNEL}, BATCH | {"key": jax.random.split(jax.random.key(1), SIZE)}, MASK

    for mesh in (MESHES["plain"](), MESHES["explicit"]()):
        divided, whole = (NamedSharding(mesh, P(*axes)) for axes in (("data",), ()))
        jitted = jax.jit(of_scale, in_shardings=(whole, whole, divided, divided))
        assert_close(jitted(2.0, *args()), jax.jit(of_scale)(2.0, *args()))
        assert "all-to-all" not in jitted.lower(2.0, *args()).compile().as_text()
        jitted = jax.jit(scaled, in_shardings=(whole, whole, divided, divided))
        of_two = jax.tree.map(lambda x: x[1], jitted(np.array([0.5, 2.0], np.float32), *args()))
        assert_close(of_two, jax.jit(of_scale)(2.0, *args()))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("method", ["auto", "vmap"])
@pytest.mark.parametrize("kind", ["explicit", "auto"])
@pytest.mark.one_in(3)
def test_a_convolution_below_a_mesh_that_was_set(kind, method, channels):
    params = CONVOLUTION | {"kernel": KERNEL[:, :, :channels]}
    clipped = dp.clipped_sum(normed_convolution, dp.flat(0.5), method=method)
    mesh, mask = MESHES[kind](), np.ones(64, bool)
    want, _ = jax.jit(clipped)(params, IMAGES, mask)
    with jax.set_mesh(mesh):
        there = jax.device_put((IMAGES, mask), NamedSharding(mesh, P("data")))
        params = jax.device_put(params, NamedSharding(mesh, P()))
        for function in (clipped, jax.jit(clipped)):
            assert_close(function(params, *there)[0].value, want.value)


@pytest.mark.parametrize("microbatch_size", [None, 8, 2])
@pytest.mark.parametrize("kind", ["explicit", "plain"])
def test_a_kernel_that_depends_on_the_example_is_computed_whole(kind, microbatch_size):
    """The one place where the engine itself has a convolution with a group for each example."""

    def loss(params, example):
        dims, kernel = ("NHWC", "HWIO", "NHWC"), params["kernel"] * example["x"][0]
        image = example["image"][None]
        out = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", None, None, dims)
        return jnp.sum(jnp.tanh(out + params["bias"].reshape(1, 1, 1, 4)))

    mesh, params = MESHES[kind](), {"kernel": KERNEL, "bias": np.zeros(4, np.float32)}
    clipped = jax.jit(dp.clipped_sum(loss, dp.flat(0.5), microbatch_size=microbatch_size))
    want = clipped(params, BATCH, MASK)
    there = jax.device_put((BATCH, MASK), NamedSharding(mesh, P("data")))
    have = clipped(jax.device_put(params, NamedSharding(mesh, P())), *there)
    assert_close((have[0].value, have[1].norms), (want[0].value, want[1].norms))


@pytest.mark.filterwarnings("error")
def test_int64_rows_of_numpy_are_taken_without_a_warning():
    batch = BATCH | {"rows": BATCH["rows"].astype(np.int64)}
    clipped = dp.clipped_sum(loss_fn(FROZEN), dp.flat(1.0))
    have = jax.eval_shape(lambda: clipped(PARAMS, batch, MASK))  # traced: NumPy comes as it is
    assert have[0].value["table"].dtype == jnp.float32


def every_route(params, example):
    """Products by Gram matrices and by gradients, lookups, functions of weights, biases."""
    x, g = example["tokens"], example["cotangents"]
    gain = params["scaled"] / jnp.linalg.norm(params["scaled"], axis=0, keepdims=True)
    derived = jnp.tanh(params["derived"])  # of no known function
    looked_up = params["table"][example["rows"]] @ params["dense"]
    products = [x @ params["wide"], x @ gain, x @ derived, x + params["bias"][None]]
    return sum(jnp.sum(out * g) for out in products) + jnp.sum(jnp.tanh(looked_up))


def odd_examples(n=SIZE, tokens=6, width=12):
    """One is not finite, of one the tokens cancel, of one they are huge and cancel, one is zero."""
    draw = np.random.default_rng(2)
    x, g = draw.standard_normal((2, n, tokens, width), np.float32)
    x[3, 0, 0] = np.nan
    x[5, 1::2], g[5, 1::2] = x[5, ::2], -g[5, ::2] * np.float32(1 + 1e-5)
    x[9, 1::2], g[9, 1::2] = 1e18 * x[9, ::2], -g[9, ::2]
    x[9, ::2] *= 1e18
    x[11], g[12] = 0, 0
    rows = draw.integers(0, 32, (n, 5)).astype(np.int32)
    return {"tokens": x, "cotangents": g, "rows": rows}


def square(name, width=12):
    return 0.3 * np.random.default_rng(len(name)).standard_normal((width, width), np.float32)


ROUTES = PARAMS | {name: square(name) for name in ("wide", "scaled", "derived")}
ROUTES["bias"] = np.zeros(12, np.float32)


@pytest.mark.parametrize("chunk", [1, 3000, 2**20])
def test_examples_that_are_set_apart_are_so_on_a_mesh(chunk, monkeypatch):
    """Whatever number of examples is measured at a time: some of every device."""
    monkeypatch.setattr(parts, "_CHUNK", {"cpu": chunk})
    batch, mesh = odd_examples(), MESHES["plain"]()
    clipped = dp.clipped_sum(every_route, dp.per_layer(0.5))
    want = jax.jit(clipped)(ROUTES, batch, MASK)
    there = jax.device_put((batch, MASK), NamedSharding(mesh, P("data")))
    have = jax.jit(clipped)(jax.device_put(ROUTES, NamedSharding(mesh, P())), *there)
    assert_close(have[0].value, want[0].value)
    np.testing.assert_allclose(have[1].factors, want[1].factors, rtol=1e-4)
    np.testing.assert_array_equal(np.isfinite(have[1].norms), np.isfinite(want[1].norms))
    assert np.sum(np.asarray(want[1].factors) == 0) > 3 * 7  # padding, and what is not finite


def normed_convolution(params, example):
    """A kernel by book-keeping, and direct leaves behind it."""
    image, kernel = example["image"][None], params["kernel"]
    out = jax.lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2 // kernel.shape[2],
    )  # fmt: skip
    out = (out - out.mean((1, 2), keepdims=True)) / (out.std((1, 2), keepdims=True) + 0.1)
    return jnp.sum(jnp.tanh(out * params["scale"].reshape(1, 1, 1, 4)) ** 2)


CONVOLUTION = {"kernel": KERNEL, "scale": np.ones(4, np.float32)}
IMAGES = {"image": np.random.default_rng(4).standard_normal((64, 6, 6, 2), np.float32)}


@pytest.mark.parametrize("microbatch_size", [None, 16, 4])
@pytest.mark.parametrize(
    ("loss", "params", "batch"),
    [(every_route, ROUTES, odd_examples(n=64)), (normed_convolution, CONVOLUTION, IMAGES)],
    ids=["products", "convolution"],
)
@pytest.mark.one_in(2)
def test_what_is_recorded_stays_where_it_is(loss, params, batch, microbatch_size):
    """No device gathers the examples of others: only facts of one number each."""
    mesh, mask = MESHES["plain"](), np.ones(64, bool)
    clipped = jax.jit(dp.clipped_sum(loss, dp.flat(0.5), microbatch_size=microbatch_size))
    want, _ = clipped(params, batch, mask)
    there = jax.device_put((batch, mask), NamedSharding(mesh, P("data")))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    assert_close(clipped(params, *there)[0].value, want.value)
    if microbatch_size == 4:
        return  # fewer than there are devices: these have to be moved
    text = clipped.lower(params, *there).compile().as_text()
    gathered = re.findall(
        r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)", text
    )
    assert all(math.prod(int(x) for x in shape.split(",") if x) <= 64 for shape in gathered), (
        gathered
    )


@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda w, x: jnp.sum(jax.lax.top_k(x @ w, 3)[0]),
        lambda w, x: jnp.sum(jnp.sin((x @ w).reshape(-1)[:7])),
    ],
)
def test_a_loss_need_not_know_how_its_parameters_are_sharded(loss, method):
    """On Explicit axes, JAX itself has no sharding for the results of these operations."""
    mesh = MESHES["explicit"]()
    w, x = NUMBERS.standard_normal((8, 8)), NUMBERS.standard_normal((SIZE, 5, 8))
    w, x = np.float32(w), np.float32(x)
    arrays = [w, x, np.ones(SIZE, bool)]
    clipped = jax.jit(dp.clipped_sum(loss, dp.flat(0.5), method=method))
    want = clipped(*arrays)
    specs = [P(None, "data"), P(), P()]
    arrays = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs)]
    with pytest.raises(Exception, match="shard"):  # or the test says nothing
        jax.eval_shape(loss, arrays[0], arrays[1][0])
    assert_close(clipped(*arrays), want)
    if method == "bookkeeping":
        dp.check_engine(loss, *arrays[:2])
        assert str(dp.explain(loss, arrays[0], arrays[1][0])) == str(dp.explain(loss, w, x[0]))
