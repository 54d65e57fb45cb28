"""Named key streams, so that no two uses of randomness share a key.

There are two seeds. The public seed determines initialization, augmentation and subsets; anyone may
know it. The private seed determines the sampled batches and the noise; the privacy guarantee holds
only while it is secret.
"""

from __future__ import annotations

import hashlib
import secrets
import zlib

import jax
import numpy as np

from dpjax.dp import chacha

__all__ = ["draw_private_seed", "fingerprint", "noise_key", "public_key", "sampler_seed"]

_BITS = 256


def public_key(seed: int, name: str) -> jax.Array:
    """Returns the typed key of the public stream `name` ("init", "augment", ...)."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def draw_private_seed() -> int:
    """Draws a 256-bit seed from the operating system's entropy."""
    return secrets.randbits(_BITS)


def noise_key(private_seed: int, stream: str = "noise", *, secure: bool = False) -> jax.Array:
    """Returns the key of a noise stream: "noise" (gradients), "count", "temperature" or "vote".

    It has 64 bits, all that JAX's threefry2x32 accepts; a secure one is a ChaCha20 key of 256 bits.
    """
    if secure:
        return chacha.key_of(_derive(private_seed, "secure " + stream))
    words = np.frombuffer(_derive(private_seed, stream)[:8], np.uint32)
    return jax.random.wrap_key_data(jax.numpy.asarray(words), impl="threefry2x32")


def sampler_seed(private_seed: int) -> int:
    """Returns the sampler's 128-bit key."""
    return int.from_bytes(_derive(private_seed, "sampler")[:16], "big")


def fingerprint(private_seed: int, text: str = "") -> str:
    """Returns a hash that distinguishes private seeds, and texts, without revealing them."""
    return _derive(private_seed, "digest" + text).hex()


def _derive(private_seed: int, stream: str) -> bytes:
    """SHA-256 of the seed and the stream's name: no stream reveals anything about another."""
    if not 0 <= private_seed < 2**_BITS:
        raise ValueError(f"private_seed={private_seed} must be in [0, 2**{_BITS}).")
    # Seeds of up to 128 bits keep the streams that they had before seeds of 256 bits.
    size = 16 if private_seed < 2**128 else _BITS // 8
    return hashlib.sha256(private_seed.to_bytes(size, "big") + stream.encode()).digest()
