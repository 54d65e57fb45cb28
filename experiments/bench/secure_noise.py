"""The cost of secure noise: a private step of ViT-Ti with both kinds of noise, in one process.

    python -m experiments.bench.secure_noise --batch=64 --rounds=5

Prints medians of seconds: the sum by either engine, the exact sum, and either draw of noise; and in
how many numbers exact sums differ when the examples change their rows, which should be none: that
is what secure noise assumes of the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpjax import dp, models
from dpjax.dp import seeds

__all__ = ["main"]


def main() -> None:
    """Measures, and prints a line for each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="examples of a chunk")
    parser.add_argument("--micro", type=int, default=None, help="examples in memory at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image", type=int, default=224)
    args = parser.parse_args()
    model = models.vision_transformer(models.SIZES["ti16"].at(args.image), 10, head_init="random")
    params = model.init(jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    shape = (args.batch, args.image, args.image, 3)
    inputs = jax.random.normal(jax.random.key(1), shape)
    batch = {"input": inputs, "label": jnp.arange(args.batch) % 10}
    mask = jnp.ones(args.batch, bool)

    def loss(params: Any, example: dict[str, jax.Array]) -> jax.Array:
        logits = model.apply(params, example["input"][None])[0]
        return -jax.nn.log_softmax(logits)[example["label"]]

    def summed(**options: Any) -> Callable[..., Any]:
        grad = jax.jit(dp.clipped_sum(loss, dp.flat(1.0), microbatch_size=args.micro, **options))
        return lambda batch=batch: grad(params, batch, mask)[0].value

    def noised(kind: Any, unit: Any, *, secure: bool) -> Callable[[], Any]:
        value = jax.tree.map(lambda x: jnp.zeros(x.shape, kind), params)
        total = dp.ClippedSum(value, jnp.float32(1e-6), unit=unit)
        tx = dp.gaussian(1.0, 1.0, key=seeds.noise_key(0, secure=secure))
        update = jax.jit(lambda total: tx.update(total, tx.init(params))[0])
        return lambda: update(total)

    parts = {
        "sum, bookkeeping": summed(method="bookkeeping"),
        "sum, vmap": summed(method="vmap"),
        "sum, exact": summed(secure_noise=1.0),
        "noise, float32": noised(jnp.float32, None, secure=False),
        "noise, secure": noised(jnp.int32, jnp.float32(1.0), secure=True),
    }
    for part in parts.values():
        jax.block_until_ready(part())
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(args.rounds):  # interleaved: a busy machine slows all alike
        for name, part in parts.items():
            begin = time.perf_counter()
            jax.block_until_ready(part())
            times[name].append(time.perf_counter() - begin)
    order = jax.random.permutation(jax.random.key(2), args.batch)
    pair = parts["sum, exact"](), parts["sum, exact"](jax.tree.map(lambda x: x[order], batch))
    moved = sum(int(n) for n in jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).sum(), *pair)))
    print(f"{moved:,} numbers of the exact sum depend on the rows of the examples")
    print(f"{size:,} parameters, {args.batch} examples, on {jax.devices()[0].device_kind}")
    for name, seconds in times.items():
        print(f"{name:18} {statistics.median(seconds):9.4f} s  (min {min(seconds):.4f})")


if __name__ == "__main__":
    main()
