"""The feature cache: what is computed, what is read, and what is never read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax import data, dp, heads, models
from dpjax.dp import linear_head
from dpjax.heads import cache

EXAMPLES = 1100  # two shards


def images(examples=EXAMPLES, *, seed=0, labels_seed=1):
    rng = np.random.default_rng(seed)
    return data.from_arrays(
        "noise",
        rng.integers(0, 256, (examples, 8, 8, 3), dtype=np.uint8),
        np.random.default_rng(labels_seed).integers(0, 3, examples),
        class_names=("a", "b", "c"),
    )


@pytest.fixture(scope="module")
def dataset():
    return images()


@pytest.fixture(scope="module")
def net():
    return models.vision_transformer(
        dataclasses.replace(
            models.SIZES["mini"],
            image_size=8,
            channels=3,
            patch=4,
            width=8,
            depth=1,
            heads=2,
            mlp=8,
        ),
        3,
    )


@pytest.fixture(scope="module")
def params(net):
    return net.init(jax.random.key(0))


def compute(net, params, dataset, path, **kwargs):
    return heads.compute_features(net, params, dataset, cache_dir=path, **kwargs)


@pytest.fixture(scope="module")
def made(net, params, dataset, tmp_path_factory):
    """Features, and the directory that holds them."""
    path = tmp_path_factory.mktemp("features")
    return compute(net, params, dataset, path), path


@pytest.fixture
def no_computing(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("features were computed")

    monkeypatch.setattr(cache, "_computed", fail)


def direct(net, params, dataset):
    spec = net.input
    prepare = jax.vmap(
        lambda image: data.preprocess(
            image,
            image_size=spec.image_size,
            mean=spec.mean,
            std=spec.std,
            channels=spec.channels,
        )
    )
    inputs = dataset.get(np.arange(len(dataset)))["input"]
    return jax.jit(lambda p, x: net.features(p, prepare(x)))(params, inputs)


def test_equals_the_model(net, params, dataset, made):
    np.testing.assert_allclose(made[0].values, direct(net, params, dataset), atol=1e-5)
    np.testing.assert_array_equal(made[0].labels, dataset.labels)
    assert made[0].num_classes == 3


def test_second_call_computes_nothing(net, params, dataset, made, no_computing):
    again = compute(net, params, dataset, made[1])
    np.testing.assert_array_equal(again.values, made[0].values)
    other_head = params | {"head": jax.tree.map(lambda x: x + 1, params["head"])}
    compute(net, other_head, dataset, made[1])


@pytest.mark.parametrize("change", ["weights", "images", "labels", "order", "prepare", "dtype"])
def test_anything_else_is_another_entry(net, params, dataset, made, no_computing, change):
    kwargs = {}
    if change == "weights":
        params = jax.tree.map(lambda x: x + 1e-3, params)
    elif change == "images":
        dataset = images(seed=2)
    elif change == "labels":
        dataset = images(labels_seed=2)
    elif change == "order":
        dataset = dataset.select(np.arange(EXAMPLES)[::-1])
    elif change == "prepare":
        kwargs["prepare"] = lambda image: image.astype(jnp.float32) / 255 - 0.25
    else:
        kwargs["dtype"] = "float16"
    with pytest.raises(AssertionError, match="were computed"):
        compute(net, params, dataset, made[1], **kwargs)


def test_constants_of_prepare_are_part_of_the_key(net, params, dataset, made, no_computing):
    """Arrays that are closed over appear in a jaxpr by name only."""
    mean = np.full((8, 8, 3), 0.5, np.float32)
    with pytest.raises(AssertionError, match="were computed"):
        compute(net, params, dataset, made[1], prepare=lambda x: x.astype(jnp.float32) - mean)
    keys = {
        cache._key(
            lambda p, x, m=mean * scale: x.astype(jnp.float32) - m,
            {},
            jax.ShapeDtypeStruct((8, 8, 3), np.uint8),
            dataset,
            "float32",
        )
        for scale in (1, 2)
    }
    assert len(keys) == 2


def test_an_interrupted_computation_goes_on(net, params, dataset, made, tmp_path, monkeypatch):
    computed = cache._computed
    seen = []

    def interrupted(*args):
        for number, part in computed(*args):
            seen.append(number)
            yield number, part
            if len(seen) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_computed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compute(net, params, dataset, tmp_path)
    np.testing.assert_array_equal(compute(net, params, dataset, tmp_path).values, made[0].values)
    assert seen == [0, 1]


@pytest.mark.parametrize("damage", ["cut", "byte", "flag", "empty", "text", "shape"])
@pytest.mark.one_in(3)
def test_damaged_shards_are_computed_again(net, params, dataset, made, tmp_path, damage, capsys):
    compute(net, params, dataset, tmp_path)
    (shard,) = tmp_path.glob("*/00000.npz")
    content = bytearray(shard.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "byte":
        content[len(content) // 2] ^= 1
    elif damage == "flag":
        content[content.rfind(b"PK\1\2") + 8] ^= 1  # "is encrypted"
    elif damage == "empty":
        content = b""
    elif damage == "text":
        content = b"<html>"
    shard.write_bytes(content)
    if damage == "shape":
        np.savez(shard, np.zeros((3, 8), np.float32))
    again = compute(net, params, dataset, tmp_path)
    np.testing.assert_array_equal(again.values, made[0].values)
    assert f"{shard} is damaged" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/.*"))


def test_half_precision(net, params, dataset, made, tmp_path):
    half = compute(net, params, dataset, tmp_path, dtype="float16")
    assert half.values.dtype == np.float32
    np.testing.assert_allclose(half.values, made[0].values, rtol=1e-3, atol=1e-3)
    sizes = [sum(f.stat().st_size for f in p.glob("*/*.npz")) for p in (tmp_path, made[1])]
    assert sizes[0] < 0.6 * sizes[1]


def test_without_a_cache(net, params, dataset, made, monkeypatch, tmp_path):
    monkeypatch.setenv("DPJAX_CACHE_DIR", "")
    monkeypatch.chdir(tmp_path)
    again = heads.compute_features(net, params, dataset, batch_size=1000)
    np.testing.assert_allclose(again.values, made[0].values, atol=1e-5)
    assert not list(tmp_path.iterdir())


def test_mistakes(net, params, dataset, tmp_path):
    with pytest.raises(ValueError, match="batch_size=0 must be >= 1"):
        compute(net, params, dataset, tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="dtype='int8' must be one of"):
        compute(net, params, dataset, tmp_path, dtype="int8")
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(ValueError, match="finite"):
        compute(net, broken, dataset, tmp_path)
    blind = lambda x: jnp.where(jnp.all(x == 255), jnp.inf, x / 255)  # noqa: E731
    white = data.from_arrays(
        "white", np.full((9, 8, 8, 3), 255, np.uint8), np.zeros(9, int), class_names="ab"
    )
    with pytest.raises(ValueError, match="no example of 'white' has finite features"):
        compute(net, params, white, tmp_path, prepare=blind)
    assert not list(tmp_path.iterdir())
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"cache_dir=.*cannot be written"):
        compute(net, params, dataset, file)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_one_example_of_features_that_are_not_finite_contributes_zero(
    value, net, params, dataset, made, tmp_path, capsys
):
    """As in training: one example can neither stop the others nor be seen in their sum."""
    wrong = jnp.asarray(dataset.get(np.array([30]))["input"][0])
    spec = net.input

    def poisoned(x):
        ready = data.preprocess(
            x, image_size=spec.image_size, mean=spec.mean, std=spec.std, channels=spec.channels
        )
        return jnp.where(jnp.all(x == wrong), value, ready)

    got = compute(net, params, dataset, tmp_path, prepare=poisoned)
    assert "nonprivate: features of 1 of 1,100 examples" in capsys.readouterr().err
    assert not np.isfinite(got.values[30]).all()
    others = np.arange(EXAMPLES) != 30
    np.testing.assert_allclose(got.values[others], made[0].values[others], atol=1e-5)
    mask = jnp.ones(EXAMPLES, bool)
    for features in (got, heads.normalize(got, center=True)):
        rows = linear_head.rows(features.values, features.labels)
        head = heads.initial_head(got.width, 3)
        whole, _ = linear_head.clipped_head_sum(head, dp.flat(1.0), rows, mask)
        without, _ = linear_head.clipped_head_sum(head, dp.flat(1.0), rows, mask & others)
        jax.tree.map(np.testing.assert_array_equal, whole.value, without.value)
        sums = [
            dp.least_squares.moments(
                features.values, jnp.asarray(features.labels), m, num_classes=3, bound=1.0
            )
            for m in (mask, mask & others)
        ]
        jax.tree.map(np.testing.assert_array_equal, *sums)


@pytest.mark.parametrize(
    "inside",
    [
        jax.jit,
        lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=1)[0],
        lambda f: lambda x: jax.lax.cond(x.sum() > 0, f, lambda y: y, x),
        lambda f: lambda x: jax.jit(jax.jit(f))(x),
        lambda f: jax.checkpoint(f),
    ],
    ids=["jit", "scan", "cond", "nested", "checkpoint"],
)
def test_constants_inside_of_other_programs_are_part_of_the_key(inside, dataset):
    def key(scale, kind=np.asarray):
        mean = kind(np.full((8, 8, 3), scale, np.float32))
        prepare = inside(lambda x: x - mean)
        return cache._key(
            lambda p, x: prepare(x.astype(jnp.float32)), {},
            jax.ShapeDtypeStruct((8, 8, 3), np.uint8), dataset, "float32",
        )  # fmt: skip

    assert key(1) == key(1) != key(2)
    assert key(1, jnp.asarray) != key(2, jnp.asarray)


def test_keys_and_callbacks_inside_of_the_computation(dataset):
    def key(prepare):
        one = jax.ShapeDtypeStruct((8, 8, 3), np.uint8)
        return cache._key(lambda p, x: prepare(x), {}, one, dataset, "float32")

    noisy = [jax.random.key(seed) for seed in (0, 1)]
    assert len({key(lambda x, k=k: x + jax.random.normal(k, x.shape)) for k in noisy}) == 2
    shape = jax.ShapeDtypeStruct((8, 8, 3), np.uint8)
    assert key(lambda x: jax.pure_callback(np.negative, shape, x)) is None


def test_a_computation_without_a_key_is_not_kept(net, params, dataset, made, tmp_path):
    shape = jax.ShapeDtypeStruct((8, 8, 3), np.float32)

    def prepare(image):
        return jax.pure_callback(
            lambda x: np.asarray(x, np.float32) / 255, shape, image, vmap_method="sequential"
        )

    compute(net, params, dataset.select(np.arange(8)), tmp_path, prepare=prepare)
    assert not list(tmp_path.iterdir())


def feature_set(values, labels=None):
    values = np.asarray(values)
    labels = np.zeros(len(values), np.int32) if labels is None else labels
    return heads.FeatureSet(values, labels, 2, "made")


def test_normalize():
    made = feature_set([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]])
    unit = heads.normalize(made)
    np.testing.assert_allclose(unit.values, [[0.6, 0.8], [0, 0], [0, -1]], rtol=1e-6)
    centered = heads.normalize(made, center=True, scale=8.0)
    root = 8 / np.sqrt(2)
    np.testing.assert_allclose(centered.values, [[-root, root], [0, 0], [root, -root]], rtol=1e-6)
    # Each example on its own: another one does not matter.
    alone = heads.normalize(made.select(np.array([2])), center=True, scale=8.0)
    np.testing.assert_array_equal(alone.values[0], centered.values[2])


def test_several_feature_sets():
    one = feature_set([[3.0, 4.0], [0.0, -2.0]], np.array([0, 1]))
    two = feature_set([[1.0, 0.0], [2.0, 2.0]], np.array([0, 1]))
    np.testing.assert_array_equal(one.select(np.array([1, 0])).values, [[0, -2], [3, 4]])
    np.testing.assert_array_equal(heads.average(one, two).values, [[2, 2], [1, 0]])
    np.testing.assert_array_equal(heads.concatenate(one, two).values, [[3, 4, 1, 0], [0, -2, 2, 2]])


def test_mirror(net, params, dataset, made, tmp_path):
    mirrored = data.from_arrays(
        "noise",
        dataset.get(np.arange(EXAMPLES))["input"][:, :, ::-1],
        dataset.labels,
        class_names=dataset.class_names,
    )
    got = compute(net, params, mirrored, tmp_path, mirror=True)
    np.testing.assert_allclose(got.values, made[0].values, atol=1e-5)


def test_feature_set_mistakes():
    with pytest.raises(ValueError, match=r"shape \(2,\) and labels"):
        feature_set([1.0, 2.0])
    with pytest.raises(ValueError, match=r"labels from 0 to 2 must be in \[0, 2\)"):
        feature_set(np.ones((2, 2)), np.array([0, 2]))
    made = feature_set(np.ones((2, 2)))
    with pytest.raises(ValueError, match="repeated"):
        made.select(np.array([1, 1]))
    with pytest.raises(ValueError, match="index=2"):
        made.select(np.array([2]))
    other = feature_set(np.ones((2, 2)), np.array([1, 0]))
    with pytest.raises(ValueError, match="same examples"):
        heads.concatenate(made, other)
    with pytest.raises(ValueError, match=r"widths \[2, 4\] must be equal"):
        heads.average(made, heads.concatenate(made, made))
    with pytest.raises(ValueError, match="at least one feature set"):
        heads.average()
    with pytest.raises(ValueError, match="scale=0 must be > 0"):
        heads.normalize(made, scale=0)


def test_a_backbone_that_couples_examples_is_refused(net, params, dataset, tmp_path):
    """Else one example would change the features of others, and no bound would hold."""

    def coupled(body, inputs):
        return net.features(body, inputs) - net.features(body, inputs).mean(0, keepdims=True)

    wrong = net._replace(features=coupled)
    with pytest.raises(ValueError, match="example"):
        compute(wrong, params, dataset, tmp_path)
