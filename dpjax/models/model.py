"""The model interface: pure functions, the name of the head, and the expected input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

__all__ = [
    "HEAD_INITS",
    "InputSpec",
    "Loader",
    "Model",
    "Params",
    "TextSpec",
    "compute_dtype",
    "dense_head",
    "flatten",
    "from_linen",
    "head_initializer",
    "unflatten",
]

Params = dict[str, Any]

HEAD_INITS = ("zero", "random", "near_zero")
_NEAR_ZERO_STD = 1e-3


@dataclass(frozen=True)
class InputSpec:
    """The images a model expects.

    Args:
        image_size: side of the square image, in pixels.
        channels: number of channels.
        mean: per-channel mean to subtract, for pixels scaled to [0, 1].
        std: per-channel divisor, for pixels scaled to [0, 1].
    """

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} must be >= 1.")
        if self.channels < 1:
            raise ValueError(f"channels={self.channels} must be >= 1.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(f"{name}={values} must have channels={self.channels} entries.")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std} must be > 0.")

    def example(self) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype of one example, `[image_size, image_size, channels]` float32."""
        shape = (self.image_size, self.image_size, self.channels)
        return jax.ShapeDtypeStruct(shape, jnp.float32)


@dataclass(frozen=True)
class TextSpec:
    """The token sequences a text model expects: int32 `[max_length]`, padded with `pad_id`.

    Args:
        max_length: number of tokens of every (padded or truncated) sequence.
        vocab_size: token ids are in [0, vocab_size).
        pad_id: id of the padding token, which the model masks out.
        causal: whether the model predicts every next token, instead of a class of the whole.
    """

    max_length: int
    vocab_size: int
    pad_id: int = 0
    causal: bool = False

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} must be >= 1.")
        if not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(f"pad_id={self.pad_id} must be in [0, {self.vocab_size}).")

    def example(self) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype of one example, `[max_length]` int32."""
        return jax.ShapeDtypeStruct((self.max_length,), jnp.int32)


class Loader(Protocol):
    """Signature of `Model.load`."""

    def __call__(self, params: Params, path: str, *, head: bool = False) -> Params:
        """Returns `params` with the weights of a file.

        Args:
            params: a tree from `Model.init`.
            path: the weight file.
            head: whether the file's classification head is loaded too; by default the head of
                `params` is kept, and the log reports it.

        Raises:
            ValueError: a tensor is missing, unexpected, misshapen or not finite; the message names
                all of them.
        """


class Model(NamedTuple):
    """A classifier as pure functions.

    Attributes:
        init: `init(key) -> params`, a nested plain dict of float32 arrays.
        apply: `apply(params, inputs) -> logits`, float32 `[batch, classes]` for inputs with a batch
            axis and `[classes]` for ONE example. No example's logits depend on another example.
        load: loads published weights, see `Loader`.
        head: top-level key of the classification head in `params`.
        input: the expected `inputs`.
        features: `features(params, inputs)`, float32 `[batch, width]` or `[width]`: the input of
            the head. `apply` equals `dense_head(params[head], features(...))`. It never reads
            `params[head]`.
        module: the Flax module of the features, for code that wants it; its parameters are those of
            the model without the head.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array], jax.Array]
    load: Loader
    head: str
    input: InputSpec | TextSpec
    features: Callable[[Params, jax.Array], jax.Array]
    module: nn.Module | None = None


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Turns `{"a": {"b": x}}` into `{"a/b": x}`."""
    flat: dict[str, Any] = traverse_util.flatten_dict(dict(params), sep="/")
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Inverse of `flatten`."""
    tree: Params = traverse_util.unflatten_dict(dict(flat), sep="/")
    return tree


def dense_head(head_params: Mapping[str, jax.Array], features: jax.Array) -> jax.Array:
    """Applies the classification head that every model here ends with.

    Args:
        head_params: `params[model.head]`, `{"kernel": [width, classes], "bias": [classes]}`.
        features: `[..., width]`.

    Returns:
        float32 logits `[..., classes]`.
    """
    logits = features.astype(jnp.float32) @ head_params["kernel"]
    return logits + jnp.broadcast_to(head_params["bias"], logits.shape)


def compute_dtype(dtype: jnp.dtype | str) -> jnp.dtype:
    """Returns the dtype in which layers compute.

    Raises:
        ValueError: it is not a floating-point type.
    """
    try:
        result = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"dtype={dtype!r} is not a dtype.") from error
    if not jnp.issubdtype(result, jnp.floating):
        raise ValueError(f"dtype={dtype!r} must be a floating-point type.")
    return result


def head_initializer(name: str) -> Callable[..., jax.Array]:
    """Returns the kernel initializer of a head: zeros, LeCun normal, or normal with std 1e-3.

    Args:
        name: one of `HEAD_INITS`.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "zero":
        return nn.initializers.zeros
    if name == "random":
        return nn.initializers.lecun_normal()
    if name == "near_zero":
        return nn.initializers.normal(_NEAR_ZERO_STD)
    raise ValueError(f"head_init={name!r} must be one of {', '.join(HEAD_INITS)}.")


def from_linen(
    backbone: nn.Module,
    spec: InputSpec | TextSpec,
    load: Loader,
    *,
    width: int,
    num_classes: int,
    head_init: str,
) -> Model:
    """Adds a head to a Flax module that maps `[..., *example]` to features `[..., width]`.

    Args:
        backbone: the module; it must treat axes in front of the example's axes as a batch.
        spec: its expected input.
        load: its loader.
        width: number of features.
        num_classes: number of classes.
        head_init: one of `HEAD_INITS`.

    Raises:
        ValueError: `num_classes` is out of range, or `head_init` is unknown.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be >= 1.")
    initial = head_initializer(head_init)
    example = spec.example()

    def init(key: jax.Array) -> Params:
        body, head = jax.random.split(key)
        variables = backbone.init(body, jnp.zeros(example.shape, example.dtype))
        kernel = initial(head, (width, num_classes), jnp.float32)
        bias = jnp.zeros((num_classes,), jnp.float32)
        return {**variables["params"], "head": {"kernel": kernel, "bias": bias}}

    def features(params: Params, inputs: jax.Array) -> jax.Array:
        got, want = jnp.shape(inputs), example.shape
        if len(got) not in (len(want), len(want) + 1) or got[len(got) - len(want) :] != want:
            raise ValueError(f"inputs of shape {got} must be {want}, or a batch [n, ...] of those.")
        kind = jnp.integer if jnp.issubdtype(example.dtype, jnp.integer) else jnp.floating
        if not jnp.issubdtype(jnp.result_type(inputs), kind):
            raise TypeError(f"inputs of {jnp.result_type(inputs)} must be {example.dtype}.")
        body = {name: leaf for name, leaf in params.items() if name != "head"}
        return jnp.asarray(backbone.apply({"params": body}, inputs), jnp.float32)

    def apply(params: Params, inputs: jax.Array) -> jax.Array:
        return dense_head(params["head"], features(params, inputs))

    return Model(init, apply, load, "head", spec, features, backbone)
