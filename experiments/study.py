"""The common part of all study reports: reading runs from files, statistics, tables, figures.

A study is a file with `get_config(arg)`, `sweep(arg)`, which yields flat overrides, and
`report(workdir)`, which rebuilds all tables and figures from the files of the runs. `arg` is its
size: "smoke" (seconds, for the tests), "laptop" (real data, 2 cores) or "paper" (accelerators).
`experiments.run_study` runs one; `dpjax report WORKDIR` calls `report` again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("agg")
from matplotlib import pyplot as plt

from dpjax import files
from dpjax.search import sweep

__all__ = [
    "SIZES", "Figure", "Metric", "Result", "Row", "Table", "check_budgets", "field", "heatmap",
    "interval", "read", "size", "summarize", "to_csv", "to_markdown", "write",
]  # fmt: skip

SIZES = ("smoke", "laptop", "paper")
PLAN = "study.json"  # of a work directory: which study, and its points

Row = dict[str, Any]


class Result(NamedTuple):
    """One point of a study, read from its files.

    Attributes:
        path: its directory.
        overrides: the fields that the sweep set.
        status: "finished", "diverged" (exit 3: parameters not finite), "waiting", "interrupted", or
            "exit N: ...".
        config: every field of the run; empty if it never started.
        evaluation: `eval.json`, on held-out data; empty unless finished.
        privacy: `privacy.json`; None without privacy.
        measured: results of the study's `measure`; empty if it has none.
    """

    path: Path
    overrides: Row
    status: str
    config: Row
    evaluation: Row
    privacy: Row | None
    measured: Row


Metric = Callable[[Result], float]


class Table(NamedTuple):
    """Rows to be written as Markdown and CSV under a name."""

    name: str
    caption: str
    rows: Sequence[Row]


class Figure(NamedTuple):
    """A figure to be written as PNG under a name."""

    name: str
    caption: str
    figure: plt.Figure


def size(arg: str | None, *more: str) -> str:
    """Returns the size that a config's argument names, of `SIZES` or `more`; else "laptop"."""
    chosen = arg or "laptop"
    files.choose("arg", chosen, dict.fromkeys((*SIZES, *more)))
    return chosen


def read(workdir: Path) -> list[Result]:
    """Reads every point that the study planned, run or not, from its files alone.

    Raises:
        ValueError: the directory holds no study.
    """
    if not (workdir / PLAN).is_file():
        raise ValueError(f"workdir={str(workdir)!r} has no {PLAN}: it holds no study.")
    points = json.loads((workdir / PLAN).read_text())["points"]
    found = []
    for row, overrides in zip(sweep.results(workdir, points), points, strict=True):
        path = sweep.point_directory(workdir, row["point"])
        status = "diverged" if "not finite" in row["status"] else row["status"]
        found.append(
            Result(
                path=path,
                overrides=overrides,
                status=status,
                config=_json(path / "config.json") or {},
                evaluation=_json(path / "eval.json") or {},
                privacy=_json(path / "privacy.json"),
                measured=_json(path / "measured.json") or {},
            )
        )
    return found


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def field(result: Result, name: str) -> Any:
    """Returns a config field by its dotted name; epsilon is inf without privacy."""
    node: Any = result.config
    if node.get("dp") is None and name.startswith("dp."):
        return math.inf if name == "dp.epsilon" else None
    for key in name.split("."):
        node = node[key]
    return node


def check_budgets(results: Iterable[Result], by: Sequence[str] = ()) -> None:
    """Raises unless runs that share the fields `by` had one budget, of privacy and of epochs.

    Args:
        results: runs that are to be compared, or averaged.
        by: config fields that tell runs apart; a budget's field among them may differ.

    Raises:
        ValueError: two runs differ, naming both and the field.
    """
    first: dict[tuple[Any, ...], tuple[Result, Row]] = {}
    for result in results:
        told = tuple(_hashable(field(result, name)) for name in by if name in _BUDGET)
        mine = _budget(result)
        other, theirs = first.setdefault(told, (result, mine))
        for name, value in mine.items():
            if name not in by and theirs[name] != value:
                raise ValueError(
                    f"{other.path.name} and {result.path.name} differ in budget: {name} is "
                    f"{theirs[name]} and {value}. Runs of different budgets are not compared."
                )


_BUDGET = ("dp.epsilon", "dp.delta", "epochs", "data.name")


def _budget(result: Result) -> Row:
    facts = result.privacy or {}
    spent = {name: facts.get(name) for name in ("num_examples", "neighboring_relation")}
    finished = result.status == "finished" and result.privacy is not None
    if finished and facts["steps_done"] != facts["steps_planned"]:
        raise ValueError(f"{result.path.name}: a finished run executed not all planned steps.")
    return {name: field(result, name) for name in _BUDGET} | spent


def _hashable(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else value


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the half width of its 95 % t-interval; nan for a single value.

    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> round(mean, 3), round(half, 3)
    (2.0, 2.484)
    """
    numbers = np.asarray(values, np.float64)
    if len(numbers) < 2:
        return (float(numbers[0]) if len(numbers) else math.nan), math.nan
    spread = numbers.std(ddof=1) / math.sqrt(len(numbers))
    return float(numbers.mean()), float(stats.t.ppf(0.975, len(numbers) - 1) * spread)


def summarize(
    results: Iterable[Result], by: Mapping[str, str], metrics: Mapping[str, Metric]
) -> list[Row]:
    """Averages runs that agree in some fields, over whatever else differs: the seeds.

    Args:
        results: runs of any status; unfinished ones are ignored.
        by: maps column names to config fields.
        metrics: maps column names to functions of a finished run.

    Returns:
        A row per group, in order of its fields: fields, "runs", "diverged" and per metric `name`
        and `name ±`, mean and half width of the 95 % interval over the runs that did not diverge.

    Raises:
        ValueError: runs of different budgets would be compared, see `check_budgets`.
    """
    ended = [r for r in results if r.status in ("finished", "diverged")]
    check_budgets(ended, tuple(by.values()))
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in ended:
        key = tuple(_hashable(field(result, name)) for name in by.values())
        groups.setdefault(key, []).append(result)
    rows = []
    for key, members in sorted(groups.items(), key=lambda item: _order(item[0])):
        good = [r for r in members if r.status == "finished"]
        row: Row = dict(zip(by, key)) | {"runs": len(members), "diverged": len(members) - len(good)}
        for name, metric in metrics.items():
            row[name], row[f"{name} ±"] = interval([metric(r) for r in good])
        rows.append(row)
    return rows


def _order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((isinstance(v, str), v is None, v if v is not None else 0) for v in key)


def to_markdown(rows: Sequence[Row]) -> str:
    """Renders rows; columns `name` and `name ±` are shown as one."""
    merged = []
    for row in rows:
        shown: Row = {}
        for name, value in row.items():
            half = row.get(f"{name} ±")
            if not name.endswith(" ±"):
                shown[name] = _text(value, half)
        merged.append(shown)
    return sweep.to_markdown(merged)


def _text(value: Any, half: float | None) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "-"
    if half is None or math.isnan(half) or half <= 1e-9 * abs(value):  # the same for every seed
        return f"{value:.4g}"
    digits = min(6, max(0, 1 - math.floor(math.log10(half))))
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def to_csv(rows: Sequence[Row]) -> str:
    """Renders rows in full precision."""
    return sweep.to_csv(list(rows))


def heatmap(
    axes: plt.Axes,
    cells: Mapping[tuple[Any, Any], float],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    limits: tuple[float, float] | None = None,
    cmap: str = "viridis",
    text: str = "{:.0f}",
    empty: str = "div.",
) -> None:
    """Draws a grid of numbers with the numbers in it.

    Args:
        axes: axes to draw on.
        cells: maps (x, y) to a value; NaN is drawn gray and labeled `empty`, missing cells are
            white.
        xlabel: label with its unit.
        ylabel: label with its unit.
        title: title with the unit of the values.
        limits: limits of the colors; by default the extremes.
        cmap: name of a color map.
        text: format of a value.
        empty: the meaning of NaN.
    """
    xs, ys = sorted({x for x, _ in cells}), sorted({y for _, y in cells})
    grid = np.array([[cells.get((x, y), math.nan) for x in xs] for y in ys], np.float64)
    finite = grid[np.isfinite(grid)]
    low, high = limits or ((finite.min(), finite.max()) if finite.size else (0.0, 1.0))
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap=cmap, vmin=low, vmax=high)
    colors = plt.get_cmap(cmap)
    for (x, y), value in cells.items():
        at = (xs.index(x), ys.index(y))
        if not math.isfinite(value):
            corner = (at[0] - 0.5, at[1] - 0.5)
            axes.add_patch(plt.Rectangle(corner, 1, 1, color="0.85"))
            axes.text(*at, empty, ha="center", va="center", color="0.3", fontsize=8)
            continue
        level = (value - low) / (high - low) if high > low else 0.5
        dark = np.mean(colors(min(max(level, 0.0), 1.0))[:3]) < 0.5
        axes.text(
            *at, text.format(value), ha="center", va="center", fontsize=8,
            color="white" if dark else "black",
        )  # fmt: skip
    axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.figure.colorbar(image, ax=axes)


def write(
    workdir: Path, title: str, parts: Sequence[str | Table | Figure], results: Sequence[Result]
) -> list[Path]:
    """Writes `report.md`, and every table and figure beside it.

    Args:
        workdir: directory of the study.
        title: title of the report.
        parts: text, tables and figures, in order.
        results: all points, to report the missing ones; none of a report that has no points.

    Returns:
        The files written.

    Raises:
        ValueError: two tables, or two figures, have one name.
    """
    for kind in (Table, Figure):
        names = [part.name for part in parts if isinstance(part, kind)]
        if len(set(names)) < len(names):  # the second would overwrite the first
            raise ValueError(f"names={names} must differ from one another.")
    lines: list[str] = [f"# {title}", ""]
    paths: list[Path] = []
    if results:
        lines += [_progress(results), ""]
    for part in parts:
        if isinstance(part, str):
            lines += [part, ""]
        elif isinstance(part, Table):
            lines += [f"**{part.caption}** ([CSV]({part.name}.csv))", ""]
            lines += [to_markdown(part.rows) if part.rows else "(no finished run yet)\n"]
            for suffix, text in (("md", to_markdown), ("csv", to_csv)):
                path = workdir / f"{part.name}.{suffix}"
                path.write_text(text(part.rows) if part.rows else "")
                paths.append(path)
        else:
            path = workdir / f"{part.name}.png"
            part.figure.savefig(path, dpi=120)
            plt.close(part.figure)
            lines += [f"![{part.caption}]({path.name})", "", part.caption, ""]
            paths.append(path)
    (workdir / "report.md").write_text("\n".join(lines))
    return [workdir / "report.md", *paths]


def _progress(results: Sequence[Result]) -> str:
    """Returns how many points finished, and which did not."""
    ended = [r for r in results if r.status == "finished"]
    diverged = [r for r in results if r.status == "diverged"]
    lines = [f"{len(ended)} of {len(results)} runs finished, {len(diverged)} diverged."]
    lines += [
        f"- missing: {r.path.name}, {r.status}: {r.overrides}"
        for r in results
        if r.status not in ("finished", "diverged")
    ]
    fixed = [r for r in ended if r.privacy is not None and "fixed" in r.privacy["seed_policy"]]
    if fixed:
        lines += ["", "Private seeds are fixed: these runs are for study, not for release. The"]
        lines += ["search over hyperparameters is declared, not charged."]
    return "\n".join(lines)
