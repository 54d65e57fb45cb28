"""A run compares its clipping engines before it spends any privacy."""

import functools

import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_config

from dpjax import build, dp
from dpjax.dp.engines import bookkeeping
from dpjax.runtime import Workdir, gathering, sharding
from dpjax.training import check, loop


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPJAX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engine"


def broken(*args, **kwargs):
    total, facts = right(*args, **kwargs)
    return total, facts._replace(norms=1.5 * facts.norms)


right = bookkeeping.microbatch_sum


def test_engines_are_compared_once_for_a_program(cache):
    run = build.build(tiny_config(finetune="regex:head/bias"))
    assert check.engines(run) == 1
    assert check.engines(run) == 0
    other = build.build(tiny_config(finetune="head"))
    assert check.engines(other) == 1
    assert len(list(cache.iterdir())) == 2


def test_constants_of_a_program_are_part_of_it(cache):
    names = set()
    for scale in (1.0, 1e18):
        constant = jnp.full(3, scale)
        names.add(check._name(jax.make_jaxpr(lambda x, c=constant: x * c)(jnp.ones(3))))
        names.add(check._name(jax.make_jaxpr(jax.jit(lambda x, c=constant: x + c))(jnp.ones(3))))
    assert len(names) == 4


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    run = build.build(tiny_config(finetune="regex:head/bias"))
    monkeypatch.setenv("DPJAX_CACHE_DIR", str(tmp_path / "file"))
    assert check.engines(run) == 1


def test_a_wrong_engine_is_refused_and_nothing_is_written(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(bookkeeping, "microbatch_sum", broken)
    run = build.build(tiny_config(finetune="head"))
    for _ in range(2):  # a mismatch is not remembered as checked
        with pytest.raises(dp.EngineMismatch, match=r"dp\.method='vmap'"):
            loop.train(run, Workdir(tmp_path / "w"))
    assert not (tmp_path / "w").exists()
    assert not cache.exists()


def test_parameters_that_are_gathered_at_each_use_are_compared_so(cache, monkeypatch):
    monkeypatch.setattr(sharding, "_LEAST", 1)
    right = gathering._gathered
    calls = []

    def gathered(shard, axis, times=1.0):
        calls.append(axis)
        return times * right(shard, axis)

    monkeypatch.setattr(gathering, "_gathered", gathered)
    assert check.engines(build.build(tiny_config(finetune="head", sharding="fsdp"))) == 1
    assert len(calls) > 2
    monkeypatch.setattr(gathering, "_gathered", functools.partial(gathered, times=1.5))
    run = build.build(tiny_config(finetune="blocks:at:0", sharding="fsdp"))
    with pytest.raises(dp.EngineMismatch):
        check.engines(run)


def test_vmap_and_runs_without_privacy_have_nothing_to_compare(cache):
    config = tiny_config(finetune="head")
    config.dp.method = "vmap"
    assert check.engines(build.build(config)) == 0
    assert check.engines(build.build(tiny_config(dp=None))) == 0


def test_made_examples_are_in_range():
    run = build.build(tiny_config())
    batch = check.examples(run)
    assert batch["input"].shape[1:] == run.train.shape
    assert int(batch["label"].max()) < run.train.num_classes
