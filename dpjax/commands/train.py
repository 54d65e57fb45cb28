"""Trains from a config file: `python -m dpjax.train --config=FILE --workdir=DIR`.

Any field can be overridden, as in `--config.dp.epsilon=1`. Running the same command again resumes.
With several processes, run it in each of them: see --coordinator.

Exit codes:
    0   finished
    2   a mistake in the command, the config or the data, or hosts that disagree: nothing was run
    3   stopped: parameters were not finite, or a step would have passed the budget
    4   finished, but the audit that `config.audit` asked for refutes the claimed epsilon
    74  a file could not be written, on a full disk, say; the last whole checkpoint stands
    75  stopped by SIGTERM or Ctrl-C and saved; the same command goes on
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from dpjax.config import load, unknown_field

__all__ = ["main", "run"]

_CONFIG = config_flags.DEFINE_config_file("config", None, "File, such as configs/quickstart.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run leaves its files; new, or to resume")
_PLAN_ONLY = flags.DEFINE_bool("plan_only", False, "Print the plan and stop")
_RESTART = flags.DEFINE_bool("restart", False, "Move a run that is in the workdir to DIR.1 first")
_SWEEP = flags.DEFINE_integer(
    "sweep_index", None, "Run this point of the file's sweep() in DIR/NNN"
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0; Slurm and Cloud TPUs tell it themselves"
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes take part")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    from dpjax import audit, build, dp
    from dpjax.commands import report
    from dpjax.runtime import OtherRun, Workdir, compilation, hosts
    from dpjax.search import sweep
    from dpjax.training import capacity, loop

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes
    compilation.keep_on_disk()
    try:
        hosts.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    except ValueError as error:
        return _mistake(str(error))

    problem = None
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}.")
        config, path = _CONFIG.value, Path(_WORKDIR.value or "")
        if _SWEEP.value is not None:
            path = sweep.point_directory(path, _SWEEP.value)
            file = config_flags.get_config_filename(flags.FLAGS["config"])
            sweep.apply(config, sweep.point(sweep.points(file, config), _SWEEP.value))
        workdir = Workdir(path)
        if not _RESTART.value:
            workdir.check(config)
        plan = build.build(config)
        if config.audit.count:
            audit.check(plan, **config.audit)
    except (ValueError, TypeError, FileNotFoundError) as error:
        problem = str(error)
    # A host that ended alone would leave the others waiting for it.
    for host, text in enumerate(hosts.gather(problem)):
        if text is not None:
            return _mistake(text if host == 0 else f"host {host}: {text}")

    if workdir.writes:
        print(build.describe.describe(plan), flush=True)
    if _PLAN_ONLY.value:
        return 0
    try:
        if _RESTART.value:
            workdir.move_aside()
            hosts.gather(None)
        results = loop.train(plan, workdir, stop=hosts.catch_signals())
        audited = audit.attach(plan, workdir) if config.audit.count else None
    except (OtherRun, hosts.Disagreement, capacity.DoesNotFit) as error:
        return _mistake(str(error))
    except (loop.TrainingFailed, dp.BudgetExceeded) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 74
    except loop.Preempted as error:
        print(str(error), file=sys.stderr)
        return 75
    if workdir.writes:
        report.figures(workdir.path)
        print(_results(results))
        if audited is not None:
            print(audit.line(audited))
        print(f"results in {workdir.path}")
    return 4 if audited is not None and audit.refuted(audited) else 0


def _results(results: dict[str, float]) -> str:
    lines = [f"{name:<20} {value:.4f}" for name, value in results.items()]
    return "\n".join(["", "held-out evaluation", *lines])


def _mistake(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; every mistake is one line, with the nearest field where there is one."""
    try:
        rest = flags.FLAGS(argv)
        for flag in ("config", "workdir"):
            if flags.FLAGS[flag].value is None:
                raise flags.Error(f"--{flag} is required.")
        return list(rest)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(_mistake(_explain(argv, error)))


def _explain(argv: Sequence[str], error: Exception) -> str:
    """The first override that names no field of the config file, or else the error itself."""
    files = [a.split("=", 1)[1] for a in argv if a.startswith(("--config=", "-config="))]
    overrides = [a.lstrip("-").split("=")[0] for a in argv if a.lstrip("-").startswith("config.")]
    try:
        config = load(files[-1])
    except Exception as other:  # whatever a config file raises is the user's to see
        return str(other if files else error)
    for override in overrides:
        problem = unknown_field(config, override.removeprefix("config."))
        if problem is not None:
            return problem
    return str(error).strip("\"'").split("\n")[0]


def run() -> None:
    """Entry point of the command line."""
    app.run(main, flags_parser=_parse)


if __name__ == "__main__":
    run()
