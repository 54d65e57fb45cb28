"""Numbers that are slow to compute, kept on disk between runs and shared by parallel ones.

They live in DPJAX_CACHE_DIR/accounting, or in ~/.cache/dpjax/accounting; an empty DPJAX_CACHE_DIR
turns the cache off. One small file per number: its name is the digest of everything the number
depends on, its content the number and a checksum. A half-written or damaged file fails the
checksum, so no file has to be renamed into place.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

__all__ = ["cached", "fingerprint"]

# Digest of the code whose results are kept, read when it is imported: were it read later, numbers
# of the code that runs could be stored under code that has been edited since.
_CODE = hashlib.sha256(
    b"".join(
        pathlib.Path(__file__).with_name(f"{name}.py").read_bytes()
        for name in ("accountant", "allocation", "composition", "events", "losses", "releases")
    )
).hexdigest()


def fingerprint(value: Any) -> str | None:
    """Returns a digest of the whole content of `value`; None if it cannot be pickled.

    A `repr` would not do: it abbreviates large arrays.
    """
    try:
        return hashlib.sha256(pickle.dumps(value, protocol=5)).hexdigest()
    except (pickle.PicklingError, AttributeError, TypeError, RecursionError):
        return None


def cached(key: Any, compute: Callable[[], float]) -> float:
    """Returns the number stored under `key`, else computes and stores it.

    Args:
        key: everything that the number depends on; dp_accounting's version and a digest of our own
            accounting code are added. A key that cannot be pickled is not cached.
        compute: returns a number >= 0, inf included.

    Guarantees:
        Different keys never share a number. A cache that is absent, damaged or not writable costs
        time and nothing else.
    """
    root = os.path.expanduser(os.environ.get("DPJAX_CACHE_DIR", "~/.cache/dpjax"))
    name = fingerprint((importlib.metadata.version("dp-accounting"), _CODE, key))
    if not root or name is None:
        return compute()
    path = pathlib.Path(root, "accounting", name)
    try:
        stored = path.read_bytes()
    except OSError:
        stored = b""
    number = stored.partition(b" ")[0]
    if stored and stored == _entry(name, number):
        return float.fromhex(number.decode())
    value = float(compute())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_entry(name, value.hex().encode()))
    except OSError:
        pass
    return value


def _entry(name: str, number: bytes) -> bytes:
    """The content of a file. The checksum covers its name: a copied file is not another's."""
    return number + b" " + hashlib.sha256(name.encode() + b" " + number).hexdigest().encode()
