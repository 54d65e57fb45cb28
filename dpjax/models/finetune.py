"""Which leaves train, and how the model is wrapped for it.

A fine-tuning set is a function from a `Model` to a `FineTuning`: the model to run (wrapped where
the set adds parameters), a predicate on parameter paths, and the way back to plain weights.
Trainable and frozen leaves are split BEFORE differentiation, so frozen ones take no clipping
budget, memory, noise or time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from dpjax.models import lora as adapters
from dpjax.models.model import Model, Params, flatten, unflatten

__all__ = [
    "FineTuning",
    "FineTuningSet",
    "bias",
    "blocks",
    "combine",
    "count",
    "film",
    "full",
    "head",
    "join",
    "lora",
    "regex",
    "split",
]

Predicate = Callable[[str], bool]


class FineTuning(NamedTuple):
    """A model prepared for fine-tuning.

    Attributes:
        model: the model to run; its `init` makes the parameters that the set adds, if any.
        trainable: whether the leaf at a path such as "blocks_0/norm1/scale" trains.
        merge: turns trained parameters into plain weights of the original model.
    """

    model: Model
    trainable: Predicate
    merge: Callable[[Params], Params]


FineTuningSet = Callable[[Model], FineTuning]


def _plain(model: Model, trainable: Predicate) -> FineTuning:
    return FineTuning(model, trainable, lambda params: params)


def _in_head(model: Model) -> Predicate:
    return lambda path: path.split("/")[0] == model.head


def full() -> FineTuningSet:
    """Every parameter."""
    return lambda model: _plain(model, lambda path: True)


def head() -> FineTuningSet:
    """The classification head: linear probing."""
    return lambda model: _plain(model, _in_head(model))


_NORM_AFFINE = re.compile(r"(^|/)[^/]*(norm|bn|gn|ln)[^/]*/(scale|bias)$", re.IGNORECASE)
_BIAS = re.compile(r"(^|/)bias$")
# A residual block: blocks_3, stages_1 or stages_1_blocks_2.
_BLOCK = re.compile(r"^(?:stages_(\d+))?_?(?:blocks_(\d+))?(?=/)")


def film() -> FineTuningSet:
    """Scale and bias of every normalisation layer, and the head (arXiv 2510.20616)."""
    return combine([regex(_NORM_AFFINE.pattern, flags=re.IGNORECASE), head()])


def bias() -> FineTuningSet:
    """Every bias, and the head: BiTFiT (arXiv 2210.00036)."""
    return combine([regex(_BIAS.pattern), head()])


def blocks(*, first: int = 0, last: int = 0) -> FineTuningSet:
    """The first and the last blocks of the backbone, and the head.

    Args:
        first: how many blocks at the input's end.
        last: how many blocks at the head's end.
    """
    if first < 0 or last < 0 or first + last == 0:
        raise ValueError(f"first={first}, last={last} must be >= 0 and not both 0.")

    def make(model: Model) -> FineTuning:
        paths = _paths(model)
        names = sorted({_block(path) for path in paths} - {()})
        if first + last > len(names):
            raise ValueError(f"first={first}, last={last} exceed the model's {len(names)} blocks.")
        chosen = set(names[:first]) | set(names[len(names) - last :])
        in_head = _in_head(model)

        def trainable(path: str) -> bool:
            return in_head(path) or _block(path) in chosen

        return _plain(model, trainable)

    return make


def _block(path: str) -> tuple[int, ...]:
    """The block's numbers, outer first; empty for a leaf outside all blocks."""
    match = _BLOCK.match(path)
    return tuple(int(number) for number in match.groups() if number) if match else ()


def lora(*, rank: int = 8, targets: str = "attn/(query|value)$") -> FineTuningSet:
    """Low-rank adapters on the dense layers whose path matches, and the head; see `lora`."""

    def make(model: Model) -> FineTuning:
        adapted = adapters.adapt(model, rank=rank, targets=targets)
        in_head = _in_head(model)
        return FineTuning(
            adapted,
            lambda path: in_head(path) or path.split("/")[0] == adapters.KEY,
            adapters.merge,
        )

    return make


def regex(pattern: str, *, flags: int = 0) -> FineTuningSet:
    """Every parameter whose path matches (`re.search`).

    Raises:
        ValueError: the pattern is no regular expression, or, once a model is given, matches
            none of its parameters.
    """
    try:
        compiled = re.compile(pattern, flags)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is not a regular expression: {error}.") from error

    def make(model: Model) -> FineTuning:
        paths = _paths(model)
        if not any(compiled.search(path) for path in paths):
            raise ValueError(
                f"pattern={pattern!r} matches none of the model's {len(paths)} parameters, "
                f"such as {', '.join(paths[:4])}."
            )
        return _plain(model, lambda path: compiled.search(path) is not None)

    return make


def combine(sets: Sequence[FineTuningSet]) -> FineTuningSet:
    """The union of several sets; wrappers apply in order."""
    if not sets:
        raise ValueError("combine needs at least one fine-tuning set.")

    def make(model: Model) -> FineTuning:
        parts: list[FineTuning] = []
        for one in sets:
            parts.append(one(parts[-1].model if parts else model))

        def merge(params: Params) -> Params:
            for part in reversed(parts):
                params = part.merge(params)
            return params

        return FineTuning(
            parts[-1].model, lambda path: any(p.trainable(path) for p in parts), merge
        )

    return make


def split(params: Params, trainable: Predicate) -> tuple[Params, Params]:
    """Splits parameters into (trainable, frozen) trees without common leaves.

    Raises:
        ValueError: no leaf is trainable.
    """
    flat = flatten(params)
    chosen = {path: leaf for path, leaf in flat.items() if trainable(path)}
    if not chosen:
        raise ValueError(f"no parameter is trainable, of {', '.join(list(flat)[:4])}, ...")
    rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(chosen), unflatten(rest)


def join(trainable: Params, frozen: Params) -> Params:
    """Inverse of `split`."""
    return unflatten({**flatten(frozen), **flatten(trainable)})


def count(params: Params) -> int:
    """Number of scalar parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _paths(model: Model) -> list[str]:
    shapes: Any = jax.eval_shape(model.init, jax.random.key(0))
    return list(flatten(shapes))
