"""Kills a run with `kill -9` again and again, and checks that its result is that of a calm run.

    python -m experiments.bench.stress --workdir=/tmp/dpjax-stress --rounds=20

A reference run is not disturbed. A second run of the same config is killed at random moments, while
it starts, trains, saves or evaluates, and started again with the same command, until `rounds` kills
have happened; whenever it finishes, another one replaces it. After every kill, the files must be
readable, the statement must report at least the steps that left a trace, and only the steps since
the last complete checkpoint may be lost. At the end of every run, the parameters must equal those
of the reference bit for bit, with the same statement and every step logged once. Prints one row per
kill; exit code 1 on any difference. About 10 s per round on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dpjax.config import default
from dpjax.runtime import read_jsonl

__all__ = ["get_config", "main"]

_EVERY = 3  # steps from checkpoint to checkpoint
_STEPS = 48
_STARTUP = 10.0  # seconds, about


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config of the run that is killed: the smallest ViT on the UCI digits."""
    if arg is not None:
        raise ValueError(f"arg={arg!r} must be absent.")
    config = default()
    config.data.name = "digits"
    with config.unlocked():
        config.model.options = {"width": 16, "depth": 1, "heads": 2, "mlp": 16, "image_size": 14}
    config.finetune = "film"
    config.private_seed = 5
    config.dp.delta = 1e-4
    # Three epochs of 16 steps: most kills fall inside an epoch, whose draws are then made again.
    config.dp.sampler = "random_allocation"
    config.batch_size = 100
    config.epochs = _STEPS / 16
    config.checkpoint_every = _EVERY
    config.eval_every = 16
    return config


def _start(workdir: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "dpjax",
        "train",
        f"--config={__file__}",
        f"--workdir={workdir}",
    ]
    with open(workdir.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _logged(workdir: Path) -> int:
    """The last step that left a row."""
    file = workdir / "metrics.jsonl"
    return max((row["step"] for row in read_jsonl(file)), default=0) if file.exists() else 0


def _identity(workdir: Path) -> int | None:
    """Distinguishes the metrics of this process from earlier ones: resuming rewrites the file."""
    file = workdir / "metrics.jsonl"
    return file.stat().st_ino if file.exists() else None


def _saved(workdir: Path) -> int:
    """The step of the latest checkpoint."""
    found = (workdir / "checkpoints").glob("[0-9]*")
    return max((int(p.name) for p in found if p.name.isdigit()), default=0)


def _charged(workdir: Path) -> int:
    file = workdir / "privacy.json"
    return int(json.loads(file.read_text())["steps_done"]) if file.exists() else 0


def _kill(workdir: Path, dice: random.Random) -> bool:
    """Starts the run and kills it at a random moment; False if it finished first."""
    before = _identity(workdir)
    child = _start(workdir)
    try:
        if dice.random() < 0.2:
            time.sleep(dice.uniform(0, _STARTUP))
        else:
            wanted = _saved(workdir) + dice.randint(1, 5 * _EVERY)
            while child.poll() is None and (
                _identity(workdir) == before or _logged(workdir) < wanted
            ):
                time.sleep(0.005)
            time.sleep(dice.expovariate(20))
        done = child.poll()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    if done not in (None, 0):
        raise RuntimeError(f"the run failed by itself, exit {done}: see {workdir}.log")
    return done is None


def _differences(workdir: Path, reference: Path) -> list[str]:
    """Returns the differences between a finished run and the reference."""
    found = [
        name
        for name in ("weights.safetensors", "privacy.json", "privacy.md", "eval.json")
        if (workdir / name).read_bytes() != (reference / name).read_bytes()
    ]
    steps = [r["step"] for r in read_jsonl(workdir / "metrics.jsonl") if "nonprivate/loss" in r]
    if steps != list(range(1, _STEPS + 1)):
        found.append(f"logged steps {steps}")
    return [f"{workdir.name}: {what} differs from the reference" for what in found]


def main(argv: Sequence[str]) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="experiments.bench.stress")
    parser.add_argument("--workdir", required=True, type=Path, help="new directory")
    parser.add_argument("--rounds", type=int, default=20, help="how often to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    given = parser.parse_args(argv)
    given.workdir.mkdir(parents=True)
    dice = random.Random(given.seed)

    reference = given.workdir / "reference"
    undisturbed = _start(reference)
    problems: list[str] = []
    number, killed = 0, 0
    print("| round | run | last logged step | checkpoint | lost | charged |\n" + 6 * "|---" + "|")
    while True:
        workdir = given.workdir / f"run{number}"
        if killed < given.rounds and _kill(workdir, dice):
            killed += 1
            logged, saved, charged = _logged(workdir), _saved(workdir), _charged(workdir)
            lost = max(0, logged - saved)
            print(f"| {killed} | {number} | {logged} | {saved} | {lost} | {charged} |", flush=True)
            if charged < max(logged, saved):
                problems.append(f"round {killed}: charged {charged} of {max(logged, saved)} steps")
            # The last checkpoint may have been under way, and the next one about to begin.
            if lost > 2 * _EVERY:
                problems.append(f"round {killed}: {lost} steps lost")
            continue
        if _start(workdir).wait() != 0:
            raise RuntimeError(f"the run failed by itself: see {workdir}.log")
        if undisturbed.wait() != 0:
            raise RuntimeError(f"the reference run failed: see {reference}.log")
        problems += _differences(workdir, reference)
        number += 1
        if killed >= given.rounds:
            break
    print(f"\n{killed} kills, {number} runs finished, {len(problems)} problems")
    print("\n".join(problems))
    return int(bool(problems))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main(sys.argv[1:]))
