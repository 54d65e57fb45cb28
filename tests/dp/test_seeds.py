"""Streams are separate, secret ones come from the operating system."""

import jax
import pytest

from dpjax.dp import seeds


def test_streams_differ():
    seed = 2**127 + 12345
    noise = jax.random.key_data(seeds.noise_key(seed)).tolist()
    assert noise != jax.random.key_data(seeds.noise_key(seed + 1)).tolist()
    assert seeds.sampler_seed(seed) != seed
    names = ["init", "augment"]
    keys = [jax.random.key_data(seeds.public_key(0, name)).tolist() for name in names]
    assert keys[0] != keys[1]


def test_every_bit_of_the_seed_counts():
    """Seeds that differ only in their top bits give other noise."""
    a, b = (jax.random.key_data(seeds.noise_key(s)).tolist() for s in (7, 7 + 2**120))
    assert a != b


def test_digests_are_keyed():
    """A fingerprint of private data tells nothing to who does not know the seed."""
    assert seeds.fingerprint(1, "data") == seeds.fingerprint(1, "data")
    assert (
        len(
            {
                seeds.fingerprint(1, "data"),
                seeds.fingerprint(2, "data"),
                seeds.fingerprint(1, "other"),
            }
        )
        == 3
    )


def test_entropy():
    drawn = {seeds.draw_private_seed() for _ in range(50)}
    assert len(drawn) == 50
    assert max(drawn).bit_length() > 100


@pytest.mark.parametrize("seed", [-1, 2**256])
def test_range(seed):
    with pytest.raises(ValueError, match="private_seed="):
        seeds.noise_key(seed)
