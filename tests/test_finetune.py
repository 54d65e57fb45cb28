"""Which leaves each set trains, and that the others stay as they are."""

import jax
import numpy as np
import pytest

from dpjax import finetune, models

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
    [({"first": 1}, {0}), ({"last": 2}, {1, 2}), ({"first": 3}, {0, 1, 2})],
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


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: finetune.regex("nothing_here")(MODEL), "matches none"),
        (lambda: finetune.regex("("), "not a regular expression"),
        (lambda: finetune.blocks(first=4)(MODEL), "exceed the model's 3 blocks"),
        (lambda: finetune.blocks(), "first=0, last=0"),
        (lambda: finetune.combine([]), "at least one"),
        (lambda: finetune.split(PARAMS, lambda path: False), "no parameter is trainable"),
    ],
)
def test_errors(make, text):
    with pytest.raises(ValueError, match=text):
        make()
