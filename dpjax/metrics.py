"""Evaluation metrics: masked sums that add over chunks, turned into metrics at the end.

Calibration follows Guo et al. 2017 (arXiv 1706.04599, equations 3 and 5): the confidence of a
prediction is its largest softmax probability; bins have equal width and are open on the left, over
(0, 1]. The adaptive error has bins of equal mass instead (Nixon et al. 2019, arXiv 1904.01685, of
the top prediction only). The Brier score (Brier 1950), 0 to 2, is the mean squared distance of the
probabilities from the one-hot label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "PRIVATE", "EvalSums", "Reliability", "TokenFacts", "TokenSums", "diagrams", "eval_sums",
    "labeled", "lookup", "reliability", "summarize", "token_sums",
]  # fmt: skip

_LEVELS = 960  # of confidence, from which bins of equal mass are put together
_CONFUSION_CLASSES = 50  # with more, a confusion matrix is neither readable nor small

PRIVATE = "nonprivate/"
"""Prefix of the name of every number that reads private data outside of the guarantee."""


def labeled(values: Mapping[str, Any], private_data: bool) -> dict[str, Any]:
    """Returns values under their names, with the prefix `PRIVATE` if they read private data.

    >>> labeled({"accuracy": 0.5}, True)
    {'nonprivate/accuracy': 0.5}
    """
    return {f"{PRIVATE if private_data else ''}{name}": value for name, value in values.items()}


def lookup(values: Mapping[str, Any], name: str) -> tuple[str, Any]:
    """Returns a value and the name that it has: plain, or with the prefix `PRIVATE`.

    Raises:
        KeyError: it has neither name.
    """
    full = name if name in values else f"{PRIVATE}{name}"
    return full, values[full]


class EvalSums(NamedTuple):
    """Float32 sums over real examples. `a + b` (or a psum) joins disjoint chunks."""

    count: jax.Array  # type: ignore[assignment]  # [] number of examples
    correct: jax.Array  # [] number of correct predictions
    nll: jax.Array  # [] negative log-likelihood of the labels, in nats
    brier: jax.Array  # [] squared distance of the probabilities from the one-hot label
    class_count: jax.Array  # [classes] by label
    class_correct: jax.Array  # [classes]
    bin_count: jax.Array  # [bins] by confidence
    bin_correct: jax.Array  # [bins]
    bin_confidence: jax.Array  # [bins]
    levels: jax.Array  # [960, 3] count, correct, confidence by fine levels of confidence
    confusion: jax.Array  # [classes, classes] by label and prediction; [0, 0] for > 50 classes

    def __add__(self, other: Any) -> EvalSums:
        """Elementwise; without this, tuples would concatenate."""
        if not isinstance(other, EvalSums):
            return NotImplemented
        return EvalSums(*(a + b for a, b in zip(self, other)))


class TokenFacts(NamedTuple):
    """How well a language model predicts each example, float32 `[batch]`."""

    nll: jax.Array  # negative log-likelihood of the target tokens together, in nats
    correct: jax.Array  # target tokens that are the most likely ones
    tokens: jax.Array  # target tokens
    bytes: jax.Array  # UTF-8 bytes of text that they stand for


class TokenSums(NamedTuple):
    """`TokenFacts` summed over real examples, with their number. `a + b` joins disjoint chunks."""

    count: jax.Array  # type: ignore[assignment]
    nll: jax.Array
    correct: jax.Array
    tokens: jax.Array
    bytes: jax.Array

    def __add__(self, other: Any) -> TokenSums:
        """Elementwise; without this, tuples would concatenate."""
        if not isinstance(other, TokenSums):
            return NotImplemented
        return TokenSums(*(a + b for a, b in zip(self, other)))


class Reliability(NamedTuple):
    """One reliability diagram; accuracy and confidence are 0 where a bin's count is 0."""

    edges: np.ndarray  # [bins + 1]
    count: np.ndarray  # type: ignore[assignment]  # [bins] number of examples
    confidence: np.ndarray  # [bins] mean confidence
    accuracy: np.ndarray  # [bins]


def eval_sums(
    logits: jax.Array, labels: jax.Array, mask: jax.Array, num_classes: int, bins: int = 15
) -> EvalSums:
    """Returns the sums of one chunk; pure, for use inside jit.

    Args:
        logits: `[batch, num_classes]`, any float dtype; converted to float32.
        labels: `[batch]` integers in [0, num_classes). A label out of range makes the NLL NaN.
        mask: `[batch]` bool, False for padding.
        num_classes: checked against the logits.
        bins: number of confidence bins.

    Guarantees:
        Padding contributes exactly zero, whatever its label and logits, NaN included.

    Raises:
        ValueError: at trace time, if the shapes do not fit.
    """
    batch = logits.shape[:1]
    if logits.ndim != 2 or logits.shape[1] != num_classes:
        raise ValueError(f"logits of shape {logits.shape} must be [batch, {num_classes}].")
    if labels.shape != batch or mask.shape != batch:
        raise ValueError(
            f"labels of shape {labels.shape} and mask of shape {mask.shape} must both be {batch}."
        )
    if bins < 1:
        raise ValueError(f"bins={bins} must be >= 1.")
    mask = mask.astype(bool)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    # "fill": the default mode would clamp a label out of range and hide the mistake.
    label_log_prob = jnp.take_along_axis(
        log_probs, labels[:, None], axis=1, mode="fill", fill_value=jnp.nan
    )[:, 0]
    confidence = jnp.exp(jnp.max(log_probs, axis=-1))
    correct = (jnp.argmax(log_probs, axis=-1) == labels).astype(jnp.float32)
    index = _bin(confidence, bins)
    facts = jnp.stack([jnp.ones_like(correct), correct, confidence], axis=1)
    facts = jnp.where(mask[:, None], facts, 0.0)
    classes = jnp.arange(num_classes)[None, :]
    in_class = mask[:, None] & (labels[:, None] == classes)
    predicted = (jnp.argmax(log_probs, axis=-1)[:, None] == classes).astype(jnp.float32)
    shown = num_classes if num_classes <= _CONFUSION_CLASSES else 0
    in_bin = mask[:, None] & (index[:, None] == jnp.arange(bins)[None, :])
    return EvalSums(
        count=jnp.sum(mask, dtype=jnp.float32),
        correct=_sum(mask, correct),
        nll=_sum(mask, -label_log_prob),
        brier=_sum(mask, 1 - 2 * jnp.exp(label_log_prob) + jnp.sum(jnp.exp(2 * log_probs), axis=1)),
        class_count=jnp.sum(in_class, axis=0, dtype=jnp.float32),
        class_correct=_sum(in_class, correct[:, None]),
        bin_count=jnp.sum(in_bin, axis=0, dtype=jnp.float32),
        bin_correct=_sum(in_bin, correct[:, None]),
        bin_confidence=_sum(in_bin, confidence[:, None]),
        # A comparison with every level, as for the bins, would be large.
        levels=jax.ops.segment_sum(facts, _bin(confidence, _LEVELS), _LEVELS),
        confusion=in_class[:, :shown].astype(jnp.float32).T @ predicted[:, :shown],
    )


def _bin(confidence: jax.Array, bins: int) -> jax.Array:
    # Bin k is (k / bins, (k + 1) / bins], hence ceil - 1; the clip guards against rounding.
    index = jnp.clip(jnp.ceil(confidence * bins) - 1, 0, bins - 1)
    # A NaN confidence goes to bin 0, whose sum becomes NaN; casting NaN to int is undefined.
    return jnp.where(jnp.isnan(index), 0, index).astype(jnp.int32)


def token_sums(facts: TokenFacts, mask: jax.Array) -> TokenSums:
    """Returns the sums of one chunk; padding (mask False) contributes exactly zero."""
    return TokenSums(jnp.sum(mask, dtype=jnp.float32), *(_sum(mask, value) for value in facts))


def summarize(sums: EvalSums | TokenSums, class_names: Sequence[str] = ()) -> dict[str, float]:
    """Returns flat metrics: accuracy, nll (nats), brier, ece, mce, class_accuracy/NAME, ...

    Classes without examples have no entry. `mce` is the largest gap over non-empty bins.
    `adaptive_ece` has as many bins as `ece`, of about equal numbers of examples: examples whose
    confidence is within 1/960 stay together. Of a language model: accuracy and nll of a target
    token, perplexity = exp(nll), and bits_per_byte, which does not depend on the tokenizer (absent
    for text of no bytes).

    Args:
        sums: over all examples.
        class_names: of every class; where two classes have one name, or none is given, all are
            called by their numbers.

    Raises:
        ValueError: no example was counted, or no target token.
    """
    total = float(sums.count)
    if not total > 0:
        raise ValueError(f"count={total} must be > 0: no example was evaluated.")
    sums = jax.device_get(sums)
    if isinstance(sums, TokenSums):
        return _summarize_tokens(sums)
    diagram = reliability(sums)
    gaps = np.abs(diagram.accuracy - diagram.confidence)
    numbers = [str(label) for label in range(len(sums.class_count))]
    # All or none: the number of one class may be the name of another.
    distinct = bool(class_names) and len(set(class_names)) == len(class_names)
    names = class_names if distinct else numbers
    per_class = {
        f"class_accuracy/{name}": float(correct) / float(count)
        for name, correct, count in zip(names, sums.class_correct, sums.class_count, strict=True)
        if count > 0
    }
    return {
        "accuracy": float(sums.correct) / total,
        "nll": float(sums.nll) / total,
        "brier": float(sums.brier) / total,
        "ece": float(np.dot(diagram.count, gaps) / total),
        "mce": float(np.max(gaps)),
        "adaptive_ece": _adaptive_ece(np.asarray(sums.levels, np.float64), len(diagram.count)),
        **per_class,
    }


def _adaptive_ece(levels: np.ndarray, bins: int) -> float:
    count, correct, confidence = levels.T
    # A level goes where its middle example belongs, by rank.
    middle = np.cumsum(count) - count / 2
    index = np.minimum(middle * bins // count.sum(), bins - 1).astype(int)
    gaps = np.bincount(index, weights=correct - confidence, minlength=bins)
    return float(np.sum(np.abs(gaps)) / count.sum())


def _summarize_tokens(sums: TokenSums) -> dict[str, float]:
    tokens, nll, size = float(sums.tokens), float(sums.nll), float(sums.bytes)
    if not tokens > 0:
        raise ValueError(f"tokens={tokens} must be > 0: no token was to be predicted.")
    # Above e^700 a float overflows; such a model is as useless as one of infinite perplexity.
    perplexity = math.exp(nll / tokens) if nll / tokens < 700 else math.inf
    bits = {"bits_per_byte": nll / math.log(2) / size} if size else {}
    return {
        "accuracy": float(sums.correct) / tokens,
        "nll": nll / tokens,
        "perplexity": perplexity,
        **bits,
    }


def reliability(sums: EvalSums) -> Reliability:
    """Returns the arrays of a reliability diagram, in float64 on the host."""
    count, correct, confidence = (
        np.asarray(value, np.float64)
        for value in (sums.bin_count, sums.bin_correct, sums.bin_confidence)
    )
    divisor = np.maximum(count, 1.0)  # an empty bin gives 0, not 0 / 0
    edges = np.linspace(0.0, 1.0, len(count) + 1)
    return Reliability(edges, count, confidence / divisor, correct / divisor)


def diagrams(sums: EvalSums, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns what `eval.json` holds besides numbers.

    Returns:
        "class_names"; "reliability", the fields of `Reliability`; and, for up to 50 classes,
        "confusion", whole numbers [classes, classes] by label and prediction.
    """
    confusion = np.asarray(sums.confusion).astype(int).tolist()
    shown = {"confusion": confusion} if confusion else {}
    return {
        "class_names": list(class_names), "reliability": reliability(sums)._asdict(), **shown,
    }  # fmt: skip


def _sum(keep: jax.Array, value: jax.Array) -> jax.Array:
    # `where`, not a product with the mask: 0 * NaN is NaN.
    return jnp.sum(jnp.where(keep, value, 0.0), axis=0)
