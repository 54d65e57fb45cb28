"""Flax models with published weights, behind `Model(init, apply, load, head, input, features)`."""

from __future__ import annotations

from dpjax.models import finetune
from dpjax.models.bare import MODULE_INPUT, from_module, is_module
from dpjax.models.model import (
    InputSpec,
    Model,
    Params,
    TextSpec,
    dense_head,
    flatten,
    from_linen,
    unflatten,
)
from dpjax.models.nets import (
    LITE0,
    RESNETS,
    SIZES,
    TEXT_SIZES,
    WRN_16_4,
    EfficientNetConfig,
    MBConvStage,
    ResNetConfig,
    TextConfig,
    ViTConfig,
    WideResNetConfig,
    efficientnet_lite,
    resnet8,
    resnet_v2,
    text_encoder,
    to_timm,
    vision_transformer,
    wide_resnet,
)
from dpjax.models.tokens import tokenizer
from dpjax.models.validate import check_examples_independent, probe
from dpjax.models.weights import (
    WEIGHTS,
    load_plain,
    load_weights,
    locate,
    read_tensors,
    save_weights,
)

__all__ = [
    "LITE0",
    "MODULE_INPUT",
    "RESNETS",
    "SIZES",
    "TEXT_SIZES",
    "WEIGHTS",
    "WRN_16_4",
    "EfficientNetConfig",
    "InputSpec",
    "MBConvStage",
    "Model",
    "Params",
    "ResNetConfig",
    "TextConfig",
    "TextSpec",
    "ViTConfig",
    "WideResNetConfig",
    "check_examples_independent",
    "dense_head",
    "efficientnet_lite",
    "finetune",
    "flatten",
    "from_linen",
    "from_module",
    "is_module",
    "load_plain",
    "load_weights",
    "locate",
    "probe",
    "read_tensors",
    "resnet8",
    "resnet_v2",
    "save_weights",
    "text_encoder",
    "to_timm",
    "tokenizer",
    "unflatten",
    "vision_transformer",
    "wide_resnet",
]
