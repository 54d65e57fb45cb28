"""The train and eval steps: pure functions over a mesh. Nothing here reads a file or a config.

One logical step is `begin`, any number of `accumulate` calls, one per physical chunk of the batch,
and `update`. Each device keeps its own partial sum, so the only collective of a step is the sum
over devices at the start of `update`, right before the noise is drawn, once, in the global view.
(Under fsdp `begin` also gathers the small trainable parameters, `accumulate` gathers others and
frozen ones at each use, and `update` scatters the gradient sums.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_leaves_with_path

from dpjax import dp, metrics
from dpjax.models import Params, int8
from dpjax.models.finetune import join
from dpjax.runtime.gathering import at_use, gathers_in_branches, held
from dpjax.runtime.sharding import Layout, batch_sharding, partition, replicated, sum_over_devices

__all__ = ["KEPT", "Batch", "Hyper", "LossFn", "Steps", "Totals", "TrainState", "apply_updates",
           "at_bound", "carry_over", "draws", "eval_step", "fact_sums", "make_steps",
           "moving_average"]  # fmt: skip

KEPT = "kept"
"""Name of the optimizer whose state is carried over to the next training."""

Batch = dict[str, jax.Array]
"""`input` [n, ...], `label` [n] int32, `mask` [n] bool (False is padding); in training also
`identity` [n] uint32, a hash of each example's content, from `Dataset.identities`. Under
user-level privacy an example is a unit of several records: `input` [n, records, ...], `label` and
`record` [n, records]; `record` is False past a unit's last record."""

LossFn = Callable[[Params, dict[str, jax.Array]], jax.Array]
"""`(params, example) -> scalar loss` of ONE example, in nats."""


class TrainState(NamedTuple):
    """Everything a step changes. Frozen parameters are not state.

    Attributes:
        step: int32 scalar, executed steps, over all phases.
        trainable: the trainable parameters.
        opt: state of the optimizer, noise transform included.
        average: moving average of `trainable`; None if none is kept.
        bound: clip bound of the next step, float32 scalar; None if the bound does not adapt.
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
        noise_multiplier: sigma, noise of the gradient sum per unit of its sensitivity; ignored
            without privacy.
        rule: clipping rule; None trains without privacy.
        noise_key: key of the gradient noise; None without privacy.
        augment_key: public key of the augmentations.
        batch_size: expected batch size B.
        ema_decay: decay of the parameter average; None keeps no average.
        adaptive: how the bound follows a quantile; None keeps the bound of `rule`.
        count_noise: standard deviation of the noise on the count that `adaptive` reads, in
            examples.
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
    """Sums over the chunks of one step so far; every leaf has a leading axis `[devices]`.

    Attributes:
        grads: a `ClippedSum`, or without privacy a plain tree of gradient sums.
        facts: sums over examples, NOT private: count, loss, norm, clipped, dropped, and "below",
            the centered count that an adaptive bound reads (`update` drops it or adds noise to
            it); also "diverged", > 0 if a parameter was not finite before the step.
    """

    grads: Any
    facts: dict[str, jax.Array]


class Steps(NamedTuple):
    """The jitted functions of a run.

    Attributes:
        init: `(trainable, hyper) -> TrainState`.
        begin: `(state) -> (trainable parameters, empty Totals)`; under fsdp, large parameters are
            still sharded.
        accumulate: `(totals, trainable, frozen, batch, step, hyper) -> Totals`; takes these
            parameters and `at_bound(hyper, state)`; donates totals.
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
    secure: bool = False,
) -> Steps:
    """Builds the train step.

    Args:
        loss_fn: `(params, example) -> scalar` for ONE example with `input`, `label` and a `key`
            of its own for augmentation.
        optimizer: builds the transform from traced values; its input is a `ClippedSum` if private.
        layout: the mesh, and how parameters and optimizer state are sharded over it.
        private: whether per-example gradients are clipped; if not, the sum is the plain gradient.
        method: clipping engine, see `dp.clipped_sum`.
        microbatch_size: examples per device in memory at once; None takes all of a chunk.
        secure: whether the noise is secure: sums are then integers, see `dp.secure`.

    Returns:
        The jitted functions.
    """
    mesh, rows, everywhere = layout.mesh, partition(0), partition(-1)

    def local(
        axes: tuple[Params, Params] | None,
        totals: Totals,
        trainable: Any,
        frozen: Params,
        batch: Batch,
        key: jax.Array,
        law: Any,
    ) -> Totals:
        rule, secure_noise = law
        examples = {k: v for k, v in batch.items() if k not in ("mask", "identity")}
        # An example's augmentation depends on the step and on the example's content. If it
        # depended on the position in the data set, removing one example would shift all later
        # ones, change their gradients, and so change the sum by more than the clip bound.
        examples["key"] = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["identity"])

        def whole_loss(frozen: Params, params: Params, example: dict[str, jax.Array]) -> jax.Array:
            return loss_fn(join(params, frozen), example)

        loss: Callable[..., jax.Array] = functools.partial(whole_loss, frozen)
        if axes is not None:
            loss = at_use(whole_loss, frozen, axes[1], int8.marks(frozen))
            trainable = held(trainable, axes[0])
        engine: Callable[..., tuple[Any, dp.PerExample]]
        if private:
            engine = dp.clipped_sum(
                loss, rule, method=method, microbatch_size=microbatch_size,
                secure_noise=secure_noise,
            )  # fmt: skip
        else:
            engine = functools.partial(_gradient_sum, loss)
            trainable = trainable if axes is None else trainable.whole()
        grads, facts = engine(trainable, examples, batch["mask"])
        # In shard_map every device sees its own slice of the totals, with a leading axis of 1.
        before = jax.tree.map(lambda x: x[0], totals.grads)
        # `ClippedSum.__add__` keeps the sensitivity: an example is in one chunk only.
        after = before + grads if private else jax.tree.map(jnp.add, before, grads)
        sums = {name: value[0] for name, value in totals.facts.items()}
        for name, value in fact_sums(facts, rule if private else None).items():
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
        law = hyper.rule, hyper.noise_multiplier if secure else None
        args = totals, trainable, frozen, batch, key, law
        axes = layout.axes_at_use(trainable), layout.axes_at_use(frozen)

        def sharded(axes: tuple[Params, Params] | None) -> Callable[..., Totals]:
            trained: Any = everywhere
            parts: Any = everywhere
            if axes is not None:
                trained, parts = jax.tree.map(partition, axes)
            return jax.shard_map(
                functools.partial(local, axes),
                mesh=mesh,
                in_specs=(rows, trained, parts, rows, everywhere, everywhere),
                out_specs=rows,
                # With the check, JAX sums the gradient of a replicated parameter over devices
                # before it can be clipped: examples would mix, and every leaf would cost a
                # collective.
                check_vma=False,
            )

        late = max(jax.tree.leaves(axes), default=-1) >= 0 or any(int8.marks(frozen))
        # An engine forms the gradient of a doubtful example alone, in a loop that other devices do
        # not enter. If that needs a sharded parameter, all are gathered before.
        if late and not gathers_in_branches(jax.make_jaxpr(sharded(axes))(*args).jaxpr):
            return sharded(axes)(*args)
        return sharded(None)(*args)

    def zeros(trainable: Params) -> Totals:
        kind = jnp.int32 if secure else jnp.float32
        grads: Any = jax.tree.map(lambda p: jnp.zeros((mesh.size, *p.shape), kind), trainable)
        if private:
            zero = jnp.zeros((mesh.size,), jnp.float32)
            grads = dp.ClippedSum(grads, zero, unit=zero if secure else None)
        facts = {name: jnp.zeros((mesh.size,), jnp.float32) for name in _FACTS}
        # The host reads it with the other facts of the step, without an extra wait. Every device
        # adds 0 or 1 for what it holds.
        parts = jax.tree.map(partition, layout.axes_at_use(trainable))
        facts["diverged"] = jax.shard_map(
            _diverged, mesh=mesh, in_specs=(parts,), out_specs=rows, check_vma=False
        )(trainable)
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
        # One call for gradients and facts: one all-reduce carries the facts and all replicated
        # gradient sums. Facts are replicated (-1); a gradient sum is sharded like its parameter.
        not_sharded = jax.tree.map(lambda fact: -1, totals.facts)
        grads, facts = sum_over_devices(
            (value, totals.facts), (layout.axes(state.trainable), not_sharded), mesh
        )
        if private:
            # The sensitivity is the same on every device and must not be summed: each device keeps
            # its own copy, and nothing is sent.
            first = jax.shard_map(
                lambda x: x[0], mesh=mesh, in_specs=rows, out_specs=everywhere, check_vma=False
            )
            unit = first(totals.grads.unit) if secure else None
            grads = dp.ClippedSum(grads, first(totals.grads.sensitivity), unit=unit)
        # The noise is drawn here, once, in the global view: the same on any number of devices.
        after = apply_updates(optimizer(at_bound(hyper, state)), grads, state, hyper.ema_decay)
        # The exact count below the bound ends here: only the noisy count moves the next bound.
        below = facts.pop("below")
        if state.bound is not None:
            facts["bound"] = state.bound
            after = after._replace(bound=_next_bound(hyper, state, below))
        # Without the constraint XLA may choose another sharding for the result; the next step would
        # then recompile, and the donated buffers could not be reused.
        return jax.lax.with_sharding_constraint(after, layout.shardings(after)), facts

    def first_state(trainable: Params, hyper: Hyper) -> TrainState:
        state = init(trainable, hyper)
        return jax.lax.with_sharding_constraint(state, layout.shardings(state))

    per_device = batch_sharding(mesh)  # the leading axis of `Totals` is the device
    empty = jax.jit(zeros, out_shardings=per_device)

    def begin(state: TrainState) -> tuple[Params, Totals]:
        trainable = layout.for_steps(state.trainable)
        return trainable, empty(trainable)

    return Steps(
        init=jax.jit(first_state),
        begin=begin,
        accumulate=jax.jit(accumulate, donate_argnums=0, out_shardings=per_device),
        update=jax.jit(update, donate_argnums=0),
    )


def _diverged(params: Params) -> jax.Array:
    """1 if a number of these parameters is not finite, `[1]`."""
    bad = [jnp.any(~jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]
    return jnp.any(jnp.stack(bad), keepdims=True).astype(jnp.float32)


def apply_updates(
    transform: optax.GradientTransformation,
    grads: Any,
    state: TrainState,
    ema_decay: jax.typing.ArrayLike | None,
) -> TrainState:
    """Returns the state after one optimizer step, with an unchanged clip bound.

    Args:
        transform: noise transform and optimizer; without privacy, the optimizer alone.
        grads: gradient sum over the whole batch, a `ClippedSum` if private.
        state: state before the step.
        ema_decay: see `moving_average`; ignored if the state has no average.
    """
    updates, opt = transform.update(grads, state.opt, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    average = state.average
    if average is not None:
        average = moving_average(average, trainable, jnp.asarray(ema_decay), state.step)
    return TrainState(state.step + 1, trainable, opt, average, state.bound)


def draws(
    mechanism: dp.Mechanism | None,
    seed: int,
    *,
    num_examples: int,
    batch_size: int,
    first: int = 0,
) -> Callable[[int], np.ndarray]:
    """Returns the function from a step number to the indices of its batch.

    Args:
        mechanism: draws the batches; None for Poisson sampling without privacy.
        seed: the sampler's seed.
        num_examples: number of training examples; a mechanism has its own.
        batch_size: expected batch size; a mechanism has its own.
        first: number of the mechanism's first step.
    """
    if mechanism is not None:
        return functools.partial(mechanism.indices, seed, first=first)
    # Without privacy the batches are Poisson samples too, so that a private run and its baseline
    # differ in clipping and noise only.
    prob = batch_size / num_examples
    sampler = dp.Poisson(num_examples=num_examples, sampling_prob=prob)
    return functools.partial(sampler.indices, seed)


def at_bound(hyper: Hyper, state: TrainState) -> Hyper:
    """Returns `hyper` for the next step: with the state's clip bound, if the bound adapts."""
    if state.bound is None or hyper.rule is None:
        return hyper
    return hyper._replace(rule=dataclasses.replace(hyper.rule, threshold=state.bound))


def carry_over(state: TrainState, before: TrainState, *, moments: bool = True) -> TrainState:
    """Returns the initial state of the next training, carrying over state from the previous one.

    The number of executed steps, the clip bound and the averages of leaves that trained before are
    carried over. Counters of noise and of learning-rate schedules restart: the next training has
    its own key and its own schedule.

    Args:
        state: fresh state of the next training.
        before: last state of the previous one.
        moments: also carries over the optimizer's state of leaves that trained before, moments and
            their age, from the optimizer that is named `KEPT` in both trainings (see
            `build.optimizer`).
    """
    average = _overlay(state.average, before.average)
    opt = state.opt
    if moments:
        schedules = [keystr(path) for path, node in tree_leaves_with_path(opt, is_leaf=_schedule)
                     if _schedule(node)]  # fmt: skip
        opt = _overlay(
            opt, before.opt,
            lambda name: f"[{KEPT!r}]" in name and not name.startswith(tuple(schedules)),
        )  # fmt: skip
    return TrainState(before.step, state.trainable, opt, average, before.bound)


def _schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def _overlay(tree: Any, before: Any, select: Callable[[str], bool] = lambda name: True) -> Any:
    """Replaces selected leaves of `tree` by the leaf of `before` at the same path, if it exists."""
    known = {keystr(path): leaf for path, leaf in tree_leaves_with_path(before)}

    def leaf_of(path: Any, leaf: jax.Array) -> jax.Array:
        name = keystr(path)
        return known.get(name, leaf) if select(name) else leaf

    return jax.tree_util.tree_map_with_path(leaf_of, tree)


def moving_average(average: Any, params: Any, decay: jax.typing.ArrayLike, step: jax.Array) -> Any:
    """Returns the exponential moving average after one more iterate.

    Args:
        average: the average so far, float32.
        params: the new iterate.
        decay: in [0, 1). Capped at (1 + t) / (10 + t), so that the average soon forgets the
            initial parameters.
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
    apply: Callable[[Params, jax.Array], Any], num_classes: int, layout: Layout
) -> Callable[[Params, Batch], Any]:
    """Returns the jitted `(params, batch) -> EvalSums`; sums add.

    Parameters may be sharded, as `layout` has them or not.
    Where `apply` returns `metrics.TokenFacts` in place of logits, the sums are `TokenSums`.
    """

    def step(params: Params, batch: Batch) -> Any:
        whole = jax.lax.with_sharding_constraint(params, layout.whole(params))
        logits = apply(whole, batch["input"])
        if isinstance(logits, metrics.TokenFacts):
            return metrics.token_sums(logits, batch["mask"])
        return metrics.eval_sums(logits, batch["label"], batch["mask"], num_classes)

    return jax.jit(step, out_shardings=replicated(layout.mesh))


_FACTS = ("count", "loss", "norm", "clipped", "dropped", "below", "diverged")


def fact_sums(facts: dp.PerExample, rule: dp.ClipRule | None) -> dict[str, jax.Array]:
    """Sums of a chunk's per-example facts, by name; those of `Totals` without "diverged"."""
    groups = facts.norms.shape[1]
    thresholds = jnp.full((groups,), jnp.inf) if rule is None else rule.thresholds(groups)
    finite = facts.real & jnp.isfinite(facts.loss) & jnp.all(jnp.isfinite(facts.norms), axis=1)
    norms = jnp.sqrt(jnp.sum(jnp.square(facts.norms), axis=1))  # over the groups of a rule
    above = jnp.any(facts.norms > thresholds[None], axis=1)  # clipped in at least one group
    return {
        "count": jnp.sum(facts.real, dtype=jnp.float32),
        "loss": jnp.sum(jnp.where(finite, facts.loss, 0.0)),
        "norm": jnp.sum(jnp.where(finite, norms, 0.0)),
        "clipped": jnp.sum(finite & above, dtype=jnp.float32),
        "dropped": jnp.sum(facts.real & ~finite, dtype=jnp.float32),
        # Centered at 1/2, the count changes by 1/2, not 1, when an example is removed: half the
        # sensitivity (arXiv 1905.03871). A NaN norm counts as above, so the bound holds for it too.
        "below": jnp.sum(jnp.where(facts.real, jnp.where(finite & ~above, 0.5, -0.5), 0.0)),
    }


def _gradient_sum(
    loss_fn: LossFn, params: Params, batch: Any, mask: jax.Array
) -> tuple[Params, dp.PerExample]:
    """Non-private gradient of the loss summed over the real examples, with the same return type."""

    def total(params: Params) -> tuple[jax.Array, jax.Array]:
        losses = jax.vmap(loss_fn, (None, 0))(params, batch)
        losses = jnp.where(mask, losses, 0.0)
        return jnp.sum(losses), losses

    grads, losses = jax.grad(total, has_aux=True)(params)
    # Per-example norms are unknown here: zeros, and a factor of 1 for every example.
    ones = jnp.ones((mask.shape[0], 1), jnp.float32)
    facts = dp.PerExample(losses, 0 * ones, ones, mask)
    return jax.tree.map(lambda g: g.astype(jnp.float32), grads), facts
