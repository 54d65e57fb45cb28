"""The points of a sweep: what they override, how one is run, and what all of them left."""

from __future__ import annotations

import csv
import inspect
import io
import json
import runpy
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dpjax.config import unknown_field

__all__ = [
    "STOPPED", "apply", "point", "point_directory", "points", "results", "run_point", "to_csv",
    "to_markdown",
]  # fmt: skip

Row = dict[str, Any]

_METRICS = ("accuracy", "nll", "ece", "mce")  # of eval.json
STOPPED = 75


def points(path: str, config: ConfigDict) -> list[Row]:
    """Returns the overrides of every point of a file's `sweep()`.

    Every point is tried on the config first, so that a typo fails before anything runs.

    Args:
        path: of the file, "FILE" or "FILE:ARGUMENT".
        config: what the points override; it is left as it is.

    Raises:
        ValueError: the file has no `sweep()`, or a point names an unknown field or gives a field
            a value of another type.
    """
    path, _, argument = path.partition(":")
    module = runpy.run_path(path)
    if "sweep" not in module:
        raise ValueError(f"config={path!r} defines no sweep().")
    given = (argument or None,) if inspect.signature(module["sweep"]).parameters else ()
    found = [dict(point) for point in module["sweep"](*given)]
    for index, overrides in enumerate(found):
        try:
            apply(config.copy_and_resolve_references(), overrides)
        except ValueError as error:
            raise ValueError(f"point {index} of sweep(): {error}") from error
    if not found:
        raise ValueError(f"config={path!r}: sweep() yields no points.")
    return found


def point(found: Sequence[Row], index: int) -> Row:
    """Returns one point; raises ValueError if there are not so many."""
    if not 0 <= index < len(found):
        raise ValueError(f"sweep_index={index} must be in [0, {len(found)}).")
    return found[index]


def apply(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Sets flat overrides in a config that is, and stays, locked.

    Raises:
        ValueError: an unknown field, naming the nearest, or a value of another type.
    """
    config.lock()
    for name, value in overrides.items():
        problem = unknown_field(config, name)
        if problem is not None:
            raise ValueError(problem)
        above, _, last = name.rpartition(".")
        node: Any = config
        for key in above.split(".") if above else ():
            node = node[key]
        try:
            node[last] = ConfigDict(value) if isinstance(value, Mapping) else value
        except (TypeError, ValueError) as error:
            raise ValueError(f"config.{name}={value!r}: {error}") from error


def point_directory(workdir: str | Path, index: int) -> Path:
    """Returns the directory of one point."""
    return Path(workdir) / f"{index:03d}"


def results(workdir: Path, found: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Returns one row per point: overrides, status, epsilon, metrics; read from its files."""
    rows: list[Row] = []
    for index, overrides in enumerate(found):
        path = point_directory(workdir, index)
        failed = path.with_suffix(".failed")
        row: Row = {"point": index, **overrides, "status": "waiting"}
        if (path / "eval.json").is_file():
            row["status"] = "finished"
            if (path / "privacy.json").is_file():
                row["epsilon"] = json.loads((path / "privacy.json").read_text())["epsilon"]
            evaluation = json.loads((path / "eval.json").read_text())
            row |= {name: evaluation[name] for name in _METRICS if name in evaluation}
        elif failed.is_file():
            row["status"] = failed.read_text()
        elif path.is_dir():
            row["status"] = "cut"
        rows.append(row)
    return rows


def to_markdown(rows: Sequence[Row]) -> str:
    """Renders rows as a Markdown table with a column for every name that occurs."""
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
    """Runs one point, hands signals on to it, and returns its exit code."""
    failed, log = path.with_suffix(".failed"), path.with_suffix(".log")
    failed.unlink(missing_ok=True)
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
        said = log.read_text().strip().splitlines() or [""]
        failed.write_text(f"exit {code}: {said[-1][:200]}")
    return code
