"""Our backbones against timm's and transformers': random weights, the same file, equal logits.

Needs torch, torchvision, timm and transformers; run with `-m peers`.
"""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dpjax import models

pytestmark = pytest.mark.peers

TOLERANCE = 1e-4
CLASSES = 7

# Importing the peers is the first thing that can warn; what they warn of is theirs.
warn = pytest.mark.filterwarnings("ignore")
VIT = models.ViTConfig(width=48, depth=2, heads=3, mlp=96, patch=8, image_size=40, channels=3)


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch


@pytest.fixture(scope="module")
def timm(torch):
    if not torch.backends.cuda.is_built():
        # The usual torchvision needs CUDA to load its operators. No backbone of timm calls them,
        # but importing torchvision needs these two declared.
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)
    return pytest.importorskip("timm")


def randomize(torch, net):
    """Every parameter and statistic away from its initial value, at a scale that keeps signal."""
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 2.0)
            elif tensor.is_floating_point():
                scale = 0.2 if tensor.ndim < 2 else (2.0 / tensor[0].numel()) ** 0.5
                tensor.copy_(tensor * (tensor.ndim < 2) + scale * torch.randn_like(tensor))
    return net.eval()


def images(size, count=3):
    return np.random.default_rng(0).normal(size=(count, size, size, 3)).astype(np.float32)


def theirs(torch, net, inputs):
    with torch.no_grad():
        return net(torch.from_numpy(np.moveaxis(inputs, -1, 1).copy())).numpy()


def numpy_state(net):
    return {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}


def random(model):
    """Parameters at a scale that keeps signal, without compiling `init`."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        scale = max(np.prod(leaf.shape[:-1]), 1) ** -0.5 if len(leaf.shape) > 1 else 0.1
        values = scale * rng.normal(size=leaf.shape) + path.endswith("scale")
        return values.astype(np.float32)

    shapes = models.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    return models.unflatten({path: fill(path, leaf) for path, leaf in shapes.items()})


def loaded(model, path, head=True):
    return model.load(random(model), str(path), head=head)


def assert_equal_logits(model, params, inputs, expected):
    assert np.ptp(expected) > 0.1, "the comparison would be empty"
    logits = jax.jit(model.apply)(params, inputs)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


def timm_vit(timm, config, **kwargs):
    return timm.models.vision_transformer.VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp / config.width,
        num_classes=CLASSES,
        class_token=config.class_token,
        global_pool="token" if config.pooling == "cls" else "avg",
        **kwargs,
    )


@warn
@pytest.mark.parametrize("pooling,class_token", [("cls", True), ("gap", True), ("gap", False)])
def test_vit_timm(torch, timm, tmp_path, pooling, class_token):
    config = dataclasses.replace(VIT, pooling=pooling, class_token=class_token)
    net = randomize(torch, timm_vit(timm, config))
    save_file(numpy_state(net), tmp_path / "vit.safetensors")
    model = models.vision_transformer(config, CLASSES)
    params = loaded(model, tmp_path / "vit.safetensors")
    inputs = images(config.image_size)
    assert_equal_logits(model, params, inputs, theirs(torch, net, inputs))
    features = theirs(torch, lambda x: net.forward_head(net.forward_features(x), True), inputs)
    np.testing.assert_allclose(jax.jit(model.features)(params, inputs), features, atol=TOLERANCE)


@warn
@pytest.mark.parametrize("size", [24, 56, 80])
def test_vit_timm_other_image_size(torch, timm, tmp_path, size):
    net = randomize(torch, timm_vit(timm, VIT))
    save_file(numpy_state(net), tmp_path / "vit.safetensors")
    net.set_input_size((size, size))
    model = models.vision_transformer(VIT.at(size), CLASSES)
    params = loaded(model, tmp_path / "vit.safetensors")
    inputs = images(size)
    assert_equal_logits(model, params, inputs, theirs(torch, net, inputs))


@warn
def test_vit_export_loads_strictly_into_timm(torch, timm):
    model = models.vision_transformer(VIT, CLASSES)
    params = random(model)
    net = timm_vit(timm, VIT).eval()
    tensors = models.to_layout(params, VIT, "timm")
    net.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in tensors.items()})
    inputs = images(VIT.image_size)
    assert_equal_logits(model, params, inputs, theirs(torch, net, inputs))


def augreg(params, config):
    """The official names and shapes."""
    flat = {path: np.asarray(x) for path, x in models.flatten(params).items()}
    d, heads, size = config.width, config.heads, config.patch
    out = {
        "embedding/kernel": flat["embed/kernel"].reshape(size, size, config.channels, d),
        "embedding/bias": flat["embed/bias"],
        "cls": flat["cls"][None, None],
        "Transformer/posembed_input/pos_embedding": flat["pos_embed"][None],
        "Transformer/encoder_norm/scale": flat["norm/scale"],
        "Transformer/encoder_norm/bias": flat["norm/bias"],
        "head/kernel": flat["head/kernel"],
        "head/bias": flat["head/bias"],
    }
    for i in range(config.depth):
        ours, block = f"blocks_{i}", f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            kernel = flat[f"{ours}/attn/{name}/kernel"].reshape(d, heads, -1)
            out[f"{attention}/{name}/kernel"] = kernel
            out[f"{attention}/{name}/bias"] = flat[f"{ours}/attn/{name}/bias"].reshape(heads, -1)
        out[f"{attention}/out/kernel"] = flat[f"{ours}/attn/out/kernel"].reshape(heads, -1, d)
        out[f"{attention}/out/bias"] = flat[f"{ours}/attn/out/bias"]
        for name, other in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out[f"{block}/{other}/scale"] = flat[f"{ours}/{name}/scale"]
            out[f"{block}/{other}/bias"] = flat[f"{ours}/{name}/bias"]
        for name, other in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            out[f"{block}/MlpBlock_3/{other}/kernel"] = flat[f"{ours}/mlp/{name}/kernel"]
            out[f"{block}/MlpBlock_3/{other}/bias"] = flat[f"{ours}/mlp/{name}/bias"]
    return out


@warn
@pytest.mark.parametrize("size", [40, 64])
def test_vit_augreg_as_timm_reads_it(torch, timm, tmp_path, size):
    source = models.vision_transformer(VIT, CLASSES)
    params = random(source)
    np.savez(tmp_path / "vit.npz", **augreg(params, VIT))
    net = timm_vit(timm, VIT.at(size)).eval()
    net.load_pretrained(str(tmp_path / "vit.npz"))
    model = models.vision_transformer(VIT.at(size), CLASSES)
    inputs = images(size)
    read = loaded(model, tmp_path / "vit.npz")
    assert_equal_logits(model, read, inputs, theirs(torch, net, inputs))


def hugging_face(transformers):
    return transformers.ViTConfig(
        hidden_size=VIT.width,
        num_hidden_layers=VIT.depth,
        num_attention_heads=VIT.heads,
        intermediate_size=VIT.mlp,
        image_size=VIT.image_size,
        patch_size=VIT.patch,
        num_labels=CLASSES,
    )


@warn
@pytest.mark.parametrize("size", [40, 24, 72])
def test_vit_hugging_face(torch, tmp_path, size):
    transformers = pytest.importorskip("transformers")
    net = randomize(torch, transformers.ViTForImageClassification(hugging_face(transformers)))
    net.save_pretrained(tmp_path)
    model = models.vision_transformer(VIT.at(size), CLASSES)
    params = loaded(model, tmp_path / "model.safetensors")
    inputs = images(size)
    expected = theirs(torch, lambda x: net(x, interpolate_pos_encoding=True).logits, inputs)
    assert_equal_logits(model, params, inputs, expected)


@warn
def test_vit_hugging_face_without_classifier_but_with_pooler(torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    net = randomize(torch, transformers.ViTModel(hugging_face(transformers)))
    net.save_pretrained(tmp_path)
    model = models.vision_transformer(VIT, CLASSES)
    params = loaded(model, tmp_path / "model.safetensors", head=False)
    inputs = images(VIT.image_size)
    expected = theirs(torch, lambda x: net(x).last_hidden_state[:, 0], inputs)
    np.testing.assert_allclose(jax.jit(model.features)(params, inputs), expected, atol=TOLERANCE)


@warn
def test_resnet_v2_bit_as_timm_reads_it(torch, timm, tmp_path):
    config = models.ResNetConfig(depths=(2, 1), width=16, groups=4, image_size=48)
    model = models.resnet_v2(config, CLASSES)
    params = random(model)
    np.savez(tmp_path / "bit.npz", **bit(params, config))
    resnetv2 = timm.models.resnetv2
    norm = resnetv2.GroupNormAct
    net = resnetv2.ResNetV2(
        layers=config.depths,
        channels=(64, 128),
        num_classes=CLASSES,
        stem_chs=config.width,
        stem_type="fixed",
        conv_layer=lambda *args, **kwargs: resnetv2.StdConv2d(*args, eps=1e-8, **kwargs),
        norm_layer=lambda *args, **kwargs: norm(*args, num_groups=config.groups, **kwargs),
    ).eval()
    net.load_pretrained(str(tmp_path / "bit.npz"))
    inputs = images(config.image_size)
    read = loaded(model, tmp_path / "bit.npz")
    assert_equal_logits(model, read, inputs, theirs(torch, net, inputs))


def bit(params, config):
    """The official names and shapes."""
    flat = {path: np.asarray(x) for path, x in models.flatten(params).items()}
    conv = "standardized_conv2d/kernel"
    out = {
        f"resnet/root_block/{conv}": flat["stem/kernel"],
        "resnet/group_norm/gamma": flat["norm/scale"],
        "resnet/group_norm/beta": flat["norm/bias"],
        "resnet/head/conv2d/kernel": flat["head/kernel"][None, None],
        "resnet/head/conv2d/bias": flat["head/bias"],
    }
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            ours = f"stages_{stage}_blocks_{block}"
            unit = f"resnet/block{stage + 1}/unit{block + 1:02d}"
            for number, letter in zip("123", "abc", strict=True):
                out[f"{unit}/{letter}/{conv}"] = flat[f"{ours}/conv{number}/kernel"]
                out[f"{unit}/{letter}/group_norm/gamma"] = flat[f"{ours}/norm{number}/scale"]
                out[f"{unit}/{letter}/group_norm/beta"] = flat[f"{ours}/norm{number}/bias"]
            if f"{ours}/shortcut/kernel" in flat:
                out[f"{unit}/a/proj/{conv}"] = flat[f"{ours}/shortcut/kernel"]
    return out


@warn
@pytest.mark.parametrize("size", list(models.EFFICIENTNETS))
def test_efficientnet(torch, timm, tmp_path, size):
    net = timm.create_model(f"tf_efficientnet_{size}", num_classes=CLASSES)
    net = randomize(torch, net)
    config = dataclasses.replace(models.EFFICIENTNETS[size], image_size=70)
    model = models.efficientnet_lite(config, CLASSES)
    # timm keeps the order of the original's layers under names of its own.
    state = {name: x for name, x in net.state_dict().items() if "num_batches" not in name}
    names = original_names(sum(1 for _ in config.blocks()))
    assert len(names) == len(state)
    torch.save(
        dict(zip(names, state.values(), strict=True)),
        tmp_path / "lite.pth",
        _use_new_zipfile_serialization=False,
    )
    params = loaded(model, tmp_path / "lite.pth")
    inputs = images(70)
    assert_equal_logits(model, params, inputs, theirs(torch, net, inputs))


def original_names(blocks):
    def normed(conv, norm):
        return [conv, *(f"{norm}.{x}" for x in ("weight", "bias", "running_mean", "running_var"))]

    names = normed("_conv_stem.weight", "_bn0")
    for i in range(blocks):
        block = f"_blocks.{i}"
        if i > 0:
            names += normed(f"{block}._expand_conv.weight", f"{block}._bn0")
        names += normed(f"{block}._depthwise_conv.weight", f"{block}._bn1")
        names += normed(f"{block}._project_conv.weight", f"{block}._bn2")
    return [*names, *normed("_conv_head.weight", "_bn1"), "_fc.weight", "_fc.bias"]
