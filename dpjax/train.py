"""Trains from a config file: `python -m dpjax.train --config=FILE --workdir=DIR`.

Any field can be overridden, as in `--config.dp.epsilon=1`. Running the same command again resumes.

Exit codes: 0 finished, 2 a mistake in the command, the config or the data (nothing was started),
3 the run stopped: parameters were not finite, or a step would have passed the budget.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from dpjax.config import load, unknown_field

__all__ = ["main", "run"]

_CONFIG = config_flags.DEFINE_config_file("config", None, "File, such as configs/quickstart.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run leaves its files; new, or to resume")
_PLAN_ONLY = flags.DEFINE_bool("plan_only", False, "Print the plan and stop")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    if len(argv) > 1:
        return _mistake(f"unexpected argument {argv[1]!r}.")
    from dpjax import build, dp, loop, report, storage

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes

    try:
        workdir = storage.Workdir(_WORKDIR.value or "")
        workdir.check(_CONFIG.value)
        plan = build.build(_CONFIG.value)
    except (ValueError, TypeError, FileNotFoundError) as error:
        return _mistake(str(error))
    print(loop.describe(plan), flush=True)
    if _PLAN_ONLY.value:
        return 0
    try:
        results = loop.train(plan, workdir)
    except (loop.TrainingFailed, dp.BudgetExceeded) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    report.figures(workdir.path)
    print(_results(results))
    print(f"results in {_WORKDIR.value}")
    return 0


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
