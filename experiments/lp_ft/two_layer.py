"""Two-layer networks as a Langevin diffusion: the task, its loss and kernel, and simulated paths.

The theory that goes with it is in `experiments.lp_ft.langevin`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "EVERY", "Paths", "Problem", "Theta", "activate", "gradient", "kernel", "loss", "noise_level",
    "problem", "simulate",
]  # fmt: skip

EVERY = 10  # steps between two points of a simulated path


class Problem(NamedTuple):
    """A regression task: `inputs` [n, d], `targets` [n]; `relu` or linear."""

    inputs: Any
    targets: Any
    relu: bool


class Theta(NamedTuple):
    """Parameters: first layer `body` [k, d], `head` [k]."""

    body: Any
    head: Any


def noise_level(
    *, learning_rate: float, noise_multiplier: float, bound: float, batch_size: float
) -> float:
    """s = sqrt(eta) sigma C / b of the diffusion that DP-SGD discretizes."""
    return learning_rate**0.5 * noise_multiplier * bound / batch_size


def problem(key: jax.Array, *, relu: bool, misfit: float = 0.5) -> tuple[Problem, np.ndarray]:
    """Draws a task that a two-layer teacher solves, and a pretrained body close to the teacher's.

    Args:
        key: of the draw.
        relu: ReLU (16 random inputs in 4 dimensions, 16 neurons) or linear (whitened inputs,
            X'X/n = 1, in 8 dimensions, 3 neurons).
        misfit: standard deviation of body - teacher, relative to the teacher's entries.

    Returns:
        The task, and the body `[k, d]`.
    """
    examples, dims, width = (16, 4, 16) if relu else (8, 8, 3)
    of_inputs, of_body, of_head, of_misfit = jax.random.split(key, 4)
    inputs = np.sqrt(dims) * np.eye(dims)
    if relu:
        inputs = np.asarray(jax.random.normal(of_inputs, (examples, dims)), np.float64)
    teacher = np.asarray(jax.random.normal(of_body, (width, dims))) / np.sqrt(dims)
    head = np.asarray(jax.random.normal(of_head, (width,))) * np.sqrt((2 if relu else 1) / width)
    targets = activate(inputs @ teacher.T, relu) @ head
    moved = np.asarray(jax.random.normal(of_misfit, (width, dims))) * misfit / np.sqrt(dims)
    return Problem(inputs, targets, relu), teacher + moved


def activate(hidden: np.ndarray, relu: bool) -> np.ndarray:
    """phi."""
    return np.maximum(hidden, 0) if relu else hidden


def loss(theta: Theta, data: Problem) -> jax.Array:
    """L(theta), a scalar."""
    return gradient(theta, data)[0]


def gradient(theta: Theta, data: Problem) -> tuple[jax.Array, Theta]:
    """The loss and its gradient; NumPy or JAX arrays."""
    hidden, gates = _hidden(theta, data)
    error = hidden @ theta.head - data.targets
    weighted = (gates * theta.head[None]) * error[:, None]
    examples = len(data.targets)
    slope = Theta(weighted.T @ data.inputs / examples, hidden.T @ error / examples)
    return (error**2).mean() / 2, slope


def _hidden(theta: Theta, data: Problem) -> tuple[jax.Array, jax.Array]:
    """Features `[n, k]`, and which of them are on."""
    hidden = data.inputs @ theta.body.T
    gates = (hidden > 0) * 1.0 if data.relu else hidden * 0.0 + 1.0
    return hidden * gates, gates


def kernel(theta: Theta, data: Problem) -> jax.Array:
    """K = J J' / n with respect to all parameters, `[n, n]`; NumPy or JAX arrays."""
    hidden, gates = _hidden(theta, data)
    weighted = (gates * (theta.head**2)[None]) @ gates.T
    return (hidden @ hidden.T + (data.inputs @ data.inputs.T) * weighted) / len(data.targets)


class Paths(NamedTuple):
    """Simulated runs.

    Attributes:
        times: `[points]`, every tenth step.
        loss: `[paths, points]`.
        lowest, highest, trace: `[paths, points]`, least and largest eigenvalue and trace of K.
    """

    times: np.ndarray
    loss: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    trace: np.ndarray


def simulate(
    theta: Theta,
    data: Problem,
    noise: float,
    *,
    time: float,
    step: float,
    share: float,
    paths: int,
    key: jax.Array,
) -> Paths:
    """Euler steps of the diffusion: probing for a share of the time, then all parameters."""
    total, first = round(time / step), round(share * time / step)
    if total % EVERY:
        raise ValueError(f"time / step = {total} must be a multiple of {EVERY}.")
    start = Theta(*(jnp.asarray(x, jnp.float32) for x in theta))
    inputs, targets = (jnp.asarray(x, jnp.float32) for x in (data.inputs, data.targets))
    losses, extremes = _simulate(
        start, inputs, targets, jnp.float32(noise), jnp.float32(step), jnp.int32(first),
        jax.random.split(key, paths), relu=data.relu, steps=total,
    )  # fmt: skip
    lowest, highest, trace = (np.asarray(x, np.float64) for x in extremes)
    times = step * np.arange(0, total + 1, EVERY)
    return Paths(times, np.asarray(losses, np.float64), lowest, highest, trace)


Facts = tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]


@functools.partial(jax.jit, static_argnames=("relu", "steps"))
def _simulate(
    theta: Theta,
    inputs: jax.Array,
    targets: jax.Array,
    noise: jax.Array,
    step: jax.Array,
    first: jax.Array,
    keys: jax.Array,
    *,
    relu: bool,
    steps: int,
) -> Facts:
    """Loss, and least and largest eigenvalue and trace of K, `[paths, steps / EVERY + 1]` each."""
    data = Problem(inputs, targets, relu)

    def facts(at: Theta) -> Facts:
        matrix = kernel(at, data)
        values = jnp.linalg.eigvalsh(matrix)
        return loss(at, data), (values[0], values[-1], jnp.trace(matrix))

    def run(key: jax.Array) -> Facts:
        def one(number: int, at: Theta) -> Theta:
            of_body, of_head = jax.random.split(jax.random.fold_in(key, number))
            slope = gradient(at, data)[1]
            kicks = noise * jnp.sqrt(step)
            body = at.body - step * slope.body
            body += kicks * jax.random.normal(of_body, body.shape)
            head = at.head - step * slope.head
            head += kicks * jax.random.normal(of_head, head.shape)
            return Theta(jnp.where(number < first, at.body, body), head)

        def some(at: Theta, start: jax.Array) -> tuple[Theta, Facts]:
            return jax.lax.fori_loop(start, start + EVERY, one, at), facts(at)

        last, seen = jax.lax.scan(some, theta, jnp.arange(0, steps, EVERY))
        return jax.tree.map(jnp.append, seen, facts(last))

    return jax.vmap(run)(keys)
