"""Searches the points of a sweep: all of them, some at random, or those that Optuna proposes.

    python -m dpjax.commands.search --config=FILE --workdir=DIR --method=random --trials=20
    python -m dpjax.commands.search --config=FILE --workdir=DIR --method=optuna --trials=30
    python -m dpjax.commands.search --config=FILE --workdir=DIR --charge=10

FILE is as for `dpjax.commands.sweep`: `get_config` and `sweep()`. Trial t runs point k in
DIR/trials/TTT/KKK, as `python -m dpjax.train --config=FILE --sweep_index=k` would. DIR/search.md
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
import sys
from collections.abc import Sequence
from pathlib import Path

from dpjax.config import load
from dpjax.search import search, sweep

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="dpjax.commands.search", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="a file with get_config and sweep")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--method", default="random", help=", ".join(search.METHODS))
    parser.add_argument("--trials", type=int, help="how many; all points by default")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the trials")
    parser.add_argument("--metric", default="accuracy", help=", ".join(search.METRICS))
    parser.add_argument("--storage", help="URL of a database, for many workers; for optuna")
    parser.add_argument("--charge", type=float, help="mean number of runs of a charged search")
    flags, others = parser.parse_known_args(argv)
    try:
        base = load(flags.config)
        found = sweep.points(flags.config, base)
        search.check(flags, others, found)
        flags.workdir.mkdir(parents=True, exist_ok=True)
        failed = search.run(
            search.Job(flags.config, flags.workdir, found, flags.metric, others), flags, base
        )
    except (ValueError, TypeError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except search.Stopped:
        print("stopped as asked; the same command goes on.", file=sys.stderr)
        return sweep.STOPPED
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
