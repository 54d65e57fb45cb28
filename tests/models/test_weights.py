"""Weight files: what fits goes in exactly, what does not is named."""

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dpjax import models
from dpjax.models.nets import bit, efficientnet, text, vit
from dpjax.models.weights import Source, translate

SHARED = Path(__file__).parents[3] / "shared" / "data"
VIT = models.ViTConfig(width=8, depth=1, heads=2, mlp=12, patch=4, image_size=8, channels=3)


def shared(name):
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not here; it may not be shipped")
    return str(SHARED / name)


def zeros(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def random(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), zeros(model)
    )


@pytest.fixture
def timm_file(tmp_path):
    """A file in timm's layout, its tensors, and the parameters it was made from."""
    model = models.vision_transformer(VIT, 3)
    params = random(model)
    tensors = models.to_layout(params, VIT, "timm")
    save_file(tensors, tmp_path / "vit.safetensors")
    return str(tmp_path / "vit.safetensors"), tensors, params


def test_timm_layout_round_trip(timm_file):
    path, _, params = timm_file
    model = models.vision_transformer(VIT, 3)
    jax.tree.map(np.testing.assert_array_equal, model.load(zeros(model), path, head=True), params)


def test_the_head_is_kept_and_that_is_said(timm_file, caplog):
    path, _, params = timm_file
    model = models.vision_transformer(VIT, 11)
    with caplog.at_level(logging.INFO, "dpjax"):
        loaded = model.load(zeros(model), path)
    assert loaded["head"]["kernel"].shape == (8, 11)
    assert not np.any(loaded["head"]["kernel"])
    np.testing.assert_array_equal(loaded["norm"]["scale"], params["norm"]["scale"])
    assert "head" in caplog.text
    assert "as requested" in caplog.text


def test_a_head_of_another_size_cannot_be_taken(timm_file):
    model = models.vision_transformer(VIT, 11)
    with pytest.raises(ValueError, match=r"misshapen head.weight \[3, 8\], must be \[11, 8\]"):
        model.load(zeros(model), timm_file[0], head=True)


def test_a_file_without_a_head_will_do(timm_file, tmp_path):
    _, tensors, params = timm_file
    body = {name: x for name, x in tensors.items() if not name.startswith("head")}
    save_file(body, tmp_path / "body.safetensors")
    model = models.vision_transformer(VIT, 3)
    loaded = model.load(zeros(model), str(tmp_path / "body.safetensors"))
    np.testing.assert_array_equal(loaded["embed"]["kernel"], params["embed"]["kernel"])
    with pytest.raises(ValueError, match=r"missing head.bias \[3\]; missing head.weight \[3, 8\]"):
        model.load(zeros(model), str(tmp_path / "body.safetensors"), head=True)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.pop("norm.bias"), r"missing norm.bias \[8\]"),
        (
            lambda t: t.update({"blocks.1.x": np.zeros((2, 1), "f")}),
            r"unexpected blocks.1.x \[2, 1",
        ),
        (
            lambda t: t.update({"blocks.0.mlp.fc1.bias": np.zeros(9, "f")}),
            r"misshapen blocks.0.mlp.fc1.bias \[9\], must be \[12\]",
        ),
        (lambda t: t["cls_token"].__setitem__((0, 0, 1), np.nan), "not finite cls_token"),
        (
            lambda t: t.update(pos_embed=np.zeros((1, 7, 8), "f")),
            r"pos_embed is \[7, 8\] in the file, \[5, 8\] here",
        ),
        (lambda t: t.pop("blocks.0.attn.qkv.weight"), "missing blocks.0.attn.qkv.weight"),
    ],
    ids=["missing", "unexpected", "misshapen", "nan", "grid", "shared"],
)
def test_files_that_do_not_fit_name_the_tensor(timm_file, tmp_path, change, message):
    tensors = {name: x.copy() for name, x in timm_file[1].items()}
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    model = models.vision_transformer(VIT, 3)
    with pytest.raises(ValueError, match=message) as caught:
        model.load(zeros(model), str(tmp_path / "bad.safetensors"))
    assert str(caught.value).count(";") == 0, "one fault, one complaint"


def test_all_faults_are_named_at_once(timm_file, tmp_path):
    tensors = dict(timm_file[1])
    del tensors["norm.bias"], tensors["norm.weight"]
    tensors["extra"] = np.zeros(1, "f")
    save_file(tensors, tmp_path / "bad.safetensors")
    model = models.vision_transformer(VIT, 3)
    with pytest.raises(ValueError, match=r"extra.*norm.bias.*norm.weight"):
        model.load(zeros(model), str(tmp_path / "bad.safetensors"))


def test_an_unknown_layout_is_refused(tmp_path):
    save_file({"a": np.zeros(2, "f")}, tmp_path / "x.safetensors")
    model = models.vision_transformer(VIT, 3)
    with pytest.raises(ValueError, match="has none of the layouts"):
        model.load(zeros(model), str(tmp_path / "x.safetensors"))


def test_half_precision_files_become_float32(timm_file, tmp_path):
    _, tensors, params = timm_file
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    save_file(half, tmp_path / "half.safetensors")
    model = models.vision_transformer(VIT, 3)
    loaded = model.load(zeros(model), str(tmp_path / "half.safetensors"), head=True)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-2)


def test_own_files_are_checked_too(tmp_path):
    model = models.vision_transformer(VIT, 3)
    params = random(model)
    path = tmp_path / "own.safetensors"
    models.save_weights(params, path)
    other = models.vision_transformer(models.ViTConfig(**{**vars(VIT), "width": 10}), 3)
    with pytest.raises(ValueError, match=r"misshapen embed/kernel \[48, 8\], must be \[48, 10\]"):
        models.load_weights(path, zeros(other))
    with pytest.raises(ValueError, match="must end in"):
        models.save_weights(params, tmp_path / "own.pkl")
    assert [p.name for p in tmp_path.iterdir()] == ["own.safetensors"]


def test_own_files_move_to_other_image_sizes(tmp_path):
    model = models.vision_transformer(VIT, 3)
    params = random(model)
    models.save_weights(params, tmp_path / "own.safetensors")
    larger = models.vision_transformer(VIT.at(16), 3)
    loaded = larger.load(zeros(larger), str(tmp_path / "own.safetensors"), head=True)
    assert loaded["pos_embed"].shape == (17, 8)
    np.testing.assert_array_equal(loaded["pos_embed"][0], params["pos_embed"][0])
    np.testing.assert_array_equal(loaded["embed"]["kernel"], params["embed"]["kernel"])


def test_the_mini_vit_is_small_enough_to_ship(tmp_path):
    model = models.vision_transformer(models.SIZES["mini"], 10)
    models.save_weights(random(model), tmp_path / "mini.safetensors")
    assert (tmp_path / "mini.safetensors").stat().st_size < 1e6


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("x.npz", b"PK\x03\x04 cut", "cannot be read"),
        ("x.npz", b"", "cannot be read"),
        ("x.safetensors", b"\x10\0\0\0\0\0\0\0{", "cannot be read"),
        ("x.pth", b"\x80\x02", "cannot be read as a legacy torch file"),
        ("x.pth", b"PK\x03\x04", "cannot be read as a legacy torch file"),
        ("x.bin", b"", "must end in"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        models.read_tensors(tmp_path / name)


def test_absent_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.npz"):
        models.read_tensors(tmp_path / "gone.npz")


def test_a_npz_with_objects_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.array([{}], object))
    with pytest.raises(ValueError, match="cannot be read"):
        models.read_tensors(tmp_path / "x.npz")


TEXT = models.TextConfig(vocab_size=9, width=8, depth=2, heads=2, mlp=12, positions=5, max_length=4)
DISTIL = models.TextConfig(**{**vars(TEXT), "token_types": 0})
MPNET = models.TextConfig(**{**vars(DISTIL), "relative": 8, "first_position": 1, "pad_id": 1})
RESNET = models.ResNetConfig(depths=(2, 1), width=8, groups=4, image_size=16)
LITE = models.EfficientNetConfig(
    stages=(models.MBConvStage(1, 3, 1, 1, 4), models.MBConvStage(2, 5, 2, 2, 6)), stem=4, width=8
)
# For each published layout: the model, the rules, and names that files carry besides.
LAYOUTS = {
    "timm": (
        models.vision_transformer(VIT, 3),
        vit._timm(VIT, 3, "fc_norm"),
        ["pre_logits.fc.bias"],
    ),
    "augreg": (
        models.vision_transformer(VIT, 3),
        vit._augreg(VIT, 3),
        ["pre_logits/kernel", "pre_logits/bias"],
    ),
    "hf_vit": (
        models.vision_transformer(VIT, 3),
        vit._hugging_face(VIT, 3, "vit."),
        ["vit.pooler.dense.bias"],
    ),
    "bit": (models.resnet_v2(RESNET, 3), bit._bit(RESNET, {}, 3), []),
    "lite": (
        models.efficientnet_lite(LITE, 3),
        efficientnet._published(LITE, {}, 3),
        ["_bn0.num_batches_tracked"],
    ),
    "bert": (
        models.text_encoder(TEXT, 3),
        text._table(TEXT, {"bert.embeddings.word_embeddings.weight"}, 3),
        ["bert.pooler.dense.weight", "cls.predictions.bias", "bert.embeddings.position_ids"],
    ),
    "distilbert": (
        models.text_encoder(DISTIL, 3),
        text._table(DISTIL, {"distilbert.embeddings.word_embeddings.weight", ".q_lin."}, 3),
        ["vocab_transform.weight", "pre_classifier.bias"],
    ),
    "mpnet": (
        models.text_encoder(MPNET, 3),
        text._table(MPNET, {"mpnet.embeddings.word_embeddings.weight"}, 3),
        ["mpnet.pooler.dense.weight", "lm_head.bias"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_fill_every_parameter(layout, tmp_path):
    model, table, besides = LAYOUTS[layout]
    assert set(table) == set(models.flatten(zeros(model)))
    rng = np.random.default_rng(0)
    tensors = {name: np.ones(1, np.float32) for name in besides}
    for source in table.values():
        for name, shape in source.tensors():
            shape = tuple(5 if size is None else size for size in shape)  # 2 x 2 patches and cls
            tensors[name] = rng.uniform(0.5, 1.0, shape).astype(np.float32)
    # The oldest files of BERT spell the norms so.
    old = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x
           for name, x in tensors.items()}  # fmt: skip
    for name, content in (("new", tensors), ("old", old if layout == "bert" else tensors)):
        save_file(content, tmp_path / f"{name}.safetensors")
        loaded = model.load(zeros(model), str(tmp_path / f"{name}.safetensors"), head=True)
        for path, leaf in models.flatten(loaded).items():
            assert np.all(leaf != 0), path
    save_file({**tensors, "more.bias": np.ones(1, "f")}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"unexpected more.bias \[1\]"):
        model.load(zeros(model), str(tmp_path / "more.safetensors"))


def test_a_parameter_without_a_rule_is_an_error():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    with pytest.raises(ValueError, match="no rule for parameter b"):
        translate(params, {"x": np.zeros(2)}, {"a": Source("x", (2,))}, origin="f", head=None)


def test_shared_vit_loads_at_both_sizes():
    path = shared("vit_ti16_tiny_imagenet.timm.safetensors")
    tensors = models.read_tensors(path)
    for size in (224, 160):
        model = models.vision_transformer(models.SIZES["ti16"].at(size), 200)
        params = model.load(zeros(model), path, head=True)
        assert params["pos_embed"].shape == ((size // 16) ** 2 + 1, 192)
        np.testing.assert_array_equal(params["head"]["kernel"], tensors["head.weight"].T)
    back = models.to_layout(params, models.SIZES["ti16"].at(160), "timm")
    assert set(back) == set(tensors)
    for name in set(tensors) - {"pos_embed"}:
        np.testing.assert_array_equal(back[name], tensors[name])


def test_shared_resnet8_computes_what_its_unfolded_form_does():
    path = shared("resnet8_cifar100.npz")
    model = models.resnet8(100)
    params = model.load(zeros(model), path, head=True)
    tensors = models.read_tensors(path)
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)

    def conv(x, name, stride, padding):
        kernel = tensors[name].transpose(2, 3, 1, 0)
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride,) * 2,
            [(padding,) * 2] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def norm(x, name):
        mean, var, scale, bias = (
            tensors[f"{name}.{part}"][None, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    x = jax.nn.relu(norm(conv(image, "conv1.weight", 1, 1), "bn1"))
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        at = f"layer{stage}.0"
        y = jax.nn.relu(norm(conv(x, f"{at}.conv1.weight", stride, 1), f"{at}.bn1"))
        y = norm(conv(y, f"{at}.conv2.weight", 1, 1), f"{at}.bn2")
        shortcut = conv(x, f"{at}.shortcut.0.weight", stride, 0)
        x = jax.nn.relu(y + norm(shortcut, f"{at}.shortcut.1"))
    pooled = np.asarray(x).reshape(1, 2, 4, 2, 4, 64).mean(axis=(2, 4))
    logits = pooled.transpose(0, 3, 1, 2).reshape(1, 256) @ tensors["linear.weight"].T
    np.testing.assert_allclose(
        model.apply(params, image), logits + tensors["linear.bias"][None], atol=1e-3
    )


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pth", "pt"])
@pytest.mark.parametrize(
    "content, words",
    [
        (LFS, "is a git-LFS pointer to the weights: run git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page, not weights"),
        (b"\n<HTML lang=en>", "is a web page, not weights"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "is a web page, not weights"),
        (b"", "cannot be read as"),
        (b"PK\3\4" + b"x" * 100, "cannot be read as"),
    ],
)
def test_what_is_not_a_weight_file_is_named(tmp_path, suffix, content, words):
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"w.{suffix} {words}"):
        models.read_tensors(path)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_types_that_numpy_does_not_have(tmp_path, kind):
    header = json.dumps({"w": {"dtype": kind, "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    with pytest.raises(ValueError, match=f"tensors of type {kind}, .* save them as F32 or BF16"):
        models.read_tensors(path)


def test_a_flipped_bit_of_an_npz_is_noticed_or_harmless(tmp_path):
    path, values = tmp_path / "w.npz", np.arange(6, dtype=np.float32)
    np.savez(path, w=values)
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            tensors = models.read_tensors(path)
        except ValueError:
            refused += 1
        else:
            assert {name: x.tolist() for name, x in tensors.items()} == {"w": values.tolist()}
    assert refused > 100
