"""Text from a decoder: sampling with a key-value cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.models.model import Params, compute_dtype
from dpjax.models.nets import Cache, DecoderConfig, decode, empty_cache, output_logits
from dpjax.models.tokens import TextCodec

__all__ = ["Generator", "generate"]

_ROUND = 32  # prompts are padded to a multiple of this, so that few lengths compile


def generate(
    config: DecoderConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    end: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
) -> list[list[int]]:
    """Continues prompts, all of them at once.

    Args:
        config: shape of the decoder.
        params: plain weights, adapters merged.
        prompts: token ids of each prompt, at least one each.
        max_tokens: the most tokens to add, >= 1.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: samples from the most likely tokens that together have at least this probability,
            (0, 1] (arXiv 1904.09751).
        end: token after which a continuation ends; it is left out of the result.
        seed: of the sampling. A continuation also depends on its place among the prompts.
        dtype: in which layers compute.

    Returns:
        The added tokens of each prompt.

    Raises:
        ValueError: an argument is out of range.
    """
    for name, value, fits in (
        ("max_tokens", max_tokens, max_tokens >= 1),
        ("temperature", temperature, 0 <= temperature < float("inf")),
        ("top_p", top_p, 0 < top_p <= 1),
        ("prompts", [len(p) for p in prompts], all(len(p) for p in prompts)),
    ):
        if not fits:
            raise ValueError(f"{name}={value} is out of range, see dpjax.models.generate.")
    wrong = [t for prompt in prompts for t in prompt if not 0 <= t < config.vocab_size]
    if wrong:
        raise ValueError(f"prompts: token {wrong[0]} must be in [0, {config.vocab_size}).")
    if not prompts:
        return []
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), -(-max(lengths) // _ROUND) * _ROUND), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    added = _continue(
        config,
        max_tokens,
        str(compute_dtype(dtype)),
        params,
        tokens,
        lengths,
        jnp.float32(temperature),
        jnp.float32(top_p),
        jnp.int32(-1 if end is None else end),
        jax.random.key(seed),
    )
    out = []
    for row in np.asarray(added).tolist():
        out.append(row[: row.index(end)] if end in row else row)
    return out


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _continue(
    config: DecoderConfig,
    count: int,
    dtype: str,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    end: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """The added tokens `[prompts, count]`; what follows the end token is repetitions of it."""
    batch, width = tokens.shape
    cache = empty_cache(config, batch, width + count, jnp.dtype(dtype))
    places = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    features, cache = decode(config, params, tokens, places, cache)
    # Logits of the last token alone: those of a long prompt would fill the memory.
    features = jnp.take_along_axis(features, (lengths - 1)[:, None, None], axis=1)
    last = output_logits(params, features[:, 0])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    State = tuple[jax.Array, Cache, jax.Array]

    def turn(state: State, step: jax.Array) -> tuple[State, jax.Array]:
        logits, cache, ended = state
        token = jax.vmap(_sample, (0, None, None, 0))(
            logits, temperature, top_p, jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        )
        token = jnp.where(ended, end, token)
        # The padding of a shorter prompt is overwritten before anything could see it.
        features, cache = decode(config, params, token[:, None], (lengths + step)[:, None], cache)
        return (output_logits(params, features[:, 0]), cache, ended | (token == end)), token

    first = (last, cache, jnp.zeros(batch, bool))
    return jax.lax.scan(turn, first, jnp.arange(count))[1].T


def _sample(
    logits: jax.Array, temperature: jax.Array, top_p: jax.Array, key: jax.Array
) -> jax.Array:
    """One token, int32, from logits `[vocab]`."""
    best = jnp.argmax(logits).astype(jnp.int32)
    scaled = logits / jnp.maximum(temperature, 1e-6)
    order = jnp.argsort(-scaled)
    probs = jax.nn.softmax(scaled[order])
    # What stands before a token decides, so that the most likely one always stays.
    kept = jnp.cumsum(probs) - probs < top_p
    choice = jax.random.categorical(key, jnp.where(kept, scaled[order], -jnp.inf))
    return jnp.where(temperature > 0, order[choice].astype(jnp.int32), best)


@dataclasses.dataclass(frozen=True)
class Generator:
    """A decoder with its tokenizer: text in, text out.

    Attributes:
        config: shape of the decoder.
        params: plain weights, adapters merged.
        codec: the tokenizer.
        dtype: in which layers compute.
    """

    config: DecoderConfig
    params: Params
    codec: TextCodec
    dtype: str = "float32"

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[str]:
        """Continues prompts.

        Args:
            prompts: texts; an empty one starts from the end-of-text token, if there is one.
            max_tokens: the most tokens to add.
            temperature: see `generate`.
            top_p: see `generate`.
            stop: a continuation ends before the first of these texts.
            seed: of the sampling.

        Returns:
            The continuations, without the prompts.

        Raises:
            ValueError: an argument is out of range, or an empty prompt has nothing to start from.
        """
        start = [] if self.codec.end is None else [self.codec.end]
        ids = [self.codec.encode(text).ids or start for text in prompts]
        if not all(ids):
            raise ValueError(
                "prompts: an empty prompt needs a tokenizer with an end-of-text token."
            )
        added = generate(
            self.config, self.params, ids, max_tokens=max_tokens, temperature=temperature,
            top_p=top_p, end=self.codec.end, seed=seed, dtype=self.dtype,
        )  # fmt: skip
        texts = [self.codec.decode(before + after) for before, after in zip(ids, added)]
        shown = [self.codec.decode(before) for before in ids]
        # Decoded together: a tokenizer may write the first token of a text in another way.
        cut = [text.removeprefix(before) for text, before in zip(texts, shown)]
        return [_until(text, stop) for text in cut]


def _until(text: str, stop: Sequence[str]) -> str:
    places = [text.index(one) for one in stop if one and one in text]
    return text[: min(places)] if places else text
