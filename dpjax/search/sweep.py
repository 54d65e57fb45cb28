"""The points of a sweep: their overrides, how one is run, and a table of their results."""

from __future__ import annotations

import csv
import functools
import io
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dpjax.build import fields
from dpjax.config import without_infinite_budget
from dpjax.files import read_object
from dpjax.metrics import PRIVATE, lookup

__all__ = [
    "STOPPED", "apply", "point", "point_config", "point_directory", "points", "results",
    "run_point", "select", "to_csv", "to_markdown",
]  # fmt: skip

Row = dict[str, Any]

_METRICS = ("accuracy", "nll", "ece", "mce", "perplexity", "bits_per_byte")  # of eval.json
STOPPED = 75


def points(file: str, config: ConfigDict) -> list[Row]:
    """Returns the overrides of every point of a file's `sweep()`.

    All points are first applied to a copy of the config, so that a typo fails before anything runs.

    Args:
        file: the config file, "FILE" or "FILE:ARGUMENT", see `build.fields.run_file`.
        config: the config that the points override; it is not changed.

    Raises:
        ValueError: the file has no `sweep()`, or a point names an unknown field or sets a field to
            a value of another type.
    """
    source = fields.run_file(file)
    rows = [dict(point) for point in source.call("sweep")]
    for index, overrides in enumerate(rows):
        try:
            apply(config.copy_and_resolve_references(), overrides)
        except ValueError as error:
            raise ValueError(f"point {index} of sweep(): {error}") from error
    if not rows:
        raise ValueError(f"config={source.path!r}: sweep() yields no points.")
    return rows


def point(rows: Sequence[Row], index: int) -> Row:
    """Returns the overrides of one point.

    Raises:
        ValueError: the index is out of range.
    """
    if not 0 <= index < len(rows):
        raise ValueError(f"sweep_index={index} must be in [0, {len(rows)}).")
    return rows[index]


def select(
    rows: Sequence[Row], config: ConfigDict, filters: Sequence[str] = (), chunk: str = "1/1"
) -> list[int]:
    """Returns the numbers of some points.

    Args:
        rows: the overrides of all points.
        config: the config that they override.
        filters: "FIELD=VALUE" each; a point has all of these values, by itself or by the config.
        chunk: "K/N", the K-th of N equal parts of these points, K from 1: one for each task of an
            array job.

    Raises:
        ValueError: a filter or a chunk that is none, an unknown field, or no point.
    """
    numbers = list(range(len(rows)))
    for text in filters:
        name, equals, wanted = text.partition("=")
        problem = fields.unknown_field(config, name) if equals else "it must be FIELD=VALUE."
        if problem is not None:
            raise ValueError(f"filter={text!r}: {problem}")
        given = config.copy_and_resolve_references()
        fields.assign_text(given, name, wanted)
        flat = given.to_dict()
        value = functools.reduce(lambda node, key: node[key], name.split("."), flat)
        base = functools.reduce(lambda node, key: node[key], name.split("."), config.to_dict())
        numbers = [k for k in numbers if rows[k].get(name, base) == value]
    part, slash, parts = chunk.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"chunk={chunk!r} must be K/N with K in 1..N.")
    if not numbers:
        raise ValueError(f"filter={list(filters)}: none of the {len(rows)} points is left.")
    return numbers[int(part) - 1 :: int(parts)]


def apply(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Sets flat overrides in a config; raises ValueError as `build.fields.assign` does."""
    for name, value in overrides.items():
        fields.assign(config, name, value)


def point_config(file: str, config: ConfigDict, index: int) -> ConfigDict:
    """Returns the config of one point of a file's `sweep()`."""
    config = config.copy_and_resolve_references()
    apply(config, point(points(file, config), index))
    return without_infinite_budget(config)


def point_directory(workdir: str | Path, index: int) -> Path:
    """Returns the directory of one point."""
    return Path(workdir) / f"{index:03d}"


def results(workdir: Path, points: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Returns one row per point, read from its files: overrides, status, epsilon and metrics.

    Metrics keep the names of `eval.json`: `nonprivate/accuracy` if they read private data.

    The status is "finished", "waiting", "interrupted" (the same command resumes it) or
    "exit CODE: last line of the log".
    """
    rows: list[Row] = []
    for index, overrides in enumerate(points):
        path = point_directory(workdir, index)
        failed = path.with_suffix(".failed")
        row: Row = {"point": index, **overrides, "status": "waiting"}
        if (path / "eval.json").is_file():
            row["status"] = "finished"
            if (path / "privacy.json").is_file():
                row["epsilon"] = read_object(path / "privacy.json")["epsilon"]
            evaluation = read_object(path / "eval.json")
            known = (name for name in _METRICS if {name, f"{PRIVATE}{name}"} & set(evaluation))
            row |= dict(lookup(evaluation, name) for name in known)
        elif failed.is_file():
            row["status"] = failed.read_text()
        elif path.is_dir():
            row["status"] = "interrupted"
        rows.append(row)
    return rows


def to_markdown(rows: Sequence[Row]) -> str:
    """Renders rows as a Markdown table with a column for every name that occurs in a row."""
    names = _columns(rows)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [row.get(name, "") for name in names]
        texts = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append("| " + " | ".join(text.replace("|", "/") for text in texts) + " |")
    return "\n".join(lines) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """Renders rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def run_point(command: Sequence[str], path: Path) -> int:
    """Runs one point, passes SIGTERM and Ctrl-C on to it, and returns its exit code."""
    failed, log = path.with_suffix(".failed"), path.with_suffix(".log")
    failed.unlink(missing_ok=True)
    log.touch(mode=0o600)  # a run prints facts about private data, too
    with open(log, "a") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        signals = (signal.SIGTERM, signal.SIGINT)
        before = [
            signal.signal(number, lambda *asked: child.send_signal(signal.SIGTERM))
            for number in signals
        ]
        try:
            code = child.wait()
        finally:
            for number, handler in zip(signals, before):
                signal.signal(number, handler)
    if code not in (0, STOPPED):
        lines = log.read_text().strip().splitlines() or [""]
        failed.touch(mode=0o600)
        failed.write_text(f"exit {code}: {lines[-1][:200]}")
    return code
