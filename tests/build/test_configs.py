"""Every config of the repository builds: shapes traced, budget calibrated, without its data."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dpjax import build, dp, models
from dpjax.build import fields, planner
from dpjax.models import finetune

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
# Training examples, classes and the shape of a stored input.
DATA = {
    "quickstart": (4_000, 10, (28, 28, 1)),
    "pretrain_digits": (1_617, 10, (8, 8, 1)),
    "cifar10": (50_000, 10, (32, 32, 3)),
    "cifar100": (50_000, 100, (32, 32, 3)),
    "sun397": (87_002, 397, (224, 224, 3)),
    "cassava": (5_656, 5, (224, 224, 3)),
    "movie_reviews": (8_454, 2, (64,)),
    "newsgroups": (11_314, 20, (128,)),
    "language_model": (5_000, 1, (3, 128)),
    "scratch_wrn": (50_000, 10, (32, 32, 3)),
}


def test_no_config_is_forgotten():
    assert {path.stem for path in CONFIGS} == set(DATA)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.one_in(2)
def test_config_builds(path):
    config = fields.load(str(path))
    num_examples, classes, shape = DATA[path.stem]
    tuning = build.model.finetuning_set(config.finetune)(build.model.model(config.model, classes))
    params = jax.eval_shape(tuning.model.init, jax.random.key(0))
    trainable, frozen = finetune.split(params, tuning.trainable)
    assert finetune.count(trainable) > 0
    _, loss_fn = build.loss.functions(tuning.model, config.data, shape)
    text = isinstance(tuning.model.input, models.TextSpec)
    example = {
        "input": jax.ShapeDtypeStruct(shape, jnp.int32 if text else jnp.uint8),
        "label": jax.ShapeDtypeStruct((), jnp.int32),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }
    grads = jax.eval_shape(
        jax.grad(lambda p, f, e: loss_fn(finetune.join(p, f), e)), trainable, frozen, example
    )
    assert jax.tree.map(lambda g: g.shape, grads) == jax.tree.map(lambda p: p.shape, trainable)
    steps = dp.num_steps(num_examples, config.batch_size, config.epochs)
    build.optimizer.optimizer(config.optimizer, steps, private=config.dp is not None)
    if config.dp is None:
        return
    build.privacy.clip_rule(config.dp)
    mechanism, poisson = (
        dp.calibrated(
            epsilon=config.dp.epsilon,
            delta=config.dp.delta,
            num_examples=num_examples,
            batch_size=config.batch_size,
            epochs=config.epochs,
            sampler=sampler,
        )
        for sampler in (config.dp.sampler, "poisson")
    )
    assert mechanism.epsilon(config.dp.delta) <= config.dp.epsilon
    # Why it is the sampler of the configs: less noise in all of them.
    assert config.dp.sampler == "random_allocation"
    assert noise_of_a_run(mechanism) < noise_of_a_run(poisson)


PRIVATE = [p.stem for p in CONFIGS if p.stem != "pretrain_digits"] + ["cifar100:10percent"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIVATE)
def test_what_a_config_says_of_the_planner_is_so(name):
    """A batch size that the planner does not pick stands beside the one that it picks."""
    stem, _, tenth = name.partition(":")
    (path,) = [p for p in CONFIGS if p.stem == stem]
    text = re.sub(r"\n *# ", " ", path.read_text())
    said = re.search(r"lanner picks (\d+)(?: for all data and (\d+) for a tenth)?", text)
    config = fields.load(name)
    made = planner.plan(
        DATA[stem][0] // (10 if tenth else 1), config.epochs, config.dp.epsilon, config.dp.delta,
        samplers=[config.dp.sampler],
    )  # fmt: skip
    assert made.batch_size == (int(said[2 if tenth else 1]) if said else config.batch_size)


def noise_of_a_run(mechanism):
    """Of the mean gradients, summed over the run: sigma sqrt(T) over q T."""
    return mechanism.noise_multiplier / (mechanism.sampling_prob * math.sqrt(mechanism.steps))
