"""Runs a study: its theory, every point that is missing, and its report.

    python -m experiments.run_study --config=experiments/calibration/study.py:laptop --workdir=DIR
    dpjax report DIR

The first command can be repeated: finished points are skipped, interrupted ones resume, failed ones
are retried. The second rebuilds tables and figures from the files alone. Points run one after the
other in this process through `dpjax.training.loop`; those that only train a head run together on
cached features (see `experiments.cached_heads`). An array job runs point k with

    dpjax train --config=experiments/calibration/study.py:paper --workdir=DIR \\
        --sweep_index=k

and the first command then does the rest. Besides `get_config`, `sweep` and `report`, a study may
define `measure(run, initial, final)`, which computes JSON values from the weights before and after
training (`measured.json` of every point), and `theory(arg)`, which computes JSON values without any
run (`theory.json`). Exit codes: 0 all finished, 1 some failed, 2 a mistake, 75 stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from dpjax import build, dp, models
from dpjax.runtime import Workdir, compilation, hosts
from dpjax.search import sweep
from dpjax.training import loop
from experiments import cached_heads, study

__all__ = ["main", "plan"]

_STOPPED = 75


def plan(
    file: str, workdir: Path, *, data_dir: str | None = None, weights: str | None = None
) -> list[cached_heads.Job]:
    """Lists the points of a study, and notes them in its work directory.

    Args:
        file: "FILE" or "FILE:SIZE".
        workdir: a new directory, or one of the same study.
        data_dir: directory of the data, if the study does not set it.
        weights: file or name of published weights, if the study does not set them.

    Raises:
        ValueError: a mistake in the study, or the directory contains another study.
    """
    base = build.fields.load(file)
    base.data.data_dir = data_dir or base.data.data_dir
    base.model.weights = weights or base.model.weights
    found = sweep.points(file, base)
    content = json.loads(json.dumps({"config": file, "points": found}))
    path = workdir / study.PLAN
    if path.is_file() and json.loads(path.read_text()) != content:
        raise ValueError(f"workdir={str(workdir)!r} holds another study, or other points of it.")
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    jobs = []
    for index, overrides in enumerate(found):
        mine = base.copy_and_resolve_references()
        sweep.apply(mine, overrides)
        jobs.append(cached_heads.Job(mine, sweep.point_directory(workdir, index)))
    return jobs


def main(argv: Sequence[str], *, stop: Callable[[int], bool] = lambda step: False) -> int:
    """Command line; `stop` is asked before every step of the train loop."""
    parser = argparse.ArgumentParser(prog="run_study", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="FILE:SIZE of a study")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--data_dir", help="where the data is")
    parser.add_argument("--weights", help="file, or name of published weights")
    flags = parser.parse_args(argv)
    compilation.keep_on_disk()
    try:
        jobs = plan(flags.config, flags.workdir, data_dir=flags.data_dir, weights=flags.weights)
        source = build.fields.run_file(flags.config)
        _theory(source.names.get("theory"), source.argument, flags.workdir)
        failed = _run_all(jobs, source.names.get("measure"), stop)
        for path in source.names["report"](flags.workdir):
            print(path)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except loop.Preempted as error:
        print(str(error), file=sys.stderr)
        return _STOPPED
    return int(failed)


def _theory(theory: Any, size: str | None, workdir: Path) -> None:
    if theory is not None and not (workdir / "theory.json").is_file():
        Workdir(workdir).write("theory.json", theory(size))


def _run_all(jobs: Sequence[cached_heads.Job], measure: Any, stop: Callable[[int], bool]) -> bool:
    """Runs the missing points; returns whether a run failed other than by diverging."""
    wanted = "eval.json" if measure is None else "measured.json"
    missing = [job for job in jobs if not (job.path / wanted).is_file()]
    missing = [job for job in missing if not _diverged(job.path)]
    cached = [job for job in missing if cached_heads.fits(job.config)]
    looped = [job for job in missing if job not in cached]
    failed = False
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="points") as bar:
        for group in cached_heads.groups(cached):
            cached_heads.train_group(group, measure)
            bar.update(len(group))
        for job in looped:
            failed |= not _run_one(job.config, job.path, measure, stop)
            bar.update()
    return failed


# Fields that do not change the functions of a run: what is traced for one value serves them all.
_VALUES = (
    "seed", "private_seed", "dp.epsilon", "optimizer.learning_rate", "lp.learning_rate",
    "model.head_init", "data.test_split",
)  # fmt: skip
_built: dict[str, build.Run] = {}  # the last run, by its config without these values


def _build(settings: ConfigDict) -> build.Run:
    """Builds a run; if it differs from the last one in values only, with the functions of that."""
    run, alike = build.build(settings), json.loads(settings.to_json())
    for name in _VALUES:
        section, _, field = name.rpartition(".")
        (alike[section] or {} if section else alike)[field] = None
    facts = [alike, run.rule is None, [phase.steps for phase in run.phases]]
    key = json.dumps(facts, sort_keys=True)
    if key not in _built:
        _built.clear()
        _built[key] = run
    last = _built[key]
    phases = zip(run.phases, last.phases, strict=True)
    return run._replace(
        loss_fn=last.loss_fn,
        apply=last.apply,
        phases=tuple(mine._replace(optimizer=other.optimizer) for mine, other in phases),
    )


def _diverged(path: Path) -> bool:
    failed = path.with_suffix(".failed")
    return failed.is_file() and "not finite" in failed.read_text()


def _run_one(settings: ConfigDict, path: Path, measure: Any, stop: Callable[[int], bool]) -> bool:
    """Trains one point through the loop; returns whether it finished or diverged."""
    failed, log = path.with_suffix(".failed"), path.with_suffix(".log")
    failed.unlink(missing_ok=True)
    with open(log, "a") as file, contextlib.redirect_stderr(file):
        try:
            on_features = cached_heads.fits_loop(settings)
            run = (cached_heads.built if on_features else _build)(settings)
            if not (path / "eval.json").is_file():
                train = cached_heads.train_one if on_features else loop.train
                train(run, Workdir(path), stop=stop)
        except loop.TrainingFailed as error:
            failed.write_text(f"exit 3: {error}")
            return True  # a rate that diverges is a result
        except (ValueError, TypeError, FileNotFoundError, dp.BudgetExceeded) as error:
            failed.write_text(f"exit 2: {error}")
            return False
    if measure is not None:
        initial = models.flatten(run.merge(run.params))
        final = {**initial, **models.read_tensors(path / "weights.safetensors")}
        found = measure(run, models.unflatten(initial), models.unflatten(final))
        Workdir(path).write("measured.json", found)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], stop=hosts.catch_signals()))
