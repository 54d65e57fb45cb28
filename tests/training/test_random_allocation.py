"""Random allocation through the real build, loop, resume, two phases and an audit."""

import json

import numpy as np
import pytest
from tiny import tiny_config

from dpjax import audit, build, dp
from dpjax.dp import seeds
from dpjax.runtime import Workdir, read_jsonl
from dpjax.training import feed, loop, phases


def made(**changes):
    return build.build(
        tiny_config(dp__sampler="random_allocation", finetune="film", epochs=2.5, **changes)
    )


@pytest.fixture(scope="module")
def run():
    return made()


def test_chunks_hold_every_example_once_per_epoch_and_the_same_after_a_restart(run):
    phase = run.phases[0]
    t = phase.mechanism.sampler.steps_per_epoch
    assert phase.steps == 2 * t + t // 2 == 20

    def identities(steps):
        chunks = feed.physical_chunks(
            run.train, phase, run.layout, seed=seeds.sampler_seed(5), size=64, steps=steps
        )
        return np.concatenate([c.batch["identity"][c.batch["mask"]] for c in chunks])

    whole = np.sort(run.train.identities(np.arange(len(run.train))))
    for epoch in (0, 1):
        first = epoch * t
        np.testing.assert_array_equal(np.sort(identities(range(first, first + t))), whole)
    assert len(identities(range(2 * t, 2 * t + t // 2))) < len(whole)
    again = identities(range(5, 9))
    np.testing.assert_array_equal(again, identities(range(9))[-len(again) :])


def test_a_run_states_its_sampler_and_resumes_inside_an_epoch(run, tmp_path):
    with pytest.raises(loop.Preempted):
        loop.train(run, Workdir(tmp_path / "w"), stop=lambda step: step == 11)
    first = json.loads((tmp_path / "w" / "privacy.json").read_text())
    assert first["epsilon"] > first["epsilon_of_steps_done"], "an early end claims the plan"
    loop.train(run, Workdir(tmp_path / "w"))
    facts = json.loads((tmp_path / "w" / "privacy.json").read_text())
    assert facts["sampler"] == "random allocation, one step per epoch"
    assert facts["steps_done"] == facts["steps_planned"] == 20
    assert 1.99 < facts["epsilon"] <= 2.0
    sizes = [
        row["nonprivate/batch_size"]
        for row in read_jsonl(tmp_path / "w" / "metrics.jsonl")
        if "nonprivate/batch_size" in row
    ]
    assert len(sizes) == 20
    assert sum(sizes[:8]) == sum(sizes[8:16]) == len(run.train)
    poisson = build.build(tiny_config(finetune="film", epochs=2.5)).phases[0].mechanism
    assert run.phases[0].mechanism.noise_multiplier < poisson.noise_multiplier


def test_phases_begin_epochs_of_their_own():
    run = made(lp__fraction=0.4)
    one, two = (phase.mechanism.sampler for phase in run.phases)
    assert (one.first_step, two.first_step) == (0, run.phases[0].steps)
    draws = [
        phase.mechanism.indices(7, step, first=phase.mechanism.sampler.first_step)
        for phase in run.phases
        for step in range(phase.mechanism.sampler.first_step,
                          phase.mechanism.sampler.first_step + 8)
    ]  # fmt: skip
    for epoch in (draws[:8], draws[8:]):
        assert len(np.unique(np.concatenate(epoch))) == len(run.train) == sum(map(len, epoch))
    assert run.ledger.planned_by_part()["train"] <= 2.0 * (1 + 1e-9)


def test_sums_are_divided_by_the_size_that_is_drawn():
    """N / B = 1.4 is no number of steps: an epoch has one, and every batch is full."""
    run = made(batch_size=1150)
    size = phases.prepare(run, 0)[0].hyper.batch_size
    assert size == len(run.train) == run.phases[0].mechanism.expected_batch_size == 1617
    plan = build.describe.describe(run)
    assert "1,617 expected" in plan
    assert ", q = 1\n" in plan


@pytest.mark.slow
def test_an_audit_follows_the_sampler():
    run = made()
    report = audit.audit(run, canaries="gradient", count=20)
    assert isinstance(run.phases[0].mechanism.sampler, dp.RandomAllocation)
    assert 1.9 < report["claimed_epsilon"] <= 2.0
    assert not audit.refuted(report)
