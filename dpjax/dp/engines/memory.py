"""What clipping takes in memory beside an ordinary gradient, estimated from a jaxpr.

An ordinary gradient keeps what its backward pass reads, and lets go of it on the way back. The
book-keeping engine keeps the inputs and the cotangents of its products up to the end. Where a model
is little more than its products, that is twice as much; so the engine then takes the batch in parts
(`microbatch`), one after the other, at the same number of operations.

The estimate knows no compiler. It takes elementwise operations as computed again in the backward
pass, from the last array before them that is no elementwise function of another, as XLA's fusion
does it, outside of scans; and a scan's arrays as kept for all turns. On five idioms of
`experiments.bench` a test holds it within 0.6 and 1.5 of XLA's temporaries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.extend.core import primitives as P

from dpjax.dp.engines.arithmetic import backend
from dpjax.dp.engines.forms import form_of
from dpjax.dp.engines.jaxprs import inlined, scan_parts
from dpjax.dp.engines.plans import Plan, make_plan
from dpjax.dp.engines.sites import Key, Weight

__all__ = ["Sizes", "estimate_memory", "microbatch", "sizes_of"]


class _Limits(NamedTuple):
    """When a batch is taken in parts.

    Attributes:
        times: the memory of a plain gradient, beyond which it is.
        extra: bytes beyond that gradient's, likewise.
        busy: bytes of a part beyond which larger parts take no less time; infinite if they do.
    """

    times: float
    extra: int
    busy: float = math.inf


# On a CPU, fresh memory pages in every step take longer than one more pass over the parameters.
_LIMITS = {"cpu": _Limits(1.1, 2**20, 2**24)}
_ELSEWHERE = _Limits(1.5, 2**28)
_OF_PARTS = 1.05  # times the memory of a plain gradient
_MOST_PARTS = 8
# Times what is fixed: parts below the first save little memory, and parts above the second spend
# little of their time on what does not grow with them.
_LEAST, _PASSES = 0.6, 3

# Operations without a sum, whose derivative reads their output, nothing, or else their input.
_OF_OUTPUT = {"tanh", "exp", "exp2", "logistic", "sqrt", "rsqrt", "cbrt", "max", "min"}
_ADDS = {"add", "add_any", "sub"}
_LINEAR = _ADDS | {
    "neg", "convert_element_type", "copy", "stop_gradient", "reshape", "transpose", "squeeze",
    "broadcast_in_dim", "expand_dims", "rev", "slice", "split", "concatenate", "pad",
    "optimization_barrier", "sharding_constraint", "dynamic_slice", "select_n",
}  # fmt: skip
_REDUCES = {"reduce_sum", "reduce_max", "reduce_min", "argmax", "argmin", "cumsum", "sort"}


_Array = tuple[Key, Any]


class Sizes(NamedTuple):
    """Bytes in temporaries, of a plain gradient and of the engine.

    Attributes:
        plain: of each example, in an ordinary backward pass.
        ours: of each example of a microbatch.
        fixed: beside the examples: gradients of the parameters that are formed for one example, and
            what is as large as parameters and kept.
        convolves: whether the model has convolutions.
    """

    plain: int
    ours: int
    fixed: int
    convolves: bool

    def whole(self, n: int) -> float:
        """Temporaries of a batch of `n` taken whole, over those of a plain gradient."""
        return (n * self.ours + self.fixed) / max(1, n * self.plain)

    def __str__(self) -> str:
        share = self.ours / max(1, self.plain)
        return (
            f"about {share:.1f} of a plain gradient's for each example, and {self.fixed:,} bytes "
            "besides"
        )


class _Stage(NamedTuple):
    """A stretch of the model: bytes of one example.

    Attributes:
        stored: what its backward pass reads, kept from the forward pass on.
        inputs: inputs of products, kept up to the end.
        cotangents: the cotangents of their outputs, kept from here on.
        within: what is computed again for its backward pass.
        work: what its backward pass makes of what was recorded, beside what it was made from.
    """

    stored: int
    inputs: int = 0
    cotangents: int = 0
    within: int = 0
    work: int = 0

    def times(self, count: int) -> _Stage:
        stored, inputs, cotangents = (count * size for size in self[:3])
        return _Stage(stored, inputs, cotangents, self.within, self.work)


def estimate_memory(loss_fn: Any, params: Any, example: Any) -> Sizes:
    """Estimates temporaries of a plain gradient and of the engine; nothing is computed.

    Args:
        loss_fn: `(params, example) -> loss` of ONE example, a scalar.
        params: trainable parameters, arrays or `jax.ShapeDtypeStruct`s.
        example: ONE example, likewise.

    Returns:
        Bytes, to be printed or compared; see the module for what they leave out.

    >>> import jax.numpy as jnp
    >>> loss = lambda w, x: jnp.sum(jnp.tanh(x @ w))
    >>> print(estimate_memory(loss, jnp.ones((8, 4)), jnp.ones((16, 8))))
    about 1.3 of a plain gradient's for each example, and 128 bytes besides
    """
    return sizes_of(make_plan(loss_fn, params, example), params)


def sizes_of(planned: Plan, params: Any) -> Sizes:
    """Estimates the temporaries of a plan.

    Args:
        planned: of the loss of ONE example.
        params: the parameters, arrays or abstract values.
    """
    traced, leaves = planned.traced, jax.tree.leaves(params)
    walk = _walked(traced.jaxpr, len(leaves), _held(planned))
    same = traced.written is traced.jaxpr
    written = walk if same else _walked(traced.written, len(leaves), frozenset())
    stored = plain = ours = 0
    for stage in written.stages:
        stored += stage.stored
        plain = max(plain, stored + stage.within)
    stored = 0
    kept = sum(stage.inputs + stage.cotangents for stage in walk.stages)
    later = kept
    for stage in walk.stages:
        stored += stage.stored
        # Inputs of this stage and of earlier ones are among what is stored.
        later -= stage.inputs
        ours = max(ours, stored + stage.within + later + stage.work)
        later -= stage.cotangents
    entries = [4 * math.prod(leaf.shape) for leaf in leaves]
    formed = sum(entries[i] for i in traced.direct)
    for group in planned.groups:
        if group.is_kept:
            formed += 4 * group.form.B * group.form.d * group.form.p
    formed += sum(entries[i] for mixed in planned.mixed if mixed.kept for i in mixed.leaves)
    fixed = (2 if traced.scalars else 1) * sum(entries)
    # Where the columns of a leaf are scaled, a second array of its size is kept.
    fixed += sum(entries[own.leaf] for mixed in planned.mixed for own, _ in mixed.columns)
    # A backward pass has arrays of its own, about a quarter of what it reads. What the engine keeps
    # is more than that at the time when it is largest.
    copied = max((_copied(group.sites) for group in planned.groups), default=0)
    return Sizes(plain * 5 // 4, max(ours, kept + copied) + formed, fixed, walk.convolves)


def _walked(jaxpr: core.Jaxpr, leaves: int, held: frozenset[Key]) -> _Walk:
    walk = _Walk(jaxpr.invars[leaves:], held)
    walk.follow(jaxpr, ())
    return walk


def _held(planned: Plan) -> frozenset[Key]:
    """Equations whose inputs and cotangents are held up to the end.

    A gradient that is kept takes their place as soon as it can be formed: in a scan, at its end; of
    two factors of a weight, once the backward pass has what both are formed from.
    """
    weights = [(group.sites, group.is_kept) for group in planned.groups]
    weights += [(sites, mixed.kept) for mixed in planned.mixed for sites in mixed.weights]
    return frozenset(
        site.equation
        for sites, kept in weights
        for site in sites
        if not kept or site.lengths or site.factor
    )


def _copied(sites: Weight) -> int:
    """Bytes that the weighted sum copies: the operand that is scaled, or turned beside lookups."""
    form = form_of(sites)
    lookups = {site.kind == "embed" for site in sites}
    if lookups == {True}:
        return 0
    return 4 * form.B * form.T * (min if len(lookups) == 1 else max)(form.d, form.p)


def microbatch(sizes: Sizes, n: int) -> int:
    """How many of `n` examples are taken at a time; a divisor of `n`.

    All of them, where that takes little more memory than an ordinary gradient, and no less time. No
    part is much smaller than what is fixed, which would save nothing, or than an eighth of the
    batch.
    """
    if not isinstance(n, int):
        return n  # a symbolic size, of `jax.export`
    if sizes.convolves and backend() == "cpu":
        return n  # XLA brings convolutions into the form that is fast there outside of loops alone
    limits = _LIMITS.get(backend(), _ELSEWHERE)
    choices = [n // parts for parts in range(1, _MOST_PARTS + 1) if n % parts == 0]
    enough = max(limits.busy, _PASSES * sizes.fixed)
    if n * sizes.ours >= 2 * enough:
        return min((m for m in choices if m * sizes.ours >= enough), default=n)
    extra = n * (sizes.ours - sizes.plain) + sizes.fixed
    if sizes.whole(n) <= limits.times or extra <= limits.extra:
        return n
    room = _OF_PARTS * n * sizes.plain - sizes.fixed
    fits = max((m for m in choices if m * sizes.ours <= room), default=choices[-1])
    least = max(fits * sizes.ours, _LEAST * sizes.fixed)
    return min((m for m in choices if m * sizes.ours >= least), default=n)


def _size(atom: Any) -> int:
    aval = atom.aval
    if not hasattr(aval, "shape"):
        return 0
    return int(math.prod(aval.shape)) * getattr(aval.dtype, "itemsize", 4)


class _Walk:
    """Follows the arrays of one example through a jaxpr, into stages."""

    def __init__(self, known: Iterable[Any], sites: frozenset[Key], fused: bool = True) -> None:
        self.stages: list[_Stage] = []
        self.convolves = False
        self._sites, self._fused = sites, fused
        # What an array is computed again from. Arrays are (place of the call, variable): a function
        # that is called twice has the same variables.
        self._roots: dict[Any, _Array] = {v: ((), v) for v in known}
        self._stored: set[_Array] = set()
        self._looked_up: set[_Array] = set()
        self._recorded: set[_Array] = set()

    def follow(self, jaxpr: core.Jaxpr, prefix: Key) -> None:
        for i, eqn in enumerate(jaxpr.eqns):
            operands = [atom for atom in eqn.invars if self._root(atom) is not None]
            if operands:
                self._roots.update({v: (prefix, v) for v in eqn.outvars})
                self._stage(eqn, operands, (*prefix, i))

    def _root(self, atom: Any) -> _Array | None:
        return None if isinstance(atom, core.Literal) else self._roots.get(atom)

    def _store(self, atoms: Iterable[Any]) -> int:
        """Bytes that are stored on behalf of some arrays, and were not before."""
        roots = {self._root(atom) for atom in atoms}
        new = {root for root in roots if root is not None} - self._stored
        self._stored |= new
        return sum(_size(variable) for _, variable in new)

    def _stage(self, eqn: core.JaxprEqn, operands: list[Any], key: Key) -> None:
        name, call = eqn.primitive.name, inlined(eqn)
        self.convolves |= eqn.primitive is P.conv_general_dilated_p
        if call is not None and name != P.remat_p.name:
            self._call(eqn, call[0], key)
        elif name.startswith("custom_") and "call_jaxpr" in eqn.params:
            self._call(eqn, eqn.params["call_jaxpr"].jaxpr, key)
        elif call is not None:
            within = self._inside(eqn, call[0], key)
            stored = self._store(operands)
            self.stages.append(within._replace(stored=stored, within=within.stored))
        elif eqn.primitive is P.scan_p:
            within = self._inside(eqn, eqn.params["jaxpr"].jaxpr, key)
            self.stages.append(within.times(eqn.params["length"]))
        elif eqn.primitive is P.cond_p:
            branches = [
                self._inside(eqn, branch.jaxpr, (*key, i), first=1)
                for i, branch in enumerate(eqn.params["branches"])
            ]
            self.stages.append(_Stage(*map(sum, zip(*branches))))
        elif key in self._sites or name in ("dot_general", "conv_general_dilated"):
            inputs = cotangents = 0
            # XLA forms the cotangent of what was looked up where it is added up by rows.
            formed = [atom for atom in operands if self._roots[atom] not in self._looked_up]
            # A product reads its operands as arrays, whatever they are functions of.
            self._roots.update({atom: (key[:-1], atom) for atom in operands})
            if key in self._sites:
                new = {self._roots[atom] for atom in operands} - self._recorded
                self._recorded |= new
                inputs = sum(_size(variable) for _, variable in new)
                cotangents = sum(map(_size, eqn.outvars))
            stored = self._store(operands)
            work = max(map(_size, formed), default=0)
            self.stages.append(_Stage(stored, inputs, cotangents, work=work))
        elif name in _OF_OUTPUT:
            # In a scan, JAX stores the derivative as well, another array.
            more = 0 if self._fused else sum(map(_size, eqn.outvars))
            self.stages.append(_Stage(self._store(eqn.outvars) + more))
        elif name in _ADDS and len(operands) > 1:
            pass  # such as a residual stream: an array of its own, where anything reads it
        elif name in _LINEAR:
            self._computed_from(operands, eqn.outvars)
        elif name == "gather":
            self._looked_up.update(self._roots[v] for v in eqn.outvars)
        elif name not in _REDUCES:
            self.stages.append(_Stage(self._store(operands)))
            self._computed_from(operands, eqn.outvars)

    def _computed_from(self, operands: list[Any], results: list[Any]) -> None:
        source = max(operands, key=_size)
        if self._fused and _size(source) >= max(map(_size, results), default=0):
            self._roots.update({v: self._roots[source] for v in results})

    def _call(self, eqn: core.JaxprEqn, jaxpr: core.Jaxpr, key: Key) -> None:
        for operand, variable in zip(eqn.invars, jaxpr.invars):
            root = self._root(operand)
            if root is not None:
                self._roots[variable] = root
        self.follow(jaxpr, key)
        for result, inner in zip(eqn.outvars, jaxpr.outvars):
            self._roots[result] = self._root(inner) or (key[:-1], result)

    def _inside(self, eqn: core.JaxprEqn, jaxpr: core.Jaxpr, key: Key, first: int = 0) -> _Stage:
        """All stages of a body, as one: what it stores, it holds at the same time."""
        pairs = zip(eqn.invars[first:], jaxpr.invars)
        known = {inner for outer, inner in pairs if self._root(outer) is not None}
        if eqn.primitive is P.scan_p:
            consts, carried = scan_parts(eqn)
            known.update(jaxpr.invars[consts : consts + carried])
        walk = _Walk(known, self._sites, fused=eqn.primitive is not P.scan_p)
        walk.follow(jaxpr, key)
        self.convolves |= walk.convolves
        stored, inputs, cotangents, within, work = zip(*walk.stages) if walk.stages else [(0,)] * 5
        return _Stage(sum(stored), sum(inputs), sum(cotangents), sum(within), max(work))
