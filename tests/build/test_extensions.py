"""Parts of a run that are the user's own, named in a config as MODULE:FUNCTION."""

import dataclasses
import json

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_config

from dpjax import build, data, dp, files, models
from dpjax.dp import sampling, seeds
from dpjax.runtime import Workdir
from dpjax.runtime.workdir import read_jsonl
from dpjax.step import Hyper
from dpjax.training import loop

# --- What a user writes ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of ten examples are drawn together; a block shows its members: no amplification."""

    num_examples: int
    sampling_prob: float
    title = "blocks of ten examples"
    relation, accountants = "replace_one", ("pld", "rdp")

    def indices(self, seed, step):
        drawn = sampling.generator(seed, step).random(self.num_examples // 10) < self.sampling_prob
        return np.flatnonzero(np.repeat(drawn, 10))

    def event(self, noise_multiplier, steps):
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
        return dp_accounting.SelfComposedDpEvent(gaussian, steps)


def blocks(num_examples, batch_size):
    return Blocks(num_examples, batch_size / num_examples)


def signs(learning_rate, decay=0.9):
    return optax.chain(
        optax.trace(decay), optax.scale_by_sign(), optax.scale_by_learning_rate(learning_rate)
    )


def falling(steps):
    return lambda step: 0.5 - step / (4 * steps)


def negative(image, *, key):
    return jnp.where(jax.random.bernoulli(key), image, -image)


def gentle(bound, *, normalized):
    return dp.automatic(bound, gamma=1.0, normalized=normalized)


def shades(split):
    generator = np.random.default_rng(len(split))
    labels = generator.integers(0, 2, 400)
    pixels = generator.integers(0, 100, (400, 14, 14, 1)) + 100 * labels[:, None, None, None]
    return data.from_arrays(
        "shades", pixels.astype(np.uint8), labels, class_names=("dark", "light"), split=split
    )


# --- What becomes of it ---------------------------------------------------------------------------

OWN = {
    "data__name": "test_extensions:shades",
    "data__augmentation": "test_extensions:negative",
    "dp__sampler": "test_extensions:blocks",
    "dp__clipping": "test_extensions:gentle",
    "optimizer__name": "test_extensions:signs",
    "optimizer__schedule": "test_extensions:falling",
    "optimizer__learning_rate": 0.01,
}


def test_a_run_of_the_user_s_own_parts_trains_as_they_say(tmp_path):
    run = build.build(tiny_config(**OWN, batch_size=50, epochs=0.25))
    results = loop.train(run, Workdir(tmp_path / "w"))
    assert 0 <= results["accuracy"] <= 1
    facts = json.loads((tmp_path / "w/privacy.json").read_text())
    assert facts["sampler"] == "blocks of ten examples"
    assert facts["neighboring_relation"] == "replace_one"
    assert (facts["steps_done"], facts["num_examples"]) == (2, 400)
    assert (run.rule.parameters["gamma"], run.train.name) == (1.0, "shades")
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.GaussianDpEvent(facts["noise_multiplier"]), 2
    )
    accountant = dp_accounting.pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE)
    assert 1.98 < accountant.compose(event).get_epsilon(1e-4) <= 2.0005
    rows = [r for r in read_jsonl(tmp_path / "w/metrics.jsonl") if "nonprivate/loss" in r]
    sizes = [row["nonprivate/batch_size"] for row in rows]
    seed, mechanism = seeds.sampler_seed(run.config.private_seed), run.phases[0].mechanism
    assert sizes == [len(mechanism.indices(seed, step)) for step in range(2)]
    assert [size % 10 for size in sizes] == [0, 0]
    # Every coordinate has made two steps of the optimizer's, at the schedule's rates.
    before, after = (
        models.flatten(run.params),
        models.read_tensors(tmp_path / "w/weights.safetensors"),
    )
    moved = np.concatenate([np.abs(after[k] - v).ravel() for k, v in before.items()])
    rates = 0.01 * 0.5, 0.01 * (0.5 - 1 / 8)
    expected = [abs(rates[0] - rates[1]), sum(rates)]
    assert np.abs(moved[:, None] - np.array(expected)).min(axis=1).max() < 1e-6
    assert 0 < (moved > 0.005).mean() < 1  # the noise has turned some signs


@pytest.mark.parametrize("name", ["lion", "adamw", "rmsprop"])
def test_an_optimizer_of_optax_moves_by_the_noised_mean_alone(name):
    config = tiny_config(optimizer__name=f"optax:{name}").optimizer
    hyper = Hyper(
        learning_rate=jnp.float32(0.1), noise_multiplier=jnp.float32(2.0), rule=dp.flat(1.0),
        noise_key=jax.random.key(0), augment_key=jax.random.key(1), batch_size=jnp.float32(50),
    )  # fmt: skip
    transform = build.optimizer.optimizer(config, 5, private=True)(hyper)
    params = {"w": jnp.ones(100)}
    total = dp.ClippedSum({"w": jnp.full(100, 3.0)}, jnp.float32(1.0))
    updates, _ = transform.update(total, transform.init(params), params)
    noise, alone = dp.gaussian(2.0, 50, key=jax.random.key(0)), getattr(optax, name)(0.1)
    mean, _ = noise.update(total, noise.init(params))
    expected, _ = alone.update(mean, alone.init(params), params)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5)


NOT_CALLABLE = 3


def nothing(*arguments, **options):
    """Returns None, which is no part of a run."""


FIELDS = ["data__name", "data__augmentation", "dp__sampler", "dp__clipping", "optimizer__name",
          "optimizer__schedule", "model__name"]  # fmt: skip
MISTAKES = {
    "no_such_module:f": "cannot be imported: ModuleNotFoundError",
    "test_extensions:": "has no function ''",
    "test_extensions:blockz": "has no function 'blockz'. Did you mean 'blocks'?",
    "test_extensions:NOT_CALLABLE": "has no function 'NOT_CALLABLE'",
    ":f": "cannot be imported: ValueError",
}  # fmt: skip


@pytest.mark.parametrize("text", MISTAKES)
def test_a_function_that_is_not_there_is_refused_with_the_nearest(text):
    with pytest.raises(ValueError) as caught:
        files.resolve("some.field", text, {"known": nothing})
    assert f"some.field={text!r}" in str(caught.value)
    assert MISTAKES[text] in str(caught.value)


def test_a_name_is_looked_up_and_a_function_imported():
    assert files.resolve("some.field", "known", {"known": nothing}) is nothing
    assert files.resolve("some.field", "test_extensions:blocks", {}).__name__ == "blocks"
    text = "must be one of known, MODULE:FUNCTION of yours. Did you mean 'known'?"
    with pytest.raises(ValueError) as caught:
        files.resolve("some.field", "knwon", {"known": nothing})
    assert text in str(caught.value)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_that_takes_a_function_says_so_in_one_way(field):
    text = "test_extensions:blockz"
    with pytest.raises(ValueError) as caught:
        build.build(tiny_config(**{field: text}))
    assert f"{field.replace('__', '.')}={text!r}" in str(caught.value)
    assert MISTAKES[text] in str(caught.value)


WRONG = {
    "data__name": "must return a Dataset, not None",
    "dp__sampler": "must be an instance of a frozen dataclass",
    "dp__clipping": "must return a ClipRule, not None",
    "optimizer__name": "must return a GradientTransformation, not None",
    "optimizer__schedule": "must return a function from the step to a number",
}


@pytest.mark.parametrize("field", WRONG)
def test_what_a_function_returns_is_checked(field):
    with pytest.raises(ValueError, match=WRONG[field]):
        build.build(tiny_config(**{field: "test_extensions:nothing"}))


@pytest.mark.parametrize("name", ["adam", "adam_corrected", "optax:adamw"])
def test_options_that_an_optimizer_does_not_take_are_refused_before_training(name):
    changes = {"optimizer__name": name, "optimizer__options": {"beta1": 0.9}}
    with pytest.raises(ValueError, match=r"optimizer.options field='beta1' must be one of b1, b2"):
        build.build(tiny_config(**changes))
