"""Searches: which points, at what price, and what the statement says of both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import on_devices

from dpjax import dp
from dpjax.commands import cli
from dpjax.dp import repeat_and_select
from dpjax.search import proposals, sweep, trials

STUDY = """
import dataclasses

import numpy as np
from dpjax import dp
from dpjax.dp import accounting
from tiny import tiny_config

def get_config(arg=None):
    config = tiny_config(finetune="head", epochs=0.3)
    config.private_seed = 5 if arg == "fixed" else None
    config.dp.sampler = "random_allocation"
    if arg == "own":
        config.data.train_split, config.data.test_split = "train[10%:]", "train[:10%]"
    if arg == "shared":
        config.data.name = "study:shared"
    if arg == "voted":
        config.finetune = "vote:1"
    if arg == "audited":
        config.audit.count = 9
    if arg == "secure":
        config.dp.noise, config.dp.method = "secure", "vmap"
    if arg == "subclass":
        config.dp.sampler = "study:blocks"
    return config

@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks(dp.Poisson):  # looks like Poisson in a statement, and costs more
    def event(self, noise_multiplier, steps):
        return accounting.full_batch(noise_multiplier, steps)

def blocks(*, num_examples, batch_size):
    return Blocks(num_examples=num_examples, sampling_prob=batch_size / num_examples)

def shared(split):  # whatever is asked for: part of the same data
    from dpjax import data
    pixels = np.zeros((300, 14, 14, 1), np.uint8)
    return data.from_arrays("mine", pixels, np.arange(300) % 2, class_names=("a", "b"))

def sweep(arg):
    for rate in (1e-3, 2e-3):
        for bound in (0.1, 1.0, 10.0):
            yield {"optimizer.learning_rate": rate, "dp.bound": bound}
            if arg == "uneven":
                return
            if arg == "secure":
                yield {"finetune": "full"}
            if arg == "batches":
                yield {"batch_size": 100}
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    here = os.path.dirname(os.path.dirname(__file__))
    monkeypatch.setenv("PYTHONPATH", f"{here}:{os.path.dirname(here)}")
    monkeypatch.setenv("XLA_FLAGS", on_devices(1)["XLA_FLAGS"])
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "study.py"
    path.write_text(STUDY)
    return str(path)


def read(path):
    return json.loads(path.read_text())


# --- Points ---------------------------------------------------------------------------------------


def test_sample_is_seeded_distinct_and_nested():
    chosen = proposals.sample(20, 8, seed=3)
    assert len(set(chosen)) == 8
    assert chosen[:5] == proposals.sample(20, 5, seed=3)
    assert chosen != proposals.sample(20, 8, seed=4)
    assert sorted(proposals.sample(5, 5, seed=0)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"trials=6 must be in \[1, 5\]"):
        proposals.sample(5, 6, seed=0)


def test_axes_are_sorted_and_only_of_full_products():
    found = proposals.grid({"a": [3.0, 1.0], "b": ["x", "y"]})
    assert proposals.axes(found) == {"a": [1.0, 3.0], "b": ["x", "y"]}
    for broken in (found[:-1], [*found, found[0]], [*found, {"a": 1.0}]):
        with pytest.raises(ValueError, match="full product"):
            proposals.axes(broken)


# --- Statements -----------------------------------------------------------------------------------


def one_run(**changes):
    values = {"epsilon": 1.0, "delta": 1e-5, "num_examples": 1000, "batch_size": 100, "steps": 20}
    return dp.calibrated(**{**values, **changes})


def statement_of(run, epsilon):
    ledger = dp.Ledger((dp.Phase("train", run),), epsilon=epsilon, delta=1e-5).charge(0, run.steps)
    return dp.statement(
        ledger, clipping="flat", seed_policy="os_entropy", released=["weights"],
        not_charged=["the choice of hyperparameters, if ...", "rows named nonprivate/..."],
    )  # fmt: skip


def test_statements_say_what_was_tried_and_whether_it_is_charged():
    spend = repeat_and_select.epsilon_of_one([one_run()], budget=3.0, delta=1e-5, mean=8.0)
    run = one_run(epsilon=spend)
    mine = statement_of(run, spend)
    assert repeat_and_select.mechanisms(json.loads(json.dumps(mine))) == (run,)

    facts = {"method": "random", "metric": "held-out accuracy", "points": 6}
    free = repeat_and_select.not_charged(mine, {**facts, "runs": 7})
    assert "among 7 runs of 6 points (random search)" in free["not_charged"][0]
    assert free["epsilon"] == mine["epsilon"]
    assert free["search"]["charged"] is False

    paid = repeat_and_select.charged(mine, [mine, mine], {**facts, "mean": 8.0, "epsilon": 3.0})
    assert mine["epsilon"] < spend + 1e-9 < 2.9 < paid["epsilon"] <= 3.0
    assert paid["epsilon_by_part"] == {"train": paid["epsilon"]}
    assert paid["epsilon_of_steps_done"] == paid["epsilon"]
    assert "membership" in mine
    assert "membership" not in paid  # one run's
    assert paid["epsilon_of_one_run"] == mine["epsilon"]
    assert not any(item.startswith("the choice") for item in paid["not_charged"])
    assert "8 on average" in paid["released"][-1]
    assert f"({paid['epsilon']:.4g}, 1e-05)" in dp.ledger.to_markdown(paid)
    with pytest.raises(ValueError, match=r"budget of 2\.9"):
        repeat_and_select.charged(mine, [mine], {**facts, "mean": 8.0, "epsilon": 2.9})
    other = statement_of(one_run(epsilon=spend, steps=19), spend)
    with pytest.raises(ValueError, match="cannot be charged"):
        repeat_and_select.charged(mine, [mine, other], {**facts, "mean": 8.0, "epsilon": 3.0})


def test_secure_noise_of_another_size_is_another_mechanism():
    facts = {"method": "random", "metric": "held-out accuracy", "points": 6, "mean": 2.0}
    mine, other = (statement_of(one_run(secure_size=size), 1.0) for size in (10, 10**6))
    paid = repeat_and_select.charged(mine, [mine, mine], {**facts, "epsilon": 1.2})
    assert 1.1 < paid["epsilon"] <= 1.2
    # Priced by the largest run, the epsilon that is published would tell of runs that are not.
    with pytest.raises(ValueError, match="cannot be charged"):
        repeat_and_select.charged(mine, [mine, other], {**facts, "epsilon": 1.2})


# --- The command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--method=randon"], "Did you mean 'random'?"),
        (["--metric=acuracy"], "Did you mean 'accuracy'?"),
        (["--trials=7"], "trials=7 must be in [1, 6]"),
        (["--method=optuna", "--trials=0"], "trials=0 must be >= 1"),
        (["--method=grid", "--trials=2"], "'grid' runs every point"),
        (["--storage=sqlite:///x"], "needs method='optuna'"),
        (["--charge=1"], "charge=1.0 must be > 1"),
        (["--charge=5", "--trials=3"], "their number must be random"),
        (["--charge=5", "--method=optuna"], "independent"),
        (["--charge=5", "--config.private_seed=1"], "takes no overrides"),
        (["--charge=5", ":batches"], "'batch_size' must not vary"),
        (["--charge=5", ":secure"], "'finetune' must not vary"),
        (["--charge=5", ":subclass"], "study.Blocks cannot be charged"),
        (["--charge=5", ":voted"], "finetune='vote:1' must not be in a charged search"),
        (["--charge=5", ":fixed"], "private_seed=5 must be None"),
        (["--charge=5", ":own"], "test_split='train[:10%]' must not overlap the training data"),
        (["--charge=5", ":shared"], "test_split='test' must not overlap the training data"),
        (["--charge=5", ":audited"], "audit.count=9 must be"),
        (["--metric=ece", "--config.task=causal_lm"], "task='causal_lm' has none: take 'nll'"),
    ],
)
def test_mistakes_cost_nothing(file, flags, text, tmp_path, capsys):
    argument = next((flag for flag in flags if flag.startswith(":")), "")
    rest = [flag for flag in flags if flag != argument]
    workdir = tmp_path / "w"
    assert cli.main(["search", f"--config={file}{argument}", f"--workdir={workdir}", *rest]) == 2
    assert text in capsys.readouterr().err
    assert not list(workdir.glob("*.json"))  # that the right command would find


def test_optuna_is_missed_clearly(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert cli.main(["search", f"--config={file}", f"--workdir={tmp_path}", "--method=optuna"]) == 2
    assert "pip install optuna" in capsys.readouterr().err


def fake_point(command, path):
    """Instead of training: the accuracy is best at the last point."""
    path.mkdir()
    index = int(path.name)
    (path / "eval.json").write_text(json.dumps({"accuracy": index / 10}))
    (path / "privacy.json").write_text(json.dumps(statement_of(one_run(), 1.0)))
    return 0


def test_a_random_search_and_its_statement(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "run_point", fake_point)
    command = [f"--config={file}", f"--workdir={tmp_path / 'w'}", "--trials=2", "--seed=1"]
    assert cli.main(["search", *command]) == 0
    statement = read(tmp_path / "w/privacy.json")
    assert "among 2 runs of 2 points (random search)" in statement["not_charged"][0]
    best = read(tmp_path / "w/best.json")
    assert best["point"] == max(proposals.sample(6, 2, seed=1))
    before = (tmp_path / "w/search.md").read_text()
    assert cli.main(["search", *command]) == 0  # everything is done
    assert (tmp_path / "w/search.md").read_text() == before
    assert cli.main(["search", *command[:-1], "--seed=2"]) == 2
    assert "contains another search" in capsys.readouterr().err
    grid = [f"--config={file}", f"--workdir={tmp_path / 'g'}", "--method=grid"]
    assert cli.main(["search", *grid]) == 0
    assert len(list((tmp_path / "g/trials").glob("*/*/eval.json"))) == 6


def test_a_run_that_fails_is_told(file, tmp_path, monkeypatch, capsys):
    def fails(command, path):
        path.with_suffix(".failed").write_text("exit 2: no such data")
        return 2

    monkeypatch.setattr(sweep, "run_point", fails)
    monkeypatch.setattr(repeat_and_select, "draw", lambda points, mean, *, generator: [4, 0])
    command = [f"--config={file}", f"--workdir={tmp_path / 'w'}"]
    assert cli.main(["search", *command, "--trials=2"]) == 1
    assert (tmp_path / "w/search.md").read_text().count("no such data") == 2
    command[1] += "c"
    assert cli.main(["search", *command, "--charge=3"]) == 2  # never the best of the rest
    assert "a run of a charged search failed" in capsys.readouterr().err
    assert not (tmp_path / "wc/privacy.json").exists()


@pytest.mark.slow
def test_a_charged_search_keeps_the_budget(file, tmp_path, monkeypatch):
    """A real run, at a small epsilon; what is said to be spent is the whole budget."""
    monkeypatch.setattr(repeat_and_select, "draw", lambda points, mean, *, generator: [4])
    command = [f"--config={file}", f"--workdir={tmp_path / 'w'}", "--charge=3"]
    assert cli.main(["search", *command]) == 0
    statement = read(tmp_path / "w/privacy.json")
    assert statement["search"]["charged"] is True
    assert 0.97 * 2.0 < statement["epsilon"] <= 2.0  # of the config
    ran = read(tmp_path / "w/trials/000/004/privacy.json")
    assert 1.5 < ran["epsilon"] == statement["epsilon_of_one_run"] < 1.7
    assert ran["noise_multiplier"] == statement["noise_multiplier"]
    # How many runs there were, and their scores, are hidden; the best one's weights are not.
    for name in ("search_secret.json", "search.md", "search.csv", "trials/000/004.log"):
        assert oct((tmp_path / "w" / name).stat().st_mode)[-3:] == "600"
    assert oct((tmp_path / "w/trials").stat().st_mode)[-3:] == "700"
    best = read(tmp_path / "w/best.json")
    assert not {"trial", "path"} & set(best)
    assert best["epsilon"] == statement["epsilon"]  # not that of the run
    weights = (tmp_path / "w/trials/000/004/weights.safetensors").read_bytes()
    assert (tmp_path / "w/weights.safetensors").read_bytes() == weights


CHANGES = {
    "mean": (["--charge=9"], "", "mean: 3.0 != 9.0"),
    "budget": (["--charge=3"], "config.dp.epsilon = 1.5", "budget: 2.0 != 1.5"),
    "delta": (["--charge=3"], "config.dp.delta = 1e-5", "delta: 0.0001 != 1e-05"),
    "points": (["--charge=3"], "config.epochs = 0.4", "sweep: "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_draw_pays_for_the_search_it_was_made_for(change, file, tmp_path, monkeypatch, capsys):
    """Killed between its secret and `search.json`, and started again on other terms."""
    monkeypatch.setattr(trials, "_order", lambda job, flags: [])
    command = [f"--config={file}", f"--workdir={tmp_path / 'w'}"]
    cli.main(["search", *command, "--charge=3"])
    secret = (tmp_path / "w/search_secret.json").read_text()
    assert {"points", "epsilon", "mean", "delta", "budget", "sweep"} == set(json.loads(secret))
    (tmp_path / "w/search.json").unlink()
    flags, line, said = CHANGES[change]
    Path(file).write_text(STUDY.replace("    return config", f"    {line}\n    return config"))
    assert cli.main(["search", *command, *flags]) == 2
    error = capsys.readouterr().err
    assert "a charged search of other terms" in error
    assert said in error
    assert (tmp_path / "w/search_secret.json").read_text() == secret


def test_scores_of_private_data_are_named_so(file, tmp_path, monkeypatch, capsys):
    def private_point(command, path):
        fake_point(command, path)
        score = {"nonprivate/accuracy": int(path.name) / 10}
        (path / "eval.json").write_text(json.dumps(score))
        return 0

    monkeypatch.setattr(sweep, "run_point", private_point)
    path = tmp_path / "w"
    assert cli.main(["search", f"--config={file}", f"--workdir={path}", "--method=grid"]) == 0
    printed = capsys.readouterr().out
    texts = [printed, *((path / name).read_text() for name in ("search.md", "search.csv"))]
    for text in texts:
        assert "nonprivate/accuracy" in text
        assert "accuracy" not in text.replace("nonprivate/accuracy", "")
    best = read(path / "best.json")
    assert best["point"] == 5
    assert {name for name in best if "accuracy" in name} == {"nonprivate/accuracy"}
    assert (path / "best.json").stat().st_mode & 0o077 == 0
    assert "held-out accuracy on private data" in read(path / "privacy.json")["not_charged"][0]


def test_optuna_finds_the_best_and_goes_on(file, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr(sweep, "run_point", fake_point)
    command = [f"--config={file}", f"--workdir={tmp_path / 'w'}", "--method=optuna"]
    assert cli.main(["search", *command, "--trials=3"]) == 0
    first = sorted(p.name for p in (tmp_path / "w/trials").iterdir())
    assert 1 <= len(first) <= 3
    assert cli.main(["search", *command, "--trials=14"]) == 0
    points = [p.name for p in (tmp_path / "w/trials").glob("*/*") if p.is_dir()]
    assert len(points) == len(set(points)) <= 6  # what is known is not run again
    assert read(tmp_path / "w/best.json")["point"] == 5
    import optuna

    journal = optuna.storages.journal.JournalFileBackend(str(tmp_path / "w/optuna.journal"))
    study = optuna.load_study(study_name=file, storage=optuna.storages.JournalStorage(journal))
    assert len(study.trials) == 14


def test_workers_share_a_database(file, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr(sweep, "run_point", fake_point)
    url = f"sqlite:///{tmp_path / 'search.db'}"
    for count in (2, 4):  # the second worker adds to the first's
        command = [f"--config={file}", f"--workdir={tmp_path / 'w'}", f"--storage={url}"]
        assert cli.main(["search", *command, "--method=optuna", f"--trials={count}"]) == 0
    import optuna

    assert len(optuna.load_study(study_name=file, storage=url).trials) == 4
    assert not (tmp_path / "w/optuna.journal").exists()


def test_a_database_that_cannot_be_opened_is_named(file, tmp_path, capsys):
    pytest.importorskip("optuna")
    command = [f"--config={file}", f"--workdir={tmp_path / 'w'}", "--storage=nonsense"]
    assert cli.main(["search", *command, "--method=optuna"]) == 2
    assert "storage='nonsense' cannot be opened" in capsys.readouterr().err


def test_optuna_needs_a_product(file, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    command = [f"--config={file}:batches", f"--workdir={tmp_path / 'w'}", "--method=optuna"]
    assert cli.main(["search", *command]) == 2
    assert "full product" in capsys.readouterr().err


def test_importing_the_search_loads_no_optuna():
    code = "import sys, dpjax.commands.search; print('optuna' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
