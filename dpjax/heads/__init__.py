"""Heads on a frozen backbone: features computed once, and many heads trained on them together."""

from dpjax.heads.cache import compute_features
from dpjax.heads.features import FeatureSet, average, concatenate, normalize
from dpjax.heads.train import (
    ClippedHeadSum,
    Heads,
    Optimizer,
    Point,
    batch_indices,
    evaluate,
    initial_head,
    train_heads,
)

__all__ = [
    "ClippedHeadSum",
    "FeatureSet",
    "Heads",
    "Optimizer",
    "Point",
    "average",
    "batch_indices",
    "compute_features",
    "concatenate",
    "evaluate",
    "initial_head",
    "normalize",
    "train_heads",
]
