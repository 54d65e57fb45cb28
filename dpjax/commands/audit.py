"""Attack a run's own guarantee: a lower bound on its epsilon.

    dpjax audit --config=quickstart --workdir=DIR                 # one run with 500 canaries
    dpjax audit --config=quickstart --workdir=DIR --runs=200      # one canary in every second run

See `dpjax.audit` for what is attacked and what the bound means.
Exit codes: 0 no contradiction; 2 a mistake, nothing was run; 4 the bound exceeds the claim.
"""

from __future__ import annotations

import argparse

from dpjax import audit, build
from dpjax.commands import cli
from dpjax.runtime import Workdir, compilation


def add_arguments(parser: cli.Parser) -> None:
    parser.add_config()
    parser.add_argument("--workdir", required=True, help="where the files go")
    parser.add_argument("--canaries", default="gradient", help=", ".join(audit.CANARIES))
    parser.add_argument("--count", type=int, default=500, help="canaries of a single run")
    parser.add_argument("--runs", type=int, default=1, help="1, or an even number of runs")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the bound")


@cli.mistakes()
def run(args: argparse.Namespace) -> int:
    arguments = {name: getattr(args, name) for name in ("canaries", "count", "runs", "confidence")}
    audit.check_arguments(**arguments)
    config = cli.config(args)
    compilation.keep_on_disk()
    place = Workdir(args.workdir)
    place.check(config)
    report = audit.audit(build.build(config), **arguments)
    place.create(config)
    audit.write(report, place.path)
    print(audit.line(report))
    return 4 if audit.refuted(report) else 0
