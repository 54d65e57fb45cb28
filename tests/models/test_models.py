"""What every model must do, on the smallest member of every family."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax import models
from dpjax.models.model import HEAD_INITS, head_initializer

CLASSES = 5
BATCH = 3
FILM = re.compile(r"(^|/)norm[^/]*/(scale|bias)$")

VIT = models.ViTConfig(width=16, depth=2, heads=2, mlp=24, patch=4, image_size=8)
LITE = models.EfficientNetConfig(
    stages=(
        models.MBConvStage(1, 3, 1, 1, 4),
        models.MBConvStage(2, 3, 2, 2, 6),
    ),
    stem=4,
    width=8,
    image_size=14,
)
RESNET = models.ResNetConfig(depths=(1, 1), width=8, groups=4, image_size=16)
WRN = models.WideResNetConfig(depth=10, widen=1, groups=4, image_size=8)
TEXT = models.TextConfig(
    vocab_size=20, width=16, depth=2, heads=2, mlp=24, positions=10, max_length=8
)
MPNET = dataclasses.replace(TEXT, pad_id=1, first_position=2, token_types=0, relative=8)

FAMILIES = {
    "vit": lambda **kwargs: models.vision_transformer(VIT, CLASSES, **kwargs),
    "vit_gap": lambda **kwargs: models.vision_transformer(
        dataclasses.replace(VIT, pooling="gap", class_token=False), CLASSES, **kwargs
    ),
    "resnet8": lambda **kwargs: models.resnet8(CLASSES, **kwargs),
    "efficientnet_lite": lambda **kwargs: models.efficientnet_lite(LITE, CLASSES, **kwargs),
    "resnet_v2": lambda **kwargs: models.resnet_v2(RESNET, CLASSES, **kwargs),
    "wide_resnet": lambda **kwargs: models.wide_resnet(WRN, CLASSES, **kwargs),
    "text": lambda **kwargs: models.text_encoder(TEXT, CLASSES, **kwargs),
    "mpnet": lambda **kwargs: models.text_encoder(MPNET, CLASSES, **kwargs),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def examples(model, count=BATCH):
    rng = np.random.default_rng(0)
    example = model.input.example()
    if example.dtype == jnp.int32:
        ids = rng.integers(1, model.input.vocab_size, (count, *example.shape), np.int32)
        ids[0, 3:] = model.input.pad_id
        return ids
    return rng.normal(size=(count, *example.shape)).astype(np.float32)


def filled(model, seed):
    """Parameters of which none is zero or one, without compiling `init`."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        scale = max(np.prod(leaf.shape[:-1]), 1) ** -0.5 if len(leaf.shape) > 1 else 0.1
        values = scale * rng.normal(size=leaf.shape) + path.endswith(("scale", "gain"))
        return jnp.asarray(values, jnp.float32)

    shapes = models.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    return models.unflatten({path: fill(path, leaf) for path, leaf in shapes.items()})


@functools.cache
def made(family):
    """The model with both its functions compiled once for all tests, and parameters."""
    model = FAMILIES[family]()
    fast = model._replace(apply=jax.jit(model.apply), features=jax.jit(model.features))
    return fast, filled(model, 0)


@every_family
def test_one_example_is_a_row_of_the_batch(family):
    model, params = made(family)
    inputs = examples(model)
    batch = model.apply(params, inputs)
    assert batch.shape == (BATCH, CLASSES)
    assert batch.dtype == jnp.float32
    assert np.ptp(batch, axis=0).min() > 1e-3, "the inputs make no difference"
    for i in range(BATCH):
        np.testing.assert_allclose(model.apply(params, inputs[i]), batch[i], atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "efficientnet_lite", "wide_resnet", "text"])
def test_examples_are_independent(family):
    model, params = made(family)
    models.check_examples_independent(FAMILIES[family]().apply, params, examples(model))


@every_family
def test_features_and_head_make_the_logits(family):
    model, params = made(family)
    inputs = examples(model)
    features = model.features(params, inputs)
    assert features.dtype == jnp.float32
    logits = models.dense_head(params[model.head], features)
    np.testing.assert_allclose(logits, model.apply(params, inputs), atol=1e-5)
    body = {name: leaf for name, leaf in params.items() if name != model.head}
    np.testing.assert_array_equal(model.features(body, inputs), features)


@every_family
def test_per_example_gradients_reach_every_parameter(family):
    model, params = made(family)
    inputs = examples(model)
    apply = FAMILIES[family]().apply

    def loss(params, example):
        return jnp.sum(jnp.square(apply(params, example)))

    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, inputs)
    for path, leaf in models.flatten(grads).items():
        assert np.isfinite(leaf).all(), path
        # Attention does not see a constant added to all keys.
        if not path.endswith("key/bias"):
            assert np.abs(leaf).max() > 1e-8, f"{path} gets no gradient"


@pytest.mark.parametrize("family", ["vit", "wide_resnet", "text"])
def test_initial_parameters(family):
    model, _ = made(family)
    params = jax.jit(model.init)(jax.random.key(0))
    assert type(params) is dict
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert set(params["head"]) == {"kernel", "bias"}
    assert not np.any(params["head"]["bias"])
    features = model.features(params, examples(model))
    assert 0.1 < np.std(features) < 3


def test_head_initializers():
    widest = {}
    for name in HEAD_INITS:
        kernel = head_initializer(name)(jax.random.key(0), (64, CLASSES), jnp.float32)
        widest[name] = float(np.abs(kernel).max())
    assert widest["zero"] == 0.0
    assert 0.0 < widest["near_zero"] < 5e-3 < widest["random"]


@pytest.mark.parametrize("family", ["vit", "efficientnet_lite", "resnet_v2", "text"])
def test_bfloat16_computes_close_to_float32_with_float32_parameters(family):
    model, params = made(family)
    inputs = examples(model)
    low = FAMILIES[family](dtype="bfloat16")
    for leaf in jax.tree.leaves(jax.eval_shape(low.init, jax.random.key(0))):
        assert leaf.dtype == jnp.float32
    exact = model.apply(params, inputs)
    rounded = jax.jit(low.apply)(params, inputs)
    assert rounded.dtype == jnp.float32
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, atol=0.05 * np.abs(exact).max())


@every_family
def test_own_weights_round_trip(family, tmp_path):
    model, params = made(family)
    path = str(tmp_path / "weights.safetensors")
    models.save_weights(params, path)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]
    fresh = filled(model, 1)
    jax.tree.map(np.testing.assert_array_equal, model.load(fresh, path, head=True), params)
    kept = model.load(fresh, path)
    jax.tree.map(np.testing.assert_array_equal, kept["head"], fresh["head"])
    body = {name: leaf for name, leaf in params.items() if name != "head"}
    del kept["head"]
    jax.tree.map(np.testing.assert_array_equal, kept, body)


@every_family
def test_norms_are_found_by_their_paths(family):
    model = FAMILIES[family]()
    paths = models.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    film = {path for path in paths if FILM.search(path)}
    assert film
    scales = {path for path in paths if path.endswith("/scale")}
    assert scales == {path for path in film if path.endswith("/scale")}
    assert len(film) == 2 * len(scales)
    # Nothing that must never be trained is among the parameters.
    assert not [path for path in paths if re.search(r"mean|var", path.split("/")[-1])]


@every_family
def test_inputs_of_another_shape_are_refused(family):
    model, params = made(family)
    example = model.input.example()
    with pytest.raises(ValueError, match="inputs of shape"):
        model.apply(params, np.zeros((2, 3, *example.shape), example.dtype))
    with pytest.raises(ValueError, match="inputs of shape"):
        model.apply(params, np.zeros(tuple(n + 1 for n in example.shape), example.dtype))


def test_inputs_of_another_kind_are_refused():
    model, params = made("vit")
    with pytest.raises(TypeError, match="inputs of uint8 must be float32"):
        model.apply(params, np.zeros(model.input.example().shape, np.uint8))
    model, params = made("text")
    with pytest.raises(TypeError, match="inputs of float32 must be int32"):
        model.apply(params, np.zeros(model.input.example().shape, np.float32))


@pytest.mark.parametrize(
    "make,parameters",
    [
        (lambda: models.vision_transformer(models.SIZES["mini"], 10), 105_546),
        (lambda: models.vision_transformer(models.SIZES["ti16"], 200), 5_563_016),
        (lambda: models.vision_transformer(models.SIZES["s16"], 1000), 22_050_664),
        (lambda: models.vision_transformer(models.SIZES["b16"], 1000), 86_567_656),
        (lambda: models.resnet_v2(models.RESNETS["r50x1"], 1000), 25_549_352),
        (lambda: models.text_encoder(models.TEXT_SIZES["distilbert_base"], 2), 66_364_418),
        # The peer's 109,486,464 are without a head and with a pooler of 768 x 768 + 768.
        (lambda: models.text_encoder(models.TEXT_SIZES["mpnet_base"], 2), 108_895_872 + 1538),
    ],
    ids=["mini", "ti16", "s16", "b16", "r50x1", "distilbert", "mpnet"],
)
def test_published_sizes(make, parameters):
    """The counts timm and transformers give for the same shapes."""
    model = make()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    example = model.input.example()
    batch = jax.ShapeDtypeStruct((2, *example.shape), example.dtype)
    assert jax.eval_shape(model.apply, shapes, batch).ndim == 2


def test_wide_resnet_is_as_wide_as_published():
    model = models.wide_resnet(models.WRN_16_4, 10)
    leaves = models.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    weights = sum(leaf.size for path, leaf in leaves.items() if not path.endswith("gain"))
    assert 2.7e6 < weights < 2.8e6  # 2.75M in arXiv:1605.07146, table 4
    assert (
        len([path for path in leaves if path.endswith("kernel")]) == 16 + 1
    )  # depth, and a shortcut


@pytest.mark.parametrize(
    "make,field",
    [
        (lambda: models.ViTConfig(heads=3), "heads=3"),
        (lambda: models.ViTConfig(image_size=30), "image_size=30"),
        (lambda: models.ViTConfig(pooling="max"), "pooling='max'"),
        (lambda: models.ViTConfig(class_token=False), "class_token=False"),
        (lambda: models.ViTConfig(depth=0), "depth=0"),
        (lambda: models.vision_transformer(VIT, 0), "num_classes=0"),
        (lambda: models.vision_transformer(VIT, 2, head_init="ones"), "head_init='ones'"),
        (lambda: models.vision_transformer(VIT, 2, dtype="int8"), "dtype='int8'"),
        (lambda: models.vision_transformer(VIT, 2, dtype="bf16"), "dtype='bf16'"),
        (lambda: models.ResNetConfig(depths=()), "depths="),
        (lambda: models.ResNetConfig(depths=(1,), groups=7), "groups=7"),
        (lambda: models.WideResNetConfig(depth=15), "depth=15"),
        (lambda: models.WideResNetConfig(groups=3), "groups=3"),
        (lambda: models.EfficientNetConfig(stages=()), "stages="),
        (lambda: models.TextConfig(max_length=513), "max_length=513"),
        (lambda: models.TextConfig(max_length=511, first_position=2), "max_length=511"),
        (lambda: models.TextConfig(relative=-4), "relative=-4"),
        (lambda: models.TextConfig(relative=6), "relative=6"),
        (lambda: models.TextConfig(pooling="max"), "pooling='max'"),
        (lambda: models.text_encoder(dataclasses.replace(TEXT, pad_id=-1), 2), "pad_id=-1"),
        (lambda: models.InputSpec(8, 3, (0.5,), (0.5,)), "mean="),
        (lambda: models.InputSpec(8, 1, (0.5,), (0.0,)), "std="),
        (lambda: models.InputSpec(0, 1, (0.5,), (1.0,)), "image_size=0"),
    ],
)
def test_bad_shapes_are_named(make, field):
    with pytest.raises(ValueError, match=re.escape(field)):
        make()


def test_padding_takes_no_part_in_text():
    model, params = made("text")
    ids = examples(model)
    short = models.text_encoder(dataclasses.replace(TEXT, max_length=3), CLASSES)
    np.testing.assert_allclose(
        model.apply(params, ids[0]), jax.jit(short.apply)(params, ids[0, :3]), atol=1e-5
    )
    nothing = model.apply(params, np.zeros_like(ids[0]))
    assert np.isfinite(nothing).all()


def test_depthwise_convolution_is_the_grouped_one():
    from dpjax.models.nets.layers import DepthwiseConv

    rng = np.random.default_rng(0)
    for size, stride, length in ((3, 2, 7), (3, 2, 8), (5, 1, 8)):
        x = rng.normal(size=(2, length, length, 6)).astype(np.float32)
        layer = DepthwiseConv(size, stride, jnp.dtype("float32"))
        params = {
            "kernel": rng.normal(size=(size, size, 1, 6)).astype(np.float32),
            "bias": np.zeros(6, np.float32),
        }
        expected = jax.lax.conv_general_dilated(
            x,
            params["kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=6,
        )
        np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=1e-5)


def test_group_norm_and_standardized_kernels_have_mean_zero_and_variance_one():
    from dpjax.models.nets.layers import GroupNorm, StandardizedConv

    rng = np.random.default_rng(0)
    x = rng.normal(2.0, 3.0, size=(2, 5, 4, 6)).astype(np.float32)
    norm = GroupNorm(3, jnp.dtype("float32"))
    y = norm.apply({"params": {"scale": np.ones(6, "f"), "bias": np.zeros(6, "f")}}, x)
    groups = np.asarray(y).reshape(2, 20, 3, 2)
    np.testing.assert_allclose(groups.mean(axis=(1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(groups.var(axis=(1, 3)), 1, atol=1e-4)
    # Fed with the canonical images, a convolution gives its kernel back.
    pixels = np.eye(6, dtype=np.float32).reshape(6, 1, 1, 6)
    kernel = {"kernel": rng.normal(1.0, 2.0, size=(1, 1, 6, 4)).astype(np.float32)}
    plain = StandardizedConv(4, 1, 1, jnp.dtype("float32"))
    weights = np.asarray(plain.apply({"params": kernel}, pixels)).reshape(6, 4)
    np.testing.assert_allclose(weights.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(weights.var(axis=0), 1, atol=1e-5)
    scaled = StandardizedConv(4, 1, 1, jnp.dtype("float32"), True)
    gain = {**kernel, "gain": np.full(4, 2.0, np.float32)}
    weights = np.asarray(scaled.apply({"params": gain}, pixels)).reshape(6, 4)
    np.testing.assert_allclose((weights**2).sum(axis=0), 4, rtol=1e-5)
