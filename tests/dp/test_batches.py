"""Gathering with the mask, and an iterator that charges: what a loop of one's own gets wrong."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from dpjax import dp
from dpjax.dp import seeds

GUIDE = Path(dp.__file__).parents[1] / "guide" / "recipes.md"
DATA = {"x": np.arange(1, 13, dtype=np.float32).reshape(6, 2), "y": np.arange(1, 7)}


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_padding_is_no_example(array):
    data = jax.tree.map(array, DATA)
    batch, mask = dp.take(data, np.array([1, 2, 3, -1, -1]))
    np.testing.assert_array_equal(batch["y"], [2, 3, 4, 0, 0])
    np.testing.assert_array_equal(batch["x"][3:], np.zeros((2, 2)))
    np.testing.assert_array_equal(mask, [True, True, True, False, False])
    assert type(batch["x"]) is type(data["x"])
    assert (batch["x"].dtype, batch["y"].dtype) == (data["x"].dtype, data["y"].dtype)


@pytest.mark.parametrize("rows", [[-1, -1], [-1, 4, 0, -1], [5, -1, 5], []])
def test_padding_may_stand_anywhere(rows):
    batch, mask = dp.take(DATA, np.array(rows, np.int64))
    want = [DATA["y"][row] if row >= 0 else 0 for row in rows]
    np.testing.assert_array_equal(batch["y"], want)
    np.testing.assert_array_equal(mask, [row >= 0 for row in rows])


@pytest.mark.parametrize(
    ("data", "indices", "text"),
    [
        (DATA, [6], r"index=6 must be in \[-1, 6\)"),
        (DATA, [-2], r"index=-2 must be in \[-1, 6\)"),
        (jax.tree.map(jnp.asarray, DATA), [6], "index=6"),  # jax would clamp it
        (DATA, [0.5], "must be integers"),
        (DATA, [[0, 1]], "must be integers"),
        ({**DATA, "z": np.zeros(5)}, [0], r"lengths \[5, 6\]"),
    ],
)
def test_a_wrong_index_is_named(data, indices, text):
    with pytest.raises(ValueError, match=text):
        dp.take(data, np.array(indices))


def ledger(*sizes, steps=4):
    mechanisms = dp.calibrated_phases(
        epsilon=5.0, delta=1e-2, num_examples=6, batch_size=sizes, steps=[steps] * len(sizes)
    )
    phases = tuple(dp.Phase(str(k), m) for k, m in enumerate(mechanisms))
    return dp.Ledger(phases, epsilon=5.0, delta=1e-2)


def test_every_step_is_charged_before_it_is_seen_and_draws_the_mechanisms_batch():
    steps = dp.Steps(ledger(3), DATA, private_seed=7, chunk_size=2)
    mechanism = steps.ledger.phases[0].mechanism
    assert len(steps) == 4
    for number, (step, parts) in enumerate(steps):
        assert (step, steps.ledger.steps_done, len(steps)) == (number, number + 1, 3 - number)
        parts = list(parts)
        assert {mask.shape for _, mask in parts} == {(2,)}
        rows = np.concatenate([batch["y"][mask] for batch, mask in parts])
        drawn = mechanism.indices(seeds.sampler_seed(7), step)
        np.testing.assert_array_equal(rows, DATA["y"][drawn])
    with pytest.raises(StopIteration):
        next(steps)
    assert steps.ledger.steps_done == steps.ledger.steps_planned == 4


def test_phases_share_no_draw():
    first = dp.Steps(ledger(3, 3), DATA, private_seed=7, chunk_size=6)
    drawn = [[(s, m.tolist(), b["y"].tolist()) for b, m in p] for s, p in first]
    second = dp.Steps(first.ledger, DATA, private_seed=7, chunk_size=6, phase=1)
    drawn += [[(s, m.tolist(), b["y"].tolist()) for b, m in p] for s, p in second]
    assert [part[0][0] for part in drawn] == list(range(8))
    mechanism = second.ledger.phases[1].mechanism
    want = mechanism.indices(seeds.sampler_seed(7), 5, first=4)
    assert [y for y in drawn[5][0][2] if y] == DATA["y"][want].tolist()


def test_mistakes_are_named_before_a_step():
    with pytest.raises(ValueError, match="5 examples of data must be num_examples=6"):
        dp.Steps(ledger(3), np.zeros((5, 2)), private_seed=7, chunk_size=2)
    with pytest.raises(ValueError, match="size=0"):
        dp.Steps(ledger(3), DATA, private_seed=7, chunk_size=0)
    for phase in (-1, 1):
        with pytest.raises(ValueError, match=rf"phase={phase} must be in 0\.\.0"):
            dp.Steps(ledger(3), DATA, private_seed=7, chunk_size=2, phase=phase)
    with pytest.raises(ValueError, match="private_seed=-1"):
        dp.Steps(ledger(3), DATA, private_seed=-1, chunk_size=2)


def loop(steps, tx, params, state, most=None):
    loss = lambda params, example: jnp.sum((params - example["x"]) ** 2)  # noqa: E731
    grad = jax.jit(dp.clipped_sum(loss, dp.flat(1.0)))
    for step, parts in steps:
        clipped = sum(grad(params, batch, mask)[0] for batch, mask in parts)
        updates, state = tx.update(clipped, state, params)
        params = optax.apply_updates(params, updates)
        if step + 1 == most:
            break
    return params, state


def test_a_loop_resumes_from_a_checkpoint_bit_for_bit(tmp_path):
    """As the guide says: parameters, optimizer state and executed steps; the seed elsewhere."""
    empty, secret = ledger(3), 7
    tx = optax.chain(
        empty.phases[0].mechanism.transform(key=seeds.noise_key(secret)), optax.adam(0.1)
    )
    start = jnp.zeros(2), tx.init(jnp.zeros(2))
    options = {"private_seed": secret, "chunk_size": 2}
    want, _ = loop(dp.Steps(empty, DATA, **options), tx, *start)
    steps = dp.Steps(empty, DATA, **options)
    params, state = loop(steps, tx, *start, most=2)
    pattern = re.compile(r"```python\n(from orbax.*?\n\ndone.*?)\n\n(.*?)```", re.DOTALL)
    save, load = pattern.search(GUIDE.read_text()).groups()
    names = {"np": np, "dp": dp, "path": tmp_path / "2", "secret": secret, "data": DATA}
    exec(save, names | {"steps": steps, "params": params, "state": state})
    # Another process knows the shapes alone, and a ledger that was charged for nothing.
    names |= {"params": start[0], "state": start[1], "done": np.asarray(0), "ledger": empty}
    names["ocp"] = ocp
    exec(load, names)
    got, _ = loop(names["steps"], tx, names["saved"]["params"], names["saved"]["state"])
    np.testing.assert_array_equal(got, want)
    assert names["steps"].ledger.steps_done == 4
