"""The cross-example check finds what couples examples and lets through what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dpjax import models

INPUTS = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
PARAMS = {"w": jnp.eye(6)}


def check(apply, params=PARAMS, inputs=INPUTS):
    models.check_examples_independent(apply, params, inputs)


class Net(nn.Module):
    frozen: bool

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=self.frozen)(nn.Dense(8)(x))
        # The head of a fresh fine-tuning run: as it is, it hides everything before it.
        return nn.Dense(3, kernel_init=nn.initializers.zeros)(x)


def net(frozen):
    module = Net(frozen)
    variables = module.init(jax.random.key(0), INPUTS)
    return lambda p, x: module.apply(p, x, mutable=["batch_stats"])[0], variables


def test_batch_norm_in_training_mode_is_refused_behind_a_zero_head():
    apply, variables = net(frozen=False)
    assert not np.any(apply(variables, INPUTS))
    with pytest.raises(ValueError, match=r"(?s)examples are coupled.*Batch normalization"):
        check(apply, variables)


def test_batch_norm_in_inference_mode_passes():
    check(*net(frozen=True))


@pytest.mark.parametrize(
    "apply",
    [
        lambda p, x: x @ p["w"] + 0.01 * x[:1] @ p["w"],
        lambda p, x: x @ p["w"] + 0.01 * jnp.roll(x, 2, axis=0),
        lambda p, x: x @ p["w"] / jnp.max(jnp.abs(x)),
        lambda p, x: jnp.cumsum(x @ p["w"], axis=0),
        lambda p, x: x @ p["w"] + 0.1 * len(x),
    ],
    ids=["first", "pairs", "max", "cumsum", "size"],
)
def test_any_coupling_is_refused(apply):
    with pytest.raises(ValueError, match="examples are coupled"):
        check(apply)


@pytest.mark.parametrize(
    "apply,inputs,message",
    [
        (lambda p, x: x @ p["w"], INPUTS[:1], "must be one size >= 2"),
        (lambda p, x: jnp.ones((len(x), 2)), INPUTS, "do not depend on the inputs"),
        (lambda p, x: jnp.sum(x @ p["w"]), INPUTS, r"returns shape \(\)"),
        (lambda p, x: jnp.log(x - 100), INPUTS, "not finite"),
        (lambda p, x: x @ p["w"], (INPUTS, INPUTS[:3]), "must be one size >= 2"),
    ],
)
def test_empty_checks_are_refused(apply, inputs, message):
    with pytest.raises(ValueError, match=message):
        check(apply, inputs=inputs)


def test_pixels_and_tokens_are_replaced_by_valid_ones():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5), np.uint8)
    check(lambda p, x: x.astype(jnp.float32)[:, None] * p["w"][0, 0], inputs=pixels)
    tokens = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    seen = []

    def apply(p, x):
        jax.debug.callback(seen.append, x)
        return p["w"][x % 6].sum(axis=1)

    check(apply, inputs=tokens)
    jax.effects_barrier()
    assert min(np.min(x) for x in seen) >= 1
    assert max(np.max(x) for x in seen) <= 6


def test_black_images_can_be_checked():
    check(lambda p, x: x @ p["w"], inputs=np.zeros((2, 6), np.float32))
