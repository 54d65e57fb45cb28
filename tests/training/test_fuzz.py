"""Random configs, data and damage: what is valid runs, what is not is one clear error, and nothing
half-done is left behind. The listed mistakes of `test_train.py` are the ones thought of; these are
drawn."""

import functools
import json
import math
import shutil

import hypothesis as hp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_workdir import ONE, like, saved, tree
from tiny import tiny_config

from dpjax import build, data, dp, models
from dpjax.runtime import Checkpoints, Unreadable, Workdir, sharding
from dpjax.training import loop, phases


def linear(num_classes, *, head_init, dtype):
    """A model whose build compiles next to nothing."""
    del head_init, dtype

    def init(key):
        return {
            "body": {"scale": jnp.ones(64), "bias": jnp.zeros(64)},
            "head": {"kernel": jax.random.normal(key, (64, num_classes)),
                     "bias": jnp.zeros(num_classes)},
        }  # fmt: skip

    def features(params, inputs):
        rows = inputs.reshape(*inputs.shape[:-3], 64)
        scale, bias = (jnp.broadcast_to(params["body"][k], rows.shape) for k in ("scale", "bias"))
        return jnp.tanh(rows * scale + bias)

    def apply(params, inputs):
        return models.dense_head(params["head"], features(params, inputs))

    def load(params, path, *, head=False):
        raise ValueError("no weights.")

    spec = models.InputSpec(8, 1, (0.5,), (0.5,))
    return models.Model(init, apply, load, "head", spec, features)


def config_of(**changes):
    return tiny_config(**{"model__name": "test_fuzz:linear", "model__options": {}, **changes})


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """The digits are read once; what is drawn here is the rest of the config."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", functools.cache(data.load))
        yield


# --- Configs -------------------------------------------------------------------------------------


@st.composite
def valid(draw):
    """Fields of a config that should run, over every feature that changes what is paid or run."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    sampler = pick("poisson", "poisson", "truncated_poisson", "fixed_size", "full_batch")
    changes = {
        "dp__epsilon": draw(st.floats(0.3, 20.0)),
        "dp__delta": 10.0 ** draw(st.floats(-9, -4)),
        "dp__sampler": sampler,
        "dp__bound": 10.0 ** draw(st.floats(-4, 3)),
        "dp__clipping": pick("flat", "per_layer", "automatic", "global"),
        "dp__normalized": pick(True, False),
        "dp__method": pick("auto", "vmap"),
        "finetune": pick("full", "head", "bias+head", "regex:body"),
        "optimizer__name": pick("adam", "sgd", "lamb", "adam_corrected"),
        "optimizer__schedule": pick("constant", "cosine", "linear"),
        "batch_size": 1617 if sampler == "full_batch" else draw(st.integers(1, 400)),
        "epochs": draw(st.floats(0.3, 3.0)),
        "ema": pick(0.0, 0.9),
        "lp__fraction": pick(0.0, 0.5),
        "lp__noise_ratio": pick(1.0, 2.0),
    }
    if sampler == "truncated_poisson":
        changes["dp__max_batch_size"] = draw(st.integers(1, 500))
        changes["epochs"] = 0.5  # its accounting is dear
        changes["batch_size"] = draw(st.integers(100, 400))
    if sampler == "poisson":
        extra = pick("adaptive", "bound", "batch", "temperature", None)
        if extra == "adaptive":
            changes |= {"dp__clipping": "flat", "dp__bound": 1.0, "dp__adaptive__quantile": 0.5}
            changes["batch_size"] = draw(st.integers(100, 400))  # less leaves the count no noise
        elif extra == "bound":
            changes["dp__bound_schedule"] = ((0.0, 0.1), (0.5, 2.0))
            changes |= {"batch_size": 50, "epochs": 2.0}
        elif extra == "batch":
            changes["batch_size_schedule"] = ((0.0, 50), (0.5, 200))
            changes["epochs"] = 2.0
        elif extra == "temperature":
            changes["dp__temperature__share"] = 0.1
            changes["batch_size"] = min(changes["batch_size"], 300)
    return changes


@hp.settings(max_examples=5)
@hp.given(changes=valid())
def test_valid_configs_calibrate_and_trace(changes):
    run = build.build(config_of(**changes))
    epsilon, delta = run.config.dp.epsilon, run.config.dp.delta
    # Straight from the accountant, whatever the ledger says.
    spent = dp.accounting.epsilon(
        [p.mechanism.event() for p in run.phases], delta,
        accountant=run.phases[0].mechanism.accountant, relation=run.phases[0].mechanism.relation,
    )  # fmt: skip
    assert 0.9 * epsilon < spent <= epsilon * (1 + 1e-9)
    chunk = {
        "input": jax.ShapeDtypeStruct((64, *run.train.shape), np.uint8),
        "label": jax.ShapeDtypeStruct((64,), np.int32),
        "identity": jax.ShapeDtypeStruct((64,), np.uint32),
        "mask": jax.ShapeDtypeStruct((64,), bool),
    }
    for prepared in phases.prepare(run, 1):
        steps, hyper = prepared.steps, prepared.hyper
        state = phases.checkpoint_like(prepared, run.params)["state"]
        whole, totals = jax.eval_shape(steps.begin, state)
        frozen = prepared.split(run.params)[1]
        number = jnp.int32(0)
        totals = jax.eval_shape(steps.accumulate, totals, whole, frozen, chunk, number, hyper)
        after, _ = jax.eval_shape(steps.update, state, totals, hyper)
        assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)
        assert prepared.phase.steps >= 1


BAD = {
    "dp__epsilon": st.sampled_from([0.0, -1.0, math.nan]),
    "dp__delta": st.sampled_from([0.0, 1.0, 0.5, -1e-5, math.nan]),
    "dp__bound": st.sampled_from([0.0, -2.0, math.nan, math.inf]),
    "dp__gamma": st.sampled_from([-0.1, math.nan]),
    "dp__clipping": st.text("abcdefgh", min_size=1),
    "dp__sampler": st.text("abcdefgh", min_size=1),
    "dp__method": st.text("abcdefgh", min_size=1),
    "dp__max_batch_size": st.integers(-5, 500),
    "dp__bound_schedule": st.sampled_from(
        [((0.1, 1.0),), ((0.0, -1.0),), ((0.0, 1.0), (2.0, 1.0))]
    ),
    "dp__adaptive__quantile": st.sampled_from([-0.5, 1.5, math.nan]),
    "dp__temperature__share": st.sampled_from([-0.5, 1.5, math.nan]),
    "batch_size": st.sampled_from([0, -3, 1618, 10**9, 2.5, "many"]),
    "batch_size_schedule": st.sampled_from([((0.0, 0),), ((0.5, 10),), ((0.0, 10**7),)]),
    "epochs": st.sampled_from([0.0, -1.0, math.inf, math.nan]),
    "ema": st.sampled_from([1.0, -0.1, math.nan]),
    "physical_batch": st.integers(-1000, -1),
    "microbatch": st.integers(-1000, 0),
    "checkpoint_every": st.integers(-1000, 0),
    "keep_checkpoints": st.integers(-1000, 0),
    "log_every": st.integers(-1000, 0),
    "private_seed": st.sampled_from([-1, 2**128, 2**200]),
    "sharding": st.text("abcdefgh:", min_size=1),
    "finetune": st.text("abcdefgh:+", min_size=1),
    "lp__fraction": st.sampled_from([-0.1, 1.1, math.nan]),
    "lp__noise_ratio": st.sampled_from([0.0, -1.0, math.inf, math.nan]),
    "lp__learning_rate": st.sampled_from([-1.0, math.inf, math.nan]),
    "optimizer__name": st.text("abcdefgh", min_size=1),
    "optimizer__learning_rate": st.sampled_from([0.0, -1.0, math.inf, math.nan]),
    "optimizer__schedule": st.text("abcdefgh", min_size=1),
    "optimizer__warmup": st.sampled_from([-1, 8, 10**6]),
    "data__train_split": st.sampled_from(["trian", "train[:0]", "train[1:", ""]),
    "data__subset": st.sampled_from([0, -1, 0.0, 1.5, 10**6, math.nan]),
    "data__holdout": st.sampled_from([0.0, 1.0, -1, 10**6]),
    "data__pad": st.integers(-100, -1),
    "data__multiplicity": st.integers(-100, 0),
    "data__resample": st.text("abcdefgh", min_size=1),
    "model__name": st.sampled_from(["vitt", "test_fuzz:cubic", "no_such_module:linear"]),
    "model__dtype": st.sampled_from(["int8", "float", "complex64"]),
}
ALONGSIDE = {
    "dp__gamma": {"dp__clipping": "automatic"},
    "lp__noise_ratio": {"lp__fraction": 0.5},
    "lp__learning_rate": {"lp__fraction": 0.5},
}


# Fields that the error calls by what they mean.
CALLED = {
    "data__train_split": "split",
    "batch_size_schedule": "batch_size",
}


@pytest.mark.parametrize("field", BAD)
@hp.settings(max_examples=2, suppress_health_check=[hp.HealthCheck.function_scoped_fixture])
@hp.given(draw=st.data())
def test_invalid_configs_give_one_error_that_names_the_field(field, draw, tmp_path):
    config = config_of(**ALONGSIDE.get(field, {}), **{field: draw.draw(BAD[field])})
    workdir = Workdir(tmp_path / "w")
    with pytest.raises((ValueError, TypeError)) as caught:
        run_as_the_command_does(config, workdir)
    message = str(caught.value)
    assert CALLED.get(field, field.split("__")[-1]) in message
    assert "\n" not in message.strip()
    assert not workdir.path.exists()
    workdir.check(config_of())  # and it is still free for a run


def run_as_the_command_does(config, workdir):
    workdir.check(config)
    return build.build(config)


# --- Data ----------------------------------------------------------------------------------------


def dataset(labels, classes=3, seed=0):
    inputs = np.random.default_rng(seed).integers(0, 256, (len(labels), 8, 8, 1)).astype(np.uint8)
    names = [str(c) for c in range(classes)]
    return data.from_arrays("drawn", inputs, np.asarray(labels), class_names=names)


@hp.given(labels=st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=5))
def test_labels_out_of_range_are_named_however_far(labels):
    if all(0 <= label < 3 for label in labels):
        assert len(dataset(labels)) == len(labels)
        return
    with pytest.raises(ValueError, match=r"label=-?\d+ of example"):
        dataset(labels)


@pytest.mark.parametrize(
    "labels,batch_size",
    [([2], 1), ([0, 2, 2, 0, 2], 2)],
    ids=["one example", "an empty class"],
)
def test_tiny_data_sets_train_to_the_end(labels, batch_size, monkeypatch, tmp_path):
    """Many of these batches are empty; every step is executed, counted and finite."""
    train = dataset(labels)
    monkeypatch.setattr(build.data, "opened", lambda config, spec: (train, dataset([0, 1], seed=1)))
    config = config_of(
        dp__delta=1e-3, batch_size=batch_size, epochs=3.0, physical_batch=8, eval_every=100
    )
    run = build.build(config)._replace(layout=sharding.layout("replicated", jax.devices()[:1]))
    loop.train(run, Workdir(tmp_path / "w"))
    statement = json.loads((tmp_path / "w" / "privacy.json").read_text())
    assert statement["steps_done"] == dp.num_steps(len(labels), batch_size, 3.0)
    weights = models.read_tensors(tmp_path / "w" / "weights.safetensors")
    assert all(np.isfinite(leaf).all() for leaf in weights.values())
    moved = [not np.array_equal(weights[k], v) for k, v in models.flatten(run.params).items()]
    assert all(moved)  # noise, at least


SCALES = jnp.asarray(np.random.default_rng(0).normal(size=(24, 3)), jnp.float32)
SUMMED = jax.jit(dp.clipped_sum(lambda p, x: jnp.vdot(p, x), dp.flat(1.0), method="vmap"))


@hp.given(
    chosen=st.lists(st.integers(0, 23), unique=True),
    poisoned=st.lists(st.integers(0, 23)),
    poison=st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_chunks_masks_and_broken_pixels_add_up(chosen, poisoned, poison):
    """Any set of examples, cut and padded, some with NaN pixels: the sum over the others."""
    rows = np.array(SCALES)
    rows[poisoned] = poison
    parts = [
        SUMMED(jnp.zeros(3), rows[chunk], jnp.asarray(chunk >= 0))[0].value
        for chunk in dp.chunks(np.asarray(chosen, np.int64), 8)
    ]
    kept = np.asarray(SCALES, np.float64)[np.setdiff1d(chosen, poisoned).astype(int)]
    norms = np.linalg.norm(kept, axis=1, keepdims=True)
    want = (kept / np.maximum(norms, 1)).sum(axis=0)
    np.testing.assert_allclose(np.sum(parts, axis=0), want, atol=1e-4)


# --- Checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("c") / "checkpoints", steps=(1, 2))


def harm(path, kind, where, byte):
    content = bytearray(path.read_bytes())
    at = int(where * max(len(content) - 1, 0))
    if kind == "delete":
        path.unlink()
        return
    if kind == "truncate":
        content = content[:at]
    elif kind == "flip" and content:
        content[at] ^= 1 << (byte % 8)
    elif kind == "garbage":
        content = content[:at] + bytes([byte]) * 64
    elif kind == "version":
        content = bytearray(bytes(content).replace(b"version", b"vision").replace(b": 1", b": 99"))
    path.write_bytes(content)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
@hp.settings(max_examples=12, suppress_health_check=[hp.HealthCheck.function_scoped_fixture])
@hp.given(
    number=st.integers(0, 10**6),
    kind=st.sampled_from(["truncate", "flip", "garbage", "delete", "version"]),
    where=st.floats(0, 1),
    byte=st.integers(0, 255),
)
def test_a_harmed_checkpoint_is_right_or_refused(number, kind, where, byte, checkpoint, tmp_path):
    """Whatever happens to one file, wrong arrays never come back, and the one before does."""
    path = tmp_path / "c"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(checkpoint, path)
    files = sorted(p for p in (path / "2").rglob("*") if p.is_file())
    harm(files[number % len(files)], kind, where, byte)
    with Checkpoints(path, keep=9) as checkpoints:
        if 2 in checkpoints.steps():  # else it is not taken for a checkpoint at all
            try:
                about, got = checkpoints.about(2), checkpoints.load(2, like(ONE))
            except Unreadable:
                checkpoints.set_aside(2)
                checkpoints.reload()
            else:
                assert about["step"] == 2
                jax.tree.map(np.testing.assert_array_equal, got, tree(2))
        jax.tree.map(np.testing.assert_array_equal, checkpoints.load(1, like(ONE)), tree(1))
