"""Everything runs on eight host devices with JAX's strictest checks on."""

import atexit
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# No test reads or writes the user's caches.
os.environ["DPJAX_CACHE_DIR"] = tempfile.mkdtemp(prefix="dpjax-test-cache-")
atexit.register(shutil.rmtree, os.environ["DPJAX_CACHE_DIR"], ignore_errors=True)

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
# The same examples in every run: a red suite means a change, never the luck of a draw.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
hypothesis.settings.load_profile("suite")
