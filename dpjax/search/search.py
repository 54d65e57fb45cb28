"""Searches the points of a sweep: all of them, some at random, or those that Optuna proposes."""

from __future__ import annotations

import argparse
import json
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
from dpjax.data import splits_overlap
from dpjax.dp import repeat_and_select, to_markdown
from dpjax.runtime import Workdir
from dpjax.search import proposals, sweep

__all__ = ["METHODS", "METRICS", "Job", "Stopped", "check", "run"]

Row = dict[str, Any]

METHODS = ("grid", "random", "optuna")
METRICS = {"accuracy": 1, "nll": -1, "ece": -1}  # of eval.json, and which way is up
# Fields in which the runs of a charged search may differ: they do not touch the mechanism.
_FREE = ("optimizer.", "model.", "finetune", "dp.bound", "dp.clipping", "dp.gamma", "dp.normalised")
_DIVERGED = 3


class Stopped(Exception):
    """A run was stopped by a signal; it is saved."""


class Job(NamedTuple):
    """What all trials share."""

    config: str
    workdir: Path
    found: list[Row]
    metric: str
    others: list[str]

    def directory(self, trial: int, index: int) -> Path:
        return sweep.point_directory(self.workdir / "trials" / f"{trial:03d}", index)

    def run(self, trial: int, index: int) -> float | None:
        """Runs a trial that has not ended; returns its metric, None if it failed or diverged."""
        path = self.directory(trial, index)
        if not (path / "eval.json").is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            command = [
                sys.executable, "-m", "dpjax.train", f"--config={self.config}",
                f"--workdir={path.parent}", f"--sweep_index={index}", *self.others,
            ]  # fmt: skip
            code = sweep.run_point(command, path)
            if code == sweep.STOPPED:
                raise Stopped
            if code:
                return None
        return float(json.loads((path / "eval.json").read_text())[self.metric])

    def rows(self) -> list[Row]:
        """One row per trial that was begun, read from its files."""
        rows = []
        for trial in sorted((self.workdir / "trials").glob("[0-9]*")):
            # A run that failed at once left a log and no directory.
            for index in sorted({int(path.stem) for path in trial.glob("[0-9]*")}):
                row = sweep.results(trial, self.found)[index]
                rows.append({"trial": int(trial.name), **row})
        return rows


def check(flags: argparse.Namespace, others: Sequence[str], found: Sequence[Row]) -> None:
    files.choose("method", flags.method, dict.fromkeys(METHODS))
    files.choose("metric", flags.metric, METRICS)
    if flags.storage and flags.method != "optuna":
        raise ValueError(f"storage={flags.storage!r} belongs to method='optuna'.")
    if flags.method == "grid" and flags.trials is not None:
        raise ValueError(f"trials={flags.trials} belongs to random and optuna: a grid is whole.")
    if flags.method == "optuna":
        proposals.require_optuna()
        proposals.axes(found)
    if flags.charge is None:
        return
    if not 1 < flags.charge < math.inf:
        raise ValueError(f"charge={flags.charge} must be > 1 and finite.")
    if flags.method != "random" or flags.trials is not None:
        raise ValueError(
            f"charge={flags.charge:g} needs method='random' without trials: the runs that are "
            "charged must be independent of one another, and their number is drawn."
        )
    if others:
        raise ValueError(f"charge={flags.charge:g} takes no overrides, got {others[0]!r}.")
    for field in sorted({name for row in found for name in row}):
        if not (field in _FREE or field.startswith(_FREE[:2])):
            raise ValueError(
                f"{field!r} must not differ between the points of a charged search: only "
                f"{', '.join(_FREE)} may."
            )


def run(job: Job, flags: argparse.Namespace, base: ConfigDict) -> bool:
    if flags.charge is not None:
        job = _charge(job, flags.charge, base)
    shown = {name: getattr(flags, name) for name in ("config", "method", "metric", "charge")}
    if flags.method == "random" and flags.charge is None:
        shown["seed"] = flags.seed
    place = Workdir(job.workdir)
    if place.exists("search.json") and place.read("search.json") != shown:
        raise ValueError(f"workdir={str(job.workdir)!r} holds another search.")
    place.write("search.json", shown)
    try:
        if flags.method == "optuna":
            proposals.optimise(
                job.found, job.run, name=flags.config, seed=flags.seed,
                storage=flags.storage or job.workdir / "optuna.journal",
                trials=len(job.found) if flags.trials is None else flags.trials,
                maximise=METRICS[flags.metric] > 0,
            )  # fmt: skip
        else:
            for trial, index in enumerate(_order(job, flags)):
                job.run(trial, index)
    finally:
        rows, hidden = job.rows(), flags.charge is not None
        place.write("search.md", sweep.to_markdown(rows), secret=hidden)
        place.write("search.csv", sweep.to_csv(rows), secret=hidden)
    return _conclude(job, flags, base, rows)


def _order(job: Job, flags: argparse.Namespace) -> list[int]:
    if flags.charge is not None:
        drawn: list[int] = Workdir(job.workdir).read(_SECRET)["points"]
        return drawn
    if flags.method == "grid":
        return list(range(len(job.found)))
    number = len(job.found) if flags.trials is None else flags.trials
    return proposals.sample(len(job.found), number, seed=flags.seed)


_SECRET = "search_secret.json"  # how many runs a charged search has, and of which points


def _charge(job: Job, mean: float, base: ConfigDict) -> Job:
    """Draws the runs of a charged search, once, and says what each may spend."""
    if base.dp is None:
        raise ValueError("config.dp=None trains without privacy: there is nothing to charge.")
    if base.private_seed is not None:
        raise ValueError(
            f"private_seed={base.private_seed} must be None in a charged search: runs that share "
            "their noise are not independent."
        )
    if base.data.holdout is not None:
        raise ValueError(
            f"data.holdout={base.data.holdout} must be None in a charged search: its score would "
            "read private data that nothing pays for."
        )
    if splits_overlap(base.data.train_split, base.data.test_split):
        raise ValueError(
            f"data.test_split={base.data.test_split!r} must not be of the training data in a "
            "charged search: its score would read private data that nothing pays for."
        )
    if base.batch_size == "auto" or base.audit.count:
        raise ValueError(
            f"batch_size={base.batch_size!r} and audit.count={base.audit.count} must be a number "
            "and 0 in a charged search: every run has one mechanism, and no other run is paid for."
        )
    place = Workdir(job.workdir)
    if not place.exists(_SECRET):
        run = build.build(base)
        if run.temperature is not None:
            raise ValueError("dp.temperature.share must be 0 in a search that is charged.")
        spend = repeat_and_select.epsilon_of_one(
            [phase.mechanism for phase in run.phases if phase.mechanism is not None],
            budget=base.dp.epsilon, delta=base.dp.delta, mean=mean,
        )  # fmt: skip
        generator = np.random.default_rng(secrets.randbits(128))
        points = repeat_and_select.draw(len(job.found), mean, generator=generator)
        place.write(_SECRET, {"points": points, "epsilon": spend}, secret=True)
    return job._replace(others=[f"--config.dp.epsilon={place.read(_SECRET)['epsilon']!r}"])


def _conclude(job: Job, flags: argparse.Namespace, base: ConfigDict, rows: Sequence[Row]) -> bool:
    """Writes the statement of the best run; returns whether a run failed."""
    ended = [row for row in rows if row["status"] == "finished"]
    failed = [
        row for row in rows
        if row["status"].startswith("exit") and not row["status"].startswith(f"exit {_DIVERGED}:")
    ]  # fmt: skip
    if flags.charge is not None and failed:
        raise ValueError("a run of a charged search failed: mend it and run the command again.")
    if not ended:
        print("no run finished.", file=sys.stderr)
        return True
    best = max(ended, key=lambda row: _score(row.get(flags.metric), METRICS[flags.metric]))
    path = job.directory(best["trial"], best["point"])
    place = Workdir(job.workdir)
    facts: Row = {"method": flags.method, "metric": f"held-out {flags.metric}"}
    if flags.charge is None:
        facts |= {"points": len({row["point"] for row in rows}), "runs": len(rows)}
    else:
        facts |= {"points": len(job.found), "mean": flags.charge, "epsilon": base.dp.epsilon}
    if (path / "privacy.json").is_file():
        mine = json.loads((path / "privacy.json").read_text())
        if flags.charge is None:
            statement = repeat_and_select.not_charged(mine, facts)
        else:
            files = sorted((job.workdir / "trials").glob("*/*/privacy.json"))
            others = [json.loads(file.read_text()) for file in files]
            statement = repeat_and_select.charged(mine, others, facts)
        place.write("privacy.json", statement)
        place.write("privacy.md", to_markdown(statement))
    if flags.charge is None:
        best = {"path": str(path.relative_to(job.workdir)), **best}
    else:  # which of how many runs it was is not released
        del best["trial"]
        shutil.copyfile(path / "weights.safetensors", job.workdir / "weights.safetensors")
    place.write("best.json", best)
    print(sweep.to_markdown([best]))
    print(f"the best run: {path if flags.charge is None else job.workdir}")
    return bool(failed)


def _score(value: Any, sign: int) -> float:
    """More is better; a metric that is not finite is the worst."""
    return sign * float(value) if value is not None and math.isfinite(value) else -math.inf
