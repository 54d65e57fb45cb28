"""The physical batch from compiled memory: no trial by running out of it."""

import jax
import numpy as np
import pytest
from tiny import tiny_config

from dpjax import build
from dpjax.runtime import sharding
from dpjax.training import capacity, phases


@pytest.mark.parametrize(
    ("limit", "size"),
    [
        (10_000, 208),  # all in one chunk
        (1200, 104),  # two equal chunks
        (1100, 72),  # the line said 104, the program needs more
        (800, 56),
        (150, 8),
    ],
)
def test_fewest_equal_chunks_that_fit(limit, size):
    asked = []

    def need(rows):
        asked.append(rows)
        return 70 + 10 * rows + (rows > 50) * 50  # not quite linear

    got = capacity.largest(need, limit, 8, enough=201.0)
    assert got == size
    assert need(got) <= limit
    assert len(asked) <= 6


def test_too_little_for_the_smallest_chunk():
    with pytest.raises(capacity.DoesNotFit, match=r"8 rows need 800 bytes per device, of 700"):
        capacity.largest(lambda rows: 100 * rows, 700, 8, enough=100.0)


@pytest.fixture(scope="module")
def run():
    return build.build(tiny_config(finetune="head", physical_batch="auto"))


def test_bytes_grow_with_the_chunk_and_cover_its_rows(run):
    need = capacity.peak_bytes(phases.prepare(run, 5)[0], run.params, run.train)
    small, large = need(64), need(512)
    assert large > small > 0
    pixels = np.prod(run.train.shape) * (512 - 64) / jax.device_count()
    assert large - small > pixels


def test_auto_is_chosen_from_memory(run, monkeypatch):
    monkeypatch.setattr(capacity, "peak_bytes", lambda *phase: lambda rows: 100 * rows)
    given = (run.config, phases.prepare(run, 5), run.params, run.train)
    assert capacity.physical_batch(*given) == 232  # 200 + 2 sqrt(200), in eights
    monkeypatch.setattr(sharding, "memory_per_device", lambda mesh: 12_000)
    assert capacity.physical_batch(*given) == 120
    run.config.physical_batch, before = 60, run.config.physical_batch
    assert capacity.physical_batch(*given) == 64
    run.config.physical_batch = before


@pytest.mark.parametrize("size", [0, -1, 1.5, "all"])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"physical_batch={size!r} must be 'auto' or"):
        build.build(tiny_config(physical_batch=size))


def test_the_time_of_many_chunks_follows_from_that_of_two(monkeypatch):
    run = build.build(tiny_config(batch_size=200, physical_batch=8, epochs=1.0))
    asked = []
    execute = phases.Prepared.execute

    def counted(self, state, frozen, steps, feed):
        feed = list(feed)
        asked.append(len(feed))
        return execute(self, state, frozen, steps, iter(feed))

    monkeypatch.setattr(phases.Prepared, "execute", counted)
    seconds, most = capacity.estimate(run)
    assert sorted(set(asked)) == [1, 2]  # of 25
    assert seconds > 0
    assert most > 0
    monkeypatch.setattr(capacity, "_step_seconds", lambda prepared, run, size, n: 0.5 + 0.25 * n)
    steps = run.phases[0].steps
    assert capacity.estimate(run)[0] == pytest.approx(steps * (0.75 + 24 * 0.25))
