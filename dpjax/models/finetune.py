"""Fine-tuning sets: which parameters train, and which parameters are added.

A fine-tuning set is a function from a `Model` to a `FineTuning`: the model to run (wrapped if the
set adds parameters), a predicate on parameter paths, and a function back to plain weights.
Trainable and frozen parameters are split BEFORE differentiation. Frozen ones therefore have no
gradient: they use up no clip norm, get no noise, and cost no memory or time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from dpjax.models import lora as adapters
from dpjax.models.model import Model, Params, TextSpec, flatten, unflatten

__all__ = [
    "FineTuning",
    "FineTuningSet",
    "bias",
    "block_names",
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
        model: the model to run; its `init` also creates the parameters that the set adds.
        trainable: maps a path such as "blocks_0/norm1/scale" to whether that parameter trains.
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


def _in_new_head(model: Model) -> Predicate:
    """The head that other sets train too, being new; that of a language model is pretrained."""
    pretrained = isinstance(model.input, TextSpec) and model.input.causal
    return (lambda path: False) if pretrained else _in_head(model)


def _with_new_head(pattern: str, flags: int = 0) -> FineTuningSet:
    return combine([regex(pattern, flags=flags), lambda model: _plain(model, _in_new_head(model))])


def full() -> FineTuningSet:
    """All parameters."""
    return lambda model: _plain(model, lambda path: True)


def head() -> FineTuningSet:
    """The classification head, or the output layer of a language model: linear probing."""
    return lambda model: _plain(model, _in_head(model))


_NORM_AFFINE = re.compile(r"(^|/)[^/]*(norm|bn|gn|ln)[^/]*/(scale|bias)$", re.IGNORECASE)
_BIAS = re.compile(r"(^|/)bias$")
# A residual block: blocks_3, stages_1 or stages_1_blocks_2.
_BLOCK = re.compile(r"^(?:stages_(\d+))?_?(?:blocks_(\d+))?(?=/)")


def film() -> FineTuningSet:
    """Scales and biases of all normalization layers, and a new head (arXiv 2510.20616)."""
    return _with_new_head(_NORM_AFFINE.pattern, re.IGNORECASE)


def bias() -> FineTuningSet:
    """All biases, and a new head: BiTFiT (arXiv 2210.00036)."""
    return _with_new_head(_BIAS.pattern)


def blocks(*, first: int = 0, last: int = 0, at: Sequence[int] = ()) -> FineTuningSet:
    """The first and the last blocks of the backbone, and those at some places, and the head.

    Args:
        first: number of blocks next to the input.
        last: number of blocks next to the head.
        at: places of blocks, counted from 0 at the input.

    Raises:
        ValueError: a negative number, no block at all, or, once a model is given, more blocks than
            it has.
    """
    if first < 0 or last < 0 or first + last + len(at) == 0:
        raise ValueError(f"first={first}, last={last} must be >= 0 and not both 0.")
    if min(at, default=0) < 0 or len(set(at)) < len(at):
        raise ValueError(f"at={tuple(at)} must be different places, from 0.")

    def make(model: Model) -> FineTuning:
        names = block_names(model)
        if first + last > len(names):
            raise ValueError(f"first={first}, last={last} exceed the model's {len(names)} blocks.")
        if max(at, default=-1) >= len(names):
            raise ValueError(f"at={tuple(at)} must be below the model's {len(names)} blocks.")
        numbers = [_block(f"{name}/") for name in names]
        selected = set(numbers[:first]) | set(numbers[len(names) - last :])
        selected |= {numbers[place] for place in at}
        in_head = _in_new_head(model)

        def trainable(path: str) -> bool:
            return in_head(path) or _block(path) in selected

        return _plain(model, trainable)

    return make


def block_names(model: Model) -> list[str]:
    """Returns the first parts of the paths of the model's blocks, in order from the input.

    Raises:
        ValueError: the model has no blocks.
    """
    names = {path.split("/")[0] for path in _paths(model) if _block(path)}
    if not names:
        raise ValueError("the model has no blocks, parts named blocks_0, stages_1 or the like.")
    return sorted(names, key=lambda name: _block(f"{name}/"))


def _block(path: str) -> tuple[int, ...]:
    """Returns a block's numbers, the stage first; () for a parameter outside all blocks."""
    match = _BLOCK.match(path)
    return tuple(int(number) for number in match.groups() if number) if match else ()


def lora(*, rank: int = 8, targets: str = "attn/(query|value)$") -> FineTuningSet:
    """Low-rank adapters on the dense layers whose path matches, and the head; see `lora.adapt`."""

    def make(model: Model) -> FineTuning:
        adapted = adapters.adapt(model, rank=rank, targets=targets)
        in_head = _in_new_head(model)
        return FineTuning(
            adapted,
            lambda path: in_head(path) or path.split("/")[0] == adapters.KEY,
            adapters.merge,
        )

    return make


def regex(pattern: str, *, flags: int = 0) -> FineTuningSet:
    """All parameters whose path matches (`re.search`).

    Raises:
        ValueError: the pattern is not a regular expression, or, once a model is given, matches
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
    """The union of several sets; wrappers are applied in order, and merged in reverse."""
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
    """Splits parameters into disjoint (trainable, frozen) trees.

    Raises:
        ValueError: no parameter is trainable.
    """
    flat = flatten(params)
    trains = {path: leaf for path, leaf in flat.items() if trainable(path)}
    if not trains:
        raise ValueError(f"no parameter is trainable, of {', '.join(list(flat)[:4])}, ...")
    frozen = {path: leaf for path, leaf in flat.items() if path not in trains}
    return unflatten(trains), unflatten(frozen)


def join(trainable: Params, frozen: Params) -> Params:
    """Inverse of `split`."""
    return unflatten({**flatten(frozen), **flatten(trainable)})


def count(params: Params) -> int:
    """Returns the number of scalar parameters."""
    return sum(leaf.size for leaf in flatten(params).values())


def _paths(model: Model) -> list[str]:
    shapes: Any = jax.eval_shape(model.init, jax.random.key(0))
    return list(flatten(shapes))
