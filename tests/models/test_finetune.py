"""Which leaves each set trains, and that the others stay as they are."""

import jax
import numpy as np
import pytest

from dpjax import models
from dpjax.models import finetune

MODEL = models.vision_transformer(
    models.ViTConfig(width=8, depth=3, heads=2, mlp=8, image_size=14), num_classes=4
)
PARAMS = MODEL.init(jax.random.key(0))
NORMS = {
    f"{where}/{leaf}"
    for where in ("norm", *(f"blocks_{b}/norm{n}" for b in range(3) for n in (1, 2)))
    for leaf in ("scale", "bias")
}
HEAD = {"head/kernel", "head/bias"}


def trained(make):
    chosen, rest = finetune.split(PARAMS, make(MODEL).trainable)
    flat = models.flatten(chosen)
    assert set(flat) | set(models.flatten(rest)) == set(models.flatten(PARAMS))
    assert not set(flat) & set(models.flatten(rest))
    return set(flat)


def test_full():
    assert trained(finetune.full()) == set(models.flatten(PARAMS))


def test_head():
    assert trained(finetune.head()) == HEAD


def test_film_is_every_norm_and_the_head():
    assert trained(finetune.film()) == NORMS | HEAD


def test_bias():
    got = trained(finetune.bias())
    assert got == {p for p in models.flatten(PARAMS) if p.endswith("/bias")} | HEAD


@pytest.mark.parametrize(
    ("arguments", "numbers"),
    [
        ({"first": 1}, {0}),
        ({"last": 2}, {1, 2}),
        ({"first": 3}, {0, 1, 2}),
        ({"at": (2, 0)}, {0, 2}),
    ],
)
def test_blocks(arguments, numbers):
    got = trained(finetune.blocks(**arguments))
    want = {p for p in models.flatten(PARAMS) if any(p.startswith(f"blocks_{n}/") for n in numbers)}
    assert got == want | HEAD


def test_regex_and_combine():
    both = finetune.combine([finetune.regex("^pos_embed$"), finetune.head()])
    assert trained(both) == {"pos_embed"} | HEAD


def test_join_undoes_split():
    parts = finetune.split(PARAMS, finetune.film()(MODEL).trainable)
    jax.tree.map(np.testing.assert_array_equal, finetune.join(*parts), PARAMS)
    assert sum(map(finetune.count, parts)) == finetune.count(PARAMS)


def random_like(params):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return jax.tree.unflatten(
        treedef, [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
    )


def test_lora():
    tuning = finetune.lora(rank=2)(MODEL)
    params = tuning.model.init(jax.random.key(0))
    chosen, rest = finetune.split(params, tuning.trainable)
    want = {
        f"lora/blocks_{b}/attn/{which}/{part}"
        for b in range(3)
        for which in ("query", "value")
        for part in "ab"
    }
    assert set(models.flatten(chosen)) == want | HEAD
    assert set(models.flatten(rest)) == set(models.flatten(PARAMS)) - HEAD
    assert params["lora"]["blocks_0"]["attn"]["query"]["a"].shape == (8, 2)

    images = jax.random.normal(jax.random.key(1), (3, *MODEL.input.example().shape))
    base = random_like(PARAMS)
    start = {**base, "lora": params["lora"]}
    np.testing.assert_array_equal(tuning.model.apply(start, images), MODEL.apply(base, images))

    moved = {**base, "lora": random_like(params["lora"])}
    adapted = tuning.model.apply(moved, images)
    assert not np.allclose(adapted, MODEL.apply(base, images), atol=1e-3)
    merged = tuning.merge(moved)
    assert set(models.flatten(merged)) == set(models.flatten(PARAMS))
    np.testing.assert_allclose(MODEL.apply(merged, images), adapted, rtol=1e-4, atol=1e-5)


def test_adapters_of_several_ranks_stand_side_by_side():
    both = finetune.combine(
        [finetune.lora(rank=2, targets="query$"), finetune.lora(rank=3, targets="value$")]
    )(MODEL)
    params = both.model.init(jax.random.key(0))
    inner = params["lora"]["blocks_0"]["attn"]
    assert (inner["query"]["a"].shape, inner["value"]["a"].shape) == ((8, 2), (8, 3))
    moved = {**params, "lora": random_like(params["lora"])}
    images = jax.random.normal(jax.random.key(1), (2, *MODEL.input.example().shape))
    merged = both.merge(moved)
    assert "lora" not in merged
    assert not np.allclose(both.model.features(params, images), both.model.features(moved, images))
    np.testing.assert_allclose(
        both.model.features(moved, images), MODEL.features(merged, images), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="blocks_0/attn/query, which has an adapter already"):
        finetune.combine([finetune.lora(), finetune.lora(targets="query")])(MODEL)


@pytest.mark.parametrize(
    "targets", [("attn/query$", "attn/value$"), ("query$", "key$", "value$"), ("fc1$", "query$")]
)
def test_several_adapters_have_their_parameters(targets):
    tuning = finetune.combine([*(finetune.lora(rank=4, targets=t) for t in targets)])(MODEL)
    params = jax.eval_shape(tuning.model.init, jax.random.key(0))
    trainable, _ = finetune.split(params, tuning.trainable)
    places = {path.rpartition("/")[0] for path in models.flatten(trainable["lora"])}
    assert len(places) == 3 * len(targets)  # one in each block
    assert set(models.flatten(jax.eval_shape(tuning.merge, params))) == set(models.flatten(PARAMS))


def test_lora_loads_published_weights(tmp_path):
    models.save_weights(random_like(PARAMS), tmp_path / "w.safetensors")
    tuning = finetune.lora(rank=2)(MODEL)
    params = tuning.model.init(jax.random.key(0))
    loaded = tuning.model.load(params, str(tmp_path / "w.safetensors"), head=True)
    np.testing.assert_array_equal(
        loaded["blocks_1"]["mlp"]["fc1"]["kernel"],
        random_like(PARAMS)["blocks_1"]["mlp"]["fc1"]["kernel"],
    )
    assert "lora" in loaded


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: finetune.regex("nothing_here")(MODEL), "matches none"),
        (lambda: finetune.regex("("), "not a regular expression"),
        (lambda: finetune.blocks(first=4)(MODEL), "exceed the model's 3 blocks"),
        (lambda: finetune.blocks(), "first=0, last=0"),
        (lambda: finetune.blocks(at=(0, 3))(MODEL), "must be below the model's 3 blocks"),
        (lambda: finetune.blocks(at=(1, 1)), r"at=\(1, 1\) must be different places"),
        (lambda: finetune.lora(rank=0)(MODEL), "rank=0"),
        (lambda: finetune.lora(targets="conv")(MODEL), "none of the 19 dense layers"),
        (lambda: finetune.combine([]), "at least one"),
        (lambda: finetune.split(PARAMS, lambda path: False), "no parameter is trainable"),
    ],
)
def test_errors(make, text):
    with pytest.raises(ValueError, match=text):
        make()
