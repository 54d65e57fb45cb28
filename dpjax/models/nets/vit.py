"""Vision transformers, from a few blocks to Ti, S and B (Dosovitskiy et al., arXiv:2010.11929).

Pre-norm blocks, exact GELU, LayerNorm with epsilon 1e-6, no dropout and no `pre_logits`. The query,
key and value projections are separate square matrices: every published layout maps to them exactly,
and each is one plain matmul under vmap.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dpjax.models.model import InputSpec, Model, Params, compute_dtype, flatten, from_linen
from dpjax.models.nets.blocks import Attention, Mlp
from dpjax.models.weights import Source, Tensors, read_tensors, resample_grid, translate

__all__ = ["SIZES", "ViTConfig", "layout_config", "to_layout", "vision_transformer"]


@dataclass(frozen=True)
class ViTConfig:
    """Shape of a vision transformer.

    Args:
        width: token width.
        depth: number of blocks.
        heads: attention heads; divides width.
        mlp: width of the hidden layer of a block's MLP.
        patch: side of a patch, in pixels.
        image_size: side of the image, in pixels; a multiple of patch.
        channels: image channels.
        pooling: "cls" takes the class token after the last norm; "gap" averages the patch tokens,
            then applies the last norm, like timm's `global_pool="avg"`.
        class_token: whether there is a class token; "cls" needs it.
    """

    width: int = 64
    depth: int = 3
    heads: int = 4
    mlp: int = 128
    patch: int = 7
    image_size: int = 28
    channels: int = 1
    pooling: str = "cls"
    class_token: bool = True

    def __post_init__(self) -> None:
        for field in ("width", "depth", "heads", "mlp", "patch", "image_size", "channels"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be >= 1.")
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}.")
        if self.image_size % self.patch:
            raise ValueError(f"image_size={self.image_size} must be a multiple of {self.patch=}.")
        if self.pooling not in ("cls", "gap"):
            raise ValueError(f"pooling={self.pooling!r} must be 'cls' or 'gap'.")
        if self.pooling == "cls" and not self.class_token:
            raise ValueError("class_token=False needs pooling='gap'.")

    @property
    def grid(self) -> int:
        """Number of patches along one side."""
        return self.image_size // self.patch

    @property
    def tokens(self) -> int:
        """Length of the token sequence."""
        return self.grid**2 + int(self.class_token)

    def at(self, image_size: int) -> ViTConfig:
        """Returns the same shape for another image size."""
        return dataclasses.replace(self, image_size=image_size)


_PATCH16 = ViTConfig(patch=16, image_size=224, channels=3)

SIZES: Mapping[str, ViTConfig] = MappingProxyType(
    {
        "mini": ViTConfig(),
        "ti16": dataclasses.replace(_PATCH16, width=192, depth=12, heads=3, mlp=768),
        "s16": dataclasses.replace(_PATCH16, width=384, depth=12, heads=6, mlp=1536),
        "b16": dataclasses.replace(_PATCH16, width=768, depth=12, heads=12, mlp=3072),
    }
)


class _Block(nn.Module):
    config: ViTConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        x = x + Attention(self.config.heads, self.dtype, name="attn")(norm(name="norm1")(x))
        return x + Mlp(self.config.mlp, self.dtype, name="mlp")(norm(name="norm2")(x))


class _Backbone(nn.Module):
    config: ViTConfig
    dtype: jnp.dtype
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        cfg = self.config
        batch = images.shape[:-3]
        # A matmul over flattened patches equals the stride-`patch` convolution, and both vmap and
        # book-keeping are fastest with it.
        grid = images.reshape(*batch, cfg.grid, cfg.patch, cfg.grid, cfg.patch, cfg.channels)
        patches = jnp.swapaxes(grid, -4, -3).reshape(*batch, cfg.grid**2, -1)
        x = nn.Dense(cfg.width, dtype=self.dtype, name="embed")(patches)
        if cfg.class_token:
            token = self.param("cls", nn.initializers.normal(1e-6), (cfg.width,))
            token = jnp.broadcast_to(token.astype(self.dtype), (*batch, 1, cfg.width))
            x = jnp.concatenate([token, x], axis=-2)
        position = self.param("pos_embed", nn.initializers.normal(0.02), (cfg.tokens, cfg.width))
        x = x + jnp.broadcast_to(position.astype(self.dtype), x.shape)
        block = nn.remat(_Block) if self.remat else _Block
        for index in range(cfg.depth):
            x = block(cfg, self.dtype, name=f"blocks_{index}")(x)
        if cfg.pooling == "cls":
            pooled = x[..., 0, :]
        else:
            pooled = x[..., int(cfg.class_token) :, :].mean(axis=-2, dtype=jnp.float32)
        return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(pooled)


def vision_transformer(
    config: ViTConfig,
    num_classes: int,
    *,
    head_init: str = "zero",
    dtype: jnp.dtype | str = "float32",
    remat: bool = False,
) -> Model:
    """Returns a ViT classifier.

    Parameters: `embed/{kernel,bias}`, `cls`, `pos_embed`, `blocks_i/{norm1,norm2}/{scale,bias}`,
    `blocks_i/attn/{query,key,value,out}/{kernel,bias}`, `blocks_i/mlp/{fc1,fc2}/{kernel,bias}`,
    `norm/{scale,bias}`, `head/{kernel,bias}`. `load` reads AugReg `.npz`, timm and Hugging Face
    `.safetensors`, and files of `save_weights`.

    Args:
        config: the shape; `SIZES` has the usual ones.
        num_classes: number of classes.
        head_init: "zero", "random" or "near_zero".
        dtype: compute dtype of the blocks; parameters, softmax, norm statistics and logits are
            always float32.
        remat: computes a block's activations again in the backward pass, instead of keeping them.

    Raises:
        ValueError: an argument is out of range.

    >>> model = vision_transformer(ViTConfig(), num_classes=10)
    >>> jax.eval_shape(model.init, jax.random.key(0))["blocks_0"]["attn"]["query"]["kernel"].shape
    (64, 64)
    """
    # Pixels in [-1, 1], like all networks that descend from AugReg.
    spec = InputSpec(
        config.image_size, config.channels, (0.5,) * config.channels, (0.5,) * config.channels
    )
    return from_linen(
        _Backbone(config, compute_dtype(dtype), remat),
        spec,
        partial(_load, config),
        width=config.width,
        num_classes=num_classes,
        head_init=head_init,
    )


# Published weights: AugReg `.npz`, timm and Hugging Face `.safetensors`, and files of
# `save_weights`.

Table = dict[str, Source]


def _transposed(tensor: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(tensor.T)


def _patches_from_oihw(tensor: np.ndarray) -> np.ndarray:
    return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])


def _third(tensor: np.ndarray, *, index: int) -> np.ndarray:
    part = np.split(tensor, 3)[index]
    return np.ascontiguousarray(part.T)


def _flat(tensor: np.ndarray) -> np.ndarray:
    return tensor.reshape(-1)


def _positions(tensor: np.ndarray, *, cfg: ViTConfig, method: str) -> np.ndarray:
    """Resamples `[1, tokens, width]` of any square grid to `[tokens, width]` of ours."""
    tensor = tensor.reshape(-1, tensor.shape[-1])
    prefix = int(cfg.class_token)
    side = math.isqrt(max(len(tensor) - prefix, 0))
    if side == 0 or side**2 + prefix != len(tensor):
        return tensor  # not a square grid: the shape check of `translate` reports it
    grid = tensor[prefix:].reshape(side, side, -1)
    resized = resample_grid(grid, cfg.grid, method)
    return np.concatenate([tensor[:prefix], resized.reshape(cfg.grid**2, -1)])


def _own(cfg: ViTConfig, params: Params) -> Table:
    table = {path: Source(path, tuple(leaf.shape)) for path, leaf in flatten(params).items()}
    resize = partial(_positions, cfg=cfg, method="cubic_antialiased")
    table["pos_embed"] = Source("pos_embed", (None, cfg.width), resize)
    return table


def _norm(table: Table, ours: str, scale: str, bias: str, width: int) -> None:
    table[f"{ours}/scale"] = Source(scale, (width,))
    table[f"{ours}/bias"] = Source(bias, (width,))


def _torch_dense(table: Table, ours: str, theirs: str, shape: tuple[int, int]) -> None:
    """Adds a dense layer; `shape` is ours, [inputs, outputs]."""
    table[f"{ours}/kernel"] = Source(f"{theirs}.weight", shape[::-1], _transposed)
    table[f"{ours}/bias"] = Source(f"{theirs}.bias", shape[1:])


def _timm(cfg: ViTConfig, classes: int, norm: str) -> Table:
    d, size = cfg.width, cfg.patch
    table: Table = {
        "embed/kernel": Source(
            "patch_embed.proj.weight", (d, cfg.channels, size, size), _patches_from_oihw
        ),
        "embed/bias": Source("patch_embed.proj.bias", (d,)),
        "pos_embed": Source(
            "pos_embed", (1, None, d), partial(_positions, cfg=cfg, method="cubic_antialiased")
        ),
    }
    if cfg.class_token:
        table["cls"] = Source("cls_token", (1, 1, d), _flat)
    for i in range(cfg.depth):
        ours, theirs = f"blocks_{i}", f"blocks.{i}"
        for name in ("norm1", "norm2"):
            scale, bias = f"{theirs}.{name}.weight", f"{theirs}.{name}.bias"
            _norm(table, f"{ours}/{name}", scale, bias, d)
        for index, name in enumerate(("query", "key", "value")):
            part = partial(_third, index=index)
            table[f"{ours}/attn/{name}/kernel"] = Source(
                f"{theirs}.attn.qkv.weight", (3 * d, d), part
            )
            table[f"{ours}/attn/{name}/bias"] = Source(f"{theirs}.attn.qkv.bias", (3 * d,), part)
        _torch_dense(table, f"{ours}/attn/out", f"{theirs}.attn.proj", (d, d))
        _torch_dense(table, f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1", (d, cfg.mlp))
        _torch_dense(table, f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2", (cfg.mlp, d))
    _norm(table, "norm", f"{norm}.weight", f"{norm}.bias", d)
    _torch_dense(table, "head", "head", (d, classes))
    return table


def _hugging_face(cfg: ViTConfig, classes: int, prefix: str) -> Table:
    d, size, embed = cfg.width, cfg.patch, f"{prefix}embeddings"
    table: Table = {
        "embed/kernel": Source(
            f"{embed}.patch_embeddings.projection.weight",
            (d, cfg.channels, size, size),
            _patches_from_oihw,
        ),
        "embed/bias": Source(f"{embed}.patch_embeddings.projection.bias", (d,)),
        "pos_embed": Source(
            f"{embed}.position_embeddings",
            (1, None, d),
            partial(_positions, cfg=cfg, method="cubic"),
        ),
        "cls": Source(f"{embed}.cls_token", (1, 1, d), _flat),
    }
    for i in range(cfg.depth):
        ours, theirs = f"blocks_{i}", f"{prefix}encoder.layer.{i}"
        for name, other in (("norm1", "layernorm_before"), ("norm2", "layernorm_after")):
            scale, bias = f"{theirs}.{other}.weight", f"{theirs}.{other}.bias"
            _norm(table, f"{ours}/{name}", scale, bias, d)
        for name in ("query", "key", "value"):
            _torch_dense(
                table, f"{ours}/attn/{name}", f"{theirs}.attention.attention.{name}", (d, d)
            )
        _torch_dense(table, f"{ours}/attn/out", f"{theirs}.attention.output.dense", (d, d))
        _torch_dense(table, f"{ours}/mlp/fc1", f"{theirs}.intermediate.dense", (d, cfg.mlp))
        _torch_dense(table, f"{ours}/mlp/fc2", f"{theirs}.output.dense", (cfg.mlp, d))
    _norm(table, "norm", f"{prefix}layernorm.weight", f"{prefix}layernorm.bias", d)
    _torch_dense(table, "head", "classifier", (d, classes))
    return table


def _matrix(rows: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda tensor: tensor.reshape(rows, -1)


def _augreg(cfg: ViTConfig, classes: int) -> Table:
    d, size = cfg.width, cfg.patch
    each = d // cfg.heads
    position = "Transformer/posembed_input/pos_embedding"
    table: Table = {
        "embed/kernel": Source(
            "embedding/kernel", (size, size, cfg.channels, d), _matrix(size**2 * cfg.channels)
        ),
        "embed/bias": Source("embedding/bias", (d,)),
        "pos_embed": Source(position, (1, None, d), partial(_positions, cfg=cfg, method="linear")),
    }
    if cfg.class_token:
        table["cls"] = Source("cls", (1, 1, d), _flat)
    for i in range(cfg.depth):
        ours, theirs = f"blocks_{i}", f"Transformer/encoderblock_{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        for name, other in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            _norm(table, f"{ours}/{name}", f"{theirs}/{other}/scale", f"{theirs}/{other}/bias", d)
        for name in ("query", "key", "value"):
            path = f"{ours}/attn/{name}"
            kernel = (d, cfg.heads, each)
            table[f"{path}/kernel"] = Source(f"{attention}/{name}/kernel", kernel, _matrix(d))
            table[f"{path}/bias"] = Source(f"{attention}/{name}/bias", kernel[1:], _flat)
        table[f"{ours}/attn/out/kernel"] = Source(
            f"{attention}/out/kernel", (cfg.heads, each, d), _matrix(d)
        )
        table[f"{ours}/attn/out/bias"] = Source(f"{attention}/out/bias", (d,))
        for name, other, shape in (
            ("fc1", "Dense_0", (d, cfg.mlp)),
            ("fc2", "Dense_1", (cfg.mlp, d)),
        ):
            path, layer = f"{ours}/mlp/{name}", f"{theirs}/MlpBlock_3/{other}"
            table[f"{path}/kernel"] = Source(f"{layer}/kernel", shape)
            table[f"{path}/bias"] = Source(f"{layer}/bias", shape[1:])
    final = "Transformer/encoder_norm"
    _norm(table, "norm", f"{final}/scale", f"{final}/bias", d)
    table["head/kernel"] = Source("head/kernel", (d, classes))
    table["head/bias"] = Source("head/bias", (classes,))
    return table


def _table(cfg: ViTConfig, params: Params, tensors: Tensors, origin: str) -> Table:
    classes = int(params["head"]["bias"].shape[0])
    if "embed/kernel" in tensors:
        return _own(cfg, params)
    if "embedding/kernel" in tensors:
        return _augreg(cfg, classes)
    if "patch_embed.proj.weight" in tensors:
        return _timm(cfg, classes, "fc_norm" if "fc_norm.weight" in tensors else "norm")
    for prefix in ("vit.", ""):
        if f"{prefix}embeddings.patch_embeddings.projection.weight" in tensors:
            return _hugging_face(cfg, classes, prefix)
    some = ", ".join(sorted(tensors)[:5])
    raise ValueError(
        f"{origin} has none of the layouts of AugReg, timm, Hugging Face or dpjax; it has: {some}."
    )


def _load(cfg: ViTConfig, params: Params, path: str, *, head: bool = False) -> Params:
    """Loads a weight file into the parameters of a ViT, see `Loader`; names reveal the layout.

    Args:
        cfg: shape of the ViT.
        params: its parameters.
        path: an AugReg `.npz`, a timm or Hugging Face `.safetensors`, or a file of `save_weights`.
        head: whether the file's head is loaded too.

    Returns:
        Parameters like `params`. Position embeddings of another image size are resampled as timm
        resamples its own files and AugReg's, and as Hugging Face resamples theirs.
    """
    tensors = read_tensors(path)
    table = _table(cfg, params, tensors, path)
    # Ignored: poolers and pre-logits are layers between the features and a head not used here.
    return translate(
        params,
        tensors,
        table,
        origin=path,
        head=None if head else "head",
        ignore=r"^(vit\.)?pooler\.|^pre_logits[./]",
    )


def to_layout(params: Mapping[str, object], cfg: ViTConfig, layout: str) -> Tensors:
    """Returns the weights under the names of another library, for export.

    Args:
        params: parameters of a ViT.
        cfg: its shape.
        layout: "timm" or "transformers".

    Returns:
        Tensors that timm's `VisionTransformer`, or transformers' `ViTForImageClassification`, of
        this shape loads with no tensor missing or left over.

    Raises:
        ValueError: transformers has no such model: it reads out a class token.
    """
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    classes = len(flat["head/bias"])
    if layout == "timm":
        table = _timm(cfg, classes, "norm" if cfg.pooling == "cls" else "fc_norm")
    elif cfg.pooling == "cls":
        table = _hugging_face(cfg, classes, "vit.")
    else:
        raise ValueError(f"format='transformers' needs pooling='cls', got {cfg.pooling!r}.")
    out: Tensors = {}
    for path, source in table.items():
        value, name = flat[path], source.name
        if path == "embed/kernel":
            value = value.reshape(cfg.patch, cfg.patch, cfg.channels, -1).transpose(3, 2, 0, 1)
        elif path.endswith("kernel"):
            value = value.T
        elif path == "pos_embed":
            value = value[None]
        elif path == "cls":
            value = value[None, None]
        out[name] = np.concatenate([out[name], value]) if name in out else value
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def layout_config(cfg: ViTConfig, layout: str, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns the `config.json` with which timm or transformers builds this ViT from a folder."""
    if layout == "transformers":
        return {
            "architectures": ["ViTForImageClassification"],
            "model_type": "vit",
            "hidden_size": cfg.width,
            "num_hidden_layers": cfg.depth,
            "num_attention_heads": cfg.heads,
            "intermediate_size": cfg.mlp,
            "image_size": cfg.image_size,
            "patch_size": cfg.patch,
            "num_channels": cfg.channels,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "id2label": {str(index): name for index, name in enumerate(class_names)},
            "label2id": {name: index for index, name in enumerate(class_names)},
        }
    center = [0.5] * cfg.channels  # as in `vision_transformer`
    return {
        "architecture": "vit_tiny_patch16_224",  # every field of its shape is replaced
        "num_classes": len(class_names),
        "model_args": {
            "img_size": cfg.image_size,
            "patch_size": cfg.patch,
            "in_chans": cfg.channels,
            "embed_dim": cfg.width,
            "depth": cfg.depth,
            "num_heads": cfg.heads,
            "mlp_ratio": cfg.mlp / cfg.width,
            "class_token": cfg.class_token,
            "global_pool": "token" if cfg.pooling == "cls" else "avg",
        },
        "pretrained_cfg": {
            "input_size": [cfg.channels, cfg.image_size, cfg.image_size],
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "mean": center,
            "std": center,
            "num_classes": len(class_names),
            "label_names": list(class_names),
        },
    }
