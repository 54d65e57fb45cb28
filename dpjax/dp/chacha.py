"""ChaCha20 as a kind of JAX key: bits that cannot be predicted without its 256 bits.

The keys fold, split and draw bits like JAX's own (`jax.random.fold_in`, ...), and every word
depends on key and position alone, so it is the same on any number of devices. Folding is a
pseudo-random function: a folded key is the first half of a block under its parent. Bits, folds and
splits use different nonces, so no two of them read the same block.

Source: RFC 8439 (Nir, Langley 2018), sections 2.1 to 2.3.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

__all__ = ["IMPL", "blocks", "is_chacha", "key_of"]

_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"
_COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))

_BITS, _FOLD, _SPLIT = ((use, 0, 0) for use in (1, 2, 3))  # nonces


def blocks(
    key: jax.Array, counter: jax.Array, nonce: tuple[jax.typing.ArrayLike, ...] = _BITS
) -> jax.Array:
    """Computes blocks of the key stream.

    Args:
        key: `[8]` uint32.
        counter: `[n]` uint32, the numbers of the blocks.
        nonce: three words.

    Returns:
        `[16, n]` uint32, the words of each block.
    """
    first = [*_CONSTANTS, *key, counter, *nonce]
    start = [jnp.broadcast_to(jnp.asarray(word, jnp.uint32), counter.shape) for word in first]

    def two_rounds(_: jax.Array, state: list[jax.Array]) -> list[jax.Array]:
        state = list(state)
        for a, b, c, d in (*_COLUMNS, *_DIAGONALS):
            for x, y, z, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                state[x] = state[x] + state[y]
                state[z] = _rotated(state[z] ^ state[x], bits)
        return state

    # Not unrolled: XLA's CPU compiler takes 5 times as long for a slower program.
    state = jax.lax.fori_loop(0, 10, two_rounds, start)
    return jnp.stack([now + before for now, before in zip(state, start)])


def _rotated(word: jax.Array, bits: int) -> jax.Array:
    return (word << bits) | (word >> (32 - bits))


def _fold_in(key: jax.Array, data: jax.typing.ArrayLike) -> jax.Array:
    return blocks(key, jnp.asarray(data, jnp.uint32)[None], _FOLD)[:8, 0]


def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    number = _size(shape)
    made = blocks(key, jnp.arange(number, dtype=jnp.uint32), _SPLIT)[:8]
    return made.T.reshape(*shape, 8)


def _random_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    size = _size(shape)
    words = blocks(key, jnp.arange(-(-size // 16), dtype=jnp.uint32)).T.reshape(-1)[:size]
    kind = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bit_width]
    return words.astype(kind).reshape(shape)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for axis in shape:
        size *= axis
    return size


def _seed(seed: jax.Array) -> jax.Array:
    raise TypeError("a ChaCha20 key has 256 bits: dp.seeds.noise_key(seed, secure=True) makes one.")


IMPL: Any = jax.extend.random.define_prng_impl(
    key_shape=(8,), seed=_seed, split=_split, random_bits=_random_bits, fold_in=_fold_in,
    name="chacha20", tag="cc20",
)  # fmt: skip


def key_of(secret: bytes) -> jax.Array:
    """Returns the typed key of 32 secret bytes."""
    if len(secret) != 32:
        raise ValueError(f"secret of {len(secret)} bytes must have 32.")
    words = [int.from_bytes(secret[i : i + 4], "little") for i in range(0, 32, 4)]
    return jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32), impl=IMPL)


def is_chacha(key: jax.Array) -> bool:
    """Whether a typed key, traced or not, is one of ChaCha20."""
    return bool(jax.random.key_impl(key) == IMPL)
