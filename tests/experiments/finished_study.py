"""What the tests of a study share: running its smallest size, and reading what it left."""

import csv
import os

import pytest

from dpjax.commands import cli
from experiments import run_study

ROOT = os.path.join(os.path.dirname(os.path.dirname(__file__)), "..")

# For tests that need a study's runs, which take up to a minute.
of_runs = pytest.mark.slow


def smoke(name, path):
    """Runs experiments/NAME/study.py at its smallest size into `path`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert (
            run_study.main([f"--config=experiments/{name}/study.py:smoke", f"--workdir={path}"])
            == 0
        )
    return path


def table(path, name):
    with (path / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def report_rebuilt(path, *, figures, tables):
    """Deletes a report, has it made again from the runs' files, and returns its text."""
    names = ["report.md", *(f"{name}.png" for name in figures)]
    names += [f"{name}.{suffix}" for name in tables for suffix in ("md", "csv")]
    before = {name: (path / name).read_bytes() for name in names}
    assert all(before.values())
    for name in names:
        (path / name).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert cli.main(["report", str(path)]) == 0
    for name in names:
        assert name.endswith(".png") or (path / name).read_bytes() == before[name]
    return before["report.md"].decode()
