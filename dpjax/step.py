"""The train and eval steps: pure functions over a mesh. Nothing here reads a file or a config.

One logical step is `begin`, any number of `accumulate` calls, one per physical chunk of the batch,
and `update`. Each device keeps its own partial sum, so the only collective of a step is the sum
over devices at the start of `update`, right before the noise is drawn, once, in the global view.
(Spread parameters are gathered before the first chunk, and their sums are scattered.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr, tree_leaves_with_path

from dpjax import dp, metrics
from dpjax.models import Params
from dpjax.models.finetune import join
from dpjax.runtime.sharding import Layout, batch_sharding, partition, replicated, sum_over_devices

__all__ = ["Batch", "Hyper", "LossFn", "Steps", "Totals", "TrainState", "at_bound", "carry_over",
           "eval_step", "make_steps", "moving_average"]  # fmt: skip

Batch = dict[str, jax.Array]
"""`input` [n, ...], `label` [n] int32, `index` [n] int32, `mask` [n] bool (False is padding)."""

LossFn = Callable[[Params, dict[str, jax.Array]], jax.Array]


class TrainState(NamedTuple):
    """What a step changes. Frozen parameters are not state.

    Attributes:
        step: int32 scalar, executed steps, over all phases.
        trainable: parameters that train.
        opt: state of the optimiser, noise transform included.
        average: moving average of `trainable`; None without.
        bound: clip bound of the next step, float32 scalar; None if it does not adapt.
    """

    step: jax.Array
    trainable: Params
    opt: Any
    average: Params | None = None
    bound: jax.Array | None = None


class Hyper(NamedTuple):
    """Values of a run that are traced: changing them never recompiles.

    Attributes:
        learning_rate: base learning rate.
        noise_multiplier: sigma of the gradient; ignored without privacy.
        rule: clipping rule; None trains without privacy.
        noise_key: key of the noise; None without privacy.
        augment_key: public key of the augmentations.
        batch_size: expected batch size B.
        ema_decay: of the average of the parameters; None keeps none.
        adaptive: how the bound follows a quantile; None leaves it as it is in `rule`.
        count_noise: standard deviation of the noise on the count that `adaptive` looks at.
        count_key: key of that noise.
    """

    learning_rate: jax.Array
    noise_multiplier: jax.Array
    rule: dp.ClipRule | None
    noise_key: jax.Array | None
    augment_key: jax.Array
    batch_size: jax.Array
    ema_decay: jax.Array | None = None
    adaptive: dp.QuantileBound | None = None
    count_noise: jax.Array | None = None
    count_key: jax.Array | None = None


class Totals(NamedTuple):
    """Sums over the chunks seen so far of one step; a leading axis `[devices]` on every leaf.

    Attributes:
        grads: a `ClippedSum`, or without privacy a plain tree of gradient sums.
        facts: sums over examples, NOT private: count, loss, norm, clipped, dropped, and "below",
            the centred count, which leaves `update` noised or not at all; and "diverged", which is
            > 0 if a parameter was not finite before the step.
    """

    grads: Any
    facts: dict[str, jax.Array]


class Steps(NamedTuple):
    """The jitted functions of a run.

    Attributes:
        init: `(trainable, hyper) -> TrainState`.
        begin: `(state) -> (whole trainable parameters, empty Totals)`.
        accumulate: `(totals, trainable, frozen, batch, step, hyper) -> Totals`, with parameters
            that are whole on every device, and `at_bound(hyper, state)`; donates totals.
        update: `(state, totals, hyper) -> (TrainState, facts)`; donates state.
    """

    init: Callable[..., TrainState]
    begin: Callable[[TrainState], tuple[Params, Totals]]
    accumulate: Callable[..., Totals]
    update: Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def make_steps(
    loss_fn: LossFn,
    optimizer: Callable[[Hyper], optax.GradientTransformation],
    layout: Layout,
    *,
    private: bool,
    method: str = "auto",
    microbatch_size: int | None = None,
) -> Steps:
    """Builds the train step.

    Args:
        loss_fn: `(params, example) -> scalar` for ONE example with `input`, `label` and a `key`
            of its own for augmentation.
        optimizer: makes the transform from traced values; it takes a `ClippedSum` if private.
        layout: mesh, and how parameters and optimiser state lie on it.
        private: whether gradients are clipped; without it the sum is an ordinary gradient.
        method: clipping engine, see `dp.clipped_sum`.
        microbatch_size: examples per device in memory at once; None for a whole chunk.

    Returns:
        The jitted functions.
    """
    mesh, rows, everywhere = layout.mesh, partition(0), partition(-1)

    def local(
        totals: Totals, trainable: Params, frozen: Params, batch: Batch, key: jax.Array, rule: Any
    ) -> Totals:
        examples = {"input": batch["input"], "label": batch["label"]}
        # An example's augmentation depends on the step and the example. By its position in the
        # data it would change when another example is removed, and the sum by more than the bound.
        examples["key"] = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["identity"])

        def loss(params: Params, example: dict[str, jax.Array]) -> jax.Array:
            return loss_fn(join(params, frozen), example)

        engine: Callable[..., tuple[Any, dp.PerExample]]
        if private:
            engine = dp.clipped_sum(loss, rule, method=method, microbatch_size=microbatch_size)
        else:
            engine = functools.partial(_gradient_sum, loss)
        grads, facts = engine(trainable, examples, batch["mask"])
        before = jax.tree.map(lambda x: x[0], totals.grads)
        after = before + grads if private else jax.tree.map(jnp.add, before, grads)
        groups = facts.norms.shape[1]
        limits = rule.thresholds(groups) if private else jnp.full((groups,), jnp.inf)
        sums = {name: value[0] for name, value in totals.facts.items()}
        for name, value in _fact_sums(facts, limits).items():
            sums[name] += value
        return jax.tree.map(lambda x: x[None], Totals(after, sums))

    def accumulate(
        totals: Totals,
        trainable: Params,
        frozen: Params,
        batch: Batch,
        step: jax.Array,
        hyper: Hyper,
    ) -> Totals:
        key = jax.random.fold_in(hyper.augment_key, step)
        sharded = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, everywhere, everywhere, rows, everywhere, everywhere),
            out_specs=rows,
            check_vma=False,  # a parameter's cotangent would otherwise be summed over devices here
        )
        return sharded(totals, trainable, frozen, batch, key, hyper.rule)

    def zeros(trainable: Params) -> Totals:
        grads: Any = jax.tree.map(
            lambda p: jnp.zeros((mesh.size, *p.shape), jnp.float32), trainable
        )
        if private:
            grads = dp.ClippedSum(grads, jnp.zeros((mesh.size,), jnp.float32))
        facts = {name: jnp.zeros((mesh.size,), jnp.float32) for name in _FACTS}
        bad = [jnp.any(~jnp.isfinite(leaf)) for leaf in jax.tree.leaves(trainable)]
        facts["diverged"] += jnp.any(jnp.stack(bad), keepdims=True)
        return Totals(grads, facts)

    def init(trainable: Params, hyper: Hyper) -> TrainState:
        bound = None
        if hyper.adaptive is not None and hyper.rule is not None:
            bound = jnp.asarray(hyper.rule.threshold, jnp.float32)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            trainable=trainable,
            opt=optimizer(hyper).init(trainable),
            average=None if hyper.ema_decay is None else trainable,
            bound=bound,
        )

    def update(
        state: TrainState, totals: Totals, hyper: Hyper
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        value = totals.grads.value if private else totals.grads
        whole = jax.tree.map(lambda fact: -1, totals.facts)
        grads, facts = sum_over_devices(
            (value, totals.facts), (layout.axes(state.trainable), whole), mesh
        )
        if private:
            # The same number on every device: the first device's is taken, nothing is sent.
            first = jax.shard_map(
                lambda x: x[0], mesh=mesh, in_specs=rows, out_specs=everywhere, check_vma=False
            )
            grads = dp.ClippedSum(grads, first(totals.grads.sensitivity))
        transform = optimizer(at_bound(hyper, state))
        updates, opt = transform.update(grads, state.opt, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        average, bound, below = state.average, state.bound, facts.pop("below")
        if average is not None:
            average = moving_average(average, trainable, jnp.asarray(hyper.ema_decay), state.step)
        if bound is not None:
            facts["bound"] = bound
            bound = _next_bound(hyper, state, below)
        after = TrainState(state.step + 1, trainable, opt, average, bound)
        return jax.lax.with_sharding_constraint(after, layout.shardings(after)), facts

    def first_state(trainable: Params, hyper: Hyper) -> TrainState:
        state = init(trainable, hyper)
        return jax.lax.with_sharding_constraint(state, layout.shardings(state))

    spread = batch_sharding(mesh)
    empty = jax.jit(zeros, out_shardings=spread)

    def begin(state: TrainState) -> tuple[Params, Totals]:
        trainable = layout.gather(state.trainable)
        return trainable, empty(trainable)

    return Steps(
        init=jax.jit(first_state),
        begin=begin,
        accumulate=jax.jit(accumulate, donate_argnums=0, out_shardings=spread),
        update=jax.jit(update, donate_argnums=0),
    )


def at_bound(hyper: Hyper, state: TrainState) -> Hyper:
    """Returns the values of one step: those of the run, with the state's bound if it adapts."""
    if state.bound is None or hyper.rule is None:
        return hyper
    return hyper._replace(rule=dataclasses.replace(hyper.rule, threshold=state.bound))


def carry_over(state: TrainState, before: TrainState, *, moments: bool = True) -> TrainState:
    """Returns a training's first state with what goes on from the training before it.

    That is the number of executed steps, the bound, and the averages of the leaves that trained
    before; with `moments` also the optimiser's moments of those leaves. The optimiser's counters
    start anew, for the learning rate has a schedule of its own, the noise a key of its own, and the
    leaves that begin to train have moments of zero to be corrected for.
    """
    average = _overlay(state.average, before.average)
    opt = state.opt
    if moments:
        trained = [keystr(path) for path, _ in tree_leaves_with_path(state.trainable)]
        opt = _overlay(opt, before.opt, lambda name: name.endswith(tuple(trained)))
    return TrainState(before.step, state.trainable, opt, average, before.bound)


def _overlay(tree: Any, before: Any, chosen: Callable[[str], bool] = lambda name: True) -> Any:
    """Replaces the chosen leaves by those of `before` at the same path, where there are any."""
    known = {keystr(path): leaf for path, leaf in tree_leaves_with_path(before)}

    def leaf_of(path: Any, leaf: jax.Array) -> jax.Array:
        name = keystr(path)
        return known.get(name, leaf) if chosen(name) else leaf

    return jax.tree_util.tree_map_with_path(leaf_of, tree)


def moving_average(average: Any, params: Any, decay: jax.typing.ArrayLike, step: jax.Array) -> Any:
    """Returns the exponential moving average after one more iterate.

    Args:
        average: the average so far, float32.
        params: the new iterate.
        decay: in [0, 1); early on (1 + t) / (10 + t) if that is smaller, so that the start is soon
            forgotten.
        step: t, the number of iterates before this one.

    Source: De et al. 2022, arXiv 2204.13650.
    """
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)


def _next_bound(hyper: Hyper, state: TrainState, below: jax.Array) -> jax.Array:
    if hyper.adaptive is None or hyper.count_key is None or hyper.count_noise is None:
        raise TypeError("a bound that adapts needs hyper.adaptive, count_noise and count_key.")
    return hyper.adaptive.following(
        jnp.asarray(state.bound),
        below,
        count_noise=hyper.count_noise,
        expected_batch_size=hyper.batch_size,
        key=jax.random.fold_in(hyper.count_key, state.step),
    )


def eval_step(
    apply: Callable[[Params, jax.Array], jax.Array], num_classes: int, layout: Layout
) -> Callable[[Params, Batch], metrics.EvalSums]:
    """Returns the jitted `(params, batch) -> EvalSums` of whole parameters; sums add."""

    def step(params: Params, batch: Batch) -> metrics.EvalSums:
        logits = apply(params, batch["input"])
        return metrics.eval_sums(logits, batch["label"], batch["mask"], num_classes)

    return jax.jit(step, out_shardings=replicated(layout.mesh))


_FACTS = ("count", "loss", "norm", "clipped", "dropped", "below", "diverged")


def _fact_sums(facts: dp.PerExample, thresholds: jax.Array) -> dict[str, jax.Array]:
    finite = facts.real & jnp.isfinite(facts.loss) & jnp.all(jnp.isfinite(facts.norms), axis=1)
    norms = jnp.sqrt(jnp.sum(jnp.square(facts.norms), axis=1))
    above = jnp.any(facts.norms > thresholds[None], axis=1)
    return {
        "count": jnp.sum(facts.real, dtype=jnp.float32),
        "loss": jnp.sum(jnp.where(finite, facts.loss, 0.0)),
        "norm": jnp.sum(jnp.where(finite, norms, 0.0)),
        "clipped": jnp.sum(finite & above, dtype=jnp.float32),
        "dropped": jnp.sum(facts.real & ~finite, dtype=jnp.float32),
        # Exactly 1/2 or -1/2 an example, also where a norm is not a number.
        "below": jnp.sum(jnp.where(facts.real, jnp.where(finite & ~above, 0.5, -0.5), 0.0)),
    }


def _gradient_sum(
    loss_fn: LossFn, params: Params, batch: Any, mask: jax.Array
) -> tuple[Params, dp.PerExample]:
    """The ordinary, non-private gradient of the summed loss over the real examples."""

    def total(params: Params) -> tuple[jax.Array, jax.Array]:
        losses = jax.vmap(loss_fn, (None, 0))(params, batch)
        losses = jnp.where(mask, losses, 0.0)
        return jnp.sum(losses), losses

    grads, losses = jax.grad(total, has_aux=True)(params)
    ones = jnp.ones((mask.shape[0], 1), jnp.float32)
    facts = dp.PerExample(losses, 0 * ones, ones, mask)
    return jax.tree.map(lambda g: g.astype(jnp.float32), grads), facts
