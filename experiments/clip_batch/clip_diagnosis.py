"""Statistics of the gradients in the course of a run. NOT private: it reads raw gradients.

See `diagnostics` for the quantities. They are computed on a sample of the training examples, before
the first step and after the last one. Where only a head trains, they are computed in between too:
the first steps of the run are executed again, which is cheap on cached features.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpjax import build, heads
from dpjax.dp import seeds
from dpjax.models import Params, finetune
from experiments import cached_heads
from experiments.clip_batch import diagnostics

__all__ = ["BOUNDS", "LEVELS", "class_accuracy", "of_run"]

BOUNDS = tuple(float(f"{c:.3g}") for c in np.geomspace(1e-3, 1e3, 37))  # at which errors are split
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)  # quantiles of the norms
_SHARES = (1 / 16, 1 / 4)  # of the steps, at which a head is looked at besides start and end
_EXAMPLES = 768  # in the sample
_FLOATS = 10**8  # that its gradients may take


def of_run(run: build.Run, initial: Params, final: Params) -> dict[str, Any]:
    """Returns norms, weights of the classes and parts of the error at some steps, as JSON values.

    Args:
        run: of one phase.
        initial: all parameters before training.
        final: all parameters after training.

    Returns:
        Empty if the gradients of even a few examples do not fit. Else lists over the moments
        `steps`: `norms` (at `LEVELS`), `clipped` (fraction), `class_weights`, `noise`, `clipping`
        and `sampling` (at `BOUNDS`) and `best_bound`; and over classes `class_accuracy` (held out).
    """
    (phase,) = run.phases
    size = finetune.count(finetune.split(initial, phase.trainable)[0])
    number = min(_EXAMPLES, len(run.train), _FLOATS // size)
    if number < 32 or phase.mechanism is None:
        return {}
    order = np.random.default_rng(0).permutation(len(run.train))
    rows = np.sort(order[:number])
    labels = run.train.labels[rows]
    found: dict[str, Any] = {
        "examples": number, "dimension": size, "steps": [], "norms": [], "clipped": [],
        "class_weights": [], "noise": [], "clipping": [], "sampling": [], "best_bound": [],
        "class_accuracy": class_accuracy(run, final).tolist(),
    }  # fmt: skip
    setting: dict[str, Any] = {
        "noise_multiplier": phase.mechanism.noise_multiplier, "dimension": size,
        "sampling_prob": phase.mechanism.sampling_prob, "num_examples": len(run.train),
    }  # fmt: skip
    for step, products in _moments(run, rows, initial, final):
        lengths = diagnostics.norms(products)
        weights = diagnostics.class_weights(lengths, labels, phase.bound, run.train.num_classes)
        errors = [diagnostics.error(products, bound, **setting) for bound in BOUNDS]
        found["steps"].append(step)
        found["norms"].append(np.quantile(lengths, LEVELS).tolist())
        found["clipped"].append(float(np.mean(lengths > phase.bound)))
        found["class_weights"].append(weights.tolist())
        for name in ("noise", "clipping", "sampling"):
            found[name].append([getattr(e, name) for e in errors])
        found["best_bound"].append(diagnostics.best_bound(products, **setting))
    return found


def _moments(
    run: build.Run, rows: np.ndarray, initial: Params, final: Params
) -> list[tuple[int, np.ndarray]]:
    """Step and Gram matrix at every moment."""
    steps = run.phases[0].steps
    if not cached_heads.fits(run.config):
        first, last = _whole(run, rows, [initial, final])
        return [(0, first), (steps, last)]
    train = heads.compute_features(run.model, run.params, run.train)
    found = [(0, initial)]
    for share in _SHARES:
        step = round(share * steps)
        if 0 < step < steps:
            found.append((step, _head_after(run, train, step)))
    batch = {"x": jnp.asarray(train.values[rows]), "y": jnp.asarray(train.labels[rows])}
    name = run.model.head
    return [
        (step, diagnostics.gram(_head_loss, params[name], batch))
        for step, params in [*found, (steps, final)]
    ]


def _head_loss(head: Params, example: dict[str, jax.Array]) -> jax.Array:
    logits = example["x"] @ head["kernel"] + head["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])


def _head_after(run: build.Run, train: heads.FeatureSet, steps: int) -> Params:
    """The head after the first steps of a run: same batches, same noise."""
    phase, name = run.phases[0], run.model.head
    if phase.mechanism is None:
        raise ValueError("a run without privacy has no mechanism.")
    point = heads.Point(
        phase.learning_rate, run.config.private_seed, run.rule,
        dataclasses.replace(phase.mechanism, steps=steps),
    )  # fmt: skip
    trained = heads.train_heads(
        train, [point], steps=steps, batch_size=phase.batch_size, optimizer=phase.optimizer,
        head={name: run.params[name]},
    )  # fmt: skip
    return jax.tree.map(lambda x: jnp.asarray(x[0]), trained.params)


def _whole(run: build.Run, rows: np.ndarray, moments: list[Params]) -> list[np.ndarray]:
    """Inner products of the gradients of what trains, through the whole model."""
    trainable = run.phases[0].trainable
    _, frozen = finetune.split(moments[0], trainable)
    batch = {name: jnp.asarray(value) for name, value in run.train.get(rows).items()}
    batch["key"] = jax.random.split(seeds.public_key(0, "augment"), len(rows))

    def loss(part: Params, example: dict[str, jax.Array]) -> jax.Array:
        return run.loss_fn(finetune.join(part, frozen), example)

    return [diagnostics.gram(loss, finetune.split(p, trainable)[0], batch) for p in moments]


def class_accuracy(run: build.Run, params: Params) -> np.ndarray:
    """Returns the accuracy on held-out data of each class, `[classes]`; nan for an absent one."""
    labels, classes = run.test.labels, run.test.num_classes
    right = np.argmax(_logits(run, params), axis=1) == labels
    counts = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels, right, minlength=classes)
    return np.where(counts > 0, hits / np.maximum(counts, 1), np.nan)


def _logits(run: build.Run, params: Params) -> np.ndarray:
    if cached_heads.fits(run.config):
        head = params[run.model.head]
        held = heads.compute_features(run.model, run.params, run.test)
        return held.values @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    apply, parts = jax.jit(run.apply), []
    for rows in np.array_split(np.arange(len(run.test)), -(-len(run.test) // 250)):
        parts.append(np.asarray(apply(params, jnp.asarray(run.test.get(rows)["input"]))))
    return np.concatenate(parts)
