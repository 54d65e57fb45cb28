"""Turns Linen and NNX modules, unchanged, into models: checks them, and adds a head."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import linen, nnx

from dpjax.models.model import (
    InputSpec,
    Model,
    Params,
    dense_head,
    flatten,
    head_initializer,
    unflatten,
)
from dpjax.models.weights import load_plain

__all__ = ["MODULE_INPUT", "from_module", "is_module"]

MODULE_INPUT = ("image_size", "channels")
"""Options that describe the images, and are not passed to the module."""


class _Backbone(NamedTuple):
    """A module as functions of a plain dict of parameters; `apply` takes a batch."""

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array], jax.Array]


def is_module(value: Any) -> bool:
    """Whether this is a Linen or NNX module, or a class of such."""
    kinds = (linen.Module, nnx.Module)
    return isinstance(value, kinds) or (isinstance(value, type) and issubclass(value, kinds))


def from_module(
    module: Any, num_classes: int, *, head_init: str, dtype: str, options: Mapping[str, Any]
) -> Model:
    """Makes a model of a module that maps images `[batch, height, width, channels]` to features.

    The module is used as in inference: `deterministic=True` and `train=False` where its
    `__call__` has such a parameter, and `eval()` for NNX. dpjax adds the head behind it.

    Args:
        module: a Linen or NNX module or class; an NNX class is called with `rngs`.
        num_classes: number of classes.
        head_init: initialization of the head, one of `HEAD_INITS`.
        dtype: passed to a class that takes `dtype`; others compute as they are.
        options: `image_size` (required) and `channels` (3) of the images; all others are passed to
            the class.

    Raises:
        ValueError: in one line, what the module must do differently.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be >= 1.")
    if "image_size" not in options:
        raise ValueError("set image_size, the side in pixels of the images that the module takes.")
    channels = options.get("channels", 3)
    spec = InputSpec(options["image_size"], channels, (0.5,) * channels, (0.5,) * channels)
    own = {name: value for name, value in options.items() if name not in MODULE_INPUT}
    make = _constructor(module, dtype, own)
    kind = module if isinstance(module, type) else type(module)
    example = spec.example()
    batch = jax.ShapeDtypeStruct((1, *example.shape), example.dtype)
    call = _inference_arguments(kind)
    backbone = (_nnx if issubclass(kind, nnx.Module) else _linen)(make, batch, call)
    try:
        params = jax.eval_shape(backbone.init, jax.random.key(0))
        out = jax.eval_shape(backbone.apply, params, batch)
    except flax.errors.InvalidRngError as error:
        raise ValueError(
            f"{kind.__name__} draws random numbers, as Dropout does: give __call__ a parameter "
            "deterministic (or train), which is set for inference; augment with data.* instead."
        ) from error
    except (TypeError, flax.errors.FlaxError) as error:
        line = str(error).strip().splitlines()[0]
        raise ValueError(f"{kind.__name__} cannot be called on {batch.shape}: {line}") from error
    if "head" in params:
        raise ValueError(f"{kind.__name__}: rename its parameters 'head', a name of dpjax's own.")
    if not hasattr(out, "shape") or out.ndim != 2 or out.shape[0] != 1:
        shape = getattr(out, "shape", type(out).__name__)
        raise ValueError(
            f"{kind.__name__} must map images [batch, height, width, channels] to [batch, width], "
            f"not {batch.shape} to {shape}: average over positions, such as x.mean((1, 2))."
        )
    initial = head_initializer(head_init)

    def init(key: jax.Array) -> Params:
        body, head = jax.random.split(key)
        kernel = initial(head, (out.shape[1], num_classes), jnp.float32)
        bias = jnp.zeros((num_classes,), jnp.float32)
        return {**backbone.init(body), "head": {"kernel": kernel, "bias": bias}}

    def features(params: Params, inputs: jax.Array) -> jax.Array:
        body = {name: leaf for name, leaf in params.items() if name != "head"}
        one = jnp.ndim(inputs) == len(example.shape)
        result = backbone.apply(body, inputs[None] if one else inputs)
        return (result[0] if one else result).astype(jnp.float32)

    def apply(params: Params, inputs: jax.Array) -> jax.Array:
        return dense_head(params["head"], features(params, inputs))

    return Model(init, apply, load_plain, "head", spec, features)


def _constructor(module: Any, dtype: str, options: dict[str, Any]) -> Callable[..., Any]:
    """Returns the function that makes the module, from `rngs` for an NNX class."""
    if not isinstance(module, type):
        if options:
            raise ValueError(f"{type(module).__name__} is an instance and takes no options.")
        return lambda **rngs: module
    # Of `__init__`: the metaclass of NNX modules hides the signature of the class.
    kind: Any = module
    signature = inspect.signature(functools.partial(kind.__init__, None))
    known = signature.parameters
    if "dtype" in known and "dtype" not in options:
        options = {**options, "dtype": jnp.dtype(dtype)}
    elif dtype != "float32" and "dtype" not in options:
        raise ValueError(f"dtype={dtype!r}: {module.__name__} takes no dtype.")
    rngs = {"rngs": None} if issubclass(module, nnx.Module) and "rngs" in known else {}
    try:
        signature.bind(**rngs, **options)
    except TypeError as error:
        raise ValueError(f"{module.__name__}: {error}.") from error
    return lambda **given: module(**{k: v for k, v in given.items() if k in rngs}, **options)


def _inference_arguments(kind: type) -> dict[str, Any]:
    """The arguments of `__call__` that switch randomness and training statistics off."""
    known = inspect.signature(kind.__call__).parameters
    values = {"deterministic": True, "train": False, "training": False}
    return {name: value for name, value in values.items() if name in known}


def _no_statistics(name: str) -> ValueError:
    return ValueError(
        f"{name} keeps batch statistics (BatchNorm), which couple the examples of a batch: use "
        "GroupNorm or LayerNorm."
    )


def _linen(make: Callable[..., Any], batch: Any, call: dict[str, Any]) -> _Backbone:
    module = make()

    def init(key: jax.Array) -> Params:
        variables = dict(module.init(key, jnp.zeros(batch.shape, batch.dtype), **call))
        params = variables.pop("params", {})
        if "batch_stats" in variables:
            raise _no_statistics(type(module).__name__)
        if variables:
            raise ValueError(
                f"{type(module).__name__} has state beside its parameters, {sorted(variables)}, "
                "which private training does not update: remove it."
            )
        return dict(params)

    return _Backbone(init, lambda params, x: module.apply({"params": params}, x, **call))


def _nnx(make: Callable[..., Any], batch: Any, call: dict[str, Any]) -> _Backbone:
    # Made once for its structure, and for what is constant: random state, which inference ignores.
    module = make(rngs=nnx.Rngs(0))
    module.eval()
    if jax.tree.leaves(nnx.state(module, nnx.BatchStat)):
        raise _no_statistics(type(module).__name__)
    graph, *(state, rest) = nnx.split(module, nnx.Param, ...)
    paths, tree = jax.tree_util.tree_flatten_with_path(state)
    names = ["/".join(filter(None, map(_key, entry[0]))) for entry in paths]

    def init(key: jax.Array) -> Params:
        made = make(rngs=nnx.Rngs(key))
        leaves = jax.tree.leaves(nnx.state(made, nnx.Param))
        return unflatten(dict(zip(names, leaves, strict=True)))

    def apply(params: Params, x: jax.Array) -> jax.Array:
        flat = flatten(params)
        leaves = jax.tree.unflatten(tree, [flat[name] for name in names])
        return nnx.merge(graph, leaves, rest)(x, **call)

    return _Backbone(init, apply)


def _key(part: Any) -> str:
    """A step of a path as text; nothing for that from a variable to its value."""
    return "" if hasattr(part, "name") else str(getattr(part, "key", getattr(part, "idx", part)))
