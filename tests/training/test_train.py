"""The whole run: files, budget, resuming, and every listed mistake."""

import contextlib
import dataclasses
import fnmatch
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import on_devices, tiny_config

from dpjax import build, dp, guide, models
from dpjax.commands import report
from dpjax.data import Dataset, splits_overlap
from dpjax.models import finetune
from dpjax.runtime import Workdir, may_be_published, read_jsonl, sharding
from dpjax.step import at_bound
from dpjax.training import feed, loop, phases, results

LOGGED = []


@contextlib.contextmanager
def writer(folder, *, name, after):
    LOGGED.append((name, after))
    yield lambda step, values: LOGGED.append({"step": step, **values})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished private run and its directory."""
    path = tmp_path_factory.mktemp("run") / "w"
    run = build.build(tiny_config(finetune="film", epochs=1.2, log_to="test_train:writer"))
    results = loop.train(run, Workdir(path))
    return run, path, results


def weights(path):
    return models.read_tensors(path / "weights.safetensors")


def test_files(finished):
    run, path, results = finished
    privacy = json.loads((path / "privacy.json").read_text())
    assert privacy["steps_done"] == privacy["steps_planned"] == run.phases[0].steps == 10
    assert privacy["epsilon"] == run.phases[0].mechanism.epsilon(1e-4) <= 2.0
    assert privacy["num_examples"] == len(run.train)
    assert privacy["seed_policy"].startswith("fixed seed")
    assert "not for release" in (path / "privacy.md").read_text()
    rows = list(read_jsonl(path / "metrics.jsonl"))
    assert [r["step"] for r in rows if "nonprivate/loss" in r] == list(range(1, 11))
    last = [r for r in rows if "eval/accuracy" in r][-1]
    assert (last["step"], last["epsilon"]) == (10, privacy["epsilon"])
    assert {"eval/nll", "eval/ece", "eval/mce", "eval/class_accuracy/0"} <= set(last)
    assert last["eval/accuracy"] == results["accuracy"]
    assert json.loads((path / "environment.json").read_text())["packages"]["jax"]
    assert json.loads((path / "config.json").read_text())["finetune"] == "film"
    assert not (path / "private_seed.json").exists()


def test_rows_go_to_the_writer_of_the_config_too(finished):
    _, path, _ = finished
    name = json.loads((path / "identity.json").read_text())["name"]
    begun = LOGGED.index((name, 0)) + 1
    rows = list(itertools.takewhile(lambda row: isinstance(row, dict), LOGGED[begun:]))
    assert rows == list(read_jsonl(path / "metrics.jsonl"))


def published():
    """Rows of the threat model's table: patterns of file names by what it says of them."""
    text = (Path(guide.__file__).parent / "threat_model.md").read_text()
    lines = text.partition("| | from the directory of a run |")[2].splitlines()[2:5]
    rows = [line.strip("| ").split(" | ") for line in lines]
    return {answer: re.findall(r"`([\w.*]+)/?`", files) for answer, files in rows}


def test_the_threat_model_lists_every_file_and_no_other_may_be_read(finished):
    _, path, _ = finished
    report.figures(path)
    table = published()
    assert list(table) == ["yes", "if the evaluation is on public data", "no"]
    seen = set()
    for file in path.iterdir():
        rows = {
            answer: [p for p in patterns if fnmatch.fnmatch(file.name, p)]
            for answer, patterns in table.items()
        }
        (answer,) = [answer for answer, patterns in rows.items() if patterns]
        seen |= set(rows[answer])
        # Of a run with a fixed seed, the config is not published.
        private = answer == "no" or file.name == "config.json"
        text = file.read_text() if file.suffix == ".json" else ""
        assert may_be_published(file.name, text) != private, file.name
        if private:
            assert file.stat().st_mode & 0o077 == 0, file.name
        elif not file.name.startswith("privacy."):
            assert "nonprivate/" not in file.read_bytes().decode(errors="ignore"), file.name
    written_by_others = {"private_seed.json", "audit.*", "tensorboard", "wandb"}
    assert set().union(*table.values()) - seen == written_by_others


def test_checkpoints_hold_nothing_about_seed_or_data(finished):
    """Only the run's random name: the digests of the identity are in no other file."""
    _, path, _ = finished
    facts = json.loads((path / "identity.json").read_text())
    digests = [value for value in facts.values() if isinstance(value, str) and len(value) == 64]
    assert {facts["data"], facts["private_seed"], facts["code"]} <= set(digests)
    for file in (p for p in path.rglob("*") if p.is_file() and p.name != "identity.json"):
        content = file.read_bytes()
        assert not [digest for digest in digests if digest.encode() in content], file
    (metadata,) = [
        json.loads(p.read_text())["custom_metadata"]
        for p in path.glob("checkpoints/10/_CHECKPOINT_METADATA")
    ]
    assert metadata == {"phase": 0, "run": facts["name"], "charged": 10}


def test_private_facts_are_named_so(finished):
    # A rate is counted in expected examples, and a bound follows from a noised count.
    allowed = (
        "step", "epsilon", "examples_per_second", "idle_fraction", "recompiles", "clip_bound",
    )  # fmt: skip
    for row in read_jsonl(finished[1] / "metrics.jsonl"):
        for name in row:
            assert name in allowed or name.startswith(("eval/", "nonprivate/")), name


def test_evaluations_on_private_data_are_named_so(tmp_path):
    config = tiny_config(finetune="head", epochs=0.4, data__holdout=0.3, keep_best=True)
    results = loop.train(build.build(config), Workdir(tmp_path))
    rows = list(read_jsonl(tmp_path / "metrics.jsonl"))
    last = [r for r in rows if "nonprivate/eval/nll" in r][-1]
    assert last["nonprivate/eval/accuracy"] == results["nonprivate/accuracy"]
    assert not [name for row in rows for name in row if name.startswith("eval/")]
    assert Workdir(tmp_path).losses()[last["step"]] == results["nonprivate/nll"]
    assert all(name.startswith("nonprivate/") for name in results)
    assert set(json.loads((tmp_path / "eval.json").read_text())) == {
        *results, "nonprivate/reliability", "nonprivate/confusion", "class_names",
    }  # fmt: skip
    for path in (*report.figures(tmp_path), tmp_path / "eval.json"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert set(loop._postfix(last, "nonprivate/eval/", 1.0)) == {
        "nonprivate/loss", "nonprivate/acc", "ex/s", "eps"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("train", "test", "private"),
    [("train", "test", False), ("train", "train", True), ("train[:80%]", "train[80%:]", True),
     ("train", "train+test", True), ("all", "test", True), ("2020", "2020[:9]", True),
     ("träning", "träning", True), ("train-a", "train-b", False)],
)  # fmt: skip
def test_splits_that_may_share_examples_are_seen(train, test, private):
    assert splits_overlap(train, test) == private


def test_evaluating_on_the_training_split_is_not_private_and_said(finished):
    run = finished[0]
    assert results.prefix(run) == "eval/"
    facts = build.describe.run_statement(run, build.describe.ledger_after(run, 1))
    assert "every evaluation on public held-out data" in " ".join(facts["released"])
    assert not [line for line in facts["not_charged"] if "evaluations" in line]
    assert not [line for line in facts["not_charged"] if "starts from" in line]
    config = run.config.copy_and_resolve_references()
    config.model.weights = "theirs.safetensors"
    run = run._replace(
        config=config, test=run.train, train=dataclasses.replace(run.train, split="train[:90%]")
    )
    assert results.prefix(run) == "nonprivate/eval/"
    facts = build.describe.run_statement(run, build.describe.ledger_after(run, 1))
    assert "evaluation" not in " ".join(facts["released"])
    for words in ("the evaluations, and which checkpoints keep_best keeps", "theirs.safetensors",
                  "'train[:90%]' with data.subset=None"):  # fmt: skip
        assert [line for line in facts["not_charged"] if words in line]


def sum_of(run):
    """The clipped sum of a first step over all examples, through the product, as one vector."""
    phase = run.phases[0]
    sampler = dataclasses.replace(phase.mechanism.sampler, num_examples=len(run.train))
    mechanism = dataclasses.replace(phase.mechanism, sampler=sampler)
    run = run._replace(phases=(phase._replace(mechanism=mechanism),))
    (prepared,) = phases.prepare(run, 5)
    steps, hyper = prepared.steps, prepared.hyper
    frozen, state = prepared.begin(run.params, None)
    whole, totals = steps.begin(state)
    for chunk in feed.physical_chunks(
        run.train, run.phases[0], run.layout, seed=1, size=64, steps=range(1)
    ):
        batch = sharding.to_mesh(chunk.batch, run.layout.mesh)
        now = at_bound(hyper, state)
        totals = steps.accumulate(totals, whole, frozen, batch, jnp.int32(0), now)
    leaves = [np.asarray(g, np.float64).sum(0).ravel() for g in jax.tree.leaves(totals.grads.value)]
    return np.concatenate(leaves)


def moved_by_the_first_example():
    """How far the clipped sum of augmented examples, at bound 1, goes without the first one."""
    run = build.build(tiny_config(finetune="head", data__shift=2))
    run = run._replace(train=run.train.select(np.arange(200)))
    phase = run.phases[0]
    everyone = dataclasses.replace(phase.mechanism, sampler=dp.FullBatch(num_examples=200))
    run = run._replace(phases=(phase._replace(mechanism=everyone),))
    without = run._replace(train=run.train.select(np.arange(1, 200)))
    return np.linalg.norm(sum_of(run) - sum_of(without))


def test_removing_an_example_moves_an_augmented_sum_by_at_most_the_bound():
    assert 0.01 < moved_by_the_first_example() <= 1.0 + 1e-4


def test_augmentation_by_position_is_seen(monkeypatch):
    """The augmentations of all later examples would change with the first one."""
    monkeypatch.setattr(Dataset, "identities", lambda _, rows: np.maximum(rows, 0).astype("u4"))
    assert moved_by_the_first_example() > 1.5


def test_frozen_leaves_are_bit_identical_and_the_others_move(finished):
    run, path, _ = finished
    after, before = weights(path), models.flatten(run.params)
    chosen = finetune.film()(run.model).trainable
    for name, value in before.items():
        assert np.array_equal(after[name], value) != chosen(name), name


def test_finished_run_is_not_trained_again(finished):
    run, path, results = finished
    before = weights(path)
    again = loop.train(run, Workdir(path))
    assert again["accuracy"] == results["accuracy"]
    assert all(np.array_equal(before[k], v) for k, v in weights(path).items())
    assert json.loads((path / "privacy.json").read_text())["steps_done"] == 10


def test_cut_run_resumes_bit_for_bit(finished, tmp_path, monkeypatch):
    run, path, _ = finished
    real, calls = loop._run_block, []

    def cut(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loop, "_run_block", cut)
    with pytest.raises(KeyboardInterrupt):
        loop.train(run, Workdir(tmp_path / "w"))
    charged = json.loads((tmp_path / "w" / "privacy.json").read_text())
    assert charged["steps_done"] == 6  # the block that was cut is charged, though it never ran
    loop.train(run, Workdir(tmp_path / "w"))
    for name, value in weights(path).items():
        np.testing.assert_array_equal(weights(tmp_path / "w")[name], value)
    steps = [r["step"] for r in read_jsonl(tmp_path / "w" / "metrics.jsonl") if "epsilon" in r]
    assert steps == sorted(set(steps))


def test_release_mode_takes_os_entropy_and_hides_it(tmp_path):
    run = build.build(tiny_config(private_seed=None, epochs=0.4, finetune="head"))
    seeds = []
    for name in "ab":
        loop.train(run, Workdir(tmp_path / name))
        file = tmp_path / name / "private_seed.json"
        assert oct(file.stat().st_mode)[-3:] == "600"
        seeds.append(json.loads(file.read_text())["private_seed"])
        assert (
            "OS entropy"
            in json.loads((tmp_path / name / "privacy.json").read_text())["seed_policy"]
        )
    assert seeds[0] != seeds[1]
    a, b = (weights(tmp_path / n)["head/kernel"] for n in "ab")
    assert not np.array_equal(a, b)


def test_without_privacy_it_says_so(tmp_path):
    run = build.build(tiny_config(dp=None, epochs=0.4))
    assert "NONE" in build.describe.describe(run)
    loop.train(run, Workdir(tmp_path / "w"))
    assert not (tmp_path / "w" / "privacy.json").exists()


def test_training_refuses_to_pass_the_budget(tmp_path):
    run = build.build(tiny_config(epochs=0.8))
    greedy = run._replace(phases=(run.phases[0]._replace(steps=run.phases[0].steps + 1),))
    with pytest.raises(dp.BudgetExceeded):
        loop.train(greedy, Workdir(tmp_path / "w"))
    assert json.loads((tmp_path / "w" / "privacy.json").read_text())["epsilon"] <= 2.0


def test_diverging_run_stops(tmp_path):
    run = build.build(tiny_config(optimizer__learning_rate=1e38, optimizer__name="sgd"))
    with pytest.raises(loop.TrainingFailed, match=r"learning_rate=1e\+38"):
        loop.train(run, Workdir(tmp_path / "w"))


def test_every_step_draws_its_own_batch_and_noise(tmp_path):
    """Update minus clipped sum is Gaussian of the accounted scale, on eight devices."""
    run = build.build(tiny_config(finetune="full", optimizer__name="sgd"))
    phase = run.phases[0]
    mechanism = phase.mechanism
    before = models.flatten(run.params)
    loop.train(
        run._replace(
            phases=(phase._replace(steps=1, learning_rate=1.0),),
            loss_fn=lambda params, example: 0.0 * sum(x.sum() for x in jax.tree.leaves(params)),
        ),
        Workdir(tmp_path / "w"),
    )
    noise = np.concatenate([(before[k] - v).ravel() for k, v in weights(tmp_path / "w").items()])
    want = mechanism.noise_multiplier / mechanism.expected_batch_size
    assert abs(noise.std() / want - 1) < 6 / np.sqrt(2 * noise.size)
    assert dp.seeds.sampler_seed(5) != 5


MISTAKES = {
    "epsilon": ({"dp__epsilon": 0.0}, "epsilon=0"),
    "delta": ({"dp__delta": 0.1}, "delta=0.1"),
    "bound": ({"dp__bound": -1.0}, "dp.bound=-1"),
    "clipping": ({"dp__clipping": "flatt"}, "Did you mean 'flat'"),
    "sampler": ({"dp__sampler": "shuffle"}, "sampler='shuffle'"),
    "truncation": ({"dp__max_batch_size": 9}, "max_batch_size=9"),
    "no truncation": ({"dp__sampler": "truncated_poisson"}, "dp.max_batch_size=None must be given"),
    "data set": ({"data__name": "mnist6k"}, "mnist6k"),
    "data not prepared": ({"data__name": "cifar10", "data__data_dir": "/nowhere"}, "prepare"),
    "split": ({"data__train_split": "trane"}, "trane"),
    "subset": ({"data__subset": 1.5}, "1.5"),
    "shots": ({"data__subset": 1000}, "1000"),
    "model": ({"model__name": "vitt"}, "Did you mean 'vit'"),
    "size": ({"model__size": "ti17"}, "Did you mean 'ti16'"),
    "option": ({"model__options": {"dept": 1}}, "Did you mean 'depth'"),
    "patch": ({"model__options": {"patch": 5}}, "image_size=28"),
    "weights file": ({"model__weights": "/nowhere/w.npz"}, "no weight file"),
    "weights name": ({"model__weights": "vit_mini_digitz"}, "vit_mini_digits"),
    "head init": ({"model__head_init": "one"}, "head_init='one'"),
    "fine-tuning set": ({"finetune": "flim"}, "Did you mean 'film'"),
    "pad": ({"data__pad": -1}, "data.pad=-1"),
    "regex": ({"finetune": "regex:zzz"}, "matches none"),
    "blocks": ({"finetune": "blocks:last:x"}, "blocks:last:x"),
    "batch": ({"batch_size": 10**6}, "batch_size=1000000"),
    "physical batch": ({"physical_batch": -1}, "physical_batch=-1"),
    "sharding": ({"sharding": "zero"}, "sharding='zero'"),
    "epochs": ({"epochs": -1.0}, "epochs=-1"),
    "optimizer": ({"optimizer__name": "adamm"}, "Did you mean 'adam'"),
    "learning rate": ({"optimizer__learning_rate": 0.0}, "learning_rate=0.0"),
    "schedule": ({"optimizer__schedule": "cosin"}, "Did you mean 'cosine'"),
    "warmup": ({"optimizer__warmup": 10**6}, "warmup=1000000"),
    "multiplicity": ({"data__multiplicity": 4}, "multiplicity=4"),
    "seed": ({"private_seed": -1}, "private_seed=-1"),
    "resample": ({"data__resample": "cubic"}, "resample='cubic'"),
    "microbatch": ({"microbatch": 0}, "microbatch=0"),
    "method": ({"dp__method": "ghost"}, "method='ghost'"),
    "dtype": ({"model__dtype": "int32"}, "dtype='int32'"),
    "average": ({"ema": 1.0}, "ema=1.0"),
    "schedule of bounds": ({"dp__bound_schedule": ((0.1, 1.0),)}, "dp.bound_schedule=((0.1, 1.0)"),
    "stage without steps": (
        {"dp__bound_schedule": ((0.0, 1.0), (0.999, 2.0))},
        "2.0 lasts less than one step",
    ),
    "schedule of batches": (
        {"batch_size_schedule": ((0.0, 200), (0.5, 10**6))},
        "batch_size=1000000",
    ),
    "planned batch": ({"batch_size": "autoo"}, "batch_size='autoo' must be 'auto'"),
    "planned without privacy": ({"batch_size": "auto", "dp": None}, "dp=None has none"),
    "planned and scheduled": (
        {"batch_size": "auto", "batch_size_schedule": ((0.0, 200),)},
        "exclude each other",
    ),
    "planned for another sampler": (
        {"batch_size": "auto", "dp__sampler": "fixed_size"},
        "plans for dp.sampler in ('poisson', 'random_allocation')",
    ),
    "quantile": ({"dp__adaptive__quantile": 1.5}, "dp.adaptive.quantile=1.5"),
    "adaptive rate": (
        {"dp__adaptive__quantile": 0.5, "dp__adaptive__rate": 0.0},
        "dp.adaptive.rate=0.0",
    ),
    "lower bound": (
        {"dp__adaptive__quantile": 0.5, "dp__bound": 0.01},
        "dp.adaptive.lower_bound=0.1",
    ),
    "count noise": (
        {"dp__adaptive__quantile": 0.5, "dp__adaptive__count_noise": 0.1},
        "count_noise=0.1",
    ),
    "adaptive clipping of another kind": (
        {"dp__adaptive__quantile": 0.5, "dp__clipping": "automatic"},
        "dp.clipping='flat'",
    ),
    "adaptive and scheduled": (
        {"dp__adaptive__quantile": 0.5, "dp__bound_schedule": ((0.0, 1.0),)},
        "exclude each other",
    ),
    "share": ({"dp__temperature__share": 1.5}, "dp.temperature.share=1.5"),
    "temperature of replaced examples": (
        {"dp__temperature__share": 0.1, "dp__sampler": "fixed_size"},
        "fixed_size",
    ),
    "temperature bound": (
        {"dp__temperature__share": 0.1, "dp__temperature__bound": 0.0},
        "dp.temperature.bound=0.0",
    ),
    "temperature steps": (
        {"dp__temperature__share": 0.1, "dp__temperature__steps": 0},
        "dp.temperature.steps=0",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_clear_and_cost_nothing(name, tmp_path):
    changes, text = MISTAKES[name]
    workdir = tmp_path / "w"
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        loop.train(build.build(tiny_config(**changes)), Workdir(workdir))
    assert text in str(caught.value)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (lambda p: p.write_text("a file"), "not a directory"),
        (lambda p: (p.mkdir(), (p / "thesis.tex").write_text("x")), "does not contain a dpjax run"),
    ],
)
def test_foreign_workdirs_are_left_alone(prepare, text, tmp_path):
    prepare(tmp_path / "w")
    with pytest.raises(ValueError, match=text):
        Workdir(tmp_path / "w").check(tiny_config())


@pytest.mark.parametrize(
    ("change", "text"),
    [({"dp__epsilon": 3.0}, "dp.epsilon: 2.0 != 3.0"), ({"private_seed": 6}, "private_seed: 5")],
)
def test_a_run_of_another_config_is_not_resumed(finished, change, text):
    _, path, _ = finished
    before = {f: f.stat().st_mtime_ns for f in path.rglob("*")}
    config = tiny_config(finetune="film", epochs=1.2, **change)
    with pytest.raises(ValueError, match=text):
        Workdir(path).check(config)
    assert before == {f: f.stat().st_mtime_ns for f in path.rglob("*")}


CONFIG = """
from tiny import tiny_config
def get_config(arg=None):
    return tiny_config(finetune="head", epochs=0.4)
"""


def command(tmp_path, *arguments):
    (tmp_path / "c.py").write_text(CONFIG)
    here = os.path.dirname(os.path.dirname(__file__))
    return subprocess.run(
        [sys.executable, "-m", "dpjax", "train", f"--config={tmp_path / 'c.py'}", *arguments],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{here}:{os.path.dirname(here)}", **on_devices(1)},
    )  # fmt: skip


def test_command_line(tmp_path):
    done = command(tmp_path, f"--workdir={tmp_path / 'w'}", "--config.dp.epsilon=1")
    assert done.returncode == 0, done.stderr
    for word in ("examples N", "1,617", "sigma sqrt(T)", "neighboring", "epsilon 1", "accountant"):
        assert word in done.stdout
    assert all(
        word in done.stderr for word in ("step", "eps=", "loss=", "ex/s=")
    )  # the progress bar is not in what is piped
    made = {p.name for p in (tmp_path / "w").iterdir()}
    assert made >= {
        "config.json", "metrics.jsonl", "environment.json", "checkpoints", "privacy.json",
        "privacy.md", "reliability.png", "learning_curve.png", "weights.safetensors",
    }  # fmt: skip


@pytest.mark.slow
def test_a_refuted_claim_is_an_exit_code(tmp_path):
    flags = [f"--workdir={tmp_path / 'w'}", "--config.audit.count=20"]
    assert command(tmp_path, *flags).returncode == 0
    report = json.loads((tmp_path / "w/audit.json").read_text())
    (tmp_path / "w/audit.json").write_text(json.dumps({**report, "bound": 50.0}))
    again = command(tmp_path, *flags)  # what was audited is not done again
    assert again.returncode == 4
    assert "THE CLAIM IS REFUTED" in again.stdout
    assert "THE CLAIM IS REFUTED" in (tmp_path / "w/privacy.md").read_text()


def test_given_data_take_the_place_of_those_named(tmp_path):
    named = build.build(tiny_config(finetune="head", epochs=0.4))
    half = named.train.select(np.arange(0, len(named.train), 2))
    config = tiny_config(finetune="head", epochs=0.4, data__name="nothing of this name")
    run = build.build(config, datasets=(half, named.test))
    assert run.phases[0].mechanism.num_examples == len(half) < len(named.train)
    loop.train(run, Workdir(tmp_path / "w"))
    assert json.loads((tmp_path / "w/privacy.json").read_text())["num_examples"] == len(half)
    for field in ("holdout", "subset"):
        wrong = tiny_config(finetune="head", **{f"data__{field}": 0.5})
        with pytest.raises(ValueError, match=rf"data.{field}=0.5 must be None"):
            build.build(wrong, datasets=(half, named.test))


def test_data_that_the_privacy_was_not_planned_for_are_refused(tmp_path):
    run = build.build(tiny_config(finetune="head"))
    other = run._replace(train=run.train.select(np.arange(100)))
    with pytest.raises(
        ValueError, match=r"num_examples=1617 of phase .* the 100 training examples:"
    ):
        loop.train(other, Workdir(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_typo_on_the_command_line(tmp_path):
    done = command(tmp_path, f"--workdir={tmp_path / 'w'}", "--config.dp.epsilno=1")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "dpjax train: config.dp has no field 'epsilno': did you mean 'epsilon'?"
    )
    assert not (tmp_path / "w").exists()
