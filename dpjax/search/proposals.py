"""Which points of a sweep to try: the full grid, a random sample, or Optuna's proposals."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["axes", "grid", "optimize", "require_optuna", "sample"]

Row = dict[str, Any]


def grid(values: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Returns the product of the fields' values, as overrides; the last field varies fastest.

    >>> grid({"dp.bound": [0.1, 1.0], "epochs": [8]})
    [{'dp.bound': 0.1, 'epochs': 8}, {'dp.bound': 1.0, 'epochs': 8}]
    """
    return [dict(zip(values, point)) for point in itertools.product(*values.values())]


def sample(points: int, number: int, *, seed: int) -> list[int]:
    """Returns `number` distinct indices in [0, points); with one seed, a short list is a prefix."""
    if not 1 <= number <= points:
        raise ValueError(f"trials={number} must be in [1, {points}], the sweep's number of points.")
    return [int(index) for index in np.random.default_rng(seed).permutation(points)[:number]]


def axes(points: Sequence[Row]) -> dict[str, list[Any]]:
    """Returns the values of every field, numbers sorted; the points must be their full product.

    Raises:
        ValueError: the points are not the full product of the fields' values.
    """
    values: dict[str, list[Any]] = {}
    for row in points:
        for name, value in row.items():
            seen = values.setdefault(name, [])
            if value not in seen:
                seen.append(value)
    for seen in values.values():
        if _numeric(seen):
            seen.sort()  # Optuna models the rank, so that neighboring values inform each other
    texts = {_text(row) for row in points}
    if texts != {_text(row) for row in grid(values)} or len(texts) != len(points):
        raise ValueError(
            "method='optuna' needs a sweep() that yields the full product of its values."
        )
    return values


def require_optuna() -> Any:
    """Imports Optuna.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise ValueError("method='optuna' needs Optuna: pip install optuna.") from error
    return optuna


def optimize(
    points: Sequence[Row],
    run: Callable[[int, int], float | None],
    *,
    storage: str | Path,
    name: str,
    maximize: bool,
    trials: int,
    seed: int,
) -> None:
    """Runs the points that Optuna's TPE proposes until `trials` trials have finished.

    Args:
        points: points that are a full product.
        run: `(trial, point) -> metric`, or None if the run failed. A point with a metric is not run
            again. If `run` raises, its point is proposed first the next time.
        storage: path of a journal file, for one machine, or URL of a database, for many workers.
        name: name of the study in the storage.
        maximize: whether a larger metric is better.
        trials: number of finished trials to reach, including those of earlier calls and of other
            workers.
        seed: seed of the proposals.
    """
    optuna = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend: Any = storage
    if isinstance(storage, Path):
        journal = optuna.storages.journal.JournalFileBackend(str(storage))
        backend = optuna.storages.JournalStorage(journal)
    try:
        backend = optuna.storages.get_storage(backend)
    except Exception as error:  # whatever the library of the database raises
        raise ValueError(f"storage={str(storage)!r} cannot be opened: {error}") from error
    study = optuna.create_study(
        storage=backend, study_name=name, load_if_exists=True,
        direction="maximize" if maximize else "minimize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.NopPruner(),  # a pruned run would have spent budget for nothing
    )  # fmt: skip
    states = optuna.trial.TrialState
    values = axes(points)
    index_of = {_text(row): index for index, row in enumerate(points)}
    while len(study.get_trials(deepcopy=False, states=(states.COMPLETE, states.FAIL))) < trials:
        trial = study.ask()
        row = {field: _suggest(trial, field, options) for field, options in values.items()}
        index = index_of[_text(row)]
        trial.set_user_attr("point", index)
        # TPE may propose a point again: it gets the metric of the first run, instead of spending
        # budget on a second one.
        same_point = [
            other for other in study.get_trials(deepcopy=False, states=(states.COMPLETE,))
            if other.user_attrs["point"] == index
        ]  # fmt: skip
        try:
            value = same_point[0].value if same_point else run(trial.number, index)
        except BaseException:  # Ctrl-C included: the run is saved, and the next call resumes it
            study.enqueue_trial(trial.params)
            raise
        if value is None or not math.isfinite(value):
            study.tell(trial, state=states.FAIL)
        else:
            study.tell(trial, value)


def _suggest(trial: Any, name: str, options: Sequence[Any]) -> Any:
    """Asks Optuna for a value: numbers are ordered by rank, all else is categorical."""
    if _numeric(options):
        return options[trial.suggest_int(name, 0, len(options) - 1)]
    texts = [json.dumps(value) for value in options]
    return options[texts.index(trial.suggest_categorical(name, texts))]


def _numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _text(row: Row) -> str:
    return json.dumps(row, sort_keys=True)
