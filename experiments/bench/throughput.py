"""The cost of privacy: time and memory of every clipping engine against ordinary training.

    python -m experiments.bench.throughput  # everything, about an hour
    python -m experiments.bench.throughput --sizes=vit_ti_64:full --engines=nonprivate,vmap
    python -m experiments.bench.throughput --sizes=vit_b_197:full,vit_b_197:film \\
        --config.dtype=bfloat16   # ViT-B/16 at 224 pixels, on an accelerator
    python -m experiments.bench.throughput --json=out.json --png=out.png --config.rounds=9

Each engine has its own process, so that its peak memory can be measured. All engines of a case take
turns in every round, so that a noisy machine disturbs all of them alike. A ratio is the median over
rounds of (time of the engine / time of the non-private gradient in the same round). Every process
has the same model, weights, batch and threads, and the sums of all engines are compared before
anything is timed. Peers run if they are installed: `pip install .[peers]`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from experiments.bench import throughput_micro

__all__ = ["get_config", "main"]

ENGINES = (
    "nonprivate", "vmap", "bookkeeping", "jax_privacy",
    "torch_nonprivate", "opacus_hooks", "opacus_ghost",
)  # fmt: skip
SETS = ("full", "film", "lora", "head")
CASES = ("vit_ti_64", "vit_ti_197", "resnet_gn", "text_4", "smollm2_4")
LARGE = ("vit_b_197", "smollm2_135m")  # for an accelerator, when asked for


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the benchmark's values; it takes no argument."""
    if arg is not None:
        raise ValueError(f"arg={arg!r} must be absent.")
    return ConfigDict(
        {
            "batch": 32,
            "dtype": "float32",  # of activations: float32 or bfloat16
            "rounds": 7,
            "steps": 2,  # gradients per engine and round; other processes ran before the first
            "microbatch": 0,  # examples at once for vmap and bookkeeping; 0 is the batch
            "classes": 100,
        }
    )


_CONFIG = config_flags.DEFINE_config_dict("config", get_config())
_SIZES = flags.DEFINE_list(
    "sizes", [f"{c}:{s}" for c in CASES for s in SETS], "Cases as MODEL or MODEL:SET"
)
_ENGINES = flags.DEFINE_list("engines", list(ENGINES), "Engines to compare")
_MICRO = flags.DEFINE_bool("micro", True, "Also time the sampler, calibration, heads, recompiles")
_JSON = flags.DEFINE_string("json", None, "Write all figures here")
_PNG = flags.DEFINE_string("png", None, "Draw the ratios here")


class Worker:
    """One engine in a process of its own; talks JSON lines."""

    def __init__(self, engine: str, case: str, subset: str, values: dict[str, Any]) -> None:
        spec = json.dumps({"engine": engine, "case": case, "set": subset, **values})
        self.engine = engine
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.bench.throughput_worker", spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.facts = self._answer()

    def run(self, steps: int) -> dict[str, Any]:
        """Computes `steps` gradients; returns seconds per gradient and peak memory."""
        if self._process.stdin is None:
            raise RuntimeError("the worker has no input.")
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        if self._process.stdout is None:
            raise RuntimeError("the worker has no output.")
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        errors = self._process.stderr.read().splitlines() if self._process.stderr else []
        named = [line for line in errors if line.split(":")[0].endswith("Error")]
        return {"error": named[-1] if named else "the process ended"}


def measure(case: str, subset: str, engines: Sequence[str], config: ConfigDict) -> dict[str, Any]:
    """Times the engines on one model and parameter set.

    Returns:
        For each engine its compile time, memory, seconds per gradient, ratios, or why it is absent.
    """
    values = {k: config[k] for k in ("batch", "dtype", "microbatch", "classes")}
    with contextlib.ExitStack() as stack:
        workers, out = [], {}
        for engine in engines:
            worker = Worker(engine, case, subset, values)
            stack.callback(worker.close)
            out[engine] = dict(worker.facts)
            if "error" in worker.facts or "skip" in worker.facts:
                continue
            workers.append(worker)
        rounds: list[dict[str, float]] = []
        for _ in range(config.rounds):
            seconds = {}
            for worker in workers:
                answer = worker.run(config.steps)
                seconds[worker.engine] = answer["seconds"]
                out[worker.engine]["peak_bytes"] = answer["peak_bytes"]
            rounds.append(seconds)
    for worker in workers:
        name = worker.engine
        times = [r[name] for r in rounds]
        facts = out[name]
        facts["seconds"] = statistics.median(times)
        facts["examples_per_second"] = config.batch / facts["seconds"]
        base = "torch_nonprivate" if name.startswith(("torch", "opacus")) else "nonprivate"
        for other, key in ((base, "ratio"), ("bookkeeping", "over_bookkeeping")):
            if other in rounds[0]:
                ratios = [r[name] / r[other] for r in rounds]
                facts[key] = [statistics.median(ratios), min(ratios), max(ratios)]
        if out.get(base, {}).get("temp_bytes") and facts.get("temp_bytes"):
            facts["temp_ratio"] = facts["temp_bytes"] / out[base]["temp_bytes"]
        if out.get(base, {}).get("peak_bytes"):
            facts["peak_ratio"] = facts["peak_bytes"] / out[base]["peak_bytes"]
    return out


def table(results: dict[str, dict[str, Any]]) -> str:
    """Renders the results as a Markdown table."""
    lines = [
        "| model, set | engine | time / own non-private (min, max) | examples/s | "
        "time / ours | memory / non-private: XLA temporaries, process peak | compile s |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, engines in results.items():
        for name, facts in engines.items():
            if "seconds" not in facts:
                why = facts.get("skip") or facts.get("error", "")
                lines.append(f"| {case} | {name} | {why} | | | | |")
                continue
            memory = [
                f"{facts[k]:.2f}" if k in facts else "-" for k in ("temp_ratio", "peak_ratio")
            ]
            lines.append(
                f"| {case} | {name} | {_span(facts.get('ratio'))} | "
                f"{facts['examples_per_second']:.1f} | {_span(facts.get('over_bookkeeping'))} | "
                f"{', '.join(memory)} | {facts['compile_seconds']:.1f} |"
            )
    return "\n".join(lines)


def summary(results: dict[str, dict[str, Any]]) -> str:
    """Returns a row per case: the cost of our engine, and its speed relative to the peers."""
    peers = ("vmap", "jax_privacy", "opacus_hooks", "opacus_ghost")
    titles = [name.replace("_", " ") for name in peers]
    lines = [
        "| model:set | non-private, examples/s | ours, time / non-private (min, max) | memory | "
        + " | ".join(f"{t}, time / own non-private" for t in titles)
        + " | ours / "
        + " | ours / ".join(titles[1:])
        + " (examples/s) |",
        "|---|" + "---|" * (2 * len(peers) + 2),
    ]
    for case, engines in results.items():
        ours, plain = engines.get("bookkeeping", {}), engines.get("nonprivate", {})
        if "seconds" not in ours or "seconds" not in plain:
            continue

        def first(name: str, key: str, engines: dict[str, Any] = engines) -> str:
            values = engines.get(name, {}).get(key)
            return "-" if values is None else f"{values[0]:.2f}"

        lines.append(
            f"| {case} | {plain['examples_per_second']:.1f} | **{_span(ours['ratio'])}** | "
            f"{ours['temp_ratio']:.2f} | "
            + " | ".join(first(name, "ratio") for name in peers)
            + " | "
            + " | ".join(first(name, "over_bookkeeping") for name in peers[1:])
            + " |"
        )
    return "\n".join(lines)


def _span(values: list[float] | None) -> str:
    return "-" if not values else f"{values[0]:.2f} ({values[1]:.2f}, {values[2]:.2f})"


def draw(results: dict[str, dict[str, Any]], path: str) -> None:
    """Draws the ratios to non-private, with their range over rounds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    names = [e for e in ENGINES if e not in ("nonprivate", "torch_nonprivate")]
    results = {c: r for c, r in results.items() if any("ratio" in facts for facts in r.values())}
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.6 * len(results)), layout="constrained")
    height = 0.8 / len(names)
    for k, name in enumerate(names):
        for row, case in enumerate(results):
            ratio = results[case].get(name, {}).get("ratio")
            if ratio is None:
                continue
            label = name if row == min(
                r for r, c in enumerate(results) if results[c].get(name, {}).get("ratio")
            ) else None  # fmt: skip
            axes.barh(
                row + (k - len(names) / 2) * height, ratio[0], height, color=f"C{k}", label=label,
                xerr=[[ratio[0] - ratio[1]], [ratio[2] - ratio[0]]], capsize=2, align="edge",
            )  # fmt: skip
    axes.axvline(1.0, color="k", lw=1)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set(xlabel="time of a clipped gradient / own non-private gradient (1 = privacy is free)")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    if len(argv) > 1:
        print(f"error: unexpected argument {argv[1]!r}.", file=sys.stderr)
        return 2
    config = _CONFIG.value
    cases = []
    for size in _SIZES.value:
        model, _, subset = size.partition(":")
        if model not in (*CASES, *LARGE) or (subset and subset not in SETS):
            print(f"error: sizes={size!r} must be {CASES + LARGE} with :{SETS}.", file=sys.stderr)
            return 2
        cases += [(model, s) for s in ([subset] if subset else SETS)]
    unknown = set(_ENGINES.value) - set(ENGINES)
    if unknown:
        print(f"error: engines={sorted(unknown)} must be of {ENGINES}.", file=sys.stderr)
        return 2
    results = {}
    for number, (model, subset) in enumerate(cases):
        print(f"[{number + 1}/{len(cases)}] {model}:{subset}", file=sys.stderr, flush=True)
        results[f"{model}:{subset}"] = measure(model, subset, _ENGINES.value, config)
        print(table({f"{model}:{subset}": results[f"{model}:{subset}"]}), flush=True)
    print("\n" + summary(results))
    micro = throughput_micro.measure() if _MICRO.value else {}
    if micro:
        print("\n" + throughput_micro.table(micro))
    machine = {
        "cpu_count": os.cpu_count(), "platform": platform.platform(), "config": dict(config),
    }  # fmt: skip
    if _JSON.value:
        everything = {"machine": machine, "cases": results, "micro": micro}
        Path(_JSON.value).write_text(json.dumps(everything, indent=2) + "\n")
    if _PNG.value:
        draw(results, _PNG.value)
    failed = [c for c, engines in results.items() if any("error" in f for f in engines.values())]
    return 1 if failed else 0


if __name__ == "__main__":
    app.run(main)
