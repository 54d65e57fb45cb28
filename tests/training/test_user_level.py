"""User-level privacy through the real build, step and train loop."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_config

from dpjax import build, data, dp
from dpjax.audit import canaries
from dpjax.dp.engines.bookkeeping import plan
from dpjax.runtime import Workdir
from dpjax.training import loop


def digits(*, per_unit, count=400, drop=()):
    """UCI digits, dealt out to units of `per_unit` records."""
    whole = data.load("digits")
    keep = np.array([row for row in range(count) if row // per_unit not in drop])
    part = whole.select(keep)
    return dataclasses.replace(part, units=keep // per_unit)


@functools.lru_cache
def made(per_unit, limit, *, drop=(), **changes):
    config = tiny_config(
        data__unit="writer", data__unit_records=limit, batch_size=20, finetune="film", **changes
    )
    test = data.load("digits", split="test")
    return build.build(config, datasets=(digits(per_unit=per_unit, drop=drop), test))


@functools.lru_cache
def by_record():
    test = data.load("digits", split="test")
    config = tiny_config(finetune="film", batch_size=20)
    return build.build(config, datasets=(digits(per_unit=1), test))


def examples(run, indices, step=0):
    batch = {k: jnp.asarray(v) for k, v in run.train.batch(indices, seed=7, step=step).items()}
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), batch.pop("identity"))
    return {**batch, "key": keys}


@functools.lru_cache
def engine(loss_fn, method):
    return jax.jit(dp.clipped_sum(loss_fn, dp.flat(1e-3, normalized=False), method=method))


def sums(run, loss_fn, batch, method="bookkeeping", real=None):
    mask = jnp.arange(len(batch["label"])) < (len(batch["label"]) if real is None else real)
    return engine(loss_fn, method)(run.params, batch, mask)


def test_a_unit_moves_the_sum_by_at_most_the_bound_however_many_records_it_has():
    run = made(10, 4)
    without = build.data.in_units(run.config, digits(per_unit=10, drop=(3,)))
    rest = run._replace(train=without)
    assert len(run.train) == 40
    assert len(without) == 39
    # -1 is padding, so that both have one shape; a unit's gradient does not know its place.
    indices = {40: np.arange(40), 39: np.append(np.arange(39), -1)}
    one, other = (
        sums(r, r.loss_fn, examples(r, indices[len(r.train)]), real=len(r.train))[0].value
        for r in (run, rest)
    )
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, one, other))
    assert 0.9e-3 < moved <= 1e-3 * (1 + 1e-3)


def test_the_loss_of_a_unit_is_the_mean_over_its_records_and_padding_is_not_seen():
    run, single = made(3, 4), by_record()
    unit = jax.tree.map(lambda x: x[5], examples(run, np.arange(10)))
    assert unit["record"].tolist() == [True] * 3 + [False]
    each = [
        jax.jit(single.loss_fn)(single.params, {k: unit[k][i] for k in ("input", "label")})
        for i in range(3)
    ]
    loss = jax.jit(run.loss_fn)
    np.testing.assert_allclose(loss(run.params, unit), np.mean(each), rtol=1e-5)
    changed = {**unit, "input": unit["input"].at[3].set(255), "label": unit["label"].at[3].set(9)}
    assert loss(run.params, changed) == loss(run.params, unit)


def test_one_record_per_unit_is_the_record_level_run():
    run = made(1, 1)
    single, order = by_record(), np.arange(8)
    of_units = examples(run, order)
    rows = run.train.rows(order, seed=7, step=0)[:, 0]
    of_records = {k: jnp.asarray(v) for k, v in single.train.get(rows).items()}
    one, two = sums(run, run.loss_fn, of_units), sums(single, single.loss_fn, of_records)
    for a, b in zip(*map(jax.tree.leaves, (one, two))):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("flip", [False, True])
def test_bookkeeping_gives_the_numbers_of_vmap_on_units(flip):
    run = made(10, 4, data__flip=flip, data__multiplicity=2 if flip else 1)
    one, two = (  # each with keys of its own, which are used once
        sums(run, run.loss_fn, examples(run, np.arange(12)), m) for m in ("bookkeeping", "vmap")
    )
    for a, b in zip(*map(jax.tree.leaves, (one, two))):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-7)
    unit = jax.tree.map(lambda x: x[0], examples(run, np.arange(12)))
    record = {"input": unit["input"][0], "label": unit["label"][0], "key": unit["key"]}
    slow = [
        {leaf.path for leaf in plan(run.loss_fn, run.params, example) if leaf.route == "direct"}
        for example in (unit, record)
    ]
    assert slow[0] <= slow[1], "a unit costs what its records cost"


@pytest.mark.slow
def test_a_run_states_samples_and_accounts_units(tmp_path):
    run = made(10, 4, dp__temperature__share=0.2, dp__temperature__steps=2)
    loop.train(run, Workdir(tmp_path / "w"))
    facts = json.loads((tmp_path / "w" / "privacy.json").read_text())
    assert "data.unit='writer'" in facts["unit_of_privacy"]
    sizes = [phase["num_examples"] for phase in facts["phases"]]
    assert sum(sizes) == 40
    assert sizes[0] == len(run.train) == run.phases[0].mechanism.num_examples
    assert "removing all training records of one unit" in (tmp_path / "w/privacy.md").read_text()
    assert "40" not in build.describe.describe(run).split("examples N")[1].split("(")[0]
    # Other records of the same people are other data: the run is not continued with them.
    other = made(10, 5, dp__temperature__share=0.2, dp__temperature__steps=2)
    with pytest.raises(ValueError, match=r"unit_records|another run"):
        loop.train(other, Workdir(tmp_path / "w"))


def test_mistakes_are_named_before_data_is_read(monkeypatch):
    monkeypatch.setattr(data, "load", lambda *a, **k: pytest.fail("opened data"))
    with pytest.raises(ValueError, match="unit_records=4"):
        build.build(tiny_config(data__unit_records=4))
    with pytest.raises(ValueError, match=r"data.subset=5 .* divide units"):
        build.build(tiny_config(data__unit="writer", data__subset=5))


def test_data_without_units_is_refused():
    with pytest.raises(ValueError, match="unit='writer' must be one of"):
        build.build(tiny_config(data__unit="writer"))


def test_a_canary_of_an_audit_is_a_unit_of_its_own():
    run = made(10, 4)
    for kind in canaries.CANARIES:
        game = canaries.make(run, kind, 3)
        units = game.data(np.array([True, False, True]))
        assert len(units) == len(run.train) + 2
        assert sorted(units.counts())[:2] == [1, 1]
        batch = units.batch(np.arange(len(units)), seed=0, step=0)
        assert (batch["record"].sum(1) == 1).sum() == 2
        loss = jax.jit(game.run.loss_fn)
        for unit in np.flatnonzero(batch["record"].sum(1) == 1):
            example = {k: jnp.asarray(v[unit]) for k, v in batch.items() if k != "identity"}
            assert jnp.isfinite(loss(game.run.params, {**example, "key": jax.random.key(0)}))
