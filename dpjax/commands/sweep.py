"""Run every point of a study, one after the other on this machine.

    dpjax sweep --config=FILE --workdir=DIR

FILE is a config or a study: a module with `get_config(arg)` and `sweep()`, which yields one dict of
flat overrides per point, as {"dp.epsilon": 1.0, "optimizer.learning_rate": 3e-3}. With FILE:ARG, a
`sweep(arg)` gets the argument too. Point k runs in
DIR/NNN, exactly as `dpjax train --config=FILE --workdir=DIR --sweep_index=k` runs it, which is the
line for an array job. Overrides, --config.FIELD=VALUE, hold for every point; --table_only runs
nothing.

The same command again does what is missing: finished points are skipped, interrupted ones resume,
failed ones are retried. --filter=dp.epsilon=1.0 and --chunk=2/8 run a part of the points, which
--list shows. DIR/sweep.md and DIR/sweep.csv contain the results, DIR/NNN.log the output
of a point.
Exit codes: 0 all finished, 1 some failed, 2 a mistake, 75 stopped by a signal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from typing import Any

from tqdm import tqdm

from dpjax.commands import cli
from dpjax.runtime import Workdir
from dpjax.search import sweep


def add_arguments(parser: cli.Parser) -> None:
    parser.add_config()
    parser.add_argument(
        "--workdir", required=True, type=cli.path, help="one directory per point in it"
    )
    parser.add_argument("--table_only", action="store_true", help="run nothing")
    parser.add_argument("--list", action="store_true", help="print the points and stop")
    parser.add_argument(
        "--filter", action="append", default=[], metavar="FIELD=VALUE",
        help="run, or list, the points with this value only; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--chunk", default="1/1", metavar="K/N",
        help="of these, the K-th of N parts: one for each task of an array job",
    )  # fmt: skip


@cli.mistakes()
def run(args: argparse.Namespace) -> int:
    config = cli.config(args)
    points = sweep.points(args.config, config)
    chosen = sweep.select(points, config, args.filter, args.chunk)
    if args.list:
        rows = sweep.results(args.workdir, points)
        print(sweep.to_markdown([rows[number] for number in chosen]))
        print(f"{len(chosen)} of {len(points)} points")
        return 0
    if args.chunk != "1/1":  # the tasks of an array share the directory; each run has a lock
        return _sweep(args, points, chosen)
    with Workdir(args.workdir).lock():
        return _sweep(args, points, chosen)


def _sweep(args: argparse.Namespace, points: list[dict[str, Any]], chosen: Collection[int]) -> int:
    args.workdir.mkdir(parents=True, exist_ok=True)
    code = 0
    for row in tqdm(sweep.results(args.workdir, points), desc="points", disable=args.table_only):
        if args.table_only or row["point"] not in chosen or row["status"] == "finished":
            continue
        command = [
            sys.executable, "-m", "dpjax", "train", f"--config={args.config}",
            f"--workdir={args.workdir}", f"--sweep_index={row['point']}", *args.overrides,
        ]  # fmt: skip
        code = sweep.run_point(command, sweep.point_directory(args.workdir, row["point"]))
        if code == sweep.STOPPED:
            break
    rows = sweep.results(args.workdir, points)
    directory = Workdir(args.workdir)
    directory.write("sweep.md", sweep.to_markdown(rows))
    directory.write("sweep.csv", sweep.to_csv(rows))
    print(sweep.to_markdown(rows))
    if code == sweep.STOPPED:
        return sweep.STOPPED
    return int(any(row["status"].startswith("exit") for row in rows))
