"""Search the points of a sweep: all, some at random, or those that Optuna proposes.

    dpjax search --config=FILE --workdir=DIR --method=random --trials=20
    dpjax search --config=FILE --workdir=DIR --method=optuna --trials=30
    dpjax search --config=FILE --workdir=DIR --charge=10

FILE is as for `dpjax sweep`: `get_config` and `sweep()`. Trial t runs point k in
DIR/trials/TTT/KKK, as `dpjax train --config=FILE --sweep_index=k` would. DIR/search.md
and .csv list the trials, DIR/privacy.json and .md are the statement of the best one: how many
points were tried, and whether that was charged. The same command goes on where it stopped.

--method=optuna needs `pip install optuna` and the full product of its fields' values. Its
trials are kept in DIR/optuna.journal; with --storage=URL of a database many workers, each running
this command with a shared DIR, take part in one search. Runs are never pruned.

--charge=MEAN draws the number of runs (geometric, of that mean) and their points at random, and
gives each run so little of config.dp.epsilon that releasing the best one keeps the whole budget:
see `dpjax.dp.repeat_and_select`.
Exit codes: 0 done, 1 some run failed, 2 a mistake, 75 stopped by a signal.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from dpjax.commands import cli
from dpjax.runtime import Workdir
from dpjax.search import sweep, trials


def add_arguments(parser: cli.Parser) -> None:
    parser.add_config()
    parser.add_argument("--workdir", required=True, type=cli.path)
    parser.add_argument("--method", default="random", help=", ".join(trials.METHODS))
    parser.add_argument("--trials", type=int, help="how many; all points by default")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the trials")
    parser.add_argument("--metric", default="accuracy", help=", ".join(trials.METRICS))
    parser.add_argument("--storage", help="URL of a database, for many workers; for optuna")
    parser.add_argument("--charge", type=float, help="mean number of runs of a charged search")


@cli.mistakes()
def run(args: argparse.Namespace) -> int:
    base = cli.config(args)
    found = sweep.points(args.config, base)
    trials.check(args, args.overrides, found)
    job = trials.Job(args.config, args.workdir, found, args.metric, args.overrides)
    # Workers that share a database share the directory too.
    alone = contextlib.nullcontext() if args.storage else Workdir(args.workdir).lock()
    args.workdir.mkdir(parents=True, exist_ok=True)
    try:
        with alone:
            return int(trials.run(job, args, base))
    except trials.Stopped:
        print("stopped as asked; the same command goes on.", file=sys.stderr)
        return sweep.STOPPED
