"""Recipes in whole runs: average, adaptive bound, schedules, phases and temperature."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from dpjax import build, dp, models
from dpjax.build import planner
from dpjax.runtime import Checkpoints, OtherRun, Workdir, compilation, read_jsonl
from dpjax.step import Hyper, TrainState, carry_over
from dpjax.training import loop, phases, results


def config(**changes):
    return tiny_config(**{"finetune": "head", "epochs": 0.75, "eval_every": 6, **changes})


def train(path, **changes):
    run = build.build(config(**changes))
    return run, loop.train(run, Workdir(path))


def weights(path, name="weights.safetensors"):
    return models.read_tensors(path / name)


def read(path, name):
    return json.loads((path / name).read_text())


def assert_same_weights(one, other, name="weights.safetensors"):
    want = weights(one, name)
    for leaf, value in weights(other, name).items():
        np.testing.assert_array_equal(value, want[leaf], err_msg=leaf)


def end_state(run, path):
    """The train state of the last checkpoint."""
    with Checkpoints(path / "checkpoints", keep=2) as checkpoints:
        step = checkpoints.steps()[0]
        like = phases.checkpoint_like(
            phases.prepare(run, run.config.private_seed or 0)[-1], run.params
        )
        return checkpoints.load(step, like)["state"]


SCHEDULED = {
    "optimizer__schedule": "cosine",
    "optimizer__warmup": 2,
    "ema": 0.9,
}


@pytest.mark.parametrize("private", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_schedule_that_changes_nothing_changes_nothing(private, tmp_path):
    """Moments, counters, learning rate, average, batches and noise go on across stages."""
    plain = dict(SCHEDULED)
    scheduled = {**plain, "batch_size_schedule": ((0.0, 200), (0.5, 200))}
    if private:
        scheduled["dp__bound_schedule"] = ((0.0, 1.0), (0.7, 1.0))
    else:
        plain["dp"] = scheduled["dp"] = None
    train(tmp_path / "a", **plain)
    with compilation.counting() as compiled:
        run, _ = train(tmp_path / "b", **scheduled)
    assert [phase.steps for phase in run.phases] == ([3, 1, 2] if private else [3, 3])
    assert compiled.beyond_first("accumulate", "update") == 0
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b", "weights_ema.safetensors")
    if private:
        one, other = (read(tmp_path / name, "privacy.json") for name in "ab")
        assert one["epsilon"] == other["epsilon"] <= 2.0


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    path = tmp_path_factory.mktemp("stages") / "w"
    run, _ = train(path, **STAGES)
    return run, path


STAGES = {
    **SCHEDULED,
    "lp__fraction": 0.3,
    "batch_size_schedule": ((0.0, 100), (0.5, 300)),
    "dp__bound_schedule": ((0.0, 0.1), (0.8, 20.0)),
}


def test_stages_share_one_budget(stages):
    run, path = stages
    titles = ["linear-probe", "train 1", "train 2", "train 3"]
    assert [phase.name for phase in run.phases] == titles
    assert [(p.batch_size, p.bound) for p in run.phases] == [
        (100, 0.1), (100, 0.1), (300, 0.1), (300, 20.0),
    ]  # fmt: skip
    assert [p.steps for p in run.phases] == [4, 2, 1, 1]
    privacy = read(path, "privacy.json")
    assert 1.9 < privacy["epsilon"] <= 2.0
    events = [phase.mechanism.event() for phase in run.phases]
    assert privacy["epsilon"] == pytest.approx(dp.accounting.epsilon(events, 1e-4), rel=1e-3)
    assert len({phase.mechanism.noise_multiplier for phase in run.phases}) == 1
    assert privacy["sampling_prob"] == [phase.mechanism.sampling_prob for phase in run.phases]
    for text in (build.describe.describe(run), privacy["clipping"]):
        assert "0.1 then 20" in text
    assert "100 then 300 expected" in build.describe.describe(run)
    sizes = [row["nonprivate/batch_size"] for row in read_jsonl(path / "metrics.jsonl")
             if "nonprivate/batch_size" in row]  # fmt: skip
    assert max(sizes[:6]) < 150 < 250 < min(sizes[6:])


@pytest.mark.slow
def test_stages_resume_bit_for_bit(stages, tmp_path):
    _, whole = stages
    for step in (4, 5, 6, 7):  # between trainings, within a stage, between stages
        with pytest.raises(loop.Preempted):
            loop.train(
                build.build(config(**STAGES)), Workdir(tmp_path / "w"),
                stop=lambda now, step=step: now == step,
            )  # fmt: skip
    train(tmp_path / "w", **STAGES)
    for name in ("weights.safetensors", "weights_ema.safetensors"):
        assert_same_weights(whole, tmp_path / "w", name)
    assert read(whole, "privacy.json") == read(tmp_path / "w", "privacy.json")


ADAPTIVE = {
    "dp__adaptive__quantile": 0.5,
    "ema": 0.8,
    "dp__temperature__share": 0.2,
    "checkpoint_every": 4,
}


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory):
    path = tmp_path_factory.mktemp("adaptive") / "w"
    return *train(path, **ADAPTIVE), path


def test_what_an_adaptive_run_leaves(adaptive):
    run, _, path = adaptive
    rows = list(read_jsonl(path / "metrics.jsonl"))
    bounds = [row["clip_bound"] for row in rows if "clip_bound" in row]
    assert len(bounds) == run.phases[0].steps
    assert bounds[0] == 1.0
    assert all(0 < abs(np.log(b / a)) < 0.2 for a, b in itertools.pairwise(bounds))
    last = [row for row in rows if "eval/accuracy" in row][-1]
    assert {"eval/ema/accuracy", "eval/ema/nll", "eval/ema/ece"} <= set(last)
    mechanism = run.phases[0].mechanism
    assert mechanism.count_noise == 200 / 20
    privacy = read(path, "privacy.json")
    assert privacy["epsilon_by_part"]["train"] == mechanism.epsilon(1e-4) <= 2.0
    assert privacy["phases"][0]["gradient_noise_multiplier"] > mechanism.noise_multiplier
    for text in (privacy["clipping"], build.describe.describe(run)):
        assert "following the 0.5 quantile" in text
        assert "never below 0.1" in text
        assert "accounted" in text
    assert any("clip_bound" in item for item in privacy["released"])


def test_what_the_average_is(adaptive):
    run, found, path = adaptive
    state = end_state(run, path)
    average = weights(path, "weights_ema.safetensors")
    np.testing.assert_array_equal(average["head/kernel"], state.average["head"]["kernel"])
    assert not np.array_equal(average["head/kernel"], state.trainable["head"]["kernel"])
    stored = read(path, "eval.json")
    assert stored["ema/accuracy"] == found["ema/accuracy"]
    assert "weights_ema" in " ".join(read(path, "privacy.json")["released"])


def test_the_temperature_is_in_the_weights_and_in_the_statement(adaptive):
    run, found, path = adaptive
    value, state = found["temperature"], end_state(run, path)
    assert value != 1
    for leaf in ("kernel", "bias"):
        np.testing.assert_allclose(
            weights(path)[f"head/{leaf}"] * value, state.trainable["head"][leaf], rtol=1e-5
        )
    last = [r for r in read_jsonl(path / "metrics.jsonl") if "eval/accuracy" in r][-1]
    assert found["before_temperature/nll"] == last["eval/nll"]
    assert found["before_temperature/ece"] == last["eval/ece"]
    assert found["accuracy"] == last["eval/accuracy"]
    assert found["nll"] != last["eval/nll"]
    # The examples are the run's own and nobody else's, and cost as much and no more.
    train_rows, own = set(run.train.rows), set(run.temperature.data.rows)
    assert not train_rows & own
    assert len(train_rows | own) == 1617
    privacy = read(path, "privacy.json")
    spent = privacy["epsilon_by_part"]
    assert set(spent) == {"train", "temperature"}
    assert 1.9 < spent["temperature"] <= 2.0
    assert privacy["epsilon"] == max(spent.values())
    assert privacy["num_examples"] == [len(train_rows), len(own)]
    assert privacy["steps_done"] == privacy["steps_planned"] == run.phases[0].steps + 10
    assert "Parts" in (path / "privacy.md").read_text()


@pytest.mark.slow
def test_an_adaptive_run_resumes_bit_for_bit(adaptive, tmp_path):
    _, found, whole = adaptive
    for step in (2, 4):
        with pytest.raises(loop.Preempted):
            loop.train(
                build.build(config(**ADAPTIVE)), Workdir(tmp_path / "w"),
                stop=lambda now, step=step: now == step,
            )  # fmt: skip
        # Nothing is fitted before training is done, and nothing is charged for it.
        assert read(tmp_path / "w", "privacy.json")["epsilon_by_part"]["temperature"] == 0
    _, again = train(tmp_path / "w", **ADAPTIVE)
    assert again == found
    for name in ("weights.safetensors", "weights_ema.safetensors"):
        assert_same_weights(whole, tmp_path / "w", name)
    bounds = [
        [row["clip_bound"] for row in read_jsonl(p / "metrics.jsonl") if "clip_bound" in row]
        for p in (whole, tmp_path / "w")
    ]
    assert bounds[0] == bounds[1]


def test_the_temperature_is_charged_before_it_is_fitted(adaptive, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(results, "fit_temperature", broken)
    with pytest.raises(RuntimeError, match="broken"):
        train(tmp_path / "w", **ADAPTIVE)
    assert read(tmp_path / "w", "privacy.json")["epsilon_by_part"]["temperature"] > 1.9


@pytest.mark.parametrize(
    "change",
    [
        {"ema": 0.7}, {"dp__adaptive__quantile": 0.4}, {"dp__adaptive__rate": 0.1},
        {"dp__adaptive__lower_bound": 0.2}, {"dp__adaptive__count_noise": 11.0},
        {"dp__temperature__share": 0.21}, {"dp__temperature__bound": 4.0},
        {"dp__temperature__steps": 9}, {"dp__bound": 2.0},
        {"batch_size_schedule": ((0.0, 200), (0.5, 201))},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.one_in(3)
def test_recipes_are_part_of_what_a_run_is(adaptive, change):
    """The config is compared first; a checkpoint is compared besides, whatever the config says."""
    run, _, path = adaptive
    changed = config(**{**ADAPTIVE, **change})
    with pytest.raises(OtherRun):
        Workdir(path).check(changed)
    other = build.build(changed)
    assert loop.identity(other, 5) != loop.identity(run, 5)
    # It stands in every checkpoint: no plain fingerprint of private data.
    assert run.train.digest not in str(loop.identity(run, 5))


@pytest.mark.slow
def test_a_kept_optimizer_goes_on_as_if_linear_probing_had_not_ended(tmp_path):
    """Moments and their age: a head that is trained in both phases takes the steps of one phase."""
    train(tmp_path / "one", dp=None, optimizer__learning_rate=0.03)
    run, _ = train(
        tmp_path / "two", dp=None, optimizer__learning_rate=0.03, lp__fraction=0.5,
        lp__keep_optimizer=True,
    )  # fmt: skip
    assert [phase.training for phase in run.phases] == [0, 1]
    want = weights(tmp_path / "one")
    for name, leaf in weights(tmp_path / "two").items():
        np.testing.assert_allclose(leaf, want[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("name", ["adam", "adam_corrected", "lamb", "optax:adamw"])
def test_kept_moments_have_their_age_whatever_the_optimizer(name):
    """Two steps of the head alone, then one of head and body: the head's is its third."""
    field = config(optimizer__name=name).optimizer
    numbers = Hyper(
        learning_rate=jnp.float32(0.1), noise_multiplier=jnp.float32(0.0), rule=dp.flat(1.0),
        noise_key=jax.random.key(0), augment_key=jax.random.key(1), batch_size=jnp.float32(4),
    )  # fmt: skip
    head = lambda path: path.startswith("head")  # noqa: E731
    tx = build.optimizer.optimizer(field, 9, private=True, kept=head)(numbers)

    def start(*parts):
        trainable = {part: {"w": jnp.ones(3)} for part in parts}
        return TrainState(jnp.int32(0), trainable, tx.init(trainable), None, None)

    def step(state, value):
        grads = jax.tree.map(lambda x: jnp.full_like(x, value), state.trainable)
        total = dp.ClippedSum(grads, jnp.float32(1.0))
        updates, opt = tx.update(total, state.opt, state.trainable)
        return updates, state._replace(opt=opt)

    state = start("head")
    for value in (1.0, 9.0):
        _, state = step(state, value)
    want, _ = step(state, -2.0)
    got, _ = step(carry_over(start("head", "body"), state), -2.0)
    fresh, _ = step(start("head", "body"), -2.0)
    np.testing.assert_allclose(got["head"]["w"], want["head"]["w"], rtol=1e-5)
    np.testing.assert_array_equal(got["body"]["w"], fresh["body"]["w"])
    assert np.all(np.abs(got["head"]["w"] - fresh["head"]["w"]) > 1e-3)


@pytest.mark.slow
def test_kept_moments_are_those_of_the_head_and_fresh_ones_the_rest(tmp_path):
    """One step after linear probing: with moments kept, the head's differ by b1 times them."""
    changes = {"finetune": "film", "lp__fraction": 0.8, "epochs": 0.62, "ema": 0.9}
    states = {}
    for keep in (False, True):
        path = tmp_path / str(keep)
        run, _ = train(path, **changes, lp__keep_optimizer=keep)
        assert [phase.steps for phase in run.phases] == [4, 1]
        states[keep] = end_state(run, path)
    with Checkpoints(path / "checkpoints", keep=2) as checkpoints:
        like = phases.checkpoint_like(phases.prepare(run, 5)[0], run.params)
        probed = checkpoints.load(4, like)["state"]

    def adam(state, part):
        return state.opt[1].inner_states[part].inner_state[0]

    fresh, kept, before = states[False].opt[1][0], adam(states[True], "kept"), adam(probed, "kept")
    new = adam(states[True], "new")
    assert (fresh.count, kept.count, new.count) == (1, 5, 1)
    assert states[True].opt[1].inner_states["kept"].inner_state[1].count == 1  # of the schedule
    for name, decay in (("mu", 0.9), ("nu", 0.999)):
        want, got, old = (getattr(s, name) for s in (fresh, kept, before))
        np.testing.assert_allclose(
            got["head"]["kernel"] - want["head"]["kernel"], decay * old["head"]["kernel"],
            rtol=1e-3, atol=1e-9,
        )  # fmt: skip
        assert np.abs(old["head"]["kernel"]).max() > 0
        rest = {k: v for k, v in models.flatten(want).items() if not k.startswith("head")}
        assert rest
        for path_, leaf in rest.items():
            np.testing.assert_array_equal(models.flatten(getattr(new, name))[path_], leaf)
    # The average goes on where leaves do, and begins at the start of those that begin to train.
    average = states[False].average
    assert states[False].step == 5
    decay = 5 / 14  # (1 + t) / (10 + t) at t = 4
    np.testing.assert_allclose(
        average["head"]["kernel"],
        decay * probed.average["head"]["kernel"]
        + (1 - decay) * states[False].trainable["head"]["kernel"],
        rtol=1e-4, atol=1e-8,
    )  # fmt: skip
    start = models.flatten(run.params)
    for name, leaf in models.flatten(average).items():
        if not name.startswith("head"):
            now = models.flatten(states[False].trainable)[name]
            np.testing.assert_allclose(
                leaf, decay * start[name] + (1 - decay) * now, rtol=1e-4, atol=1e-7
            )


def test_the_planner_chooses_the_batch():
    run = build.build(config(batch_size="auto", epochs=4.0))
    plan = planner.plan(1617, 4.0, 2.0, 1e-4)
    assert run.phases[0].batch_size == plan.batch_size
    assert run.phases[0].steps == dp.num_steps(1617, plan.batch_size, 4.0)
    assert run.phases[0].mechanism.expected_batch_size == pytest.approx(plan.batch_size)
    assert plan.reason in build.describe.describe(run)
    assert f"{plan.batch_size:,} expected" in build.describe.describe(run)


def test_models_without_sizes_are_named_without_one():
    assert build.model.model_title(config(model__name="resnet8").model) == "resnet8"
    assert build.model.model_title(config().model) == "vit mini"


@pytest.mark.parametrize("fraction", [0.97, 0.04])
def test_a_phase_without_a_step_is_refused(fraction):
    with pytest.raises(ValueError, match=rf"lp\.fraction={fraction} of 6 steps leaves none to"):
        build.build(config(lp__fraction=fraction))
