"""Runs that are stopped, killed, out of disk, or resumed as something else."""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_workdir import files_no_longer_than
from tiny import on_devices, tiny_config

from dpjax import build, dp, models
from dpjax.commands import cli
from dpjax.config import MAY_CHANGE, default
from dpjax.dp.noise import GaussianState
from dpjax.runtime import OtherRun, Unwritable, Workdir, read_jsonl
from dpjax.search import sweep
from dpjax.training import loop, phases, results

STEPS = 10


@pytest.fixture(scope="module")
def run():
    """Its state has an average of the parameters and a bound that adapts."""
    return build.build(
        tiny_config(finetune="head", epochs=1.2, eval_every=5, ema=0.9, dp__adaptive__quantile=0.5)
    )


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The directory of the run that nothing happened to."""
    path = tmp_path_factory.mktemp("whole") / "w"
    loop.train(run, Workdir(path))
    return path


def weights(path, file="weights.safetensors"):
    return models.read_tensors(path / file)


def assert_same_weights(one, other):
    """The parameters, and their average if there is one."""
    files = sorted(p.name for p in one.glob("weights*"))
    assert files == sorted(p.name for p in other.glob("weights*"))
    for file in files:
        got = weights(other, file)
        for name, value in weights(one, file).items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)


def statement(path):
    return json.loads((path / "privacy.json").read_text())


def checkpoint_steps(path):
    return sorted(int(p.name) for p in (path / "checkpoints").iterdir() if p.name.isdigit())


def test_what_is_measured(whole):
    rows = list(read_jsonl(whole / "metrics.jsonl"))
    assert [row["recompiles"] for row in rows if "recompiles" in row] == [0, 0]
    assert all(0 <= row["idle_fraction"] < 1 for row in rows if "recompiles" in row)
    for row in rows:
        if "nonprivate/batch_size" in row:
            padded = row["nonprivate/batch_size"] / (1 - row["nonprivate/padding_fraction"])
            assert padded == pytest.approx(64 * np.ceil(row["nonprivate/batch_size"] / 64))


def test_asked_to_stop_it_saves_and_goes_on_bit_for_bit(run, whole, tmp_path):
    path = tmp_path / "w"
    for step in (4, 4, 7):  # the second time before a single step
        with pytest.raises(loop.Preempted, match=f"after step {step}"):
            loop.train(run, Workdir(path), stop=lambda now, step=step: now == step)
        assert statement(path)["steps_done"] == step
        assert checkpoint_steps(path)[-1] == step
    loop.train(run, Workdir(path))
    assert_same_weights(path, whole)
    assert statement(path) == statement(whole)
    steps = [r["step"] for r in read_jsonl(path / "metrics.jsonl") if "nonprivate/loss" in r]
    assert steps == list(range(1, STEPS + 1))


def test_stopped_before_its_first_step_it_goes_on_all_the_same(run, whole, tmp_path):
    path = tmp_path / "w"
    with pytest.raises(loop.Preempted, match="after step 0"):
        loop.train(run, Workdir(path), stop=lambda step: True)
    assert 0 < statement(path)["steps_done"] < STEPS  # of the first block: too much, not too little
    loop.train(run, Workdir(path))
    assert_same_weights(path, whole)
    assert statement(path) == statement(whole)


class Killed(BaseException):
    """Stands for kill -9: nothing below `BaseException` is caught."""


def stop_by(error, at):
    def stop(step):
        if step == at:
            raise error
        return False

    return stop


def test_what_a_killed_process_reported_is_never_taken_back(run, whole, tmp_path):
    path = tmp_path / "w"
    with pytest.raises(Killed):
        loop.train(run, Workdir(path), stop=stop_by(Killed(), 3))
    # Killed before step 3 was done, but steps 3 and 4 had been charged, and might have been run.
    assert statement(path)["steps_done"] == 5
    mechanism = run.phases[0].mechanism
    assert statement(path)["epsilon_of_steps_done"] == mechanism.epsilon(1e-4, steps=5)
    assert statement(path)["epsilon"] == mechanism.epsilon(1e-4)
    with pytest.raises(loop.Preempted):
        loop.train(run, Workdir(path), stop=lambda step: step == 4)
    assert statement(path)["steps_done"] == 5  # 4 now, but 5 may have been run before
    (path / "privacy.json").unlink()
    with pytest.raises(loop.Preempted):
        loop.train(run, Workdir(path), stop=lambda step: step == 4)
    assert statement(path)["steps_done"] == 5  # the checkpoint knows, too
    loop.train(run, Workdir(path))
    assert_same_weights(path, whole)
    assert statement(path)["steps_done"] == STEPS


def test_a_failure_leaves_the_executed_steps_in_the_statement(run, tmp_path):
    with pytest.raises(RuntimeError, match="broken"):
        loop.train(run, Workdir(tmp_path / "w"), stop=stop_by(RuntimeError("broken"), 3))
    assert statement(tmp_path / "w")["steps_done"] == 4  # step 3 may have been begun


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_the_run_and_the_one_before_goes_on(run, whole, tmp_path):
    path = tmp_path / "w"
    config = run.config.copy_and_resolve_references()
    config.log_every = 100  # so that the metrics are smaller than a checkpoint
    with contextlib.ExitStack() as limits:
        limits.enter_context(contextlib.redirect_stderr(io.StringIO()))  # else a file of pytest's

        def fill_the_disk(step):
            if step == 5:
                while not (path / "checkpoints" / "3").is_dir():
                    time.sleep(0.01)
                limits.enter_context(files_no_longer_than(3500))
            return False

        with pytest.raises(Unwritable, match="checkpoint 3 is intact"):
            loop.train(run._replace(config=config), Workdir(path), stop=fill_the_disk)
    assert checkpoint_steps(path) == [3]
    loop.train(run, Workdir(path))
    assert_same_weights(path, whole)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
@pytest.mark.parametrize("harmed", [1, 2])
def test_truncated_checkpoints_fall_back_to_the_one_before(run, whole, harmed, tmp_path, capsys):
    path = tmp_path / "w"
    with pytest.raises(loop.Preempted):
        loop.train(run, Workdir(path), stop=lambda step: step == 7)
    assert checkpoint_steps(path) == [6, 7]
    for step in (7, 6)[:harmed]:
        for file in (path / "checkpoints" / str(step)).rglob("d/*"):
            file.write_bytes(file.read_bytes()[:10])
    loop.train(run, Workdir(path))
    said = capsys.readouterr().err
    assert said.count("Falling back") == harmed
    assert "warning: checkpoint 7:" in said
    assert (path / "checkpoints" / "unreadable-7").is_dir()
    assert_same_weights(path, whole)
    assert statement(path)["steps_done"] == STEPS


def test_the_checkpoint_of_the_lowest_held_out_loss_is_kept(run, tmp_path):
    config = run.config.copy_and_resolve_references()
    config.update(keep_best=1, keep_checkpoints=1, eval_every=2, checkpoint_every=100)
    loop.train(run._replace(config=config), Workdir(tmp_path / "w"))
    losses = Workdir(tmp_path / "w").losses()
    assert sorted(losses) == [0, 2, 4, 6, 8, 10]
    del losses[0]  # before training: evaluated, and not kept
    assert checkpoint_steps(tmp_path / "w") == sorted({min(losses, key=losses.get), 10})


def with_mechanism(run, **changes):
    phase = run.phases[0]
    mechanism = dataclasses.replace(phase.mechanism, **changes)
    return run._replace(phases=(phase._replace(mechanism=mechanism),))


def with_sampler(run, **changes):
    sampler = dataclasses.replace(run.phases[0].mechanism.sampler, **changes)
    return with_mechanism(run, sampler=sampler)


class Renamed(dp.Poisson):
    """Another sampler of the same fields."""

    title = "another"


def with_ledger(run, **changes):
    return run._replace(ledger=dataclasses.replace(run.ledger, **changes))


OTHERS = {
    "epsilon": lambda run: with_ledger(run, epsilon=2.5),
    "delta": lambda run: with_ledger(run, delta=2e-4),
    "noise_multiplier": lambda run: with_mechanism(run, noise_multiplier=9.0),
    "sampler.sampling_prob": lambda run: with_sampler(run, sampling_prob=0.01),
    "sampler.title": lambda run: with_mechanism(
        run, sampler=Renamed(**dataclasses.asdict(run.phases[0].mechanism.sampler))
    ),
    "num_examples": lambda run: with_sampler(
        run._replace(train=run.train.select(np.arange(1000))), num_examples=1000
    ),
    "steps": lambda run: with_mechanism(run, steps=20),
    "bound": lambda run: run._replace(phases=(run.phases[0]._replace(bound=2.0),)),
    "clipping.function": lambda run: run._replace(rule=dp.global_(1.0, normalized=True)),
    "data": lambda run: run._replace(train=run.train.select(np.arange(1617)[::-1])),
}


@pytest.mark.parametrize("field", OTHERS)
def test_a_checkpoint_of_another_run_is_refused(run, whole, field):
    files = ("config.json", "metrics.jsonl", "privacy.json", "weights.safetensors")
    before = [(whole / name).read_bytes() for name in files]
    with pytest.raises(OtherRun, match=rf"run\.(phases\.0_train\.)?{field}: "):
        loop.train(OTHERS[field](run), Workdir(whole))
    assert before == [(whole / name).read_bytes() for name in files]


def test_other_data_under_the_same_name_are_refused_before_any_checkpoint(run, tmp_path):
    """The same noise on other data would give both away."""
    path = Workdir(tmp_path / "w")
    with pytest.raises(loop.Preempted):
        loop.train(run, path, stop=lambda step: step == 1)
    shutil.rmtree(path.path / "checkpoints")
    with pytest.raises(OtherRun, match=r"the workdir belongs to another run: run\.data: "):
        loop.train(OTHERS["data"](run), path)
    loop.train(run, path)


def test_other_weights_under_the_same_name_are_refused(tmp_path, monkeypatch):
    """Their content decides every sum, and not where they lie."""
    file, path = tmp_path / "start.safetensors", tmp_path / "w"
    config = tiny_config(finetune="head", epochs=0.5)
    models.save_weights(build.build(config).params, file)
    config.model.weights = str(file)

    def begin():
        with pytest.raises(loop.Preempted):
            loop.train(build.build(config), Workdir(path), stop=lambda step: True)

    begin()
    begin()
    params = models.load_weights(file, build.build(config).params)
    models.save_weights({**params, "embed": {k: v + 1 for k, v in params["embed"].items()}}, file)
    with pytest.raises(OtherRun, match=r"another run: run\.weights: "):
        begin()


def test_every_field_is_in_the_identity_or_may_change_for_a_reason(run):
    def names(section, above=""):
        for name, value in section.items():
            inner = isinstance(value, dict) and name != "options" and value
            yield from names(value, f"{above}{name}.") if inner else [f"{above}{name}"]

    facts = build.describe.identity(run, 5)
    kept, fields = set(names(facts["config"])), set(names(default().to_dict()))
    assert set(MAY_CHANGE) < fields
    assert kept == fields - set(MAY_CHANGE) - {"private_seed"} | (kept & {"audit"})
    assert all(len(reason) > 20 for reason in MAY_CHANGE.values())
    assert "dp.method" in kept  # its factors differ by more than rounding
    config = run.config.copy_and_resolve_references()
    config.optimizer.learning_rate *= 2
    assert facts != build.describe.identity(run._replace(config=config), 5)


def test_hosts_compare_no_plain_digest_of_the_data(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop.hosts, "agree", lambda facts: seen.append(facts) or 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            loop.train(run, Workdir(tmp_path))
    assert seen[0]["config"] == seen[1]["config"]
    assert len({run.train.digest, seen[0]["data"], seen[1]["data"]}) == 3


def test_a_rule_of_any_function_and_any_parameters_has_an_identity(run):
    function = functools.partial(lambda base, norms, thresholds, w: base * w, 0.5)
    rule = dp.rule(function, 1.0, grouping=functools.partial(dp.by_leaf), w=jnp.array([0.5, 1.0]))
    facts = build.describe.identity(run._replace(rule=rule), 5)["clipping"]
    assert "<lambda>" in facts["function"]
    assert (facts["grouping"], facts["parameters"]) == ("by_leaf", {"w": [0.5, 1.0]})


def test_the_code_of_a_user_is_part_of_the_code(run, tmp_path, monkeypatch):
    (tmp_path / "own_rule.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("own_rule")
    config = run.config.copy_and_resolve_references()
    config.dp.clipping = "own_rule:make"
    own = run._replace(config=config)
    before = build.describe.identity(own, 5)["code"]
    assert before != build.describe.identity(run, 5)["code"]
    (tmp_path / "own_rule.py").write_text("x = 2\n")
    assert before != build.describe.identity(own, 5)["code"]


def test_a_second_process_is_refused_before_it_writes(run, whole):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and p.name != ".lock"}
    with Workdir(whole).lock(), pytest.raises(OtherRun, match="another process runs here"):
        loop.train(run, Workdir(whole))
    after = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and p.name != ".lock"}
    assert before == after


@pytest.mark.parametrize("steps", [9, 11])
def test_a_state_of_other_steps_than_were_charged_ends_without_results(run, steps, tmp_path):
    """Whatever a loop did: draws of noise, executed steps and the statement must agree."""
    workdir = Workdir(tmp_path)
    state = phases.prepare(run, 5)[0].begin(run.params, None)[1]
    noisy = jax.tree.map(
        lambda x: x._replace(step=jnp.int32(steps)) if isinstance(x, GaussianState) else x,
        state.opt, is_leaf=lambda x: isinstance(x, GaussianState),
    )  # fmt: skip
    workdir.write("privacy.json", {"steps_done": STEPS})
    with pytest.raises(dp.BudgetExceeded, match=f"{steps} draws of noise"):
        results.finish(
            run, workdir, run.params, state._replace(opt=noisy, step=jnp.int32(STEPS)),
            evaluate=None, private_seed=5,
        )  # fmt: skip


REFUSED = {
    "dp.epsilon": 2.5, "dp.delta": 2e-4, "dp.clipping": "global", "dp.bound": 2.0,
    "batch_size": 100, "epochs": 2.0, "data.subset": 0.5, "seed": 1, "private_seed": 6,
    "dp.method": "vmap",
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_a_workdir_of_another_config_is_refused_unless_asked(field, run, whole):
    config = run.config.copy_and_resolve_references()
    sweep.apply(config, {field: REFUSED[field]})
    with pytest.raises(OtherRun, match=rf"config\.{field}: .* --restart"):
        Workdir(whole).check(config)


def test_a_lost_private_seed_is_not_replaced(tmp_path):
    run = build.build(tiny_config(finetune="head", epochs=0.5, private_seed=None))
    path = tmp_path / "w"
    with pytest.raises(loop.Preempted):
        loop.train(run, Workdir(path), stop=lambda step: step == 2)
    (path / "private_seed.json").unlink()
    with pytest.raises(OtherRun, match=r"run\.private_seed: "):
        loop.train(run, Workdir(path))


def two_phases(keep_optimizer=False):
    """The head first, then everything but the head: its leaves are frozen, and not as they were."""
    config = tiny_config(finetune="film", epochs=1.2, eval_every=5)
    config.lp.fraction = 0.5
    config.lp.keep_optimizer = keep_optimizer
    run = build.build(config)
    first, second = run.phases
    body = second._replace(trainable=lambda path: "norm" in path and second.trainable(path))
    return run._replace(phases=(first, body))


@pytest.mark.slow
def test_phases_resume_bit_for_bit_and_share_no_draw(tmp_path, monkeypatch):
    run = two_phases()
    assert [phase.steps for phase in run.phases] == [5, 5]
    drawn, real = [], dp.Mechanism.indices
    monkeypatch.setattr(
        dp.Mechanism,
        "indices",
        lambda self, seed, step, first: drawn.append(step) or real(self, seed, step, first=first),
    )
    loop.train(run, Workdir(tmp_path / "whole"))
    assert sorted(drawn) == list(range(10))
    monkeypatch.undo()
    path = tmp_path / "w"
    for step in (2, 5, 7):  # in the first phase, between the two, in the second
        with pytest.raises(loop.Preempted):
            loop.train(two_phases(), Workdir(path), stop=lambda now, step=step: now == step)
        spent = [phase["steps_done"] for phase in statement(path)["phases"]]
        assert spent == [min(step, 5), max(0, step - 5)]
    loop.train(two_phases(), Workdir(path))
    assert_same_weights(path, tmp_path / "whole")
    assert statement(path) == statement(tmp_path / "whole")
    start, end = models.flatten(run.params), weights(path)
    assert not np.array_equal(start["head/kernel"], end["head/kernel"])


def test_facts_are_fetched_a_step_late(run, tmp_path, monkeypatch):
    events, prepare, log = [], phases.prepare, loop._log

    def prepare_noting(*arguments):
        (prepared,) = prepare(*arguments)

        def update(*operands):
            events.append("update")
            return prepared.steps.update(*operands)

        return (prepared._replace(steps=prepared.steps._replace(update=update)),)

    def log_noting(*arguments):
        events.append("log")
        return log(*arguments)

    monkeypatch.setattr(phases, "prepare", prepare_noting)
    monkeypatch.setattr(loop, "_log", log_noting)
    with pytest.raises(loop.Preempted):
        loop.train(run, Workdir(tmp_path / "w"), stop=lambda step: step == 3)
    assert events == ["update", "update", "log", "update", "log", "log"]


EXITS = {
    0: lambda: {"accuracy": 0.5},
    2: OtherRun("another run"),
    3: loop.TrainingFailed("diverged"),
    74: Unwritable("no space left"),
    75: loop.Preempted("stopped"),
}


@pytest.fixture
def main(run, tmp_path, monkeypatch):
    """Calls the command in this process, with `train` in place of the training."""
    monkeypatch.setattr(build, "build", lambda config: run)
    monkeypatch.setattr("dpjax.commands.report.figures", lambda path: [])
    monkeypatch.setattr("dpjax.runtime.hosts.catch_signals", lambda: None)
    monkeypatch.setattr("dpjax.runtime.compilation.keep_on_disk", lambda: None)
    config = tmp_path / "c.py"
    config.write_text(
        "from tiny import tiny_config\ndef get_config(arg=None): return tiny_config()"
    )

    def call(outcome, *arguments):
        monkeypatch.setattr(loop, "train", outcome)
        given = [f"--config={config}", f"--workdir={tmp_path / 'w'}", *arguments]
        return cli.main(["train", *given])

    return call


@pytest.mark.parametrize("code", EXITS)
def test_exit_codes(code, main, capsys):
    def outcome(*arguments, **options):
        if isinstance(EXITS[code], Exception):
            raise EXITS[code]
        return EXITS[code]()

    assert main(outcome) == code
    if isinstance(EXITS[code], Exception):
        assert str(EXITS[code]) in capsys.readouterr().err


def test_an_audit_after_training_holds_the_lock(main, tmp_path, monkeypatch):
    def attach(run, workdir):
        with pytest.raises(OtherRun, match="another process runs here"), workdir.lock():
            pass
        return {**dict.fromkeys(("bound", "claimed_epsilon"), 1.0), "runs": 4, "confidence": 0.5,
                "canaries": "random"}  # fmt: skip

    monkeypatch.setattr("dpjax.audit.attach", attach)
    flags = ["--config.audit.count=9", "--config.audit.runs=4"]
    assert main(lambda *arguments, **options: {}, *flags) == 0


def test_restart_moves_the_run_of_another_config_aside(main, tmp_path, capsys):
    other = Workdir(tmp_path / "w")
    other.create(tiny_config(dp__epsilon=1.0))

    def outcome(run, workdir, **options):
        assert not workdir.path.exists()
        return {}

    assert main(outcome) == 2
    assert "config.dp.epsilon: 1.0 != 2.0" in capsys.readouterr().err
    assert main(outcome, "--restart") == 0
    assert Workdir(tmp_path / "w.1").read("config.json")["dp"]["epsilon"] == 1.0


CONFIG = """
from tiny import tiny_config
def get_config(arg=None):
    return tiny_config(finetune="head", epochs={epochs}, eval_every=100, checkpoint_every=100)
"""


def command(tmp_path, epochs):
    here = os.path.dirname(os.path.dirname(__file__))
    (tmp_path / "c.py").write_text(CONFIG.format(epochs=epochs))
    return subprocess.Popen(
        [sys.executable, "-m", "dpjax.train", f"--config={tmp_path / 'c.py'}",
         f"--workdir={tmp_path / 'w'}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{here}:{os.path.dirname(here)}", **on_devices(1)},
    )  # fmt: skip


def test_sigterm_to_the_command(tmp_path):
    child = command(tmp_path, 2000.0)
    metrics = tmp_path / "w" / "metrics.jsonl"
    while child.poll() is None and not (metrics.exists() and "grad_norm" in metrics.read_text()):
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 75, said
    assert "the same command resumes" in said
    steps = statement(tmp_path / "w")["steps_done"]
    assert checkpoint_steps(tmp_path / "w") == [steps]
    rows = [row for row in read_jsonl(metrics) if "nonprivate/loss" in row]
    assert len(rows) == steps > 0
    assert Path(tmp_path / "w" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 3])
def test_kill_9(rounds, tmp_path):
    """The stress command, which is `kill -9` at random moments; by hand with 20 rounds."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench.stress", f"--workdir={tmp_path / 'w'}",
         f"--rounds={rounds}", "--seed=10"],  # of three kills, the second falls into the start
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
        env={**os.environ, **on_devices(1)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{rounds} kills, " in done.stdout
    assert ", 0 problems" in done.stdout
