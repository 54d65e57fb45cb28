"""Activation checkpointing is one field: of every family, each block, with the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core.primitives import remat_p
from tiny import tiny_config

from dpjax import models
from dpjax.build import model
from dpjax.models import finetune

FAMILIES = {
    "vit": ({"width": 16, "depth": 2, "heads": 2, "mlp": 16, "image_size": 14}, 2),
    "text_encoder": ({"vocab_size": 40, "width": 16, "depth": 3, "heads": 2, "mlp": 16,
                      "positions": 8, "max_length": 8}, 3),
    "decoder": ({"vocab_size": 40, "width": 16, "depth": 2, "heads": 2, "mlp": 16,
                 "max_length": 8}, 2),
    "wide_resnet": ({"depth": 10, "widen": 1, "groups": 4, "image_size": 8}, 3),
    "resnet_v2": ({"depths": (1, 1, 1, 1), "image_size": 32}, 4),
    "efficientnet_lite": ({"image_size": 32}, 16),
    "resnet8": ({}, 3),
}  # fmt: skip
SIZES = {"vit": "mini", "text_encoder": "minilm_l6", "decoder": "tiny", "wide_resnet": "16_4",
         "resnet_v2": "r50x1", "efficientnet_lite": "lite0", "resnet8": None}  # fmt: skip


def make(name, remat):
    config = tiny_config(
        model__name=name, model__size=SIZES[name], model__remat=remat, model__head_init="random"
    )
    with config.unlocked():
        config.model.options = FAMILIES[name][0]
    return model.model(config.model, 3)


def functions(net):
    example = net.input.example()
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, example.shape) * 3, example.dtype)
    return lambda params: jnp.sum(jnp.square(net.apply(params, x)))


def checkpoints(net, params):
    """The number of checkpointed calls in the program of one output."""
    program = jax.make_jaxpr(functions(net))(params)
    return sum(eqn.primitive is remat_p for eqn in program.eqns)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_block_is_checkpointed_and_keeps_its_name(name):
    plain, again = make(name, False), make(name, True)
    shapes = [jax.eval_shape(net.init, jax.random.key(0)) for net in (plain, again)]
    assert shapes[0] == shapes[1]
    assert checkpoints(again, shapes[0]) == FAMILIES[name][1]
    assert checkpoints(plain, shapes[0]) == 0


@pytest.mark.parametrize("name", [
    "vit", *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n != "vit")])  # fmt: skip
def test_gradients_are_those_of_the_plain_model(name):
    nets = make(name, False), make(name, True)
    params = nets[0].init(jax.random.key(0))
    want, got = (jax.jit(jax.grad(functions(net)))(params) for net in nets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5), want, got)


@pytest.mark.slow
def test_lora_reaches_checkpointed_blocks():
    nets = [finetune.lora(rank=2)(make("vit", remat)).model for remat in (False, True)]
    params = nets[0].init(jax.random.key(0))
    params["lora"] = jax.tree.map(lambda x: x + 0.1, params["lora"])
    want, got = (jax.grad(functions(net))(params)["lora"] for net in nets)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5), want, got)


def own(num_classes, *, head_init, dtype):
    return models.vision_transformer(models.SIZES["mini"], num_classes)


def own_with_remat(num_classes, *, head_init, dtype, remat):
    return models.vision_transformer(models.SIZES["mini"], num_classes, remat=remat)


def test_a_model_of_yours_takes_remat_or_says_how():
    config = tiny_config(model__name="test_remat:own", model__remat=True, model__options={})
    with pytest.raises(ValueError, match=r"model\.remat=True: 'test_remat:own' takes no remat"):
        model.model(config.model, 3)
    config.model.name = "test_remat:own_with_remat"
    net = model.model(config.model, 3)
    assert checkpoints(net, jax.eval_shape(net.init, jax.random.key(0))) == 3
    config.model.name = "test_bare:Linen"
    with pytest.raises(ValueError, match=r"nn\.remat"):
        model.model(config.model, 3)
