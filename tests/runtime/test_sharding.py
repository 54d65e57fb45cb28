"""The mesh: what is spread, what is read where, and one collective for any number of leaves."""

import re

import jax
import numpy as np
import pytest

from dpjax.runtime import sharding
from experiments.bench import scaling

TREE = {
    "head": {"kernel": np.zeros((24, 16), np.float32), "bias": np.zeros(3, np.float32)},
    "blocks_0": {"kernel": np.zeros((5, 8), np.float32)},
}


def collectives(program):
    """Kinds of the collectives in compiled code, in order."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return re.findall(rf" ({kinds})(?:-start)?\(", program.as_text())


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("replicated", {"head/kernel": -1, "head/bias": -1, "blocks_0/kernel": -1}),
        ("fsdp", {"head/kernel": 0, "head/bias": -1, "blocks_0/kernel": 1}),
        ("fsdp:^head", {"head/kernel": 0, "head/bias": -1, "blocks_0/kernel": -1}),
        ("fsdp:blocks_[0-9]/", {"head/kernel": -1, "head/bias": -1, "blocks_0/kernel": 1}),
    ],
)
def test_rule_over_paths(text, axes):
    got = sharding.layout(text).axes(TREE)
    assert {f"{a}/{b}": v for a, leaf in got.items() for b, v in leaf.items()} == axes
    # An optimizer's state has the same paths behind its own.
    state = ({"step": np.zeros(())}, {"mu": TREE})
    assert sharding.layout(text).axes(state) == ({"step": -1}, {"mu": got})


@pytest.mark.parametrize("text", ["zero", "fsdp:", "fsdp:(", "replicated:x", ""])
def test_other_layouts_are_refused(text):
    with pytest.raises(ValueError, match="sharding="):
        sharding.layout(text)


@pytest.mark.parametrize("text", ["replicated", "fsdp", "fsdp:head"])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_sum_over_devices(text, count):
    layout = sharding.layout(text, jax.devices()[:count])
    rng = np.random.default_rng(0)
    parts = jax.tree.map(lambda x: rng.normal(size=(count, *x.shape)).astype(np.float32), TREE)
    placed = jax.device_put(parts, sharding.batch_sharding(layout.mesh))
    function = jax.jit(lambda t: sharding.sum_over_devices(t, layout.axes(TREE), layout.mesh))
    for got, leaf, want in zip(
        jax.tree.leaves(function(placed)),
        jax.tree.leaves(parts),
        jax.tree.leaves(layout.shardings(TREE)),
    ):
        np.testing.assert_allclose(got, leaf.sum(axis=0), rtol=1e-6)
        assert got.sharding.is_equivalent_to(want, got.ndim)
    if count > 1:
        found = collectives(function.lower(placed).compile())
        assert sorted(found) == ["all-reduce"] + ["reduce-scatter"] * (text != "replicated")


@pytest.mark.parametrize("text", ["replicated", "fsdp"])
def test_integers_beside_floats_are_summed_exactly(text):
    """Exact sums and the facts of a step travel together; as floats, 2**24 + 1 would be even."""
    layout = sharding.layout(text)
    axes = layout.axes(TREE)
    parts = jax.tree.map(lambda x: np.full((8, *x.shape), 2**24 + 1, np.int32), TREE)
    placed = jax.device_put((parts, np.ones(8, np.float32)), sharding.batch_sharding(layout.mesh))
    got, fact = jax.jit(lambda t: sharding.sum_over_devices(t, (axes, -1), layout.mesh))(placed)
    for leaf in jax.tree.leaves(got):
        assert leaf.dtype == np.int32
        assert (np.asarray(leaf) == 8 * (2**24 + 1)).all()
    assert fact == 8


@pytest.mark.parametrize("text", ["fsdp", "fsdp:head"])
def test_gather_and_place(text):
    layout = sharding.layout(text)
    values = jax.tree.map(lambda x: np.arange(x.size, dtype=x.dtype).reshape(x.shape), TREE)
    placed = sharding.place(values, layout.shardings(values))
    assert placed["head"]["kernel"].sharding.shard_shape((24, 16)) == (3, 16)
    whole = layout.gather(placed)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(whole))
    jax.tree.map(np.testing.assert_array_equal, whole, values)
    assert collectives(jax.jit(layout.gather).lower(placed).compile()) == ["all-gather"]


def test_one_process_reads_every_row_once():
    mesh = sharding.make_mesh()
    np.testing.assert_array_equal(sharding.local_rows(24, mesh), np.arange(24))
    batch = sharding.to_mesh({"x": np.arange(24)}, mesh)
    assert batch["x"].sharding.shard_shape((24,)) == (3,)
    np.testing.assert_array_equal(batch["x"], np.arange(24))


def test_memory_per_device_is_a_share_of_the_machine():
    one = sharding.memory_per_device(sharding.make_mesh(jax.devices()[:1]))
    eight = sharding.memory_per_device(sharding.make_mesh())
    assert 0 < eight == one // 8


def test_the_scaling_table_reads_bytes_off_programs():
    text = """
      %all-reduce.1 = f32[423]{0} all-reduce(f32[423]{0} %x), channel_id=1
      %ag = (f32[2,3]{1,0}, f32[4,3]{1,0}) all-gather-start(f32[2,3]{1,0} %y), dimensions={0}
      %reduce-scatter = f32[2,24]{1,0} reduce-scatter(f32[16,24]{1,0} %z)
      ROOT %sum = f32[] add(f32[] %a, f32[] %b)"""
    assert scaling.collectives(text) == [
        ("all-reduce", 4 * 423),
        ("all-gather", 4 * 12),
        ("reduce-scatter", 4 * 16 * 24),
    ]
