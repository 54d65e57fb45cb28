"""Attack a run's own guarantee: a lower bound on its epsilon.

    dpjax audit --workdir=DIR                                     # the config of a finished run
    dpjax audit --config=quickstart --workdir=DIR                 # one run with 500 canaries
    dpjax audit --config=quickstart --workdir=DIR --runs=200      # one canary in every second run

Without --config, DIR is that of a finished run: its config is audited by other runs, and the result
is added to its statement (`dpjax export` leaves it out). See `dpjax.audit` for what is attacked and
what the bound means.
Exit codes: 0 no contradiction; 2 a mistake, nothing was run; 4 the bound exceeds the claim.
"""

from __future__ import annotations

import argparse

from ml_collections import ConfigDict

from dpjax import audit, build
from dpjax.commands import cli
from dpjax.config import default
from dpjax.runtime import Workdir, compilation


def add_arguments(parser: cli.Parser) -> None:
    parser.add_config(required=False)
    parser.add_argument("--workdir", required=True, help="where the files go; a finished run")
    parser.add_argument("--canaries", default="gradient", help=", ".join(audit.CANARIES))
    parser.add_argument("--count", type=int, default=500, help="canaries of a single run")
    parser.add_argument("--runs", type=int, default=1, help="1, or an even number of runs")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the bound")


@cli.mistakes()
def run(args: argparse.Namespace) -> int:
    arguments = {name: getattr(args, name) for name in ("canaries", "count", "runs", "confidence")}
    audit.check_arguments(**arguments)
    place = Workdir(args.workdir)
    config = _of_finished(place, args) if args.config is None else cli.config(args)
    config.audit.update(arguments)
    compilation.keep_on_disk()
    if args.config is not None:
        place.check(config)
    run = build.build(config)
    audit.check(run, **arguments)
    with place.lock():
        if args.config is None:
            report = audit.attach(run, place)
        else:
            report = audit.audit(run, **arguments)
            place.create(config)
            audit.write(report, place.path)
    print(audit.line(report))
    return 4 if audit.refuted(report) else 0


def _of_finished(place: Workdir, args: argparse.Namespace) -> ConfigDict:
    """Returns the config of a finished run, from its directory."""
    if args.overrides:
        raise ValueError(f"{args.overrides[0]} needs --config: a finished run has its own.")
    for name in ("config.json", "weights.safetensors"):
        if not place.exists(name):
            raise ValueError(f"workdir={str(place.path)!r} has no {name}: give --config.")
    values = place.read("config.json")
    if values["dp"] is None:
        raise ValueError("dp=None: a run without privacy claims nothing to audit.")
    config = default()
    with config.unlocked():
        config.update(values)
    return config
