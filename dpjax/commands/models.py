"""List the model families, their sizes, and the published weights with what they need.

    dpjax models | less

--config.model.name=FAMILY and --config.model.size=SIZE choose a model, --config.model.weights=NAME
its weights, by a name listed here or by the path of a file. Any other model is a function of yours:
see the guide, "Your own model on your own data".
"""

from __future__ import annotations

import argparse

from dpjax.commands import cli

# Which published weights a family and size take.
_WEIGHTS = {
    "efficientnet_lite0": "efficientnet_lite lite0",
    "efficientnet_lite2": "efficientnet_lite lite2",
    "minilm_l6": "text_encoder minilm_l6",
    "mpnet_base": "text_encoder mpnet_base",
    "distilbert_base": "text_encoder distilbert_base",
    "vit_mini_digits": "vit mini",
    "vit_ti16_augreg": "vit ti16",
    "vit_s16_augreg": "vit s16",
    "vit_b16_augreg": "vit b16",
    "bit_m_r50x1": "resnet_v2 r50x1",
    "smollm2_135m_instruct": "decoder smollm2_135m",
}


def add_arguments(parser: cli.Parser) -> None:
    """This command takes no flags."""


def run(args: argparse.Namespace) -> int:
    from dpjax import build, models

    rows: list[tuple[str, ...]] = [("family", "size", "input", "parameters")]
    for family, sizes in build.model.families().items():
        rows += [(family, size or "-", *_facts(family, size)) for size in sizes or ("",)]
    print(_aligned(rows), "", sep="\n")
    rows = [("weights", "for", "status")]
    for name in sorted(models.WEIGHTS):
        owner = _WEIGHTS.get(name, "data.tokenizer" if "tokenizer" in name else "")
        rows.append((name, owner, models.availability(name)))
    print(_aligned(rows))
    return 0


def _facts(family: str, size: str) -> tuple[str, str]:
    """The input of a model, and how many parameters it has without a new head."""
    import jax

    from dpjax import build, models
    from dpjax.config import default

    config = default().model
    config.name = family
    config.size = size or config.size
    net = build.model.model(config, 2)
    params = jax.eval_shape(net.init, jax.random.key(0))
    spec = net.input
    pretrained = isinstance(spec, models.TextSpec) and spec.causal
    new = None if pretrained else net.head
    count = models.finetune.count({k: v for k, v in params.items() if k != new})
    if isinstance(spec, models.TextSpec):
        return f"{spec.max_length} tokens", f"{count:,}"
    return f"{spec.image_size} x {spec.image_size} x {spec.channels}", f"{count:,}"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
