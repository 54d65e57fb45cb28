"""A numerical check that a model treats examples independently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.models.model import InputSpec, TextSpec

__all__ = ["check_examples_independent", "probe"]

# Tolerances, relative to the largest output. One compiled program rounds every row alike, whatever
# the other rows contain.
_SAME_PROGRAM = 1e-5
# Another batch size is another program, with other summation orders, possibly in bfloat16 or TF32.
_OTHER_PROGRAM = 2e-2

_ADVICE = (
    "Batch normalization with batch statistics is the usual cause: an example then changes the "
    "gradients of others, and clipping does not bound its influence. Use group or layer "
    "normalization, or frozen statistics (inference mode)."
)


def probe(spec: InputSpec | TextSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Returns four random, public inputs `[4, *shape]` for `check_examples_independent`."""
    rng = np.random.default_rng(0)
    if isinstance(spec, TextSpec):
        return rng.integers(0, spec.vocab_size, (4, *shape), dtype=np.int32)
    return rng.integers(0, 256, (4, *shape), dtype=np.uint8)


def check_examples_independent(
    apply: Callable[[Any, Any], jax.Array], params: Any, input_batch: Any
) -> None:
    """Checks numerically that no example of a batch changes another example's output.

    Each example in turn is replaced by other finite data: the other rows of the output must not
    change. Then each example runs alone, in a batch of one: it must reproduce its row. Parameters
    that are all zero (a new head, adapters) are first replaced by small random values, since zeros
    would hide the layers before them. Normalization in inference mode passes: its statistics are
    constants.

    Args:
        apply: `apply(params, batch) -> [batch, ...]`; jitted here.
        params: its parameters.
        input_batch: arrays `[batch, ...]` of at least two examples, images or token ids, not all
            ids equal.

    Raises:
        ValueError: examples are coupled, the outputs are not finite, or the check would prove
            nothing because the batch is too small or the output does not depend on the input.
    """
    leaves = jax.tree.leaves(input_batch)
    sizes = {int(np.shape(leaf)[0]) if np.ndim(leaf) else 0 for leaf in leaves}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(f"input_batch has leading axes {sorted(sizes)}; must be one size >= 2.")
    size = sizes.pop()
    params = _without_zeros(params)
    batch = jax.tree.map(np.asarray, input_batch)
    run = jax.jit(apply)
    together = _run(run, params, batch, size)
    scale = max(float(np.abs(together).max()), 1e-30)
    responded = False
    for changed in range(size):
        outputs = _run(run, params, _with_other_data(batch, changed), size)
        moved = _distance(outputs, together) / scale
        responded = responded or bool(moved[changed] > _SAME_PROGRAM)
        others = np.delete(np.arange(size), changed)
        worst = int(others[np.argmax(moved[others])])
        if moved[worst] > _SAME_PROGRAM:
            raise ValueError(
                f"examples are coupled: changing example {changed} of the batch moves the output "
                f"of example {worst} by {moved[worst]:.2g} of its scale. {_ADVICE}"
            )
    if not responded:
        raise ValueError(
            "the outputs do not depend on the inputs, so it cannot be checked that examples are "
            "independent."
        )
    for index in range(size):
        single = jax.tree.map(lambda leaf, at=index: leaf[at : at + 1], batch)
        gap = float(_distance(_run(run, params, single, 1), together[index : index + 1])[0]) / scale
        if gap > _OTHER_PROGRAM:
            raise ValueError(
                f"examples are coupled: example {index} alone differs from itself in a batch by "
                f"{gap:.2g} of the output's scale. {_ADVICE}"
            )


def _run(apply: Callable[[Any, Any], jax.Array], params: Any, batch: Any, size: int) -> np.ndarray:
    outputs = np.asarray(jax.device_get(apply(params, batch)), np.float32)
    if outputs.ndim == 0 or outputs.shape[0] != size:
        raise ValueError(f"apply returns shape {outputs.shape} for a batch of {size}.")
    if not np.isfinite(outputs).all():
        raise ValueError("apply returns outputs that are not finite.")
    return outputs


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(a - b).reshape(len(a), -1).max(axis=1))


def _without_zeros(params: Any) -> Any:
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or np.any(np.asarray(leaf)):
            return leaf
        return jnp.asarray(rng.normal(scale=0.1, size=leaf.shape), leaf.dtype)

    return jax.tree.map(fill, params)


def _with_other_data(batch: Any, index: int) -> Any:
    rng = np.random.default_rng(index)

    def change(leaf: np.ndarray) -> np.ndarray:
        changed = leaf.copy()
        if leaf.dtype == np.uint8:
            changed[index] = 255 - leaf[index]
        elif np.issubdtype(leaf.dtype, np.integer):
            # Only ids that occur are known to be valid: mirrored within their range.
            changed[index] = leaf.max() - (leaf[index] - leaf.min())
        else:
            noise = rng.normal(size=leaf.shape[1:]).astype(leaf.dtype)
            changed[index] = noise * (1 + np.abs(leaf).max()) - leaf[index]
        return changed

    return jax.tree.map(change, batch)
