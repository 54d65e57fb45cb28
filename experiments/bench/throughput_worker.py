"""One engine of the benchmark in its own process; started by `experiments.bench.throughput`."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.bench.throughput_models import make_batch, make_model

__all__: list[str] = []


def rss(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak) of this process."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


def reset_peak() -> None:
    """Makes VmHWM start again from now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def jax_engine(spec: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Compiles a gradient function; returns it without arguments, and its facts."""
    import jax
    import jax.numpy as jnp
    import optax

    from dpjax import build, dp
    from dpjax.models import finetune

    if spec["engine"] == "jax_privacy" and importlib.util.find_spec("jax_privacy") is None:
        return lambda: None, {"skip": "jax_privacy is not installed"}
    sets = {
        "full": finetune.full(), "film": finetune.film(), "lora": finetune.lora(),
        "head": finetune.head(),
    }  # fmt: skip
    net = make_model(spec["case"], spec["classes"], spec["dtype"])
    if getattr(net.input, "causal", False):
        sets["lora"] = finetune.lora(rank=16, targets="attn/|mlp/")
    try:
        tuning = sets[spec["set"]](net)
    except ValueError as error:
        return lambda: None, {"skip": str(error)}
    everything = jax.jit(tuning.model.init)(jax.random.key(0))
    params, frozen = finetune.split(everything, tuning.trainable)
    batch = jax.tree.map(jnp.asarray, make_batch(net.input, spec["batch"], spec["classes"]))
    mask = jnp.ones(spec["batch"], bool)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels

    def loss_fn(params: Any, frozen: Any, example: Any) -> jax.Array:
        logits = tuning.model.apply(finetune.join(params, frozen), example["input"])
        return cross_entropy(logits, example["label"])

    def mean_loss(params: Any, frozen: Any, batch: Any) -> jax.Array:
        return jnp.mean(loss_fn(params, frozen, batch))  # the ordinary batched forward pass

    if getattr(net.input, "causal", False):
        facts_of, loss_of = build.next_token.functions(tuning.model)

        def loss_fn(params: Any, frozen: Any, example: Any) -> jax.Array:
            return loss_of(finetune.join(params, frozen), example)

        def mean_loss(params: Any, frozen: Any, batch: Any) -> jax.Array:
            facts = facts_of(finetune.join(params, frozen), batch["input"])
            return jnp.mean(facts.nll / facts.tokens)

    def ours(method: str) -> Callable[..., Any]:
        def gradient(params: Any, frozen: Any, batch: Any, mask: Any) -> Any:
            summed = dp.clipped_sum(
                lambda p, e: loss_fn(p, frozen, e),
                dp.flat(1.0),
                method=method,
                microbatch_size=spec["microbatch"] or None,
            )
            return summed(params, batch, mask)[0].value

        return gradient

    def nonprivate(params: Any, frozen: Any, batch: Any, mask: Any) -> Any:
        del mask
        return jax.value_and_grad(mean_loss)(params, frozen, batch)[1]

    def theirs(params: Any, frozen: Any, batch: Any, mask: Any) -> Any:
        del mask
        from jax_privacy import clipping

        clipped = clipping.clipped_grad(
            lambda p, e: loss_fn(p, frozen, e), l2_clip_norm=1.0, keep_batch_dim=False
        )
        return clipped(params, batch)

    made = {
        "nonprivate": nonprivate, "jax_privacy": theirs,
        "vmap": ours("vmap"), "bookkeeping": ours("bookkeeping"),
    }  # fmt: skip
    start = time.perf_counter()
    compiled = jax.jit(made[spec["engine"]]).lower(params, frozen, batch, mask).compile()
    facts = {
        "compile_seconds": time.perf_counter() - start,
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "device": jax.devices()[0].device_kind,
        "trainable": finetune.count(params),
    }

    def run() -> Any:
        return jax.block_until_ready(compiled(params, frozen, batch, mask))

    return run, {**facts, "sum": _size(run())}


def _size(tree: Any) -> float:
    """Norm of a gradient, by which engines are compared."""
    import jax

    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return float(np.sqrt(sum((leaf**2).sum() for leaf in leaves)))


def main() -> None:
    """Builds the engine of the JSON in argv[1], then answers step counts on stdin."""
    spec = json.loads(sys.argv[1])
    if spec["engine"].startswith(("torch", "opacus")):
        from experiments.bench.throughput_torch import torch_engine as engine
    else:
        engine = jax_engine
    base = rss("VmRSS")
    run, facts = engine(spec)
    print(json.dumps(facts), flush=True)
    if "skip" in facts:
        return
    run()
    for line in sys.stdin:
        reset_peak()
        start = time.perf_counter()
        for _ in range(int(line)):
            run()
        seconds = (time.perf_counter() - start) / int(line)
        answer = {"seconds": seconds, "peak_bytes": rss("VmHWM") - base}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
