"""Frozen matrices of 8-bit integers: rounding, files, and the memory of their floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from causal import causal_config
from jax.sharding import PartitionSpec
from tiny import tiny_config

from dpjax import build, dp, models
from dpjax.models import int8
from dpjax.runtime import Workdir, sharding
from dpjax.runtime.gathering import at_use
from dpjax.training import loop


@pytest.mark.parametrize("axis", [0, 1])
def test_a_number_is_off_by_half_a_step_of_its_block(axis):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(64, 96)).astype(np.float32) * np.exp(rng.normal(size=(64, 1)))
    matrix[:, :32] = 0  # a block of zeros stays zeros
    small = int8.quantized(matrix, axis)
    assert small.numbers.dtype == np.int8
    assert small.size == matrix.size
    step = np.repeat(small.scales, int8.BLOCK, axis=axis)
    assert np.all(np.abs(small.whole() - matrix) <= 0.5001 * step)
    assert not np.any(np.isnan(small.whole()))
    again = int8.quantized(small.whole(), axis)
    np.testing.assert_array_equal(again.whole(), small.whole())


def test_what_a_gguf_file_holds_in_8_bits_is_kept_exactly():
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    rows = np.random.default_rng(1).normal(size=(48, 64)).astype(np.float32)
    held = gguf.dequantize(gguf.quantize(rows, kind), kind)
    assert np.any(held != rows)
    # A kernel is the transposed tensor, a table the tensor itself.
    for path, matrix in (("blocks_0/mlp/up/kernel", held.T), ("embed/tokens", held)):
        np.testing.assert_array_equal(int8.in_int8(path, matrix).whole(), matrix)


def test_only_matrices_that_blocks_divide_are_rounded():
    for path, shape in (("norm/scale", (64,)), ("a/kernel", (33, 64)), ("a/table", (64, 33))):
        leaf = np.ones(shape, np.float32)
        assert int8.in_int8(path, leaf) is leaf


OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander",
           "xla_cpu_enable_concurrency_optimized_scheduler": False}  # fmt: skip
LORA = {"finetune": "lora:2:attn/|mlp/", "dp__epsilon": 50.0}


def small(folder, **changes):
    config = causal_config(folder, **LORA, **changes)
    with config.unlocked():
        config.model.options.update({"width": 64, "mlp": 64})
    return config


@pytest.mark.slow  # a minute; two processes train on it every day
def test_a_run_trains_on_it_and_its_weights_generate(tmp_path, monkeypatch):
    losses = {}
    for name, changes in {
        "float": {}, "int8": {"model__frozen_dtype": "int8"},
        "sharded": {"model__frozen_dtype": "int8", "sharding": "fsdp", "model__remat": True},
    }.items():  # fmt: skip
        monkeypatch.setattr(sharding, "_LEAST", 1)
        run = build.build(small(tmp_path, **changes))
        frozen = [
            leaf for path, leaf in models.flatten(run.params).items()
            if not run.phases[0].trainable(path)
        ]  # fmt: skip
        matrices = [leaf for leaf in frozen if not isinstance(leaf, int8.Int8) and leaf.ndim == 2]
        # The head has 257 outputs and 64 inputs; the table 257 rows of 64.
        assert bool(matrices) == (name == "float")
        losses[name] = loop.train(run, Workdir(tmp_path / name))["nll"]
    # As in `test_frozen`, adapters are added in float32.
    assert losses["int8"] == pytest.approx(losses["float"], abs=0.05)
    assert losses["int8"] != losses["float"]
    assert losses["sharded"] == pytest.approx(losses["int8"], abs=1e-3)
    speak = build.generator.load(tmp_path / "int8")
    assert len(speak(["ann met "], temperature=0.0, max_tokens=4)) == 1


def test_the_floats_are_never_all_in_memory():
    """A chain of matrices: with floats made first, all of them wait for the backward pass."""
    width, depth = 256, 24
    rng = np.random.default_rng(0)
    packed = {f"w{i}": {"kernel": int8.quantized(rng.normal(size=(width, width)) / 16, 0)}
              for i in range(depth)}  # fmt: skip

    def loss(frozen, trains, x):
        frozen = int8.whole(frozen)
        for i in range(depth):
            x = jnp.tanh(x @ frozen[f"w{i}"]["kernel"]) + trains
        return jnp.sum(x)

    axes = jax.tree.map(lambda x: -1, packed)
    mesh = sharding.make_mesh(jax.local_devices()[:1])

    def total(frozen, trains, batch, late):
        bound = (
            at_use(loss, frozen, axes, int8.marks(frozen)) if late else lambda *a: loss(frozen, *a)
        )
        engine = dp.clipped_sum(bound, dp.flat(1.0))
        return engine(trains, batch, jnp.ones(len(batch), bool))[0].value

    here = PartitionSpec()
    need, value = {}, {}
    for late in (False, True):
        function = jax.shard_map(
            lambda *a, late=late: total(*a, late), mesh=mesh, in_specs=here, out_specs=here,
            check_vma=False,
        )  # fmt: skip
        args = packed, jnp.zeros(width), jnp.ones((4, width))
        # As on an accelerator: the host's compiler drops barriers unless it is told not to.
        program = jax.jit(function).lower(*args).compile(OPTIONS)
        need[late] = program.memory_analysis().temp_size_in_bytes
        value[late] = program(*args)
    np.testing.assert_allclose(value[True], value[False], rtol=1e-5, atol=1e-6)
    floats = depth * width * width * 4
    assert need[True] < floats / 8 < floats < need[False]


def test_it_is_refused_where_it_is_not_offered(tmp_path):
    with pytest.raises(ValueError, match=r"model\.frozen_dtype='int8' is for task='causal_lm'"):
        build.build(tiny_config(model__frozen_dtype="int8", finetune="lora:2"))
    with pytest.raises(ValueError, match="trains every parameter"):
        build.build(causal_config(tmp_path, model__frozen_dtype="int8"))
