"""The cost of scaling: collectives, bytes and idle time on host devices, and a plan for large ones.

    python -m experiments.bench.scaling          # the weak-scaling table, about 3 min on 2 cores
    python -m experiments.bench.scaling --memory # bytes of a device, LoRA and all parameters, 8 min
    python -m experiments.bench.scaling --plan   # ViT-L, and language models of 1B and 8B, 5 min

The table trains a small ViT for twelve steps on 1, 2, 4 and 8 host devices, with the same number of
examples per device and step, and times the last six. Host devices share the cores of this machine:
collectives and bytes carry over to real devices, but the times are those of one machine divided
into parts.

The memory table reads arguments and temporaries of one of 8 devices, while it accumulates a chunk,
off the compiled program of a ViT of eight blocks, about 6.4 MB of parameters.

The plan analyzes the compiled step of ViT-L on data of ImageNet-21k's size, and of LoRA on decoders
(operations and bytes per example from programs of one and two blocks, book-keeping engine,
float32), calibrates the noise, and divides by the vendors' peak numbers in `_MACHINES`. It gives a
lower bound on the time, not a measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dpjax import build, dp, models
from dpjax.config import default
from dpjax.models import finetune
from dpjax.runtime import Workdir, compilation, read_jsonl, sharding
from dpjax.training import loop, phases

__all__ = ["collectives", "get_config", "main"]

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config of one row; the argument is the number of devices."""
    devices = int(arg or 1)
    config = default()
    config.data.name = "digits"
    with config.unlocked():
        config.model.options = {"width": 64, "depth": 2, "heads": 4, "mlp": 128, "image_size": 14}
    config.dp.delta = 1e-4
    config.private_seed = 5
    config.batch_size = 128 * devices
    config.physical_batch = 32 * devices
    config.epochs = 12 * config.batch_size / 1617
    config.eval_every = 6
    return config


def collectives(program: str) -> list[tuple[str, int]]:
    """Returns kind and bytes of every collective of a compiled program's text.

    The bytes are those of the larger of operand and result: what all devices together hold once.
    """
    found = []
    for line in program.splitlines():
        match = re.search(rf" ({_KINDS})(?:-start)?\(", line)
        if match is not None:
            sizes = [
                _BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n)
                for kind, shape in re.findall(r"\b(f32|bf16|f16|s32|u32|pred)\[([\d,]*)\]", line)
            ]
            found.append((match[1], max(sizes)))
    return found


def _sent(kind: str, size: int, devices: int) -> float:
    """Bytes that each device sends in a ring: a reduction of all to all passes the data twice."""
    return (2 if kind == "all-reduce" else 1) * size * (devices - 1) / devices


def _row(devices: int, layout: str) -> list[str]:
    run = build.build(get_config(str(devices)))
    run = run._replace(layout=sharding.layout(layout, jax.devices()[:devices]))
    found = _step_collectives(run)
    with tempfile.TemporaryDirectory() as directory:
        workdir = Workdir(f"{directory}/w")
        loop.train(run, workdir)
        rows = list(read_jsonl(workdir.path / "metrics.jsonl"))
    last = [r for r in rows if "idle_fraction" in r][-1]  # compiled before
    speed, idle = last["examples_per_second"], last["idle_fraction"]
    padding = statistics.mean(
        r["nonprivate/padding_fraction"] for r in rows if "nonprivate/padding_fraction" in r
    )
    names = [f"{sum(k == kind for k, _ in found)} {kind}" for kind in _KINDS.split("|")
             if any(k == kind for k, _ in found)]  # fmt: skip
    sent = sum(_sent(kind, size, devices) for kind, size in found)
    state = phases.checkpoint_like(phases.prepare(run, 5)[0], run.params)["state"]
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )
    return [
        str(devices), layout, str(run.config.batch_size), ", ".join(names) or "none",
        f"{sent / 1e3:.0f} kB", f"{held / 1e3:.0f} kB", f"{speed:.0f}",
        f"{1e3 * run.config.batch_size / speed:.0f} ms", f"{100 * idle:.1f} %",
        f"{100 * padding:.0f} %",
    ]  # fmt: skip


def _step_collectives(run: build.Run) -> list[tuple[str, int]]:
    """Of one whole step: begin, one chunk, update."""
    prepared = phases.prepare(run, 5)[0]
    steps, hyper = prepared.steps, prepared.hyper
    trainable, frozen = prepared.split(run.params)
    state = steps.init(sharding.place(trainable, run.layout.shardings(trainable)), hyper)
    whole, totals = steps.begin(state)
    rows = run.config.physical_batch
    batch = sharding.to_mesh(
        {
            **run.train.get(np.arange(rows)),
            "index": np.arange(rows),
            "mask": np.ones(rows, bool),
        },
        run.layout.mesh,
    )
    programs: list[Any] = [
        steps.accumulate.lower(totals, whole, frozen, batch, jnp.int32(0), hyper),  # type: ignore[attr-defined]
        steps.update.lower(state, totals, hyper),  # type: ignore[attr-defined]
    ]
    if run.layout.spread is not None:
        programs.append(jax.jit(run.layout.for_steps).lower(state.trainable))
    return [one for program in programs for one in collectives(program.compile().as_text())]


# Without these XLA's CPU compiler drops JAX's barriers, gathers early and keeps.
_BARRIERS = {
    "xla_disable_hlo_passes": "cse_barrier_expander",
    "xla_cpu_enable_concurrency_optimized_scheduler": False,
}


def _memory(finetune: str, microbatch: int | None, layout: str) -> str:
    """A row: arguments and temporaries of `accumulate` on one device."""
    config = get_config("8")
    options = {"width": 128, "depth": 8, "heads": 4, "mlp": 512, "image_size": 14}
    with config.unlocked():
        config.model.options = options
    config.finetune = finetune
    config.microbatch = microbatch
    run = build.build(config)._replace(layout=sharding.layout(layout))
    prepared = phases.prepare(run, 5)[0]
    frozen, state = prepared.begin(run.params, None)
    trainable, totals = prepared.steps.begin(state)
    rows = config.physical_batch
    batch = {**run.train.batch(np.arange(rows), seed=0, step=0), "mask": np.ones(rows, bool)}
    placed = sharding.to_mesh(batch, run.layout.mesh)
    args = totals, trainable, frozen, placed, jnp.int32(0), prepared.hyper
    program = prepared.steps.accumulate.lower(*args).compile(_BARRIERS)  # type: ignore[attr-defined]
    sizes = program.memory_analysis()
    return (
        f"| {finetune} | {microbatch or 'the chunk'} | {layout} | "
        f"{sizes.argument_size_in_bytes / 1e3:,.0f} kB | {sizes.temp_size_in_bytes / 1e3:,.0f} kB |"
    )


class _Machine(NamedTuple):
    """Peak numbers of the vendor, per chip."""

    name: str
    chips: int
    flops: float  # bfloat16, dense
    memory: float  # bytes
    link: float  # bytes/s that a chip can send to the others


_MACHINES = {
    "images": (
        _Machine("TPU v5e-256", 256, 197e12, 16e9, 200e9),
        _Machine("64 H100 (8 x 8)", 64, 989e12, 80e9, 50e9),
    ),
    "text": (
        _Machine("8 H100", 8, 989e12, 80e9, 450e9),
        _Machine("TPU v5e-64", 64, 197e12, 16e9, 200e9),
    ),
}
_CLASSES = 21_841
_VIT_L = models.ViTConfig(
    width=1024, depth=24, heads=16, mlp=4096, patch=16, image_size=224, channels=3
)
_LLAMA_1B = dataclasses.replace(models.DECODERS["llama3_2_1b"], max_length=512)
_LLAMA_8B = dataclasses.replace(
    _LLAMA_1B, width=4096, depth=32, mlp=14336, rope_factor=8.0, tied=False
)


class _Paper(NamedTuple):
    """A large run that is planned and not run.

    Attributes:
        name: of the model and what trains.
        machines: key of `_MACHINES`.
        shape: of the model.
        setting: N, B, epochs and delta.
        frozen_bytes: of a frozen parameter.
        reads: bytes of an example.
    """

    name: str
    machines: str
    shape: models.ViTConfig | models.DecoderConfig
    setting: tuple[int, int, int, float]
    frozen_bytes: int
    reads: int


_PAPERS = (
    _Paper("ViT-L/16, all parameters", "images", _VIT_L, (14_197_122, 32_768, 8, 1e-8), 4,
           224 * 224 * 3),
    _Paper("Llama 3.2 1B, LoRA of rank 16, base in bfloat16, 512 tokens", "text", _LLAMA_1B,
           (100_000, 2_048, 3, 1e-6), 2, 3 * 4 * 512),
    _Paper("Llama 3.1 8B, LoRA of rank 16, base in int8, 512 tokens", "text", _LLAMA_8B,
           (100_000, 2_048, 3, 1e-6), 1, 3 * 4 * 512),
)  # fmt: skip


class _Cost(NamedTuple):
    """Of one example's clipped gradient."""

    flops: float
    bytes: float


def _task(shape: models.ViTConfig | models.DecoderConfig) -> tuple[Any, Any, Any]:
    """The tuning of a plan, its loss `(params, example)`, and an example."""
    if isinstance(shape, models.DecoderConfig):
        tuning = finetune.lora(rank=16, targets="attn/|mlp/")(models.decoder(shape, remat=True))
        _, loss = build.next_token.functions(tuning.model)
        tokens = jax.ShapeDtypeStruct((3, shape.max_length), jnp.int32)
        return tuning, loss, {"input": tokens}
    tuning = finetune.full()(models.vision_transformer(shape, _CLASSES))

    def loss(params: Any, example: Any) -> jax.Array:
        return -jax.nn.log_softmax(tuning.model.apply(params, example["x"]))[example["y"]]

    image = jax.ShapeDtypeStruct((224, 224, 3), jnp.float32)
    return tuning, loss, {"x": image, "y": jax.ShapeDtypeStruct((), jnp.int32)}


def _split(tuning: Any) -> tuple[Any, Any]:
    whole = jax.eval_shape(tuning.model.init, jax.random.key(0))
    return finetune.split(whole, tuning.trainable)


def _cost(shape: models.ViTConfig | models.DecoderConfig, depth: int) -> _Cost:
    """Differences of compiled programs of two batch sizes: what does not grow cancels."""
    tuning, loss, example = _task(dataclasses.replace(shape, depth=depth))
    trains, frozen = _split(tuning)

    def total(trains: Any, frozen: Any, batch: Any, mask: Any) -> Any:
        whole = lambda params, example: loss(finetune.join(params, frozen), example)  # noqa: E731
        return dp.clipped_sum(whole, dp.flat(1.0))(trains, batch, mask)[0].value

    def compiled(size: int) -> _Cost:
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), example)
        mask = jax.ShapeDtypeStruct((size,), jnp.bool_)
        # Programs of the host would drop the barriers of checkpointed blocks.
        program = jax.jit(total).lower(trains, frozen, batch, mask).compile(_BARRIERS)
        operations: Any = program.cost_analysis()
        memory: Any = program.memory_analysis()
        return _Cost(operations["flops"], memory.temp_size_in_bytes)

    small, large = compiled(2), compiled(4)
    return _Cost(*((b - a) / 2 for a, b in zip(small, large)))


def _plan(paper: _Paper) -> list[str]:
    shape = paper.shape
    one, two = _cost(shape, 1), _cost(shape, 2)
    example = _Cost(*(a + (shape.depth - 1) * (b - a) for a, b in zip(one, two)))
    trains, frozen = _split(_task(shape)[0])
    count, stays = finetune.count(trains), finetune.count(frozen)
    examples, batch, epochs, delta = paper.setting
    mechanism = dp.calibrated(
        epsilon=8.0, delta=delta, num_examples=examples, batch_size=batch, epochs=epochs
    )
    lines = [
        f"{paper.name}: {count / 1e6:.0f} M parameters train, {stays / 1e6:,.0f} M are frozen; one "
        f"example's clipped gradient takes {example.flops / 1e9:,.0f} GFLOP and "
        f"{example.bytes / 1e6:.0f} MB of temporaries (float32, from compiled programs)",
        f"N = {examples:,}, B = {batch:,}, {epochs} epochs: T = {mechanism.steps:,} steps, "
        f"q = {mechanism.sampling_prob:.5f}, sigma = {mechanism.noise_multiplier:.3f} for "
        f"epsilon 8, delta {delta:g}; {batch * paper.reads / 1e9:.2g} GB of input a step, over all "
        "hosts",
        "",
        "| machine | per chip and step | state, replicated | state, fsdp | left for examples | "
        "rows at once | sum sent | compute >= | collectives >= | run >= |",
        "|" + 10 * "---|",
    ]
    for machine in _MACHINES[paper.machines]:
        rows = batch / machine.chips
        # Parameters, two moments; the sum and its traveling copy are there in both layouts.
        held = paper.frozen_bytes * stays
        state, sums = 3 * 4 * count + held, 2 * 4 * count
        spread = state / machine.chips
        left = machine.memory - sums - spread
        at_once = max(1.0, left / example.bytes)
        sent = _sent("all-reduce", 4 * count, machine.chips)
        # Frozen parameters are gathered in the forward and, at least once, in the backward pass.
        chunks = math.ceil(rows / at_once)
        gathered = 2 * chunks * _sent("all-gather", held, machine.chips) if held else 0
        compute = rows * example.flops / machine.flops
        moved = (sent + gathered) / machine.link
        hours = mechanism.steps * (compute + moved) / 3600
        lines.append(
            f"| {machine.name} | {rows:.0f} examples | {(state + sums) / 1e9:.1f} GB | "
            f"{(spread + sums) / 1e9:.1f} GB | {left / 1e9:.1f} GB | "
            f"{max(0.0, left / example.bytes):.0f} | {sent / 1e9:.1f} GB | {compute:.2f} s | "
            f"{1e3 * moved:.0f} ms | {60 * hours:.1f} min |"
        )
    return lines


def main(argv: Sequence[str]) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="experiments.bench.scaling")
    parser.add_argument("--plan", action="store_true", help="the plan instead of the table")
    parser.add_argument("--devices", default="1,2,4,8", help="rows of the table")
    parser.add_argument("--memory", action="store_true", help="the table of memory")
    given = parser.parse_args(argv)
    compilation.keep_on_disk()
    if given.plan:
        for paper in _PAPERS:
            print("\n".join([*_plan(paper), ""]), flush=True)
        return 0
    if given.memory:
        print("| trains | microbatch | layout | arguments | temporaries |\n|" + 5 * "---|")
        for finetune in ("lora:4", "full"):
            for microbatch in (None, 1):
                for layout in ("replicated", "fsdp"):
                    print(_memory(finetune, microbatch, layout), flush=True)
        return 0
    print(
        "| devices | layout | batch | collectives a step | sent per device and step | state per "
        "device | examples/s | step | idle | padding |\n|" + 10 * "---|"
    )
    for devices in map(int, given.devices.split(",")):
        for layout in ("replicated", "fsdp")[: 1 + (devices > 1)]:
            print("| " + " | ".join(_row(devices, layout)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
