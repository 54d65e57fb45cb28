"""Small costs: sampling, calibration, recompiles of a sweep, and heads on cached features."""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpjax import dp

__all__ = ["measure", "table"]

_EXAMPLES, _WIDTH, _CLASSES, _BATCH, _STEPS = 50_000, 1280, 10, 1024, 48


def measure() -> dict[str, float]:
    """Returns seconds, counts and rates by name."""
    return {**_sampler(), **_calibration(), "recompiles in a (C, lr, sigma) sweep": _recompiles(),
            **_heads()}  # fmt: skip


def table(figures: dict[str, float]) -> str:
    """Renders the figures as a Markdown table."""
    rows = [f"| {name} | {value:.4g} |" for name, value in figures.items()]
    return "\n".join(["| figure | value |", "|---|---|", *rows])


def _sampler() -> dict[str, float]:
    sampler = dp.Poisson(num_examples=1_300_000, sampling_prob=16_384 / 1_300_000)
    mechanism = dp.Mechanism(sampler=sampler, steps=10**6, noise_multiplier=1.0)
    times = []
    for step in np.random.default_rng(0).integers(0, 10**6, 50).tolist():
        start = time.perf_counter()
        mechanism.indices(1, step)
        times.append(time.perf_counter() - start)
    return {
        "indices of a random step, N = 1.3M, B = 16,384: median ms": 1e3 * statistics.median(times),
        "the same, maximum ms": 1e3 * max(times),
    }


def _calibration() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        before = os.environ.get("DPJAX_CACHE_DIR")
        os.environ["DPJAX_CACHE_DIR"] = cache
        try:
            seconds = []
            for _ in range(2):
                start = time.perf_counter()
                dp.calibrated(
                    epsilon=1.0, delta=1e-5, num_examples=50_000, batch_size=256, epochs=8
                )
                seconds.append(time.perf_counter() - start)
        finally:
            if before is None:
                del os.environ["DPJAX_CACHE_DIR"]
            else:
                os.environ["DPJAX_CACHE_DIR"] = before
    return {"calibration of 1,562 steps: s": seconds[0], "the same from the cache: s": seconds[1]}


def _recompiles() -> float:
    """Traces of a jitted private step over a sweep, beyond the first."""
    traces = 0

    @jax.jit
    def step(rule: dp.ClipRule, rate: Any, sigma: Any, params: Any, batch: Any, key: Any) -> Any:
        nonlocal traces
        traces += 1
        loss = lambda p, e: jnp.sum(jnp.square(e @ p))  # noqa: E731
        clipped, _ = dp.clipped_sum(loss, rule)(params, batch, jnp.ones(len(batch), bool))
        tx = dp.adam(rate, sigma, len(batch), key=key)
        updates, _ = tx.update(clipped, tx.init(params), params)
        return optax.apply_updates(params, updates)

    params, batch = jnp.ones((8, 2)), jnp.ones((16, 8))
    for bound in (0.1, 1.0, 10.0):
        for rate in (1e-3, 1e-2):
            for sigma in (0.5, 2.0):
                step(dp.flat(bound), rate, sigma, params, batch, jax.random.key(0))
    return traces - 1


def _heads() -> dict[str, float]:
    """DP training of a linear head on cached features, in examples per second."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(_EXAMPLES, _WIDTH)).astype(np.float32)
    labels = rng.integers(0, _CLASSES, _EXAMPLES).astype(np.int32)
    ours = _our_head(features, labels)
    out = {"DP head on cached features, ours: examples/s": ours}
    if importlib.util.find_spec("opacus") is not None:
        theirs = _opacus_head(features, labels)
        out |= {"the same, Opacus hooks: examples/s": theirs, "ours / Opacus": ours / theirs}
    return out


def _rate(run: Callable[[], Any]) -> float:
    run()
    start = time.perf_counter()
    run()
    return _STEPS * _BATCH / (time.perf_counter() - start)


def _our_head(features: np.ndarray, labels: np.ndarray) -> float:
    sampler = dp.Poisson(num_examples=_EXAMPLES, sampling_prob=_BATCH / _EXAMPLES)
    mechanism = dp.Mechanism(sampler=sampler, steps=_STEPS, noise_multiplier=1.0)
    draws = [mechanism.indices(0, t) for t in range(_STEPS)]
    capacity = max(map(len, draws))
    indices = np.stack([dp.chunks(d, capacity)[0] for d in draws])
    tx = dp.adam(1e-3, 1.0, _BATCH, key=jax.random.key(0))

    def loss(params: Any, example: Any) -> jax.Array:
        logits = example[0] @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, example[1])

    @jax.jit
    def train(features: Any, labels: Any, indices: Any) -> Any:
        params = {"kernel": jnp.zeros((_WIDTH, _CLASSES)), "bias": jnp.zeros(_CLASSES)}

        def step(carry: Any, chosen: Any) -> Any:
            params, state = carry
            batch = (features[chosen], labels[chosen])
            clipped, _ = dp.clipped_sum(loss, dp.flat(1.0))(params, batch, chosen >= 0)
            updates, state = tx.update(clipped, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), indices)[0][0]

    arrays = jnp.asarray(features), jnp.asarray(labels), jnp.asarray(indices)
    return _rate(lambda: jax.block_until_ready(train(*arrays)))


def _opacus_head(features: np.ndarray, labels: np.ndarray) -> float:
    import warnings

    import torch
    from opacus import PrivacyEngine

    warnings.filterwarnings("ignore")
    data = torch.utils.data.TensorDataset(
        torch.tensor(features), torch.tensor(labels, dtype=torch.long)
    )
    module, optimizer, loader = PrivacyEngine().make_private(
        module=(net := torch.nn.Linear(_WIDTH, _CLASSES)),
        optimizer=torch.optim.Adam(net.parameters(), lr=1e-3),
        data_loader=torch.utils.data.DataLoader(data, batch_size=_BATCH),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )

    def run() -> None:
        for step, (inputs, targets) in enumerate(loader):
            if step == _STEPS:
                break
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(inputs), targets).backward()
            optimizer.step()

    return _rate(run)
