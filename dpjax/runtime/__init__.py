"""Devices, processes and disk: the mesh, the hosts, compiled programs, checkpoints, run files."""

from dpjax.runtime import compilation, hosts, sharding
from dpjax.runtime.checkpoints import Checkpoints, Unreadable, Unwritable
from dpjax.runtime.workdir import OtherRun, Workdir, code_digest, digest, read_jsonl

__all__ = [
    "Checkpoints",
    "OtherRun",
    "Unreadable",
    "Unwritable",
    "Workdir",
    "code_digest",
    "compilation",
    "digest",
    "hosts",
    "read_jsonl",
    "sharding",
]
