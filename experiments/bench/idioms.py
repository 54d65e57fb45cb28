"""What the idioms of real models cost: time and memory of clipping over the plain gradient.

    python -m experiments.bench.idioms                    # all, some minutes
    python -m experiments.bench.idioms --only=tied,lstm   # some

For each idiom, the plain gradient of the mean loss, book-keeping clipping and vmap clipping are
compiled and take turns. Printed are the ratios to the plain gradient: compile time (tracing
included), median time and XLA's temporaries, and the share of parameters that the engine
differentiates per example.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from dpjax import dp

__all__ = ["IDIOMS", "head", "main", "measure", "row"]

Case = tuple[Callable[[Any, Any], jax.Array], Any, Any]  # loss of one example, parameters, batch


class _Draw:
    """Random parameters and batches, small for tests and large for benchmarks."""

    def __init__(self, small: bool) -> None:
        self._rng = np.random.default_rng(0)
        self.small = small

    def size(self, large: int, small: int) -> int:
        return small if self.small else large

    def normal(self, *shape: int, by: float = 1.0) -> np.ndarray:
        return (by * self._rng.standard_normal(shape)).astype(np.float32)

    def weight(self, *shape: int) -> np.ndarray:
        return self.normal(*shape, by=shape[-2] ** -0.5)

    def rows(self, most: int, *shape: int) -> np.ndarray:
        return self._rng.integers(0, most, shape, dtype=np.int32)


def user_item(draw: _Draw) -> Case:
    """Two tables looked up by one scalar each."""
    n, rows, width = draw.size(64, 4), draw.size(20_000, 9), draw.size(32, 3)
    params = {"user": draw.normal(rows, width), "item": draw.normal(rows, width)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        rating = params["user"][example["user"]] @ params["item"][example["item"]]
        return jnp.square(rating - example["rating"])

    batch = {"user": draw.rows(rows, n), "item": draw.rows(rows, n), "rating": draw.normal(n)}
    return loss_fn, params, batch


def vmapped_lookup(draw: _Draw) -> Case:
    """An embedding of one token, vmapped over tokens, as Equinox has it."""
    n, rows, width, tokens = draw.size(32, 4), draw.size(8192, 9), draw.size(128, 4), 32
    params = {"table": draw.normal(rows, width), "out": draw.weight(width, 10)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x = jax.vmap(lambda i: params["table"][i])(example)
        return jnp.sum(jnp.square(jnp.tanh(x) @ params["out"]))

    return loss_fn, params, draw.rows(rows, n, tokens)


def bag(draw: _Draw) -> Case:
    """The mean of many rows of a table, some of them several times, and layers of it."""
    n, rows, width = draw.size(64, 4), draw.size(20_000, 9), draw.size(64, 3)
    layers = {f"w{i}": draw.weight(a, b) for i, (a, b) in enumerate(((width, 512), (512, 512)))}
    params = {"table": draw.normal(rows, width), **layers, "out": draw.weight(512, 10)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x = jnp.mean(params["table"][example], 0)
        for name in ("w0", "w1", "out"):
            x = jnp.tanh(x @ params[name])
        return jnp.sum(jnp.square(x))

    return loss_fn, params, draw.rows(rows, n, draw.size(512, 80))


def masked(draw: _Draw) -> Case:
    """Layers under a mask, as those of an autoregressive density, and one that is positive."""
    width = draw.size(768, 6)
    params = {f"w{i}": draw.weight(width, width) for i in range(3)}
    mask = np.tril(np.ones((width, width), np.float32))

    def loss_fn(params: Any, x: Any) -> jax.Array:
        x = jnp.tanh(x @ (params["w0"] * mask))
        x = jnp.tanh(x @ (params["w1"] * mask))
        return jnp.mean(jnp.square(x @ jax.nn.softplus(params["w2"] - 3)))

    return loss_fn, params, draw.normal(draw.size(128, 4), width)


def tied(draw: _Draw) -> Case:
    """A language model whose output layer is its embedding."""
    n, rows, width, tokens = draw.size(8, 4), draw.size(16_384, 11), draw.size(512, 5), 64
    tokens = draw.size(tokens, 6)
    params = {"embed": draw.normal(rows, width, by=0.05), "mix": draw.weight(width, width)}

    def loss_fn(params: Any, example: Any) -> jax.Array:
        x = jnp.tanh(params["embed"][example] @ params["mix"])
        logits = x @ params["embed"].T
        picked = jnp.take_along_axis(logits, jnp.roll(example, -1)[:, None], 1)
        return jnp.mean(jax.nn.logsumexp(logits, 1) - picked[:, 0])

    return loss_fn, params, draw.rows(rows, n, tokens)


def _mlp(draw: _Draw, depth: int = 3) -> tuple[dict[str, np.ndarray], np.ndarray]:
    width = draw.size(384, 6)
    params = {f"w{i}": draw.weight(width, width) for i in range(depth)}
    return params, draw.normal(draw.size(16, 4), draw.size(64, 3), width)


def penalty(draw: _Draw) -> Case:
    """A term of the parameters alone."""
    params, batch = _mlp(draw)

    def loss_fn(params: Any, x: Any) -> jax.Array:
        for w in params.values():
            x = jnp.tanh(x @ w)
        decay = sum(jnp.sum(jnp.square(w)) for w in params.values())
        return jnp.sum(x) + 1e-4 * decay

    return loss_fn, params, batch


def dead_code(draw: _Draw) -> Case:
    """A scan over checkpointed layers whose parameters leave it unread; a head nobody reads."""
    width, depth = draw.size(384, 5), 4
    params = {"layers": draw.weight(depth, width, width), "head": draw.weight(width, width)}

    def loss_fn(params: Any, x: Any) -> jax.Array:
        @jax.checkpoint
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
            return x + jnp.tanh(x @ w), w

        x, _ = jax.lax.scan(layer, x, params["layers"])
        jnp.sum(x @ params["head"] + jnp.sin(params["head"])[:1])
        return jnp.sum(jnp.square(x))

    return loss_fn, params, draw.normal(draw.size(16, 4), draw.size(64, 3), width)


def fused(draw: _Draw) -> Case:
    """Separate query, key and value kernels, concatenated into one product."""
    width = draw.size(384, 6)
    params = {name: draw.weight(width, width) for name in "qkvo"}

    def loss_fn(params: Any, x: Any) -> jax.Array:
        joint = jnp.concatenate([params["q"], params["k"], params["v"]], 1)
        q, k, v = jnp.split(x @ joint, 3, -1)
        weights = jax.nn.softmax(q @ k.T / width**0.5)
        return jnp.sum(jnp.square(weights @ v @ params["o"]))

    return loss_fn, params, draw.normal(draw.size(16, 4), draw.size(64, 3), width)


def stacked(draw: _Draw) -> Case:
    """The kernels of all layers, stacked for a scan."""
    params, batch = _mlp(draw)

    def loss_fn(params: Any, x: Any) -> jax.Array:
        layers = jnp.stack(list(params.values()))
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)
        return jnp.sum(x)

    return loss_fn, params, batch


def sliced(draw: _Draw) -> Case:
    """One kernel used in slices, negated, behind a barrier and a sharding constraint."""
    width = draw.size(384, 6)
    params = {"w": draw.weight(width, 3 * width), "b": draw.weight(width, width)}

    def loss_fn(params: Any, x: Any) -> jax.Array:
        w = jax.lax.optimization_barrier(params["w"])
        y = jnp.tanh(x @ w[:, :width]) * jax.nn.sigmoid(x @ -w[:, width : 2 * width])
        return jnp.sum(jnp.tanh(y @ params["b"]) @ w[:, 2 * width :])

    return loss_fn, params, draw.normal(draw.size(16, 4), draw.size(64, 3), width)


def weight_norm(draw: _Draw) -> Case:
    """Dense kernels of normalized columns."""
    params, batch = _mlp(draw)
    params = {"w": params, "gain": draw.normal(3, batch.shape[-1])}

    def loss_fn(params: Any, x: Any) -> jax.Array:
        for w, gain in zip(params["w"].values(), params["gain"]):
            norm = jnp.sqrt(jnp.sum(jnp.square(w), 0, keepdims=True))
            x = jnp.tanh(x @ (w / norm * gain[None]))
        return jnp.sum(x)

    return loss_fn, params, batch


def merged_lora(draw: _Draw) -> Case:
    """A frozen kernel plus a product of two trained ones."""
    frozen, batch = _mlp(draw)
    width, rank = batch.shape[-1], draw.size(8, 2)
    params = {k: (draw.weight(width, rank), draw.normal(rank, width, by=0.1)) for k in frozen}

    def loss_fn(params: Any, x: Any) -> jax.Array:
        for name, (a, b) in params.items():
            x = jnp.tanh(x @ (frozen[name] + 0.5 * (a @ b)))
        return jnp.sum(x)

    return loss_fn, params, batch


def spectral_norm(draw: _Draw) -> Case:
    """Kernels over their spectral norm, by one step of power iteration (arXiv 1802.05957)."""
    params, batch = _mlp(draw)
    start = draw.normal(batch.shape[-1])

    def loss_fn(params: Any, x: Any) -> jax.Array:
        for w in params.values():
            v = jax.lax.stop_gradient(w @ start / jnp.linalg.norm(w @ start))
            u = jax.lax.stop_gradient(v @ w / jnp.linalg.norm(v @ w))
            x = jnp.tanh(x @ (w / (v @ w @ u)))
        return jnp.sum(x)

    return loss_fn, params, batch


def merged_dora(draw: _Draw) -> Case:
    """Merged LoRA with a trained length for each column; norms are constants (2402.09353, 4.3)."""
    frozen, batch = _mlp(draw)
    width, rank = batch.shape[-1], draw.size(8, 2)
    params = {
        k: (draw.weight(width, rank), draw.normal(rank, width, by=0.1), draw.normal(width))
        for k in frozen
    }

    def loss_fn(params: Any, x: Any) -> jax.Array:
        for name, (a, b, lengths) in params.items():
            merged = frozen[name] + 0.5 * (a @ b)
            norm = jax.lax.stop_gradient(jnp.linalg.norm(merged, axis=0))
            x = jnp.tanh(x @ (merged * (lengths / norm)[None]))
        return jnp.sum(x)

    return loss_fn, params, batch


def _flax(draw: _Draw, module: nn.Module, batch: np.ndarray) -> Case:
    shapes = jax.eval_shape(module.init, jax.random.key(0), batch[0])
    params = jax.tree.map(lambda p: draw.normal(*p.shape, by=(p.shape or (1,))[0] ** -0.5), shapes)

    def loss_fn(params: Any, x: Any) -> jax.Array:
        with jax.numpy_rank_promotion("allow"):
            return jnp.sum(jnp.square(module.apply(params, x)))

    return loss_fn, params, batch


def lstm(draw: _Draw) -> Case:
    """A recurrent layer whose cell concatenates its kernels."""
    width = draw.size(192, 3)
    batch = draw.normal(draw.size(16, 4), draw.size(48, 4), width)
    return _flax(draw, nn.RNN(nn.OptimizedLSTMCell(width)), batch)


def gru(draw: _Draw) -> Case:
    """A recurrent layer over a scan."""
    width = draw.size(192, 3)
    batch = draw.normal(draw.size(16, 4), draw.size(48, 4), width)
    return _flax(draw, nn.RNN(nn.GRUCell(width)), batch)


def resnet(draw: _Draw) -> Case:
    """Convolutions with group norm, four times as wide as usual."""
    width, side = draw.size(64, 4), draw.size(16, 6)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.Conv(width, (3, 3))(x)
            for _ in range(2):
                y = nn.Conv(width, (3, 3))(nn.relu(nn.GroupNorm(2)(x)))
                x = x + nn.Conv(width, (3, 3))(nn.relu(nn.GroupNorm(2)(y)))
            return nn.Dense(10)(x.mean((0, 1)))

    return _flax(draw, Net(), draw.normal(draw.size(16, 4), side, side, 3))


def experts(draw: _Draw) -> Case:
    """A kernel looked up for each token; there are fewer kernels than tokens."""
    n, count, width = draw.size(8, 4), 4, draw.size(128, 3)
    tokens = draw.size(64, 6)
    params = {"gate": draw.normal(width, count), "w": draw.weight(count, width, width)}

    def loss_fn(params: Any, x: Any) -> jax.Array:
        scores = x @ params["gate"]
        best = jnp.argmax(scores, 1)
        y = jnp.einsum("td,tdp->tp", x, params["w"][best])
        return jnp.sum(jnp.square(y) * jnp.max(scores, 1)[:, None])

    return loss_fn, params, draw.normal(n, tokens, width)


def blocks(draw: _Draw) -> Case:
    """Block-diagonal kernels, one along each of two axes (Monarch, arXiv 2204.00595)."""
    n, side, tokens = draw.size(16, 4), draw.size(16, 2), draw.size(128, 16)
    params = {name: draw.weight(side, side, side) for name in ("rows", "columns")}

    def loss_fn(params: Any, x: Any) -> jax.Array:
        x = jnp.tanh(jnp.einsum("tki,kij->tkj", x, params["rows"]))
        return jnp.sum(jnp.square(jnp.einsum("tki,ikj->tij", x, params["columns"])))

    return loss_fn, params, draw.normal(n, tokens, side, side)


def branches(draw: _Draw) -> Case:
    """Layers inside of branches."""
    params, batch = _mlp(draw)

    def loss_fn(params: Any, x: Any) -> jax.Array:
        w0, w1, w2 = params.values()
        x = jax.lax.cond(x[0, 0] > 0, lambda x: jnp.tanh(x @ w0), lambda x: jnp.sin(x @ w1), x)
        return jnp.sum(jnp.tanh(x @ w2))

    return loss_fn, params, batch


def queries(draw: _Draw) -> Case:
    """Learned queries, multiplied with a kernel before they meet the example."""
    width, count = draw.size(384, 6), draw.size(16, 2)
    params = {"queries": draw.normal(count, width), **{k: draw.weight(width, width) for k in "qkv"}}

    def loss_fn(params: Any, x: Any) -> jax.Array:
        q = params["queries"] @ params["q"]
        weights = jax.nn.softmax(q @ (x @ params["k"]).T / width**0.5)
        return jnp.sum(jnp.square(weights @ (x @ params["v"])))

    return loss_fn, params, draw.normal(draw.size(16, 4), draw.size(64, 3), width)


def own_derivative(draw: _Draw) -> Case:
    """A product with a derivative of its own, which the engine cannot read: stays direct."""
    params, batch = _mlp(draw)

    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

    def loss_fn(params: Any, x: Any) -> jax.Array:
        for w in params.values():
            x = jnp.tanh(product(x, w))
        return jnp.sum(x)

    return loss_fn, params, batch


IDIOMS: dict[str, Callable[[_Draw], Case]] = {
    make.__name__: make
    for make in (
        user_item, vmapped_lookup, tied, dead_code, penalty, fused, stacked, sliced, weight_norm,
        merged_lora, lstm, gru, resnet, experts, branches, queries, own_derivative, bag, masked,
        blocks, spectral_norm, merged_dora,
    )
}  # fmt: skip


def small(name: str) -> Case:
    """An idiom at the size of a test."""
    return IDIOMS[name](_Draw(small=True))


def measure(name: str, case: Case, rounds: int) -> dict[str, Any]:
    """Measures one idiom or model.

    Args:
        name: of the case, for messages.
        case: loss of one example, parameters and batch.
        rounds: how often each engine takes its turn.

    Returns:
        By engine: compile seconds, median seconds, temporary bytes; and the direct share.
    """
    loss_fn, params, batch = case
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    mask = jnp.ones(jax.tree.leaves(batch)[0].shape[0], bool)

    def plain(params: Any, batch: Any, mask: Any) -> Any:
        del mask
        return jax.grad(lambda p: jnp.mean(jax.vmap(lambda e: loss_fn(p, e))(batch)))(params)

    def clipped(method: str) -> Callable[..., Any]:
        summed = dp.clipped_sum(loss_fn, dp.flat(1.0), method=method)
        return lambda params, batch, mask: summed(params, batch, mask)[0].value

    engines = {"plain": plain, "bookkeeping": clipped("bookkeeping"), "vmap": clipped("vmap")}
    out: dict[str, Any] = {}
    compiled, norms = {}, {}
    for engine, function in engines.items():
        start = time.perf_counter()
        compiled[engine] = jax.jit(function).lower(params, batch, mask).compile()
        out[engine] = {
            "compile": time.perf_counter() - start,
            "memory": compiled[engine].memory_analysis().temp_size_in_bytes,
            "seconds": [],
        }
        total = jax.tree.leaves(compiled[engine](params, batch, mask))
        norms[engine] = float(np.sqrt(sum(np.sum(np.square(np.float64(x))) for x in total)))
    if abs(norms["bookkeeping"] / norms["vmap"] - 1) > 1e-3:
        raise RuntimeError(f"{name}: the engines disagree: {norms}")
    for _ in range(rounds):
        for engine, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(params, batch, mask))
            out[engine]["seconds"].append(time.perf_counter() - start)
    plan = dp.bookkeeping.plan(loss_fn, params, jax.tree.map(lambda x: x[0], batch))
    sizes = [p.size for p in jax.tree.leaves(params)]
    direct = sum(size for size, leaf in zip(sizes, plan) if leaf.route == "direct")
    return {**out, "direct": direct / sum(sizes), "plan": plan}


def head(title: str) -> str:
    """The first two lines of the table."""
    columns = [f"{e}: {c}" for e in ("ours", "vmap") for c in ("compile", "time", "memory")]
    first = f"| {title} | plain, ms | direct | " + " | ".join(columns) + " |"
    return f"{first}\n|---|" + "---|" * (2 + len(columns))


def row(name: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    plain = found["plain"]
    cells = [name, f"{1e3 * statistics.median(plain['seconds']):.1f}", f"{found['direct']:.0%}"]
    for engine in ("bookkeeping", "vmap"):
        own = found[engine]
        ratios = [a / b for a, b in zip(own["seconds"], plain["seconds"])]
        cells.append(f"{own['compile'] / plain['compile']:.1f}")
        cells.append(f"{statistics.median(ratios):.2f}")
        cells.append(f"{own['memory'] / max(plain['memory'], 1):.2f}")
    return "| " + " | ".join(cells) + " |"


_ONLY = flags.DEFINE_list("only", list(IDIOMS), "Idioms to measure")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Turns of each engine", lower_bound=1)


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    unknown = set(_ONLY.value) - set(IDIOMS)
    if len(argv) > 1 or unknown:
        print(f"error: only={sorted(unknown) or argv[1:]} must be of {list(IDIOMS)}.",
              file=sys.stderr)  # fmt: skip
        return 2
    print(head("idiom"), flush=True)
    for name in _ONLY.value:
        case = IDIOMS[name](_Draw(small=False))
        print(row(name, measure(name, case, _ROUNDS.value)), flush=True)
    return 0


if __name__ == "__main__":
    app.run(main)
