"""A Linen or NNX module as it is: what is wrapped, and what is refused in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from tiny import tiny_config

from dpjax import build, models
from dpjax.models import check_examples_independent


class Linen(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, images, train: bool = True):  # training is the default: Dropout would draw
        x = images.reshape((images.shape[0], -1))  # needs the batch axis
        x = nn.relu(nn.LayerNorm()(nn.Dense(self.width)(x)))
        return nn.Dropout(0.5, deterministic=not train)(x)


class Nnx(nnx.Module):
    def __init__(self, width: int = 8, *, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(14 * 14, width, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, images):
        return self.dropout(jnp.tanh(self.layers[0](images.reshape((images.shape[0], -1)))))


def linen_function(num_classes, *, head_init, dtype, width=8):
    return Linen(width)


class Statistics(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
        return nn.BatchNorm(use_running_average=not train)(images).mean((1, 2))


class NnxStatistics(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(1, rngs=rngs)

    def __call__(self, images):
        return self.norm(images).mean((1, 2))


class Draws(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dropout(0.5, deterministic=False)(images.mean((1, 2)))


class NoPooling(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Conv(4, (3, 3))(images)


class Couples(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Dense(8)(images.mean((1, 2)))
        return x - x.mean(0, keepdims=True)


def config(name, **options):
    made = tiny_config(model__name=f"test_bare:{name}", batch_size=100, epochs=0.1)
    with made.unlocked():
        made.model.options = {"image_size": 14, "channels": 1, **options}
    return made


@pytest.mark.parametrize("name", ["Linen", "Nnx", "linen_function"])
def test_a_bare_module_becomes_a_model_that_trains_privately(name):
    run = build.build(config(name, width=6))
    params = run.model.init(jax.random.key(0))
    assert params["head"]["kernel"].shape[0] == 6
    one = jnp.asarray(np.random.default_rng(0).normal(size=(14, 14, 1)), jnp.float32)
    batch = run.model.apply(params, jnp.stack([one, one + 1]))
    np.testing.assert_allclose(run.model.apply(params, one), batch[0], rtol=1e-5, atol=1e-6)
    other = run.model.init(jax.random.key(1))
    differ = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), params, other)
    assert any(jax.tree.leaves(differ))
    check_examples_independent(run.model.apply, params, np.stack([one, one + 1, one - 1]))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("Statistics", {}, "BatchNorm.*GroupNorm"),
        ("NnxStatistics", {}, "BatchNorm.*GroupNorm"),
        ("Draws", {}, "draws random numbers"),
        ("NoPooling", {}, "average over positions"),
        ("Linen", {"depth": 3}, "depth"),
        ("Nnx", {"depth": 3}, "depth"),
        ("linen_function", {"depth": 3}, "depth"),
        ("Linen", {"image_size": 0}, "image_size=0"),
        ("Couples", {}, "examples are coupled"),
    ],
)
def test_what_a_module_must_not_be_is_one_line(name, options, text):
    with pytest.raises(ValueError, match=text) as raised:
        build.build(config(name, **options))
    assert "\n" not in str(raised.value)
    if name != "Couples":  # found by numbers, on the run's own parameters
        assert f"test_bare:{name}" in str(raised.value)


def test_the_size_of_the_images_is_asked_for():
    with pytest.raises(ValueError, match="set image_size"):
        models.from_module(Linen, 2, head_init="zero", dtype="float32", options={})
