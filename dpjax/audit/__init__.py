"""Attacks on the guarantee of a run, with canaries among its examples."""

from dpjax.audit.attack import attach, audit, check, line, refuted, write
from dpjax.audit.canaries import CANARIES

__all__ = [
    "CANARIES",
    "attach",
    "audit",
    "check",
    "line",
    "refuted",
    "write",
]
