"""Audits of whole runs: a correct one is not contradicted, broken ones are, and nothing leaks."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_broken import Unclipped
from tiny import tiny_config

from dpjax import build, dp
from dpjax.audit import attack, canaries
from dpjax.commands import cli
from dpjax.dp import seeds
from dpjax.dp.ledger import gdp_mu
from dpjax.dp.lower_bound import p_value, ranks_mu
from dpjax.runtime import Workdir, sharding
from dpjax.training import feed, loop

COUNT = 600


def linear_loss(params, example):
    inputs = example["input"].reshape(-1) / 255
    logits = inputs @ params["head"]["kernel"] + params["head"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])


@pytest.fixture(scope="module")
def base():
    return build.build(tiny_config(finetune="head", physical_batch=1024, dp__delta=1e-5))


def linear(run, *, epsilon, batch_size, steps):
    """A run of the digits with a linear model on one device, which compiles in no time."""
    mechanism = dp.calibrated(
        epsilon=epsilon, delta=1e-5, num_examples=len(run.train), batch_size=batch_size, steps=steps
    )

    def sgd(hyper):
        return dp.sgd(1.0, hyper.noise_multiplier, hyper.batch_size, key=hyper.noise_key)

    return run._replace(
        loss_fn=linear_loss,
        params={"head": {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}},
        phases=(
            run.phases[0]._replace(
                steps=steps, batch_size=batch_size, mechanism=mechanism, optimizer=sgd
            ),
        ),
        ledger=dp.Ledger((dp.Phase("train", mechanism),), epsilon=epsilon, delta=1e-5),
        layout=sharding.layout("replicated", jax.devices()[:1]),
    )


@pytest.fixture(scope="module")
def sampled(base):
    return linear(base, epsilon=2.0, batch_size=200, steps=8)


@pytest.fixture(scope="module")
def whole(base):
    return linear(base, epsilon=8.0, batch_size=len(base.train), steps=1)


@pytest.fixture(scope="module")
def strict(base):
    return linear(base, epsilon=0.1, batch_size=len(base.train), steps=1)


def without_noise(run):
    """The mistake: an optimizer that only divides."""

    def quiet(hyper):
        return optax.chain(
            dp.gaussian(0.0, hyper.batch_size, key=jax.random.key(0)), optax.sgd(1.0)
        )

    return run._replace(phases=tuple(p._replace(optimizer=quiet) for p in run.phases))


def with_half_the_noise(run):
    def half(hyper):
        return dp.sgd(1.0, hyper.noise_multiplier / 2, hyper.batch_size, key=hyper.noise_key)

    return run._replace(phases=tuple(p._replace(optimizer=half) for p in run.phases))


def without_clipping(run):
    return run._replace(rule=Unclipped(**vars(dp.flat(1.0, normalized=True))))


def test_a_correct_run_is_not_contradicted_and_the_bound_is_not_empty(whole):
    report = attack.audit(whole, count=COUNT)
    assert report["claimed_epsilon"] / 2 < report["bound"] <= report["claimed_epsilon"] <= 8.0
    assert report["bound"] == report["estimators"]["ranks"] > 2 * report["estimators"]["guesses"]
    assert report["claimed_mu"] >= gdp_mu(report["claimed_epsilon"], report["delta"]) - 1e-3
    assert len(report["scores_in"]) + len(report["scores_out"]) == COUNT
    assert "No contradiction" in attack.line(report)
    # The claim is that of the run that was audited: its steps, noise and rate, whatever its size.
    mechanism = whole.phases[0].mechanism
    assert report["claimed_epsilon"] == mechanism.epsilon(1e-5)
    assert report["steps_done"] == mechanism.steps


@pytest.mark.parametrize("breaks", [without_noise, with_half_the_noise, without_clipping])
def test_a_broken_run_is_refuted(breaks, sampled):
    report = attack.audit(breaks(sampled), count=COUNT)
    assert report["bound"] > report["claimed_epsilon"]
    assert "REFUTED" in attack.line(report)
    assert report["mu"]["ranks"] > report["claimed_mu"]
    guesses = report["guesses"]
    tried = guesses["positive"] + guesses["negative"]
    p = p_value(COUNT, tried, guesses["correct"], report["claimed_epsilon"], 1e-5)
    assert (p < 0.05) == (breaks is not with_half_the_noise)  # which guesses alone do not show


def test_many_runs(strict):
    assert attack.audit(strict, runs=24)["bound"] <= 0.1
    report = attack.audit(without_noise(strict), runs=24)
    # All 6 + 6 guesses of the second halves right: the most that so few runs can show.
    limit = 1 - 0.025 ** (1 / 6)
    assert report["bound"] == pytest.approx(math.log((1 - limit - 1e-5) / limit))
    assert report["bound"] > report["claimed_epsilon"]
    assert (len(report["scores_in"]), len(report["scores_out"])) == (12, 12)


@pytest.mark.parametrize("kind", ["mislabeled", "random"])
def test_canaries_that_are_examples(kind, sampled):
    report = attack.audit(sampled, canaries=kind, count=60)
    assert report["bound"] <= report["claimed_epsilon"]
    game = canaries.make(sampled, kind, 60)
    if kind == "mislabeled":
        by_bytes = {sampled.test.get(np.array([i]))["input"].tobytes(): sampled.test.labels[i]
                    for i in range(len(sampled.test))}  # fmt: skip
        true = [by_bytes[x.tobytes()] for x in game.inputs]
        assert (np.array(true) != game.labels).all()
    # A loss that falls is a score that rises.
    better = {"head": {"kernel": 0 * sampled.params["head"]["kernel"],
                       "bias": 5.0 * jax.nn.one_hot(3, 10)}}  # fmt: skip
    scores = game.scores(better)
    assert (scores[game.labels == 3] > 0).all()
    assert (scores[game.labels != 3] < 0).all()


def test_absent_canaries_are_never_read_and_present_ones_are_drawn_at_the_rate(sampled):
    game = canaries.make(sampled, "gradient", 40)
    included = np.arange(40) % 2 == 0
    train = game.data(included)
    assert len(train) == len(sampled.train) + 20
    played = game.run._replace(train=train)
    phase = attack._of_size(sampled.phases[0], len(train))
    assert phase.mechanism.sampling_prob == sampled.phases[0].mechanism.sampling_prob
    seen, steps = np.zeros(40), 400
    phase = phase._replace(mechanism=dataclasses.replace(phase.mechanism, steps=steps))
    drawn = feed.physical_chunks(
        played.train, phase, sampled.layout, seed=3, size=64, steps=range(steps)
    )
    for chunk in drawn:
        labels = chunk.batch["label"][chunk.batch["mask"]]
        np.add.at(seen, labels[labels >= 10] - 10, 1)
    assert not seen[~included].any()
    q = phase.mechanism.sampling_prob
    assert np.abs(seen[included] / steps - q).max() < 6 * math.sqrt(q * (1 - q) / steps)


def test_gradient_canaries_move_nothing_but_their_own_coordinate(sampled):
    game = canaries.make(sampled, "gradient", 5)
    canary = {"input": jnp.asarray(game.inputs[2]), "label": jnp.int32(12)}
    grad = jax.grad(game.run.loss_fn)(game.run.params, canary)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grad["head"]))
    (own,) = np.flatnonzero(grad["audit_canaries"])
    assert own == 2
    assert -grad["audit_canaries"][2] > 10 * sampled.rule.threshold  # clipped, and pushed upwards
    one = sampled.train.get(np.array([0]))
    real = {"input": jnp.asarray(one["input"][0]), "label": jnp.int32(one["label"][0])}
    grad = jax.grad(game.run.loss_fn)(game.run.params, real)
    assert not np.any(grad["audit_canaries"])
    want = jax.grad(linear_loss)(sampled.params, real)
    jax.tree.map(np.testing.assert_array_equal, grad["head"], want["head"])


def test_no_seed_of_the_run_is_used_again(sampled):
    drawn = attack._private_seeds(sampled, 20)
    assert len({*drawn, sampled.config.private_seed}) == 21
    assert drawn == attack._private_seeds(sampled, 20)  # a fixed seed repeats the audit
    config = sampled.config.copy_and_resolve_references()
    with config.unlocked():
        config.private_seed = None
    free = sampled._replace(config=config)
    assert not set(attack._private_seeds(free, 5)) & set(attack._private_seeds(free, 5))
    assert seeds.fingerprint(drawn[0]) != seeds.fingerprint(sampled.config.private_seed)


def changed(run, **fields):
    made = dp.calibrated(
        epsilon=2.0, delta=1e-4, num_examples=1617, batch_size=200, steps=8, **fields
    )
    return run._replace(ledger=dp.Ledger((dp.Phase("train", made),), epsilon=2.0, delta=1e-4))


@pytest.mark.parametrize(
    "arguments,text",
    [
        ({"canaries": "gradients"}, "Did you mean 'gradient'"),
        ({"count": 0}, "count=0"),
        ({"count": 181, "canaries": "mislabeled"}, "count=181 must be <= the 180"),
        ({"runs": 0}, "runs=0"),
        ({"runs": 5}, "runs=5"),
        ({"confidence": 1.0}, "confidence=1.0"),
    ],
)
def test_mistakes(arguments, text, sampled):
    with pytest.raises(ValueError, match=text):
        attack.audit(sampled, **arguments)


def test_runs_that_cannot_be_audited(sampled):
    with pytest.raises(ValueError, match="dp=None"):
        attack.audit(sampled._replace(ledger=None))
    for sampler, options in (("fixed_size", {}), ("truncated_poisson", {"max_batch_size": 300})):
        other = changed(sampled, sampler=sampler, **options)
        title = other.ledger.phases[0].mechanism.sampler.title
        with pytest.raises(ValueError, match=f"{title}.*adding or removing .* not depend on N"):
            attack.audit(other)


CONFIG = """
from tiny import tiny_config
def get_config(arg=None):
    return tiny_config(finetune="head")
"""


def test_command(sampled, tmp_path, monkeypatch, capsys):
    (tmp_path / "c.py").write_text(CONFIG)
    arguments = ["audit", f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'w'}"]
    for run, code in ((sampled, 0), (without_noise(sampled), 4)):
        monkeypatch.setattr(build, "build", lambda config, run=run: run)
        assert cli.main([*arguments, f"--count={COUNT}"]) == code
    assert ("REFUTED" in capsys.readouterr().out) == (code == 4)
    report = json.loads((tmp_path / "w" / "audit.json").read_text())
    assert report["bound"] > report["claimed_epsilon"]
    assert (tmp_path / "w" / "audit.png").stat().st_size > 1000
    assert (tmp_path / "w" / "config.json").exists()


def test_a_finished_run_is_audited_by_its_directory(sampled, tmp_path, monkeypatch, capsys):
    ledger = sampled.ledger.charge(0, sampled.ledger.steps_planned)
    place = Workdir(tmp_path / "w")
    config = tiny_config(finetune="head")
    place.path.mkdir()
    place.write("config.json", config)
    place.write("privacy.json", build.describe.run_statement(sampled, ledger))
    command = ["audit", f"--workdir={place.path}", f"--count={COUNT}"]
    assert cli.main(command) == 2  # has not finished
    assert "has no weights.safetensors: give --config" in capsys.readouterr().err
    (place.path / "weights.safetensors").write_text("")
    assert cli.main([*command, "--config.epochs=1"]) == 2
    assert "a finished run has its own" in capsys.readouterr().err
    before, seen = place.read("config.json"), []

    def built(config):
        seen.append(config)
        return sampled._replace(config=config)

    monkeypatch.setattr(build, "build", built)
    assert cli.main(command) == 0
    assert seen[0].to_dict() | {"audit": None} == config.to_dict() | {"audit": None}
    assert place.read("config.json") == before
    assert place.read("audit.json")["count"] == COUNT
    assert place.read("privacy.json")["audit"] in capsys.readouterr().out
    assert not place.exists("environment.json")


@pytest.mark.parametrize(
    "arguments,text",
    [
        (["--config.dp.epsilno=1"], "epsilno"),
        (["--config.dp.epsilon=-1.0"], "epsilon=-1"),
        (["--canaries=gradients"], "Did you mean"),
        (["--runs=3"], "runs=3"),
        (["left_over"], "left_over"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments, text, tmp_path, capsys):
    (tmp_path / "c.py").write_text(CONFIG)
    command = ["audit", f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'w'}", *arguments]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("dpjax audit: ")
    assert text in error
    assert error.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_training_audits_itself_and_says_so_in_the_statement(tmp_path, capsys):
    config = tiny_config(
        finetune="head", physical_batch=1024, audit__count=40, audit__canaries="random"
    )
    run, workdir = build.build(config), Workdir(tmp_path / "w")
    loop.train(run, workdir)
    assert "audit" not in (workdir.path / "privacy.md").read_text()
    said = attack.line(attack.attach(run, workdir))
    assert said in (workdir.path / "privacy.md").read_text()
    assert "random canaries, one run of 40" in said
    (named,) = [x for x in workdir.read("privacy.json")["not_charged"] if "audit.json" in x]
    assert "costs the claimed epsilon once more" in named
    written = (workdir.path / "audit.json").stat().st_mtime_ns
    assert attack.line(attack.attach(run, workdir)) == said  # what is there is not done again
    assert (workdir.path / "audit.json").stat().st_mtime_ns == written
    config.audit.count = 41
    assert "one run of 41" in attack.line(attack.attach(run, workdir))


def test_all_checkpoints_show_what_momentum_and_schedules_hide():
    """Momentum and a falling rate: the last parameters weigh steps unequally, the path does not."""
    rng = np.random.default_rng(0)
    steps, count, q, strength = 40, 3000, 0.2, 1.0
    joined = (rng.random((steps, count)) < q) & (np.arange(count) < count // 2)
    grads = rng.normal(size=(steps, count + 6000))
    grads[:, :count] += strength * joined
    velocity, place, path = 0.0, np.zeros(count + 6000), [np.zeros(count + 6000)]
    for step in range(steps):
        velocity = 0.95 * velocity + grads[step]
        place = place + 0.9**step * velocity
        path.append(place)
    laws = np.full(steps, q), np.full(steps, strength)
    own, unused = canaries.likelihoods(np.stack(path), count, *laws)
    exact = np.log(1 - q + q * np.exp(strength * grads - strength**2 / 2)).sum(0)
    assert unused.shape == (3000,)
    assert np.corrcoef(own, exact[:count])[0, 1] > 0.98
    seen = ranks_mu(own[: count // 2], unused)
    last = ranks_mu(place[: count // 2], place[count : count + 3000])
    assert seen > last + 0.3
    assert ranks_mu(own[count // 2 :], unused) < 0.1  # those that took part in nothing
