"""Which points of a sweep to try: all of a grid, some at random, or those that Optuna proposes."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["axes", "grid", "optimise", "require_optuna", "sample"]

Row = dict[str, Any]


def grid(values: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Returns the product of the fields' values, as overrides; the last field varies fastest.

    >>> grid({"dp.bound": [0.1, 1.0], "epochs": [8]})
    [{'dp.bound': 0.1, 'epochs': 8}, {'dp.bound': 1.0, 'epochs': 8}]
    """
    return [dict(zip(values, point)) for point in itertools.product(*values.values())]


def sample(points: int, number: int, *, seed: int) -> list[int]:
    """Returns `number` distinct indices below `points`; with one seed, fewer begin as more do."""
    if not 1 <= number <= points:
        raise ValueError(f"trials={number} must be in [1, {points}], the points of the sweep.")
    return [int(index) for index in np.random.default_rng(seed).permutation(points)[:number]]


def axes(found: Sequence[Row]) -> dict[str, list[Any]]:
    """Returns the values of every field of points that are a full product; numbers are sorted.

    Raises:
        ValueError: they are not.
    """
    values: dict[str, list[Any]] = {}
    for row in found:
        for name, value in row.items():
            seen = values.setdefault(name, [])
            if value not in seen:
                seen.append(value)
    for seen in values.values():
        if _numeric(seen):
            seen.sort()  # neighbours are alike, and Optuna is to know it
    given = {_text(row) for row in found}
    if given != {_text(row) for row in grid(values)} or len(given) != len(found):
        raise ValueError("method='optuna' needs a sweep() that is the full product of its values.")
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


def optimise(
    found: Sequence[Row],
    run: Callable[[int, int], float | None],
    *,
    storage: str | Path,
    name: str,
    maximise: bool,
    trials: int,
    seed: int,
) -> None:
    """Lets Optuna's TPE propose points until so many trials have ended, here or elsewhere.

    Args:
        found: points that are a full product.
        run: `(trial, point) -> metric`, None if the run failed. A point that has its metric is not
            run again. If it raises, the point is proposed anew the next time.
        storage: file of a journal, for one machine, or URL of a database, for many workers.
        name: of the study in the storage.
        maximise: whether more is better.
        trials: how many have to have ended, those of earlier calls and other workers included.
        seed: of the proposals.
    """
    optuna = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kept: Any = storage
    if isinstance(storage, Path):
        journal = optuna.storages.journal.JournalFileBackend(str(storage))
        kept = optuna.storages.JournalStorage(journal)
    study = optuna.create_study(
        storage=kept, study_name=name, load_if_exists=True,
        direction="maximize" if maximise else "minimize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.NopPruner(),  # a pruned run would have spent budget for nothing
    )  # fmt: skip
    states = optuna.trial.TrialState
    values = axes(found)
    known = {_text(row): index for index, row in enumerate(found)}
    while len(study.get_trials(deepcopy=False, states=(states.COMPLETE, states.FAIL))) < trials:
        trial = study.ask()
        chosen = {field: _suggest(trial, field, options) for field, options in values.items()}
        index = known[_text(chosen)]
        trial.set_user_attr("point", index)
        twins = [
            other for other in study.get_trials(deepcopy=False, states=(states.COMPLETE,))
            if other.user_attrs["point"] == index
        ]  # fmt: skip
        try:
            value = twins[0].value if twins else run(trial.number, index)
        except BaseException:
            study.enqueue_trial(trial.params)
            raise
        if value is None or not math.isfinite(value):
            study.tell(trial, state=states.FAIL)
        else:
            study.tell(trial, value)


def _suggest(trial: Any, name: str, options: Sequence[Any]) -> Any:
    """Lets Optuna choose: numbers by their rank, anything else by name."""
    if _numeric(options):
        return options[trial.suggest_int(name, 0, len(options) - 1)]
    texts = [json.dumps(value) for value in options]
    return options[texts.index(trial.suggest_categorical(name, texts))]


def _numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _text(row: Row) -> str:
    return json.dumps(row, sort_keys=True)
