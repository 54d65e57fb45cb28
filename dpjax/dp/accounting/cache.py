"""Numbers that are slow to compute, kept on disk between runs and shared by parallel ones.

They live in DPJAX_CACHE_DIR/accounting, or in ~/.cache/dpjax/accounting; an empty DPJAX_CACHE_DIR
turns the cache off. One small JSON file per number, so that processes never share a file to write.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["cached"]


@functools.cache
def _ours() -> str:
    """Digest of the code whose results are kept."""
    here = pathlib.Path(__file__).parent
    names = ("accountant", "events", "root")
    code = b"".join((here / f"{name}.py").read_bytes() for name in names)
    return hashlib.sha256(code).hexdigest()[:16]


def cached(key: Sequence[Any], compute: Callable[[], float]) -> float:
    """The number stored under `key`, else compute() and store it.

    Args:
      key: everything that the number depends on, as JSON values; dp_accounting's version and a
        digest of our own accounting code are added.
      compute: gives a number >= 0, inf included.
    Guarantees:
      A cache that is absent, damaged or not writable costs time and nothing else.
    """
    root = os.environ.get("DPJAX_CACHE_DIR", os.path.expanduser("~/.cache/dpjax"))
    if not root:
        return compute()
    version = importlib.metadata.version("dp-accounting")
    text = json.dumps([f"dp-accounting {version}, dpjax {_ours()}", *key])
    name = hashlib.sha256(text.encode()).hexdigest()[:40]
    path = pathlib.Path(root, "accounting", f"{name}.json")
    try:
        entry = json.loads(path.read_text())
        if entry["key"] == text and entry["value"] >= 0:
            return float(entry["value"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, or damaged: computed anew and written over
    value = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({"key": text, "value": value}, file)
        os.replace(file.name, path)  # readers see the old file or the whole new one
    except OSError:
        pass
    return value
