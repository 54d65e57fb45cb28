"""A vote for the blocks that train: charged before it is held, held once, and all it decides."""

import json

import jax
import numpy as np
import pytest
from tiny import tiny_config

from dpjax import build, dp, models
from dpjax.audit import attack
from dpjax.runtime import Workdir, read_jsonl
from dpjax.training import loop, vote

OPTIONS = {"width": 16, "depth": 2, "heads": 2, "mlp": 16, "image_size": 14}


def made(**changes):
    changes = {"dp__method": "vmap", **changes}  # quick to compile
    return build.build(tiny_config(finetune="vote:1", model__options=OPTIONS, **changes))


@pytest.fixture(scope="module")
def run():
    return made(checkpoint_every=2)


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("vote") / "w"
    loop.train(run, Workdir(path))
    return path


def read(path, name):
    return json.loads((path / name).read_text())


def test_the_vote_and_the_training_share_one_budget(run):
    held, trained = run.ledger.phases
    assert (held.name, held.part, trained.part) == ("vote", "train", "train")
    assert held.mechanism == run.vote.mechanism
    assert held.mechanism.sampler == dp.FullBatch(num_examples=len(run.train))
    alone = held.mechanism.epsilon(1e-4)
    assert alone == pytest.approx(0.1 * 2.0, rel=1e-3)  # dp.vote of epsilon
    events = [held.mechanism.event(), trained.mechanism.event()]
    whole = dp.accounting.epsilon(events, 1e-4)
    assert 0.999 * 2.0 < whole <= 2.0
    without = build.build(tiny_config(model__options=OPTIONS)).phases[0].mechanism
    assert trained.mechanism.noise_multiplier > without.noise_multiplier
    assert "vote  " in build.describe.describe(run)


def test_the_plan_counts_the_blocks_that_can_be_picked(run):
    one = build.build(tiny_config(finetune="blocks:last:1", model__options=OPTIONS))
    counts = build.describe.describe(one).split("parameters")[1].split("\n")[0].split()
    line = f"at most {counts[0]} trainable (vote:1), {counts[3]} frozen"
    assert line in build.describe.describe(run)


@pytest.mark.slow
def test_what_the_vote_picks_trains_with_the_head_and_nothing_else(run, finished):
    known = read(finished, "vote.json")
    best = max(known["votes"], key=known["votes"].get)
    assert known["finetune"] == f"blocks:at:{best.split('_')[1]}"
    before = models.flatten(run.params)
    after = models.read_tensors(finished / "weights.safetensors")
    moved = {n.split("/")[0] for n in before if not np.array_equal(before[n], after[n])}
    assert moved == {best, "head"}


def test_the_statement_says_it(run, finished):
    facts = read(finished, "privacy.json")
    steps = run.phases[0].steps
    assert [p["name"] for p in facts["phases"]] == ["vote", "train"]
    assert facts["steps_done"] == facts["steps_planned"] == steps + 1
    assert facts["epsilon"] <= 2.0
    assert any("vote.json" in item for item in facts["released"])
    rows = read_jsonl(finished / "metrics.jsonl")
    spent = [row["epsilon"] for row in rows if "epsilon" in row and row["step"]]
    assert spent[-1] == pytest.approx(facts["epsilon"])
    assert min(spent) > run.vote.mechanism.epsilon(1e-4)


def test_votes_depend_on_their_example_alone(run):
    everyone = vote.ballots(run)
    np.testing.assert_allclose(np.linalg.norm(everyone, axis=1), 1.0, rtol=1e-9)
    rows = np.random.default_rng(0).permutation(len(run.train))[:70]
    some = vote.ballots(run._replace(train=run.train.select(rows)))
    np.testing.assert_allclose(some, everyone[rows], rtol=1e-4, atol=1e-6)


def test_the_vote_is_the_norm_of_a_block_s_gradient_over_the_root_of_its_size():
    run, rows = made(dp__method="auto"), np.arange(5)
    some = run._replace(train=run.train.select(rows))
    params = vote._with_a_head(some)
    assert not np.any(run.params["head"]["kernel"])
    names = models.finetune.block_names(run.model)
    batch = some.train.get(rows)
    gradient_of, want = jax.jit(jax.grad(run.loss_fn)), []
    for place in rows:
        example = {k: v[place] for k, v in batch.items()} | {"key": jax.random.key(0)}
        gradient = gradient_of(params, example)
        flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient[n])]) for n in names]
        want.append([np.linalg.norm(g) / np.sqrt(g.size) for g in flat])
    want = np.array(want) / np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(vote.ballots(some), want, rtol=2e-3)


def test_the_vote_is_charged_before_it_is_held_and_held_once(run, finished, tmp_path, monkeypatch):
    path = tmp_path / "w"

    def stopped(run):
        assert read(path, "privacy.json")["steps_done"] == 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vote, "ballots", stopped)
        with pytest.raises(KeyboardInterrupt):
            loop.train(run, Workdir(path))
    facts = read(path, "privacy.json")
    assert facts["epsilon_of_steps_done"] == pytest.approx(run.vote.mechanism.epsilon(1e-4))
    assert facts["epsilon"] > 1.99  # who stops early may do so for what was seen
    assert not (path / "vote.json").exists()
    with pytest.raises(loop.Preempted):
        loop.train(run, Workdir(path), stop=lambda step: step == 3)
    assert read(path, "privacy.json")["steps_done"] == 1 + 3
    monkeypatch.setattr(vote, "ballots", None)  # a second vote would fail
    loop.train(run, Workdir(path))
    assert read(path, "vote.json") == read(finished, "vote.json")
    ours, theirs = (models.read_tensors(p / "weights.safetensors") for p in (path, finished))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_probed_head_is_not_voted_about():
    """Under linear probing first, the head trains alone, then what the vote picked."""
    run = made(lp__fraction=0.5)
    head, rest = run.phases
    assert [p.name for p in run.ledger.phases] == ["vote", "linear-probe", "train"]
    assert not head.trainable("blocks_0/norm1/scale")
    assert rest.trainable("blocks_0/norm1/scale")


def test_an_audit_of_a_run_with_a_vote_is_refused(run):
    with pytest.raises(ValueError, match="an audit's runs hold no vote"):
        attack.check(run, canaries="gradient", count=4, runs=1, confidence=0.95)


def test_random_allocation_pays_for_a_vote_too():
    run = made(dp__sampler="random_allocation")
    assert run.ledger.planned_by_part()["train"] <= 2.0
