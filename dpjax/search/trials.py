"""Searches the points of a sweep: the full grid, a random sample, or Optuna's proposals."""

from __future__ import annotations

import argparse
import math
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dpjax import build, files
from dpjax.config import differences
from dpjax.dp import repeat_and_select, sampling, to_markdown
from dpjax.files import read_object
from dpjax.metrics import PRIVATE, lookup
from dpjax.runtime import OtherRun, Workdir, json_digest
from dpjax.search import proposals, sweep

__all__ = ["METHODS", "METRICS", "Job", "Stopped", "check", "run"]

Row = dict[str, Any]

METHODS = ("grid", "random", "optuna")
METRICS = {"accuracy": 1, "nll": -1, "ece": -1}  # of eval.json; 1: larger is better
# Fields in which the runs of a charged search may differ: repeat-and-select composes runs of ONE
# mechanism, and these fields do not change it.
_MAY_VARY = (
    "optimizer.", "model.", "finetune", "dp.bound", "dp.clipping", "dp.gamma", "dp.normalized",
)  # fmt: skip
_DIVERGED = 3  # exit code of a run whose parameters became non-finite


class Stopped(Exception):
    """Raised when a signal stopped a run; the run is saved and can be resumed."""


class Job(NamedTuple):
    """The facts that all trials share.

    Attributes:
        config: path of the config file.
        workdir: directory of the search.
        found: overrides of every point of the sweep.
        metric: name of the metric in eval.json.
        others: further flags of every run.
    """

    config: str
    workdir: Path
    found: list[Row]
    metric: str
    others: list[str]

    def directory(self, trial: int, index: int) -> Path:
        return sweep.point_directory(self.workdir / "trials" / f"{trial:03d}", index)

    def run(self, trial: int, index: int) -> float | None:
        """Runs a trial, or reads a finished one.

        Returns:
            The metric; None if the run failed or diverged.

        Raises:
            Stopped: a signal stopped the run.
        """
        path = self.directory(trial, index)
        if not (path / "eval.json").is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            command = [
                sys.executable, "-m", "dpjax", "train", f"--config={self.config}",
                f"--workdir={path.parent}", f"--sweep_index={index}", *self.others,
            ]  # fmt: skip
            code = sweep.run_point(command, path)
            if code == sweep.STOPPED:
                raise Stopped
            if code:
                return None
        return float(lookup(read_object(path / "eval.json"), self.metric)[1])

    def rows(self) -> list[Row]:
        """Returns one row per started trial, read from its files."""
        rows = []
        for trial in sorted((self.workdir / "trials").glob("[0-9]*")):
            # By stem: a run that failed at once left INDEX.log and no directory INDEX.
            for index in sorted({int(path.stem) for path in trial.glob("[0-9]*")}):
                row = sweep.results(trial, self.found)[index]
                rows.append({"trial": int(trial.name), **row})
        return rows


def check(flags: argparse.Namespace, others: Sequence[str], found: Sequence[Row]) -> None:
    """Checks the flags of a search against one another, before any run.

    Args:
        flags: `method`, `metric`, `storage`, `trials`, `charge`.
        others: overrides that go to every run.
        found: overrides of every point of the sweep.

    Raises:
        ValueError: naming the flag, or the field that a charged search must not vary.
    """
    files.choose("method", flags.method, dict.fromkeys(METHODS))
    files.choose("metric", flags.metric, METRICS)
    if flags.storage and flags.method != "optuna":
        raise ValueError(f"storage={flags.storage!r} needs method='optuna', got {flags.method!r}.")
    if flags.method == "grid" and flags.trials is not None:
        raise ValueError(
            f"trials={flags.trials} needs method='random' or 'optuna': 'grid' runs every point."
        )
    most = len(found) if flags.method == "random" else math.inf
    if flags.trials is not None and not 1 <= flags.trials <= most:
        limit = f"in [1, {most}], the sweep's number of points" if most < math.inf else ">= 1"
        raise ValueError(f"trials={flags.trials} must be {limit}.")
    if flags.method == "optuna":
        proposals.require_optuna()
        proposals.axes(found)
    if flags.charge is None:
        return
    if not 1 < flags.charge < math.inf:
        raise ValueError(f"charge={flags.charge} must be > 1 and finite.")
    if flags.method != "random" or flags.trials is not None:
        raise ValueError(
            f"charge={flags.charge:g} needs method='random' without trials: charged runs must be "
            "independent of one another, and their number must be random."
        )
    if others:
        raise ValueError(f"charge={flags.charge:g} takes no overrides, got {others[0]!r}.")
    for field in sorted({name for row in found for name in row}):
        if not (field in _MAY_VARY or field.startswith(_MAY_VARY[:2])):
            raise ValueError(
                f"{field!r} must not vary between the points of a charged search: only "
                f"{', '.join(_MAY_VARY)} may."
            )


def run(job: Job, flags: argparse.Namespace, base: ConfigDict) -> bool:
    """Runs or resumes a search and writes its tables, the best run and its statement.

    Args:
        job: from the command line.
        flags: checked by `check`.
        base: the config that the points override.

    Returns:
        Whether a run failed.

    Raises:
        ValueError: the work directory contains another search, or the search cannot be charged.
        Stopped: a signal stopped a run.
    """
    if base.task == "causal_lm" and flags.metric == "ece":
        raise ValueError("metric='ece' needs classes, and task='causal_lm' has none: take 'nll'.")
    if flags.charge is not None:
        job = _charge(job, flags.charge, base)
    settings = {name: getattr(flags, name) for name in ("config", "method", "metric", "charge")}
    if flags.method == "random" and flags.charge is None:
        settings["seed"] = flags.seed
    directory = Workdir(job.workdir)
    if directory.exists("search.json") and directory.read("search.json") != settings:
        raise ValueError(
            f"workdir={str(job.workdir)!r} contains another search: name a new directory."
        )
    directory.write("search.json", settings)
    try:
        if flags.method == "optuna":
            journal = job.workdir / "optuna.journal"
            if not flags.storage:
                journal.touch(mode=0o600)
            proposals.optimize(
                job.found, job.run, name=flags.config, seed=flags.seed,
                storage=flags.storage or journal,
                trials=len(job.found) if flags.trials is None else flags.trials,
                maximize=METRICS[flags.metric] > 0,
            )  # fmt: skip
        else:
            for trial, index in enumerate(_order(job, flags)):
                job.run(trial, index)
    finally:
        rows = job.rows()
        directory.write("search.md", sweep.to_markdown(rows))
        directory.write("search.csv", sweep.to_csv(rows))
    return _conclude(job, flags, base, rows)


def _order(job: Job, flags: argparse.Namespace) -> list[int]:
    """Returns the point of every trial."""
    if flags.charge is not None:
        drawn: list[int] = Workdir(job.workdir).read(_SECRET)["points"]
        return drawn
    if flags.method == "grid":
        return list(range(len(job.found)))
    number = len(job.found) if flags.trials is None else flags.trials
    return proposals.sample(len(job.found), number, seed=flags.seed)


_SECRET = "search_secret.json"  # the points of a charged search's runs, and so their number


def _charge(job: Job, mean: float, base: ConfigDict) -> Job:
    """Draws the runs of a charged search, once, and sets the epsilon of each."""
    for text in [base.finetune, *(row["finetune"] for row in job.found if "finetune" in row)]:
        if build.model.vote_count(text) is not None:  # a mechanism of its own
            raise ValueError(
                f"finetune={text!r} must not be in a charged search: let the points name "
                "blocks:at:I,J instead, and the search chooses among them."
            )
    if base.dp is None:
        raise ValueError("config.dp=None trains without privacy: there is nothing to charge.")
    if base.private_seed is not None:
        raise ValueError(
            f"private_seed={base.private_seed} must be None in a charged search: runs with the "
            "same noise are not independent."
        )
    sized = sorted(
        {name for row in job.found for name in row if name.startswith(("finetune", "model."))}
    )
    if base.dp.noise == "secure" and sized:
        raise ValueError(
            f"{sized[0]!r} must not vary between the points of a charged search with "
            "dp.noise='secure', whose cost depends on how many numbers train."
        )
    if base.batch_size == "auto" or base.audit.count:
        raise ValueError(
            f"batch_size={base.batch_size!r} must be a number and audit.count={base.audit.count} "
            "must be 0 in a charged search: all runs need the same mechanism, and an audit's runs "
            "would not be charged."
        )
    directory = Workdir(job.workdir)
    # What the draw depends on, and what it pays for. Another mean, budget or list of points under
    # the old draw would be a search whose cost nobody has computed.
    terms = {
        "mean": mean, "delta": base.dp.delta, "budget": base.dp.epsilon,
        "sweep": json_digest([base.to_dict(), job.found]),
    }  # fmt: skip
    if directory.exists(_SECRET):
        known = directory.read(_SECRET)
        changed = differences(known, {**known, **terms}, "")
        if changed:
            raise OtherRun(
                f"workdir={str(job.workdir)!r} contains a charged search of other terms "
                f"({'; '.join(text.lstrip('.') for text in changed)}): name a new directory."
            )
    else:
        run = build.build(base)
        if run.temperature is not None:
            raise ValueError("dp.temperature.share must be 0 in a charged search.")
        if run.evaluates_on_private_data:
            raise ValueError(
                f"data.holdout={base.data.holdout} must be None, and data.test_split="
                f"{base.data.test_split!r} must not overlap the training data, in a charged "
                "search: the score would read private data without being charged."
            )
        mechanisms = [phase.mechanism for phase in run.phases if phase.mechanism is not None]
        for mechanism in mechanisms:
            repeat_and_select.check_sampler(sampling.name_of(type(mechanism.sampler)))
        spend = repeat_and_select.epsilon_of_one(
            mechanisms, budget=base.dp.epsilon, delta=base.dp.delta, mean=mean,
        )  # fmt: skip
        # From the system's entropy, and stored: a seed would let anyone recompute the number of
        # runs, and a second draw after a crash would not be the law that is accounted.
        generator = np.random.default_rng(secrets.randbits(128))
        points = repeat_and_select.draw(len(job.found), mean, generator=generator)
        directory.write(_SECRET, {"points": points, "epsilon": spend, **terms})
    # A list of its directories would show the number of runs.
    (job.workdir / "trials").mkdir(mode=0o700, exist_ok=True)
    return job._replace(others=[f"--config.dp.epsilon={directory.read(_SECRET)['epsilon']!r}"])


def _conclude(job: Job, flags: argparse.Namespace, base: ConfigDict, rows: Sequence[Row]) -> bool:
    """Writes the statement of the best run; returns whether a run failed."""
    finished = [row for row in rows if row["status"] == "finished"]
    failed = [
        row for row in rows
        if row["status"].startswith("exit") and not row["status"].startswith(f"exit {_DIVERGED}:")
    ]  # fmt: skip
    # The best of the runs that happened to succeed is not the best of a geometric number of runs.
    # A diverged run did execute, and only has the worst score.
    if flags.charge is not None and failed:
        raise ValueError(
            "a run of a charged search failed: see its log under trials/, fix the cause and run "
            "the same command again."
        )
    if not finished:
        print("no run finished.", file=sys.stderr)
        return True
    best = max(finished, key=lambda row: _score(row, flags.metric))
    path = job.directory(best["trial"], best["point"])
    directory = Workdir(job.workdir)
    facts: Row = {"method": flags.method, "metric": f"held-out {flags.metric}"}
    if f"{PRIVATE}{flags.metric}" in best:
        facts["metric"] += " on private data"
    if flags.charge is None:
        facts |= {"points": len({row["point"] for row in rows}), "runs": len(rows)}
    else:
        facts |= {"points": len(job.found), "mean": flags.charge, "epsilon": base.dp.epsilon}
    if (path / "privacy.json").is_file():
        own = read_object(path / "privacy.json")
        if flags.charge is None:
            statement = repeat_and_select.not_charged(own, facts)
        else:
            files = sorted((job.workdir / "trials").glob("*/*/privacy.json"))
            others = [read_object(file) for file in files]
            statement = repeat_and_select.charged(own, others, facts)
        best = {**best, "epsilon": statement["epsilon"]}  # of a charged search, not of one run
        directory.write("privacy.json", statement)
        directory.write("privacy.md", to_markdown(statement))
    if flags.charge is None:
        best = {"path": str(path.relative_to(job.workdir)), **best}
    else:  # the number of the trial is a lower bound on the secret number of runs
        del best["trial"]
        shutil.copyfile(path / "weights.safetensors", job.workdir / "weights.safetensors")
    directory.write("best.json", best)
    print(sweep.to_markdown([best]))
    print(f"the best run: {path if flags.charge is None else job.workdir}")
    return bool(failed)


def _score(row: Row, metric: str) -> float:
    """Returns a score where larger is better, and a non-finite metric is the worst."""
    _, value = lookup(row, metric)
    return METRICS[metric] * float(value) if math.isfinite(value) else -math.inf
