"""Low-rank adapters (LoRA) on the dense layers of a Flax model, without changing its code."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpjax.models.model import Model, Params, flatten, unflatten

__all__ = ["KEY", "adapt", "merge"]

KEY = "lora"
"""Top-level key of the adapters; the paths of the model's own parameters stay the same."""


def adapt(model: Model, *, rank: int, targets: str) -> Model:
    """Adds `x -> x A B` to every dense layer whose path matches.

    A is `[in, rank]`, normal with variance 1/in, and B is `[rank, out]`, zero, so that the model
    starts unchanged. The scale alpha/rank is 1. A model that has adapters already gets further ones
    on other layers, of another rank if you like.

    Args:
        model: the model; its parameters keep their paths, so published weights still load.
        rank: rank of the adapters, >= 1.
        targets: regular expression on layer paths such as "blocks_0/attn/query" (`re.search`).

    Returns:
        A model whose parameters have the adapters under `KEY`.

    Raises:
        ValueError: rank < 1, no dense layer matches, or one that matches has an adapter.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be >= 1.")
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ValueError(f"targets={targets!r} is not a regular expression: {error}.") from error
    shapes = _dense_layers(model)
    targeted = {path: shape for path, shape in shapes.items() if pattern.search(path)}
    if not shapes:
        raise ValueError("lora adapts dense layers, and this model has none beside its head.")
    if not targeted:
        raise ValueError(
            f"targets={targets!r} matches none of the {len(shapes)} dense layers, such as "
            f"{', '.join(list(shapes)[:4])}."
        )

    shape: Any = jax.eval_shape(model.init, jax.random.key(0))
    before = set(flatten(shape.get(KEY, {})))
    twice = [path for path in targeted if f"{path}/a" in before]
    if twice:
        raise ValueError(f"targets={targets!r} matches {twice[0]}, which has an adapter already.")

    def inner(params: Params) -> Params:
        """The parameters of `model`: without the adapters that are added here."""
        rest = {path: leaf for path, leaf in flatten(params[KEY]).items() if path in before}
        return {**_without(params), **({KEY: unflatten(rest)} if rest else {})}

    def init(key: jax.Array) -> Params:
        base, own = jax.random.split(key)
        start = model.init(base)
        adapters = flatten(start.get(KEY, {}))
        for number, (path, (inputs, outputs)) in enumerate(targeted.items()):
            a = jax.random.normal(jax.random.fold_in(own, number), (inputs, rank))
            adapters[f"{path}/a"] = a / jnp.sqrt(inputs)
            adapters[f"{path}/b"] = jnp.zeros((rank, outputs))
        return {**start, KEY: unflatten(adapters)}

    def adapted(function: Callable[..., jax.Array]) -> Callable[[Params, jax.Array], jax.Array]:
        def call(params: Params, inputs: jax.Array) -> jax.Array:
            adapters = {k: v for k, v in flatten(params[KEY]).items() if k not in before}
            with nn.intercept_methods(_interceptor(adapters)):
                return function(inner(params), inputs)

        return call

    def load(params: Params, path: str, *, head: bool = False) -> Params:
        return {**model.load(inner(params), path, head=head), KEY: params[KEY]}

    return model._replace(
        init=init, apply=adapted(model.apply), features=adapted(model.features), load=load
    )


def merge(params: Params) -> Params:
    """Returns plain weights: adds every A B to its layer's kernel and drops all adapters."""
    flat = flatten(_without(params))
    adapters = flatten(params.get(KEY, {}))
    for name in adapters:
        if name.endswith("/a"):
            path = name.removesuffix("/a")
            kernel = flat[f"{path}/kernel"]
            product = jnp.matmul(adapters[name], adapters[f"{path}/b"], precision="highest")
            # In float32, even if the kernel was frozen in bfloat16: it would round the update away.
            flat[f"{path}/kernel"] = kernel.astype(jnp.float32) + product.astype(jnp.float32)
    return unflatten(flat)


def _without(params: Params) -> Params:
    return {name: leaf for name, leaf in params.items() if name != KEY}


def _interceptor(adapters: dict[str, jax.Array]) -> Callable[..., Any]:
    """Returns a hook that Flax runs around every method, and that adds x A B to dense layers."""

    def intercept(
        call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        out = call(*args, **kwargs)
        if not isinstance(context.module, nn.Dense) or context.method_name != "__call__":
            return out
        path = "/".join(context.module.path)
        if f"{path}/a" not in adapters:
            return out
        inputs = args[0] if args else kwargs["inputs"]
        a, b = (adapters[f"{path}/{part}"].astype(out.dtype) for part in "ab")
        return out + inputs.astype(out.dtype) @ a @ b

    return intercept


def _dense_layers(model: Model) -> dict[str, tuple[int, int]]:
    """Returns the paths and kernel shapes of the layers that the interceptor will see."""
    seen: dict[str, tuple[int, int]] = {}

    def record(
        call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        out = call(*args, **kwargs)
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            inputs = args[0] if args else kwargs["inputs"]
            seen["/".join(context.module.path)] = (inputs.shape[-1], out.shape[-1])
        return out

    params = jax.eval_shape(model.init, jax.random.key(0))
    with nn.intercept_methods(record):
        # The lambda is a new function object: JAX would answer a second trace of the same function
        # from its cache, and the interceptor would see nothing.
        jax.eval_shape(lambda p, x: model.features(p, x), params, model.input.example())
    return seen
