"""Several processes as one run: they start, agree and stop together.

With a single process, every function here returns its argument or does nothing.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["Disagreement", "agree", "catch_signals", "first", "gather", "in_cluster", "start"]

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


class Disagreement(ValueError):
    """Raised on every host, before any step, if the hosts were given different runs."""


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of the run; call it before any use of a device.

    Missing arguments are read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
    a Kubernetes indexed job sets JOB_COMPLETION_INDEX, which replaces the last one. If none is set,
    JAX configures itself in a Slurm step of several tasks and on a TPU host.

    Args:
        coordinator: "host:port" of process 0.
        num_processes: how many processes take part.
        process_id: number of this process, in [0, num_processes).

    Raises:
        ValueError: only some of the three are known, or one of them is no number or out of range.
    """
    env = os.environ
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    if num_processes is None:
        num_processes = _integer("JAX_NUM_PROCESSES")
    if coordinator is None and num_processes is None and process_id is None:
        if in_cluster():
            jax.distributed.initialize()
        return
    if process_id is None:
        process_id = _integer("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX")
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(
            f"coordinator={coordinator}, num_processes={num_processes} and process_id={process_id} "
            "must be given together, or not at all."
        )
    if not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"coordinator={coordinator!r} must be 'host:port'.")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process_id={process_id} must be in [0, num_processes={num_processes}).")
    jax.distributed.initialize(coordinator, num_processes, process_id)


def in_cluster() -> bool:
    """Whether this process is a Slurm step of several tasks, or on a TPU host."""
    if all(name in os.environ for name in _SLURM) and int(os.environ["SLURM_NTASKS"]) > 1:
        return True
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def gather(value: Any) -> list[Any]:
    """Returns the JSON value of every host, in the order of the hosts."""
    if jax.process_count() == 1:
        return [value]
    # Only arrays of one shape on all hosts can be gathered: first the lengths, then padded bytes.
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([text.size]))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes.ravel())]


def first(value: Any) -> Any:
    """Returns host 0's JSON value on every host."""
    return gather(value)[0]


def agree(facts: Mapping[str, Any]) -> None:
    """Checks that every host states the same facts.

    Raises:
        Disagreement: on every host, naming the facts that differ and the hosts.
    """
    everyone = gather(dict(facts))
    wrong = [
        f"{name}: host {host} has {theirs[name]!r}, host 0 has {everyone[0][name]!r}"
        for name in facts
        for host, theirs in enumerate(everyone)
        if theirs[name] != everyone[0][name]
    ]
    if wrong:
        raise Disagreement(f"the hosts were given different runs: {'; '.join(wrong[:4])}.")


def catch_signals() -> Callable[[int], bool]:
    """Turns the first SIGTERM or Ctrl-C into a request to stop; a second one kills the process.

    Returns:
        `(step) -> whether to stop before that step`, which every host calls before every step.
        With several hosts, a SIGTERM to one of them stops all before the same step.
    """
    if jax.process_count() > 1:
        # JAX's coordination service has caught SIGTERM since `start`, and picks a common step.
        return multihost_utils.reached_preemption_sync_point
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, receive)
    signal.signal(signal.SIGINT, receive)
    return lambda step: bool(received)


def _integer(*names: str) -> int | None:
    """The first of some environment variables that is set, as a number."""
    for name in names:
        text = os.environ.get(name)
        if text is not None and not text.isdigit():
            raise ValueError(f"{name}={text!r} must be a whole number.")
        if text is not None:
            return int(text)
    return None
