"""Parameters that are sharded: gathered at each use, with the numbers of one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import collectives

from dpjax import dp
from dpjax.runtime import sharding
from dpjax.runtime.gathering import gathers_in_branches
from dpjax.step import Hyper, make_steps

ROWS, WIDTH = 16, 8
# XLA's CPU compiler would otherwise drop barriers, gather early and keep; see the guide's page.
OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander",
           "xla_cpu_enable_concurrency_optimized_scheduler": False}  # fmt: skip
NUMBERS = np.random.default_rng(0)


def draw(*shape):
    return NUMBERS.normal(size=shape).astype(np.float32) * np.float32(shape[0] ** -0.5)


FROZEN = {
    "table": draw(16, WIDTH),
    "kernel": draw(WIDTH, WIDTH).astype(jnp.bfloat16),
    "turned": draw(WIDTH, WIDTH),
    "block": draw(WIDTH, WIDTH),
    "stack": draw(2, WIDTH, WIDTH),
    "joined": draw(8, WIDTH),
    "odd": draw(3),  # not divisible: replicated
}
TRAINABLE = {"a": draw(WIDTH, 2), "b": draw(2, WIDTH), "more": draw(8, WIDTH), "out": draw(16, 3)}


def dense(params, example):
    """Lookups, conversions, transposes, checkpoints, scans, and kernels that train in part."""
    x = params["table"][example["input"]]
    x = jnp.tanh(x @ params["kernel"].astype(jnp.float32) + x @ params["a"] @ params["b"])
    x = jax.checkpoint(lambda x: jnp.tanh(x @ params["block"]))(jnp.tanh(x @ params["turned"].T))
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
    x = x @ jnp.concatenate([params["joined"], params["more"]]).T
    logits = x.mean(0) @ params["out"] + params["odd"]
    return -jax.nn.log_softmax(logits)[example["label"]]


def everything(params, example):
    """All of `dense`'s parameters, derived ones, a penalty, and an example that is set apart."""
    steps = {name: params[name] for name in params.keys() - {"derived", "gain"}}
    derived = params["derived"] / jnp.linalg.norm(params["derived"], axis=0, keepdims=True)
    x = params["table"][example["input"]] * example["scale"] * params["gain"][None]
    more = jnp.mean(jnp.tanh(x @ derived)) + jnp.sum(x @ params["block"]) * 1e-3
    return dense(steps, example) + more + 1e-3 * jnp.sum(jnp.square(params["more"]))


ALL = {**FROZEN, **TRAINABLE, "kernel": draw(WIDTH, WIDTH), "gain": draw(WIDTH),
       "derived": draw(WIDTH, WIDTH)}  # fmt: skip


CONVOLVED = {"kernel": draw(3, WIDTH, WIDTH), "odd": draw(3)}
CONVOLUTION = {"out": draw(WIDTH, 3), "trained": draw(3, 1, WIDTH)}


def convolve(params, example):
    """A convolution that trains: the engine takes a doubtful example by itself."""
    dims = ("NWC", "WIO", "NWC")
    x = example["input"].astype(jnp.float32)[None, :, None] * example["scale"]
    for w in (params["trained"], params["kernel"]):
        x = jnp.tanh(jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=dims))
    return -jax.nn.log_softmax(x[0].mean(0) @ params["out"] + params["odd"])[example["label"]]


def prepared(loss, trainable, frozen, text, devices, **options):
    layout = sharding.layout(text, jax.devices()[:devices])
    hyper = Hyper(
        learning_rate=jnp.float32(1.0),
        noise_multiplier=jnp.float32(0.0),
        rule=dp.flat(0.5),
        noise_key=jax.random.key(3),
        augment_key=jax.random.key(4),
        batch_size=jnp.float32(ROWS),
    )
    sgd = lambda h: dp.sgd(1.0, h.noise_multiplier, ROWS, key=h.noise_key)  # noqa: E731
    steps = make_steps(loss, sgd, layout, private=True, **options)
    state = steps.init(sharding.place(trainable, layout.shardings(trainable)), hyper)
    whole, totals = steps.begin(state)
    scale = np.where(np.arange(ROWS) == 5, np.nan, 1.0).astype(np.float32)  # on one device
    large = np.where(np.arange(ROWS) == 5, 1e19, 1.0).astype(np.float32)
    values = {
        "input": np.random.default_rng(1).integers(0, 16, (ROWS, 6)).astype(np.int32),
        "label": (np.arange(ROWS) % 3).astype(np.int32),
        "scale": scale if loss is convolve else large,
        "identity": np.arange(ROWS, dtype=np.uint32),
        "mask": np.arange(ROWS) < 13,
    }
    batch = sharding.to_mesh(values, layout.mesh)
    placed = layout.place_frozen(frozen)
    arguments = totals, whole, placed, batch, jnp.int32(0), hyper
    return layout, steps, state, hyper, arguments


@pytest.mark.parametrize(("loss", "trainable", "frozen", "method"), [
    (dense, TRAINABLE, FROZEN, "bookkeeping"),
    (dense, TRAINABLE, FROZEN, "vmap"),
    (everything, ALL, {}, "bookkeeping"),
    (everything, ALL, {}, "vmap"),
    pytest.param(convolve, CONVOLUTION, CONVOLVED, "bookkeeping", marks=pytest.mark.slow),
    (convolve, CONVOLUTION, CONVOLVED, "vmap"),
])  # fmt: skip
@pytest.mark.one_in(2)
def test_same_numbers_on_one_device(loss, trainable, frozen, method, monkeypatch):
    monkeypatch.setattr(sharding, "_LEAST", 1)
    results = []
    for text, devices in (("replicated", 1), ("fsdp", 8)):
        parts = prepared(loss, trainable, frozen, text, devices, method=method, microbatch_size=1)
        _, steps, state, hyper, arguments = parts
        program = steps.accumulate.lower(*arguments).compile()
        totals = program(*arguments)
        results.append(jax.device_get(steps.update(state, totals, hyper)))
    (want, facts), (got, others) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=2e-5, atol=1e-7),
                 (want.trainable, facts), (got.trainable, others))  # fmt: skip
    assert float(facts["dropped"]) == (loss is convolve)
    # One reduction of the sum, as without frozen parameters; `accumulate` only gathers.
    assert set(collectives(program)) == {"all-gather"}
    late = "all_gather" in str(jax.make_jaxpr(steps.accumulate)(*arguments))
    assert late or loss is convolve  # if not, the compiler gathers all before
    state = prepared(loss, trainable, frozen, "fsdp", 8, method=method, microbatch_size=1)[2]
    update = collectives(steps.update.lower(state, totals, hyper).compile())
    assert sorted(update) == ["all-reduce", "reduce-scatter"]


@pytest.mark.parametrize(("loss", "trainable", "frozen", "inside"), [
    (dense, TRAINABLE, FROZEN, True), (convolve, CONVOLUTION, CONVOLVED, False)])  # fmt: skip
def test_no_device_gathers_where_others_may_not_follow(
    loss, trainable, frozen, inside, monkeypatch
):
    monkeypatch.setattr(sharding, "_LEAST", 1)
    layout, steps, _, _, arguments = prepared(loss, trainable, frozen, "fsdp", 8, method="vmap")
    program = jax.make_jaxpr(steps.accumulate)(*arguments)
    assert not gathers_in_branches(program.jaxpr)
    assert ("all_gather" in str(program)) == inside  # if not, the compiler gathers before
    sharded = [p for p in jax.tree.leaves(arguments[2]) if not p.is_fully_replicated]
    assert len(sharded) == len(frozen) - 1
    assert layout.axes({"odd": FROZEN["odd"]}) == {"odd": -1}


def deep(params, example):
    """Layers of equal size, of which one at a time is to be here."""
    x = params["table"][example["input"]]
    for i in range(8):
        x = x + jnp.tanh(x @ params[f"layer_{i}"])
    return -jax.nn.log_softmax(x.mean(0)[:3])[example["label"]]


def test_what_trains_is_not_held_whole():
    """Off the compiled program: arguments hold shards, temporaries less than all the layers."""
    width = 128
    params = {f"layer_{i}": draw(width, width) for i in range(8)} | {"table": draw(32, width)}
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    found = {}
    for text in ("replicated", "fsdp"):
        _, steps, _, _, arguments = prepared(deep, params, {}, text, 8, microbatch_size=1)
        program = steps.accumulate.lower(*arguments).compile(OPTIONS)
        sizes = program.memory_analysis()
        found[text] = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
        if text == "fsdp":
            assert max(map(len, re.findall(r"all-gather\([^)]*\)", program.as_text()))) < 100
            assert bytes_of(arguments[1]) == bytes_of(params)
            shard = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(arguments[1]))
            assert shard == bytes_of(params) // 8
    whole = bytes_of(params)
    assert found["replicated"][0] - found["fsdp"][0] == pytest.approx(whole * 7 / 8, rel=0.01)
    assert found["fsdp"][1] - found["replicated"][1] < 0.4 * whole


def test_a_collective_in_a_branch_is_found():
    mesh = sharding.make_mesh()

    def program(where):
        def local(x):
            gather = lambda x: jax.lax.all_gather(x, sharding.AXIS).sum(0)  # noqa: E731
            if where == "cond":
                return jax.lax.cond(x[0] > 0, gather, lambda x: x, x)
            if where == "while":
                return jax.lax.fori_loop(0, x[0].astype(int), lambda _, x: gather(x), x)
            return jax.lax.scan(lambda x, _: (gather(x), None), x, length=2)[0]

        spec = sharding.partition(0)
        run = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return jax.make_jaxpr(jax.jit(run))(jnp.ones(8)).jaxpr

    assert [gathers_in_branches(program(w)) for w in ("cond", "while", "scan")] == [1, 1, 0]
