"""Devices, processes and disk: the mesh, the hosts, compiled programs, checkpoints, run files."""

from dpjax.runtime import compilation, gathering, hosts, rows, sharding
from dpjax.runtime.checkpoints import Checkpoints, Unreadable, Unwritable
from dpjax.runtime.workdir import (
    PUBLISHED,
    OtherRun,
    Workdir,
    code_digest,
    json_digest,
    may_be_published,
    read_jsonl,
)

__all__ = [
    "PUBLISHED",
    "Checkpoints",
    "OtherRun",
    "Unreadable",
    "Unwritable",
    "Workdir",
    "code_digest",
    "compilation",
    "gathering",
    "hosts",
    "json_digest",
    "may_be_published",
    "read_jsonl",
    "rows",
    "sharding",
]
