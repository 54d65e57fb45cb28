"""The benchmark's models and batches, the same for every engine."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["make_batch", "make_model"]


def make_model(case: str, classes: int, dtype: str) -> Any:
    """Makes one of the benchmark's models with a random head."""
    from dpjax import models

    common = {"head_init": "random", "dtype": dtype}
    ti16 = models.SIZES["ti16"]
    if case == "vit_ti_64":
        config = type(ti16)(
            **{**vars(ti16), "image_size": 128, "class_token": False, "pooling": "gap"}
        )
        return models.vision_transformer(config, classes, **common)
    if case == "vit_ti_197":
        return models.vision_transformer(ti16.at(224), classes, **common)
    if case == "vit_b_197":
        return models.vision_transformer(models.SIZES["b16"].at(224), classes, **common)
    if case == "resnet_gn":
        return models.wide_resnet(models.WRN_16_4, classes, **common)
    if case == "text_4":
        config = models.TextConfig(
            vocab_size=30_522, max_length=128, width=256, depth=4, heads=4, mlp=1024
        )
        return models.text_encoder(config, classes, **common)
    if case in ("smollm2_4", "smollm2_135m"):  # the first has 4 of its 30 blocks
        config = models.DECODERS["smollm2_135m"]
        depth = 4 if case == "smollm2_4" else config.depth
        return models.decoder(type(config)(**{**vars(config), "depth": depth}), dtype=dtype)
    raise ValueError(f"case={case!r} is unknown.")


def make_batch(spec: Any, batch: int, classes: int) -> dict[str, np.ndarray]:
    """Random inputs of a model and labels, the same in every process."""
    rng = np.random.default_rng(0)
    example = spec.example()
    if getattr(spec, "causal", False):  # tokens, targets and their bytes
        shape = (batch, 3, *example.shape)
        inputs = rng.integers(1, spec.vocab_size, shape, dtype=np.int32)
    elif example.dtype == np.int32:
        inputs = rng.integers(1, spec.vocab_size, (batch, *example.shape), dtype=np.int32)
    else:
        inputs = rng.normal(size=(batch, *example.shape)).astype(np.float32)
    return {"input": inputs, "label": rng.integers(0, classes, batch, dtype=np.int32)}
