"""The next-token task: what a record costs, and what is measured on held-out text.

An example is one record, and its loss is the mean over its target tokens. Several records in one
sequence (packing) would be one gradient of many records, whose clipping protects none of them by
itself; there is no such option. A record that is longer than the context is cut, or is a unit with
several windows (`data.Units`), whose loss is the mean over the target tokens of those that a step
reads.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dpjax import data, metrics, models
from dpjax.config import default
from dpjax.models import Model, Params
from dpjax.step import LossFn

__all__ = ["check", "functions", "independent", "opened"]

TASKS = ("classification", "causal_lm")

# Numbers in the logits of one chunk of tokens of one example.
_CHUNK = 2**22


def check(config: ConfigDict, spec: models.InputSpec | models.TextSpec) -> None:
    """Refuses a task that the model is not for, and what only classification has."""
    if config.task not in TASKS:
        raise ValueError(f"task={config.task!r} must be one of {', '.join(TASKS)}.")
    causal = isinstance(spec, models.TextSpec) and spec.causal
    if causal != (config.task == "causal_lm"):
        raise ValueError(
            f"task={config.task!r} does not fit model.name={config.model.name!r}: a decoder is "
            "for task='causal_lm', every other model for task='classification'."
        )
    if config.data.long_records not in data.LONG_RECORDS:
        raise ValueError(
            f"data.long_records={config.data.long_records!r} must be one of "
            f"{', '.join(data.LONG_RECORDS)}."
        )
    if not causal:
        return
    data.check_template(config.data.template)
    if config.data.tokenizer == default().data.tokenizer:
        raise ValueError(
            f"data.tokenizer={config.data.tokenizer!r} is of a text encoder: name the "
            "tokenizer.json of the language model."
        )
    if config.dp is not None and config.dp.temperature.share:
        raise ValueError(
            f"dp.temperature.share={config.dp.temperature.share} must be 0 for task='causal_lm': "
            "a temperature is fitted to classes."
        )
    if config.data.label_key is not None:
        raise ValueError(
            f"data.label_key={config.data.label_key!r} must be None for task='causal_lm': text has "
            "no labels."
        )
    if config.lp.fraction:
        raise ValueError(
            f"lp.fraction={config.lp.fraction} must be 0 for task='causal_lm': the output layer is "
            "not new."
        )


def opened(config: ConfigDict, spec: models.TextSpec) -> Callable[..., data.Dataset]:
    """Returns the reader of a split, `(name, *, split, data_dir, unit=None) -> Dataset`."""
    section = config.data
    codec = models.text_codec(models.locate(section.tokenizer), spec, end=section.end_token)

    def read(
        name: str, *, split: str, data_dir: str | None, unit: str | None = None
    ) -> data.Dataset:
        return data.load_causal(
            name,
            split=split,
            data_dir=data_dir,
            codec=codec,
            length=spec.max_length,
            # Held-out text is measured whole.
            long_records=section.long_records if split == section.train_split else "split",
            template=section.template,
            unit=unit,
        )

    return read


def functions(
    net: Model,
) -> tuple[Callable[[Params, jax.Array], metrics.TokenFacts], LossFn]:
    """Returns what is measured on a batch of windows `[n, 3, length]`, and the loss of an example.

    A window is tokens, the tokens to predict (-1: none) and the bytes of each of these. An example
    is one window, or a unit of several, `[windows, 3, length]`, with `record` for those that exist.
    """

    def facts(params: Params, windows: jax.Array) -> metrics.TokenFacts:
        tokens, targets, sizes = (windows[..., i, :] for i in range(3))
        nll, correct = token_losses(params, net.features(params, tokens), targets)
        wanted = targets >= 0
        return metrics.TokenFacts(
            nll=jnp.sum(nll, -1),
            correct=jnp.sum(correct, -1, dtype=jnp.float32),
            tokens=jnp.sum(wanted, -1, dtype=jnp.float32),
            bytes=jnp.sum(jnp.where(wanted, sizes, 0), -1, dtype=jnp.float32),
        )

    def loss_fn(params: Params, example: dict[str, jax.Array]) -> jax.Array:
        measured = facts(params, example["input"])
        if "record" not in example:
            return measured.nll / jnp.maximum(measured.tokens, 1)
        there = example["record"]
        nll, tokens = (jnp.sum(jnp.where(there, x, 0)) for x in (measured.nll, measured.tokens))
        return nll / jnp.maximum(tokens, 1)

    return facts, loss_fn


def independent(net: Model, params: Params, shape: tuple[int, ...]) -> None:
    """Checks that examples do not depend on each other, see `models.check_examples_independent`.

    Args:
        net: a decoder.
        params: its parameters.
        shape: of an example of the data, which a function of the user's may have made.

    Raises:
        ValueError: they do, or an example is not a window.
    """
    if len(shape) != 2 or shape[0] != 3:
        raise ValueError(
            f"data.name: an example of shape {list(shape)} must be a window [3, length] of tokens, "
            "targets and bytes, as dpjax.data.causal.windows makes them."
        )
    facts, _ = functions(net)
    windows = np.maximum(models.probe(net.input, shape), 0)
    models.check_examples_independent(lambda p, x: facts(p, x).nll, params, windows)


def token_losses(
    params: Params, features: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The negative log-likelihood of target tokens, without all logits in memory at once.

    The logits of a chunk of tokens are formed, reduced, and formed again in the backward pass. (If
    the output layer trains, the clipping engine keeps the cotangents of all of them.)

    Args:
        params: of a decoder.
        features: `[..., tokens, width]`.
        targets: int32 `[..., tokens]`; -1 where nothing is to be predicted.

    Returns:
        Nats, float32, and whether the most likely token is the target, both of the shape of
        `targets` and 0 where there is none.
    """
    vocabulary = jax.eval_shape(models.output_logits, params, features).shape[-1]
    shape, width = targets.shape, features.shape[-1]
    # A power of two below what fits, so that common lengths divide.
    size = 2 ** max(4, (max(_CHUNK // vocabulary, 1)).bit_length() - 1)
    length = int(np.prod(shape))
    features, targets = features.reshape(-1, width), targets.reshape(-1)

    def chunk(features: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = models.output_logits(params, features)
        wanted = targets >= 0
        row = jnp.maximum(targets, 0)[:, None]
        nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, row, axis=-1)[:, 0]
        correct = jnp.argmax(logits, axis=-1) == targets
        return jnp.where(wanted, nll, 0.0), wanted & correct

    if length <= size:
        nll, correct = chunk(features, targets)
    else:
        pad = -length % size
        features = jnp.pad(features, ((0, pad), (0, 0))).reshape(-1, size, width)
        targets = jnp.pad(targets, (0, pad), constant_values=-1).reshape(-1, size)
        body = jax.checkpoint(chunk)
        _, (nll, correct) = jax.lax.scan(lambda _, x: (None, body(*x)), None, (features, targets))
        nll, correct = nll.reshape(-1)[:length], correct.reshape(-1)[:length]
    return nll.reshape(shape), correct.reshape(shape)
