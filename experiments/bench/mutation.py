"""Mutates `dpjax/dp` and asks the suite: which changes of the code does no test notice?

    pip install cosmic-ray coverage
    python -m experiments.bench.mutation --sample=0.3 --workers=2 --out=mutants.jsonl

The operators are cosmic-ray's: an arithmetic operator, comparison, number, truth value, loop or
condition is replaced by a near one. A mutant is run against those tests that own its module and
reach its line, and is killed by the first that fails, by a crash or by the time limit. Those that
live are printed as diffs, to be read. A test that finds a traced function in a cache does not reach
it: it may miss a mutant that it would kill, and never kills one that it should not. Tests run in
forks of a process that has imported the libraries (not dpjax), with a compilation cache of their
own, so a mutant costs seconds. Results are appended to --out as they come: the same command goes on
where it was stopped.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import difflib
import functools
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from absl import app, flags
from tqdm import tqdm

__all__ = ["OWNERS", "Mutant", "mutants"]

_SAMPLE = flags.DEFINE_float("sample", 1.0, "Share of the mutants, drawn with --seed.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the sample.")
_WORKERS = flags.DEFINE_integer("workers", 1, "Processes at a time.")
_ONLY = flags.DEFINE_list("only", None, "Modules of dpjax/dp, by name; all of them by default.")
_SLOWEST = flags.DEFINE_float(
    "slowest", float("inf"), "Seconds; no test that takes longer. What lives is to be run again."
)
_OUT = flags.DEFINE_string("out", None, "JSON lines, appended.", required=True)

_ROOT = Path(__file__).resolve().parents[2]
_ENGINE = ("dp/test_products", "dp/test_bookkeeping", "dp/test_sites")
# The tests that own a module, most likely to notice first.
OWNERS: dict[str, tuple[str, ...]] = {
    "accounting/accountant": ("dp/test_accounting", "dp/test_mechanism", "commands/test_plan"),
    "accounting/cache": ("dp/test_accounting",),
    "accounting/events": ("dp/test_ledger", "dp/test_mechanism", "dp/test_accounting"),
    "adaptive": ("dp/test_adaptive", "dp/test_mechanism"),
    "clipping": ("dp/test_clipping", "dp/test_clipped_sum", "dp/test_numerics"),
    "engines/bookkeeping": _ENGINE,
    "engines/clipped_sum": ("dp/test_clipped_sum", "test_step"),
    "engines/forms": _ENGINE,
    "engines/products": _ENGINE,
    "engines/sites": _ENGINE,
    "engines/taps": _ENGINE,
    "least_squares": ("dp/test_least_squares",),
    "ledger": ("dp/test_ledger", "dp/test_mechanism"),
    "linear_head": ("dp/test_linear_head", "experiments/test_cached_heads"),
    "lower_bound": ("dp/test_lower_bound",),
    "mechanism": ("dp/test_mechanism", "dp/test_accounting", "test_step"),
    "noise": ("dp/test_noise", "dp/test_numerics", "test_step"),
    "optimizers": ("dp/test_optimizers", "dp/test_noise"),
    "sampling": ("dp/test_sampling", "data/test_prefetch"),
    "temperature": ("dp/test_temperature",),
}
# One near replacement for each operator of the language, not all of them: eleven ways to break one
# product teach what one does.
_OPERATORS = (
    "NumberReplacer", "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr",
    "ReplaceOrWithAnd", "ZeroIterationForLoop", "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak", "RemoveDecorator", "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_Delete_USub",
    *(f"ReplaceBinaryOperator_{pair}" for pair in
      ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul", "Pow_Mul")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in
      ("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Is_IsNot", "IsNot_Is")),
)  # fmt: skip
_PLACE = re.compile(r"^@@ -(\d+)")
# What a product's replacement makes of the bare star of a signature; nothing that a caller sees.
_BARE_SLASH = re.compile(r"^\+(\s*|.*[(,] ?)/,", re.MULTILINE)
_PRELOADED = (
    "jax.numpy", "jax.experimental.pallas", "flax.linen",
    "optax.contrib", "dp_accounting.pld.privacy_loss_distribution", "orbax.checkpoint",
    "ml_collections", "tensorflow_datasets", "matplotlib.pyplot", "jax_privacy", "scipy.stats",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: the occurrence of an operator in a module."""

    module: str
    operator: str
    occurrence: int

    def __str__(self) -> str:
        return f"{self.module} {self.operator} {self.occurrence}"

    def source(self) -> tuple[str, str] | None:
        """The module before and after; None where there is no such occurrence."""
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator

        before = (_ROOT / f"dpjax/dp/{self.module}.py").read_text()
        after = mutate_code(before, get_operator(f"core/{self.operator}")(), self.occurrence)
        return None if after is None else (before, after)

    def diff(self) -> str:
        """The lines that it changes."""
        return "\n".join(self._diff())

    def lines(self) -> range:
        """The statement that it changes; of one with a body, the head."""
        before, place = (self.source() or ("", ""))[0], int(_PLACE.findall(self._diff()[0])[0])
        ranges = [range(place, place + 1)]
        for node in ast.walk(ast.parse(before)):
            if isinstance(node, ast.stmt):
                body = getattr(node, "body", None)
                end = body[0].lineno if body else (node.end_lineno or node.lineno) + 1
                ranges.append(range(node.lineno, max(end, node.lineno + 1)))
        return min((lines for lines in ranges[1:] if place in lines), key=len, default=ranges[0])

    def _diff(self) -> list[str]:
        before, after = (text.splitlines() for text in self.source() or ("", ""))
        return list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]


def mutants(module: str) -> Iterator[Mutant]:
    """Yields all mutants of a module of `dpjax/dp` under the operators above."""
    for operator in _OPERATORS:
        occurrence = 0
        # A number becomes one more or one less, in turn; one of them is enough.
        step = 2 if operator == "NumberReplacer" else 1
        while (mutant := Mutant(module, operator, occurrence)).source() is not None:
            if not _BARE_SLASH.search(mutant.diff()):
                yield mutant
            occurrence += step


class _Reach:
    """A pytest plugin: which tests reach which lines of `dpjax/dp`, and how long they take."""

    def __init__(self, tree: Path) -> None:
        import coverage

        self.path = tree / "reach.json"
        folder = str(tree / "dpjax/dp/**")
        self.coverage = coverage.Coverage(data_file=None, include=[folder], config_file=False)
        self.seconds: dict[str, float] = {}
        self.coverage.start()

    def pytest_runtest_logreport(self, report: object) -> None:
        name, seconds = report.nodeid, report.duration  # type: ignore[attr-defined]
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(_file(item))  # a fixture may serve the file
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        return (yield)

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {Path(name).stem: data.contexts_by_lineno(name) for name in data.measured_files()}
        self.path.write_text(json.dumps({"lines": lines, "seconds": self.seconds}))


class _Select:
    """A pytest plugin: only the tests that reach a mutant, in every file the quick ones first."""

    def __init__(self, mutant: Mutant, reach: dict) -> None:
        lines = reach["lines"].get(mutant.module, {})
        found = {name for line in mutant.lines() for name in lines.get(str(line), [])}
        self.names = found if "" not in found else set()  # "": when it is imported
        self.seconds = reach["seconds"]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        files = list(dict.fromkeys(map(_file, items)))
        slowest = _SLOWEST.value
        if self.names:
            items[:] = [item for item in items if {item.nodeid, _file(item)} & self.names]
        items[:] = [item for item in items if self.seconds.get(item.nodeid, 0) <= slowest]
        items.sort(key=lambda item: (files.index(_file(item)), self.seconds.get(item.nodeid, 0)))


def _file(item: pytest.Item) -> str:
    return item.nodeid.split("::")[0]


def _fork(tree: Path, module: str, plugin: Callable[[], object]) -> int:
    """Starts the tests that own a module in `tree`; returns the process."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        os.chdir(tree)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.path.insert(0, str(tree))
        names = [f"tests/{name}.py" for name in OWNERS[module]]
        status = pytest.main(
            ["-x", "-q", "-p", "no:cacheprovider", f"dpjax/dp/{module}.py", *names],
            plugins=[plugin()],
        )
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status))


def _wait(pid: int, limit: float, started: float) -> str | None:
    """None while it runs; else "survived", "killed" or "timeout"."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
    if time.monotonic() - started < limit:
        return None
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "timeout"


def _copy(folder: Path, number: int) -> Path:
    tree = folder / str(number)
    ignored = shutil.ignore_patterns("__pycache__", ".git", ".venv*", "*.egg-info")
    shutil.copytree(_ROOT, tree, ignore=ignored)
    return tree


def _unchanged(tree: Path, modules: list[str]) -> dict[str, dict]:
    """What the tests of each module reach, and the seconds a mutant gets; they fill the cache.

    Raises:
        RuntimeError: they fail without any mutation.
    """
    found: dict[str, dict] = {}
    by_owners: dict[tuple[str, ...], dict] = {}
    for module in tqdm(modules, "unchanged"):
        if OWNERS[module] in by_owners:
            found[module] = by_owners[OWNERS[module]]
            continue
        started = time.monotonic()
        pid = _fork(tree, module, lambda: _Reach(tree))
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
            print((tree / "output.txt").read_text(), file=sys.stderr)
            raise RuntimeError(f"the tests of {module} fail without any mutation.")
        found[module] = json.loads((tree / "reach.json").read_text())
        found[module]["limit"] = 60 + 4 * (time.monotonic() - started)
        by_owners[OWNERS[module]] = found[module]
    return found


def _run(chosen: list[Mutant], trees: list[Path], reach: dict[str, dict]) -> Iterator[dict]:
    running: dict[int, tuple[Mutant, Path, float]] = {}
    left, free = collections.deque(chosen), list(trees)
    while left or running:
        while left and free:
            mutant, tree = left.popleft(), free.pop()
            (tree / f"dpjax/dp/{mutant.module}.py").write_text((mutant.source() or ("", ""))[1])
            select = functools.partial(_Select, mutant, reach[mutant.module])
            running[_fork(tree, mutant.module, select)] = (mutant, tree, time.monotonic())
        time.sleep(0.05)
        for pid, (mutant, tree, started) in list(running.items()):
            outcome = _wait(pid, reach[mutant.module]["limit"], started)
            if outcome is not None:
                del running[pid]
                name = f"dpjax/dp/{mutant.module}.py"
                shutil.copy(_ROOT / name, tree / name)
                free.append(tree)
                seconds = round(time.monotonic() - started, 1)
                yield {"mutant": str(mutant), "module": mutant.module, "outcome": outcome,
                       "seconds": seconds, "diff": mutant.diff()}  # fmt: skip


def _print(rows: list[dict]) -> None:
    for row in rows:
        if row["outcome"] == "survived":
            print(f"\n{row['mutant']}\n{row['diff']}")
    print("\n| module | mutants | killed | timed out | survived |\n|---|---|---|---|---|")
    for module in [*sorted({row["module"] for row in rows}), ""]:
        mine = [row["outcome"] for row in rows if module in ("", row["module"])]
        counts = [mine.count(outcome) for outcome in ("killed", "timeout", "survived")]
        print(f"| {module or 'all'} | {len(mine)} | " + " | ".join(map(str, counts)) + " |")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}.")
    modules = _ONLY.value or list(OWNERS)
    everything = [mutant for module in modules for mutant in mutants(module)]
    draw = random.Random(_SEED.value)
    chosen = [mutant for mutant in everything if draw.random() < _SAMPLE.value]
    draw.shuffle(chosen)  # cut short, it is still a fair sample
    out = Path(_OUT.value)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {row["mutant"] for row in rows}
    left = [mutant for mutant in chosen if str(mutant) not in done]
    print(f"{len(chosen)} of {len(everything)} mutants, {len(left)} to go.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # what killed tests leave goes with it
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{folder}/x"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "MPLBACKEND": "agg",
            "JAX_PLATFORMS": "cpu",
        }
        sys.dont_write_bytecode = True  # a mutant of the same size and second would look unchanged
        for name in _PRELOADED:
            importlib.import_module(name)
        trees = [_copy(Path(folder), number) for number in range(_WORKERS.value)]
        reach = _unchanged(trees[0], sorted({mutant.module for mutant in left}))
        with out.open("a") as file:
            for row in tqdm(_run(left, trees, reach), "mutants", total=len(left)):
                file.write(json.dumps(row) + "\n")
                file.flush()
                rows.append(row)
    _print([row for row in rows if row["mutant"] in {str(mutant) for mutant in chosen}])


if __name__ == "__main__":
    app.run(main)
