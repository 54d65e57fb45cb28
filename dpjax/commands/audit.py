"""Attacks a run's own guarantee: `python -m dpjax.commands.audit --config=FILE --workdir=DIR`.

Exit codes: 0 no contradiction; 2 a mistake, nothing was run; 4 the bound exceeds the claim.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from dpjax import audit, build
from dpjax.runtime import Workdir, compilation

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Runs the command on `argv[1:]`; returns the exit code."""
    known = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", None, "File", flag_values=known)
    workdir = flags.DEFINE_string("workdir", None, "Where the files go", flag_values=known)
    canaries = flags.DEFINE_string("canaries", "gradient", str(audit.CANARIES), flag_values=known)
    count = flags.DEFINE_integer("count", 500, "Canaries of a single run", flag_values=known)
    runs = flags.DEFINE_integer("runs", 1, "Runs; 1 or even", flag_values=known)
    confidence = flags.DEFINE_float("confidence", 0.95, "Of the bound", flag_values=known)
    try:
        rest = known(list(argv))
        if rest[1:]:
            raise ValueError(f"unexpected argument {rest[1]!r}.")
        if config.value is None or workdir.value is None:
            raise ValueError("--config and --workdir are required.")
        arguments: dict[str, Any] = {
            "canaries": canaries.value, "count": count.value,
            "runs": runs.value, "confidence": confidence.value,
        }  # fmt: skip
        compilation.keep_on_disk()
        place = Workdir(workdir.value)
        place.check(config.value)
        report = audit.audit(build.build(config.value), **arguments)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    place.create(config.value)
    audit.write(report, place.path)
    print(audit.line(report))
    return 4 if audit.refuted(report) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
