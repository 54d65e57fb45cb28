"""Everything runs on eight host devices with JAX's strictest checks on."""

import atexit
import collections
import gc
import os
import shutil
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

# Programs are compiled without LLVM's optimizations, which saves a tenth to a third of the time.
os.environ["XLA_FLAGS"] = (  # Flags that are set already come last and win.
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    + os.environ.get("XLA_FLAGS", "")
)
# Most of a test is compilation. The older emitter, with one LLVM module for a program, takes a
# quarter of the time. XLA stops at a flag that it does not know, and jax 0.12 does not know it.
if metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
        + os.environ["XLA_FLAGS"]
    )
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs do not say which line of the model each operation is from: 2 % less to do.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("MPLBACKEND", "agg")
# No test reads or writes the user's caches. Workers and the processes that tests start share one
# cache of compiled programs, which many tests have in common; it starts empty.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["DPJAX_CACHE_DIR"] = tempfile.mkdtemp(prefix="dpjax-test-cache-")
    atexit.register(shutil.rmtree, os.environ["DPJAX_CACHE_DIR"], ignore_errors=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["DPJAX_CACHE_DIR"] + "/xla")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax
import pytest

# Test files import one another by name, from whichever folder.
sys.path[:0] = [str(path) for path in Path(__file__).parent.iterdir() if path.is_dir()]
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
# The same examples in every run: a red suite means a change, never the luck of a draw.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
hypothesis.settings.load_profile("suite")

# The collector of cycles walks JAX's many objects again and again: 7 % of the time where it was
# measured. It runs once after every file instead, and then only over what that file left.
gc.disable()


@pytest.fixture(scope="module", autouse=True)
def _collect_cycles_once_a_file():
    yield
    with warnings.catch_warnings():
        # Of Orbax, after a read of a damaged checkpoint: we cannot await it.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        gc.collect()
    gc.freeze()


_cases = collections.Counter()


def pytest_itemcollected(item):
    """Of the cases of a test with `one_in(n)`, leaves all but each n-th to the tests on demand."""
    share = item.get_closest_marker("one_in")
    if share:
        if _cases[item.function] % share.args[0]:
            item.add_marker(pytest.mark.slow)
        _cases[item.function] += 1


def _stage(nodeid):
    if nodeid.startswith("dpjax/"):
        return "doctests"
    return {"tests/test_quality.py": "lint and types", "tests/test_docs.py": "docs"}.get(
        nodeid.partition("::")[0], "tests"
    )


def pytest_terminal_summary(terminalreporter):
    """Prints where the time went: seconds of each stage, and of the slowest files."""
    stages, files = collections.Counter(), collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            seconds = getattr(report, "duration", 0.0)
            if seconds:
                stages[_stage(report.nodeid)] += seconds
                files[report.nodeid.partition("::")[0]] += seconds
    terminalreporter.section("seconds, summed over workers")
    for name, seconds in [*stages.most_common(), *files.most_common(8)]:
        terminalreporter.write_line(f"{seconds:8.1f}  {name}")
