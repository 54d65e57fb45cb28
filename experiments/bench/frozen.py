"""Memory of one device while frozen parameters are replicated, or sharded and gathered at each use.

    XLA_FLAGS="--xla_force_host_platform_device_count=8 \\
        --xla_disable_hlo_passes=cse_barrier_expander \\
        --xla_cpu_enable_concurrency_optimized_scheduler=false \\
        --xla_backend_optimization_level=0" \\
        python -m experiments.bench.frozen

Numbers are read off compiled programs (`compiled.memory_analysis()`); nothing runs. The flags make
the CPU compiler do what those of accelerators do: keep JAX's barriers, and schedule for memory. The
last one only makes it faster.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import NamedSharding

from dpjax import dp, models
from dpjax.models import finetune
from dpjax.runtime import sharding
from dpjax.step import Hyper, make_steps

__all__ = ["main", "measure"]

_TOKENS, _ROWS = 16, 16


def _bytes(text: str, *, remat: bool, microbatch: int | None) -> dict[str, int]:
    """Bytes of `accumulate` on one device, with LoRA on a text encoder of eight blocks."""
    shape = models.TextConfig(512, 128, 8, 4, 512, positions=_TOKENS, max_length=_TOKENS)
    tuning = finetune.lora(rank=4)(models.text_encoder(shape, 3, remat=remat))
    layout = sharding.layout(text)
    params: Any = jax.eval_shape(tuning.model.init, jax.random.key(0))
    trainable, frozen = finetune.split(params, tuning.trainable)

    def loss(params: Any, example: Any) -> jax.Array:
        logits = tuning.model.apply(params, example["input"])
        return -jax.nn.log_softmax(logits)[example["label"]]

    def sgd(hyper: Hyper) -> Any:
        return dp.sgd(1.0, hyper.noise_multiplier, _ROWS, key=hyper.noise_key)

    def like(tree: Any, axes: Any) -> Any:
        return jax.tree.map(
            lambda x, axis: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(layout.mesh, sharding.partition(axis))
            ),
            tree,
            axes,
        )

    one = jnp.float32(1.0)
    hyper = Hyper(one, one, dp.flat(1.0), jax.random.key(0), jax.random.key(1), one)
    steps = make_steps(loss, sgd, layout, private=True, microbatch_size=microbatch)
    whole = like(trainable, jax.tree.map(lambda x: -1, trainable))
    totals = jax.eval_shape(steps.begin, jax.eval_shape(steps.init, trainable, hyper))[1]
    batch = {
        "input": jax.ShapeDtypeStruct((_ROWS, _TOKENS), jnp.int32),
        "label": jax.ShapeDtypeStruct((_ROWS,), jnp.int32),
        "identity": jax.ShapeDtypeStruct((_ROWS,), jnp.uint32),
        "mask": jax.ShapeDtypeStruct((_ROWS,), bool),
    }
    first = lambda tree: like(tree, jax.tree.map(lambda x: 0, tree))  # noqa: E731
    arguments = first(totals), whole, like(frozen, layout.frozen_axes(frozen)), first(batch)
    found = steps.accumulate.lower(*arguments, jnp.int32(0), hyper).compile()  # type: ignore[attr-defined]
    sizes = found.memory_analysis()
    return {
        "frozen": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen)),
        "arguments": sizes.argument_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "total": sizes.argument_size_in_bytes + sizes.temp_size_in_bytes,
        "gathers": found.as_text().count(" all-gather("),
    }


def measure() -> list[dict[str, Any]]:
    """Returns both layouts, for a chunk at once and in microbatches."""
    rows = []
    for case in ({"remat": False, "microbatch": None}, {"remat": False, "microbatch": 1}):
        sizes = {text: _bytes(text, **case) for text in ("replicated", "fsdp")}
        rows.append({**case, "frozen": sizes["fsdp"]["frozen"], **sizes})
    return rows


def main(argv: list[str]) -> None:
    """Prints the table, or with --json its rows."""
    del argv
    rows = measure()
    if flags.FLAGS.json:
        print(json.dumps(rows))
        return
    print("| remat | microbatch | layout | frozen | arguments | temporaries | gathers |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        for text in ("replicated", "fsdp"):
            kilobytes = [f"{row[text][k] / 1e3:.0f} kB" for k in ("arguments", "temporaries")]
            cells = [row["remat"], row["microbatch"], text, f"{row['frozen'] / 1e3:.0f} kB"]
            print("|", " | ".join(map(str, [*cells, *kilobytes, row[text]["gathers"]])), "|")


if __name__ == "__main__":
    flags.DEFINE_bool("json", False, "print JSON")
    if jax.device_count() < 2:
        sys.exit("set XLA_FLAGS as the first lines of this file say: there is one device.")
    app.run(main)
