"""LoRA on frozen, sharded bfloat16 parameters, blocks checkpointed: from config to prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from dpjax import build, models
from dpjax.build import predictor
from dpjax.models import finetune
from dpjax.runtime import Workdir, sharding
from dpjax.training import loop

LORA = {"finetune": "lora:2", "dp__epsilon": 50.0, "batch_size": 400, "epochs": 1.0,
        "model__head_init": "random"}  # fmt: skip


def built(**changes):
    return build.build(tiny_config(**{**LORA, **changes}))


def gradient(run):
    """Of the mean loss of eight examples, over what trains."""
    trainable, frozen = finetune.split(run.params, run.phases[0].trainable)
    batch = run.train.batch(np.arange(8), seed=0, step=0)
    batch = {name: jnp.asarray(batch[name]) for name in ("input", "label")}

    def loss(trainable):
        one = lambda example: run.loss_fn(finetune.join(trainable, frozen), example)  # noqa: E731
        return jnp.mean(jax.vmap(one)(batch))

    return jax.jit(jax.grad(loss))(trainable)


def test_only_what_no_phase_trains_is_rounded():
    for changes in ({}, {"lp__fraction": 0.5}):
        run = built(model__frozen_dtype="bfloat16", **changes)
        for path, leaf in models.flatten(run.params).items():
            trains = any(phase.trainable(path) for phase in run.phases)
            assert leaf.dtype == (jnp.float32 if trains else jnp.bfloat16), path


def test_gradients_are_close_to_those_of_float32():
    want, got = gradient(built()), gradient(built(model__frozen_dtype="bfloat16"))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert b.dtype == jnp.float32
        assert np.linalg.norm(a - b) <= 0.03 * np.linalg.norm(a) + 1e-7
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)))


@pytest.mark.slow
def test_a_run_trains_and_its_weights_predict_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "_LEAST", 1)
    run = built(model__frozen_dtype="bfloat16", model__remat=True, sharding="fsdp")
    results = loop.train(run, Workdir(tmp_path))
    file = models.read_tensors(tmp_path / "weights.safetensors")
    # Adapted kernels are merged in float32: bfloat16 would round the update away.
    kernel = file["blocks_0/attn/query/kernel"]
    before = models.flatten(run.params)["blocks_0/attn/query/kernel"]
    assert kernel.dtype == np.float32
    moved = np.linalg.norm(kernel - np.asarray(before, np.float32))
    assert 0 < moved < np.linalg.norm(kernel)
    loaded = predictor.load(tmp_path)
    images = np.stack([run.test.get(np.array([i]))["input"][0] for i in range(64)])
    labels = np.concatenate([run.test.get(np.array([i]))["label"] for i in range(64)])
    found = np.mean(np.argmax(loaded.predict(images).probabilities, -1) == labels)
    assert abs(found - results["accuracy"]) < 0.2


@pytest.mark.parametrize(("changes", "text"), [
    ({"model__frozen_dtype": "float16"}, "model.frozen_dtype='float16' must be None, 'bfloat16'"),
    ({"model__frozen_dtype": "bfloat16", "finetune": "full"}, "trains every parameter"),
])  # fmt: skip
def test_what_cannot_be_frozen_in_it_is_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        built(**changes)
