"""Published text weights: Hugging Face `.safetensors` of BERT and DistilBERT, and our own files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from dpjax.models.model import Params, flatten
from dpjax.models.weights.tables import Source, Tensors, load_weights, read_tensors, translate

if TYPE_CHECKING:
    from dpjax.models.nets.text import TextConfig

__all__ = ["load"]

Table = dict[str, Source]

# Buffers, and what sits between the features and a head of theirs.
_IGNORE = (
    r"position_ids$|(^|\.)pooler\.|^cls\.|^pre_classifier\."
    r"|^vocab_(transform|layer_norm|projector)\."
)

_BERT = {
    "attn/query": "attention.self.query",
    "attn/key": "attention.self.key",
    "attn/value": "attention.self.value",
    "attn/out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
    "norm2": "output.LayerNorm",
}
_DISTILBERT = {
    "attn/query": "attention.q_lin",
    "attn/key": "attention.k_lin",
    "attn/value": "attention.v_lin",
    "attn/out": "attention.out_lin",
    "norm1": "sa_layer_norm",
    "mlp/fc1": "ffn.lin1",
    "mlp/fc2": "ffn.lin2",
    "norm2": "output_layer_norm",
}


def _transposed(tensor: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(tensor.T)


def _table(cfg: TextConfig, classes: int, prefix: str, layer: str, names: dict[str, str]) -> Table:
    d, embed = cfg.width, f"{prefix}embeddings"
    table: Table = {
        "embed/word": Source(f"{embed}.word_embeddings.weight", (cfg.vocab_size, d)),
        "embed/position": Source(f"{embed}.position_embeddings.weight", (cfg.positions, d)),
        "embed/norm/scale": Source(f"{embed}.LayerNorm.weight", (d,)),
        "embed/norm/bias": Source(f"{embed}.LayerNorm.bias", (d,)),
        "head/kernel": Source("classifier.weight", (classes, d), _transposed),
        "head/bias": Source("classifier.bias", (classes,)),
    }
    if cfg.token_types:
        table["embed/token_type"] = Source(
            f"{embed}.token_type_embeddings.weight", (cfg.token_types, d)
        )
    for index in range(cfg.depth):
        for ours, theirs in names.items():
            path, name = f"blocks_{index}/{ours}", f"{prefix}{layer}.{index}.{theirs}"
            if ours.startswith("norm"):
                table[f"{path}/scale"] = Source(f"{name}.weight", (d,))
                table[f"{path}/bias"] = Source(f"{name}.bias", (d,))
                continue
            inputs = cfg.mlp if ours == "mlp/fc2" else d
            outputs = cfg.mlp if ours == "mlp/fc1" else d
            table[f"{path}/kernel"] = Source(f"{name}.weight", (outputs, inputs), _transposed)
            table[f"{path}/bias"] = Source(f"{name}.bias", (outputs,))
    return table


def _modern(tensors: Tensors) -> Tensors:
    """Names of norms as they are spelt today; the oldest files say gamma and beta."""
    names = {
        name: re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name).replace(
            "LayerNorm.gamma", "LayerNorm.weight"
        )
        for name in tensors
    }
    return {names[name]: tensor for name, tensor in tensors.items()}


def load(cfg: TextConfig, params: Params, path: str, *, head: bool = False) -> Params:
    """Puts a weight file into the parameters of a text encoder.

    Args:
      cfg: shape of the encoder.
      params: its parameters.
      path: a Hugging Face `.safetensors` of BERT or DistilBERT, or a file of `save_weights`.
      head: whether to take the file's `classifier` too.

    Raises:
      ValueError: a tensor is missing, unexpected, misshapen or not finite; all are named.
    """
    tensors, kept = read_tensors(path), None if head else "head"
    if set(tensors) & set(flatten(params)):
        return load_weights(path, params, head=kept)
    tensors = _modern(tensors)
    distil = any(".q_lin." in name for name in tensors)
    prefix = next(
        (p for p in ("bert.", "distilbert.") if f"{p}embeddings.word_embeddings.weight" in tensors),
        "",
    )
    layer, names = ("transformer.layer", _DISTILBERT) if distil else ("encoder.layer", _BERT)
    table = _table(cfg, params["head"]["bias"].shape[0], prefix, layer, names)
    return translate(params, tensors, table, origin=path, head=kept, ignore=_IGNORE)
