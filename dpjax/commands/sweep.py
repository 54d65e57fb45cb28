"""Sweeps: many runs of one config, one after the other on this machine.

    python -m dpjax.commands.sweep --config=FILE --workdir=DIR

FILE is a config or a study: a module with `get_config(arg)` and `sweep()`, which yields one dict of
flat overrides per point, as {"dp.epsilon": 1.0, "optimizer.learning_rate": 3e-3}. With FILE:ARG, a
`sweep(arg)` is given the argument too. Point k runs in
DIR/NNN, exactly as `python -m dpjax.train --config=FILE --workdir=DIR --sweep_index=k` runs it,
which is the line for an array job. Other flags of `dpjax.train` go to every point; --table_only
runs nothing.

The same command again does what is missing: finished points are kept, cut ones go on, failed ones
are tried anew. DIR/sweep.md and DIR/sweep.csv hold the results, DIR/NNN.log what a point printed.
Exit codes: 0 all finished, 1 some failed, 2 a mistake, 75 stopped by a signal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from dpjax.config import load
from dpjax.search import sweep

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="dpjax.commands.sweep", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="a file with get_config and sweep")
    parser.add_argument("--workdir", required=True, type=Path, help="one directory per point in it")
    parser.add_argument("--table_only", action="store_true", help="run nothing")
    known, others = parser.parse_known_args(argv)
    try:
        found = sweep.points(known.config, load(known.config))
    except Exception as error:  # whatever a config file raises is the user's to see
        print(f"error: {error}", file=sys.stderr)
        return 2
    known.workdir.mkdir(parents=True, exist_ok=True)
    code = 0
    for row in tqdm(sweep.results(known.workdir, found), desc="points", disable=known.table_only):
        if known.table_only or row["status"] == "finished":
            continue
        command = [
            sys.executable, "-m", "dpjax.train", f"--config={known.config}",
            f"--workdir={known.workdir}", f"--sweep_index={row['point']}", *others,
        ]  # fmt: skip
        code = sweep.run_point(command, sweep.point_directory(known.workdir, row["point"]))
        if code == sweep.STOPPED:
            break
    rows = sweep.results(known.workdir, found)
    (known.workdir / "sweep.md").write_text(sweep.to_markdown(rows))
    (known.workdir / "sweep.csv").write_text(sweep.to_csv(rows))
    print(sweep.to_markdown(rows))
    if code == sweep.STOPPED:
        return sweep.STOPPED
    return int(any(row["status"].startswith("exit") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
