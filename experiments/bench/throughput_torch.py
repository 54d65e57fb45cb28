"""The benchmark's peers in torch: ordinary training, Opacus hooks and Opacus ghost clipping.

The architectures equal those of `dpjax.models`, and the weights are copied by path. Class token and
position embedding are `nn.Embedding`s here, because Opacus has no per-example rule for bare
parameters.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.bench.throughput_models import make_batch, make_model

__all__ = ["torch_engine"]


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        split = (batch, tokens, self.heads, width // self.heads)
        query, key, value = (
            getattr(self, n)(x).reshape(split).transpose(1, 2) for n in ("query", "key", "value")
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = _Attention(width, heads), _Mlp(width, mlp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _ViT(nn.Module):
    def __init__(self, config: Any, classes: int) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.embed = nn.Linear(config.patch**2 * config.channels, width)
        if config.class_token:
            self.cls = nn.Embedding(1, width)
        self.pos_embed = nn.Embedding(config.tokens, width)
        for i in range(config.depth):
            setattr(self, f"blocks_{i}", _Block(width, config.heads, config.mlp))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        c, n = self.config, images.shape[0]
        grid = images.reshape(n, c.grid, c.patch, c.grid, c.patch, c.channels)
        x = self.embed(grid.transpose(2, 3).reshape(n, c.grid**2, -1))
        if c.class_token:
            x = torch.cat([self.cls(torch.zeros(n, 1, dtype=torch.long)), x], dim=1)
        x = x + self.pos_embed(torch.arange(c.tokens).repeat(n, 1))
        for i in range(c.depth):
            x = getattr(self, f"blocks_{i}")(x)
        return self.head(self.norm(x[:, 0] if c.pooling == "cls" else x.mean(dim=1)))


def _copy(module: nn.Module, params: dict[str, Any]) -> None:
    """Copies a flat parameter dict of ours into a torch module of the same paths."""
    state = {}
    for path, leaf in params.items():
        value = torch.tensor(np.asarray(leaf))
        name = path.replace("/", ".")
        if name.endswith(".kernel"):
            name, value = name.removesuffix("kernel") + "weight", value.T.contiguous()
        elif name.endswith(".scale"):
            name = name.removesuffix("scale") + "weight"
        elif name in ("cls", "pos_embed"):
            name, value = f"{name}.weight", value.reshape(-1, value.shape[-1])
        state[name] = value
    module.load_state_dict(state, strict=True)


def torch_engine(spec: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Like `throughput_worker.jax_engine`, in torch."""
    import jax

    from dpjax import models
    from dpjax.models import finetune

    engine = spec["engine"]
    if not spec["case"].startswith("vit"):
        why = "Opacus has no rule for weight standardization" if "resnet" in spec["case"] else (
            "compared on ViT only")  # fmt: skip
        return lambda: None, {"skip": why}
    if spec["set"] == "lora":
        return lambda: None, {"skip": "adapters are not part of Opacus"}
    if spec["dtype"] != "float32":
        return lambda: None, {"skip": "float32 only"}
    if engine.startswith("opacus") and importlib.util.find_spec("opacus") is None:
        return lambda: None, {"skip": "Opacus is not installed"}
    net = make_model(spec["case"], spec["classes"], spec["dtype"])
    ti16 = models.SIZES["ti16"]
    config = (
        type(ti16)(**{**vars(ti16), "image_size": 128, "class_token": False, "pooling": "gap"})
        if spec["case"] == "vit_ti_64"
        else models.SIZES["b16" if spec["case"] == "vit_b_197" else "ti16"]
    )
    params = jax.jit(net.init)(jax.random.key(0))
    module: nn.Module = _ViT(config, spec["classes"])
    _copy(module, models.flatten(params))
    tuning = {"full": finetune.full, "film": finetune.film, "head": finetune.head}[spec["set"]]()
    trainable = tuning(net).trainable
    for name, value in module.named_parameters():
        path = name.replace(".", "/").replace("cls/weight", "cls")
        path = path.replace("pos_embed/weight", "pos_embed")
        if "norm" in path:
            path = path.replace("weight", "scale")
        value.requires_grad_(trainable(path))
    arrays = make_batch(net.input, spec["batch"], spec["classes"])
    images = torch.tensor(arrays["input"])
    labels = torch.tensor(arrays["label"], dtype=torch.long)
    start = time.perf_counter()
    run = _ordinary(module, images, labels) if engine == "torch_nonprivate" else (
        _opacus(module, images, labels, ghost=engine == "opacus_ghost"))  # fmt: skip
    facts = {"compile_seconds": time.perf_counter() - start, "sum": run()}
    return run, facts


def _ordinary(module: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    chosen = [p for p in module.parameters() if p.requires_grad]

    def run() -> float:
        module.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(module(images), labels).backward()
        return _norm([p.grad for p in chosen])

    return run


def _opacus(
    module: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, ghost: bool
) -> Callable[[], float]:
    import warnings

    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleModuleFastGradientClipping,
    )
    from opacus.optimizers import DPOptimizer
    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    warnings.filterwarnings("ignore")
    chosen = [p for p in module.parameters() if p.requires_grad]
    values = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": len(labels)}
    plain = torch.optim.SGD(chosen, lr=0.0)
    if ghost:
        wrapped = GradSampleModuleFastGradientClipping(module, max_grad_norm=1.0)
        ghost_optimizer = DPOptimizerFastGradientClipping(plain, **values)
        criterion = DPLossFastGradientClipping(
            wrapped, ghost_optimizer, nn.CrossEntropyLoss(reduction="mean")
        )

        def run_ghost() -> float:
            ghost_optimizer.zero_grad()
            criterion(wrapped(images), labels).backward()
            return _norm([p.grad for p in chosen])

        return run_ghost

    hooked = GradSampleModule(module)
    optimizer = DPOptimizer(plain, **values)

    def run_hooks() -> float:
        optimizer.zero_grad()
        nn.functional.cross_entropy(hooked(images), labels).backward()
        optimizer.clip_and_accumulate()
        return _norm([p.summed_grad for p in chosen])

    return run_hooks


def _norm(grads: list[Any]) -> float:
    return float(torch.sqrt(sum((g.detach() ** 2).sum() for g in grads)))
