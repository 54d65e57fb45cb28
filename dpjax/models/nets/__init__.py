"""Networks, one file per family, each with the layouts of its published weights."""

from dpjax.models.nets.bit import RESNETS, ResNetConfig, resnet_v2
from dpjax.models.nets.decoder import (
    DECODERS,
    Cache,
    DecoderConfig,
    decode,
    decoder,
    empty_cache,
    output_logits,
    to_hugging_face,
)
from dpjax.models.nets.efficientnet import (
    EFFICIENTNETS,
    EfficientNetConfig,
    MBConvStage,
    efficientnet_lite,
)
from dpjax.models.nets.resnet8 import resnet8
from dpjax.models.nets.text import TEXT_SIZES, TextConfig, text_encoder
from dpjax.models.nets.vit import SIZES, ViTConfig, layout_config, to_layout, vision_transformer
from dpjax.models.nets.wrn import WRN_16_4, WideResNetConfig, wide_resnet

__all__ = [
    "DECODERS",
    "EFFICIENTNETS",
    "RESNETS",
    "SIZES",
    "TEXT_SIZES",
    "WRN_16_4",
    "Cache",
    "DecoderConfig",
    "EfficientNetConfig",
    "MBConvStage",
    "ResNetConfig",
    "TextConfig",
    "ViTConfig",
    "WideResNetConfig",
    "decode",
    "decoder",
    "efficientnet_lite",
    "empty_cache",
    "layout_config",
    "output_logits",
    "resnet8",
    "resnet_v2",
    "text_encoder",
    "to_hugging_face",
    "to_layout",
    "vision_transformer",
    "wide_resnet",
]
