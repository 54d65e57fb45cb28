"""Flax models with published weights, behind `Model(init, apply, load, head, input, features)`."""

from __future__ import annotations

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
from dpjax.models.nets.bit import RESNETS, ResNetConfig, resnet_v2
from dpjax.models.nets.efficientnet import LITE0, EfficientNetConfig, MBConvStage, efficientnet_lite
from dpjax.models.nets.resnet8 import resnet8
from dpjax.models.nets.text import TEXT_SIZES, TextConfig, text_encoder
from dpjax.models.nets.vit import SIZES, ViTConfig, to_timm, vision_transformer
from dpjax.models.nets.wrn import WRN_16_4, WideResNetConfig, wide_resnet
from dpjax.models.tokens import tokenizer
from dpjax.models.validate import check_examples_independent, probe
from dpjax.models.weights.published import WEIGHTS, locate
from dpjax.models.weights.tables import load_plain, load_weights, read_tensors, save_weights

__all__ = [
    "LITE0",
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
    "flatten",
    "from_linen",
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
