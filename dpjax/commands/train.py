"""Train from a config file; the same command again resumes.

    dpjax train --config=quickstart --workdir=DIR --config.dp.epsilon=1

--config.FIELD=VALUE sets any field: --config.dp=None trains without privacy, None leaves an
optional field out, and --config.optimizer.options.b1=0.8 sets an option. With several processes,
run the same command in each of them: see --coordinator.

Exit codes:
    0   finished
    2   a mistake in the command, the config or the data, or hosts that disagree: nothing was run
    3   stopped: parameters were not finite, or a step would have passed the budget
    4   finished, but the audit that `config.audit` asked for refutes the claimed epsilon
    74  a file could not be written, on a full disk, say; the last whole checkpoint stands
    75  stopped by SIGTERM or Ctrl-C and saved; the same command goes on
"""

from __future__ import annotations

import argparse
import sys

from absl import logging

from dpjax.commands import cli


def add_arguments(parser: cli.Parser) -> None:
    parser.add_config()
    parser.add_argument("--workdir", required=True, help="where the run leaves its files")
    parser.add_argument("--plan_only", action="store_true", help="print the plan and stop")
    parser.add_argument(
        "--dry_run", action="store_true",
        help="print the plan, and the time and memory of one step on made data; train nothing",
    )  # fmt: skip
    parser.add_argument(
        "--restart", action="store_true", help="move a run that is in the workdir to DIR.1 first"
    )
    parser.add_argument(
        "--sweep_index", type=int, metavar="K", help="run this point of the file's sweep() in DIR/K"
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT",
        help="of process 0; on Slurm and Cloud TPUs JAX finds it",
    )  # fmt: skip
    parser.add_argument("--num_processes", type=int, help="how many processes take part")
    parser.add_argument("--process_id", type=int, help="which of them this one is, from 0")


def run(args: argparse.Namespace) -> int:
    # What takes seconds to import is imported here: a typo in a flag is answered at once.
    from dpjax import audit, build, dp
    from dpjax.commands import report
    from dpjax.runtime import OtherRun, Workdir, compilation, hosts, rows
    from dpjax.search import sweep
    from dpjax.training import capacity, loop

    logging.set_verbosity(logging.WARNING)  # Orbax logs every file it writes
    compilation.keep_on_disk()
    with cli.mistakes():
        config = cli.config(args)
        hosts.start(args.coordinator, args.num_processes, args.process_id)

    problem, path = None, args.workdir
    try:
        with cli.mistakes():
            if args.sweep_index is not None:
                path = sweep.point_directory(path, args.sweep_index)
                config = sweep.point_config(args.config, config, args.sweep_index)
            workdir = Workdir(path)
            if not args.restart:
                workdir.check(config)
            if config.audit.count:
                try:
                    audit.check_arguments(**config.audit)
                except ValueError as error:
                    raise ValueError(f"audit.{error}") from error
            plan = build.build(config)
            if config.audit.count:
                audit.check(plan, **config.audit)
    except cli.Mistake as error:
        problem = str(error)
    # A host that ended alone would leave the others waiting for it.
    for host, text in enumerate(hosts.gather(problem)):
        if text is not None:
            raise cli.Mistake(text if host == 0 else f"host {host}: {text}")

    if workdir.writes:
        print(build.describe.describe(plan), flush=True)
    if args.dry_run:
        with cli.mistakes():
            seconds, needed = capacity.estimate(plan)
        if workdir.writes:
            print(f"time of all steps  {_duration(seconds)}, without compiling and evaluating")
            print(f"memory per device  {needed / 2**20:,.0f} MiB")
    if args.plan_only or args.dry_run:
        return 0
    try:
        if args.restart:
            workdir.move_aside()
            hosts.gather(None)
        results = loop.train(plan, workdir, stop=hosts.catch_signals())
        audited = None
        if config.audit.count:  # for minutes, in which nobody else may write the statement
            with workdir.lock():
                audited = audit.attach(plan, workdir)
    except (
        OtherRun, hosts.Disagreement, rows.CannotWrite, capacity.DoesNotFit, dp.EngineMismatch
    ) as error:  # fmt: skip
        raise cli.Mistake(str(error)) from error
    except (loop.TrainingFailed, dp.BudgetExceeded) as error:
        print(f"dpjax train: stopped: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"dpjax train: {error}", file=sys.stderr)
        return 74
    except loop.Preempted as error:
        print(f"dpjax train: {error}", file=sys.stderr)
        return 75
    if workdir.writes:
        report.figures(workdir.path)
        print(_results(results))
        if audited is not None:
            print(audit.line(audited))
        print(f"results in {workdir.path}")
    return 4 if audited is not None and audit.refuted(audited) else 0


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return (
        f"{hours:.1f} h"
        if hours >= 1
        else f"{minutes:.1f} min"
        if minutes >= 1
        else (f"{seconds:.1f} s")
    )


def _results(results: dict[str, float]) -> str:
    lines = [f"{name:<20} {value:.4f}" for name, value in results.items()]
    return "\n".join(["", "held-out evaluation", *lines])
