"""Clipping in function space: kernels of clipped gradient flow, and their predictions.

Setting (Bu et al., arXiv 2106.07830): outputs f = (f_1 ... f_n) of a scalar network on n training
examples, losses l_i = (f_i - y_i)^2 / 2, L their mean, J_r = df/dw_r `[n, parameters]` of layer r.
Gradient flow on clipped gradients, dw_r/dt = -(1/n) sum_i c_ir grad_r l_i, moves the outputs by

    df/dt = -(1/n) K (f - y),    dL/dt = -(dL/df) K (dL/df)',    K = sum_r H_r C_r,

with H_r = J_r J_r' and C_r = diag(c_1r ... c_nr), because the gradient of l_i in layer r is
(f_i - y_i) J_r[i]. Its norm is |f_i - y_i| sqrt(H_r[i, i]), so the factors, too, are functions of f
and of the diagonals. `kernels` evaluates the K of every kind of clipping at a point, `properties`
says what holds of it: K symmetric, x'Kx >= 0 for all x (then the loss cannot rise), and eigenvalues
of positive real part (then the linearized flow cannot blow up).

Where J hardly moves (wide networks, NTK parametrization) the flow closes in f alone: `predict`
integrates it with the J of the start. Noise enters to second order only: a step of rate eta adds
to f a term of covariance (eta sigma S / n)^2 H, with S the sensitivity, and between steps a
deviation decays by A = sum_r H_r diag(unclipped in r): a clipped example pulls with a force that
does not depend on its residual. Hence for the covariance V of f after time t = eta * steps

    dV/dt = -(A V + V A') / n + eta (sigma S / n)^2 H,     E[excess loss] = tr V / (2 n),

which vanishes with eta: this is all that "noise does not affect convergence" means, and a step of
finite size pays it. The last formula and its use are our own, not the paper's.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpjax import dp

__all__ = [
    "KINDS", "Flow", "Problem", "clipped_kernel", "init", "jacobians", "kernels", "layer_kernels",
    "measure", "outputs", "predict", "problem", "properties",
]  # fmt: skip

Params = dict[str, jax.Array]

KINDS = {
    "none": "H",
    "flat": "H C",
    "layerwise": "sum_r H_r C_r",
    "global, flat": "H c",
    "global, layerwise": "sum_r H_r c_r",
    "global, flat, dropping": "H C, C in {0, 1}",
}


class Problem(NamedTuple):
    """A regression: `inputs` [n, d] float32 of norm 1, `targets` [n] float32."""

    inputs: jax.Array
    targets: jax.Array


class Flow(NamedTuple):
    """A predicted training curve.

    Attributes:
        times: `[points]` t = learning rate times steps.
        loss: `[points]` without noise.
        excess: `[points]` what noise adds to the expected loss, per unit of eta sigma^2.
    """

    times: np.ndarray
    loss: np.ndarray
    excess: np.ndarray


def problem(key: jax.Array, examples: int, width: int) -> Problem:
    """Draws inputs on the unit sphere and targets from a smooth function of them."""
    inputs = jax.random.normal(key, (examples, width))
    inputs = inputs / jnp.linalg.norm(inputs, axis=1, keepdims=True)
    return Problem(inputs, jnp.sin(3 * inputs[:, 0]) + inputs[:, 1] * inputs[:, 2] * 3)


def init(key: jax.Array, inputs: int, width: int) -> Params:
    """Standard normal weights of a network with two hidden layers; one leaf is one layer."""
    first, second, last = jax.random.split(key, 3)
    return {
        "1": jax.random.normal(first, (inputs, width)),
        "2": jax.random.normal(second, (width, width)),
        "3": jax.random.normal(last, (width,)),
    }


def outputs(params: Params, x: jax.Array) -> jax.Array:
    """The scalar output for one input `[d]`, in the NTK parametrization."""
    hidden = jnp.tanh(x @ params["1"])
    width = params["2"].shape[0]
    hidden = jnp.tanh(hidden @ params["2"] / width**0.5)
    return hidden @ params["3"] / width**0.5


@jax.jit
def _jacobians(params: Params, inputs: jax.Array) -> Params:
    return jax.vmap(jax.grad(outputs), (None, 0))(params, inputs)


def jacobians(params: Params, inputs: jax.Array) -> list[np.ndarray]:
    """J_r of every layer, float64 `[n, parameters of r]`."""
    found = _jacobians(params, inputs)
    return [np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in found.values()]


def layer_kernels(params: Params, inputs: jax.Array) -> list[np.ndarray]:
    """H_r of every layer, float64 `[n, n]`."""
    return [j @ j.T for j in jacobians(params, inputs)]


def clipped_kernel(each: list[np.ndarray], residual: np.ndarray, rule: dp.ClipRule) -> np.ndarray:
    """K = sum_r H_r C_r for the factors that a rule of the library gives, float64 `[n, n]`.

    Args:
        each: H_r of every layer.
        residual: f - y, `[n]`.
        rule: flat or per layer (`dp.by_leaf`), not normalized.
    """
    groups, norms = _grouped(each, residual, rule)
    factors = np.asarray(_factors(rule, jnp.asarray(norms, jnp.float32)), np.float64)
    return np.asarray(sum(h * factors[:, g][None] for h, g in zip(each, groups, strict=True)))


def _decay(each: list[np.ndarray], residual: np.ndarray, rule: dp.ClipRule) -> np.ndarray:
    """A = sum_r H_r diag(unclipped in r): how a deviation of f decays."""
    groups, norms = _grouped(each, residual, rule)
    free = norms <= np.asarray(rule.thresholds(norms.shape[1]))[None]
    return np.asarray(sum(h * free[:, g][None] for h, g in zip(each, groups, strict=True)))


def _grouped(
    each: list[np.ndarray], residual: np.ndarray, rule: dp.ClipRule
) -> tuple[tuple[int, ...], np.ndarray]:
    """The group of every layer, and the gradient norms `[n, groups]`."""
    groups = rule.groups({str(r): 0 for r in range(len(each))})
    squares = np.square(_norms(each, residual))
    return groups, np.sqrt(squares @ np.eye(max(groups) + 1)[list(groups)])


def _norms(each: list[np.ndarray], residual: np.ndarray) -> np.ndarray:
    """Gradient norms of every example in every layer, `[n, layers]`."""
    return np.abs(residual)[:, None] * np.sqrt(np.stack([np.diag(h) for h in each], axis=1))


@jax.jit
def _factors(rule: dp.ClipRule, norms: jax.Array) -> jax.Array:
    return jax.vmap(rule.factors)(norms)


def kernels(
    each: list[np.ndarray], residual: np.ndarray, quantile: float = 0.25
) -> dict[str, np.ndarray]:
    """The kernel of every kind of clipping.

    Args:
        each: H_r of every layer.
        residual: f - y, `[n]`.
        quantile: of the gradient norms at which bounds are put, so that most are clipped.

    Returns:
        Kind (see `KINDS`) to `[n, n]`. Global clipping multiplies every example that it keeps by
        one number c = R / Z; in the two rows that the paper gives, Z is the largest norm and all
        are kept. The last row is the library's `dp.global_`, which keeps or drops.
    """
    layer_norms = _norms(each, residual)
    norms = np.linalg.norm(layer_norms, axis=1)
    bound = np.quantile(norms, quantile)
    bounds = np.quantile(layer_norms, quantile, axis=0)
    whole = np.asarray(sum(each))
    return {
        "none": whole,
        "flat": clipped_kernel(each, residual, dp.flat(bound)),
        "layerwise": clipped_kernel(each, residual, dp.per_layer(bounds)),
        "global, flat": whole * (bound / norms.max()),
        "global, layerwise": np.asarray(
            sum(h * (r / z) for h, r, z in zip(each, bounds, layer_norms.max(axis=0)))
        ),
        "global, flat, dropping": clipped_kernel(
            each, residual, dp.global_(np.quantile(norms, 1 - quantile))
        ),
    }


def properties(kernel: np.ndarray) -> dict[str, float]:
    """Returns the properties of a kernel that the table shows, relative to its spectral norm.

    Returns:
        asymmetry: |K - K'| / |K|, 0 if symmetric. quadratic: the least x'Kx over |x| = 1.
        eigenvalue: the least real part of an eigenvalue. imaginary: the largest imaginary part.
    """
    scale = np.linalg.norm(kernel, 2)
    eigenvalues = np.linalg.eigvals(kernel)
    return {
        "asymmetry": float(np.linalg.norm(kernel - kernel.T, 2) / scale),
        "quadratic": float(np.linalg.eigvalsh((kernel + kernel.T) / 2).min() / scale),
        "eigenvalue": float(eigenvalues.real.min() / scale),
        "imaginary": float(np.abs(eigenvalues.imag).max() / scale),
    }


def predict(
    params: Params, data: Problem, rule: dp.ClipRule | None, *, time: float, points: int = 400
) -> Flow:
    """Integrates the clipped flow in function space with the kernels of the start.

    Args:
        params: of the start.
        data: the training set.
        rule: flat or per layer, not normalized; None does not clip.
        time: end of the flow.
        points: steps of the fourth-order Runge-Kutta method, and points returned.
    """
    each = layer_kernels(params, data.inputs)
    targets = np.asarray(data.targets, np.float64)
    start = jax.vmap(outputs, (None, 0))(params, data.inputs)
    start = np.asarray(start, np.float64) - targets
    whole = np.asarray(sum(each))
    examples, dt = len(targets), time / points
    sensitivity = float(rule.sensitivity()) if rule is not None else 0.0

    def kernel(residual: np.ndarray) -> np.ndarray:
        return whole if rule is None else clipped_kernel(each, residual, rule)

    def velocity(residual: np.ndarray) -> np.ndarray:
        return -kernel(residual) @ residual / examples

    def decay(residual: np.ndarray) -> np.ndarray:
        return whole if rule is None else _decay(each, residual, rule)

    residual, covariance = start, np.zeros_like(whole)
    times, losses, excess = [0.0], [float(np.mean(start**2) / 2)], [0.0]
    for step in range(points):
        force = decay(residual)
        drift = -(force @ covariance + covariance @ force.T) / examples
        covariance = covariance + dt * (drift + (sensitivity / examples) ** 2 * whole)
        a = velocity(residual)
        b = velocity(residual + dt / 2 * a)
        c = velocity(residual + dt / 2 * b)
        d = velocity(residual + dt * c)
        residual = residual + dt / 6 * (a + 2 * b + 2 * c + d)
        times.append((step + 1) * dt)
        losses.append(float(np.mean(residual**2) / 2))
        excess.append(float(np.trace(covariance) / (2 * examples)))
    return Flow(np.array(times), np.array(losses), np.array(excess))


def measure(
    params: Params,
    data: Problem,
    rule: dp.ClipRule,
    *,
    learning_rate: float,
    steps: int,
    noise_multiplier: float,
    keys: jax.Array,
) -> tuple[np.ndarray, np.ndarray]:
    """Trains with the library's clipped sum and noise, on full batches.

    Args:
        params: of the start.
        data: the training set.
        rule: clipping rule.
        learning_rate: eta of plain DP-SGD.
        steps: number of updates.
        noise_multiplier: sigma.
        keys: `[runs]`, the noise key of each.

    Returns:
        Training loss before every step and after the last: `[steps + 1]` without noise (not
        private), and `[runs, steps + 1]` with it, each the mean of two runs of opposite noise: what
        is linear in the noise drops out of a mean of few runs.
    """
    sigmas = jnp.asarray([noise_multiplier, -noise_multiplier, 0.0], jnp.float32)
    found = _measure(params, data, rule, learning_rate, sigmas, keys, steps=steps)
    up, down, quiet = np.moveaxis(np.asarray(found, np.float64), 1, 0)
    return quiet[0], (up + down) / 2


@functools.partial(jax.jit, static_argnames="steps")
def _measure(
    params: Params,
    data: Problem,
    rule: dp.ClipRule,
    learning_rate: jax.Array,
    sigmas: jax.Array,
    keys: jax.Array,
    *,
    steps: int,
) -> jax.Array:
    examples = len(data.targets)
    clipped = dp.clipped_sum(_loss, rule, method="vmap")

    def run(key: jax.Array, sigma: jax.Array) -> jax.Array:
        transform = dp.sgd(learning_rate, sigma, examples, key=key)

        def step(carry: tuple[Params, Any], _: None) -> tuple[tuple[Params, Any], jax.Array]:
            params, opt = carry
            grads, facts = clipped(params, data, jnp.ones(examples, bool))
            updates, opt = transform.update(grads, opt, params)
            return (optax.apply_updates(params, updates), opt), jnp.mean(facts.loss)

        begin = (params, transform.init(params))
        (final, _), losses = jax.lax.scan(step, begin, None, length=steps)
        return jnp.append(losses, jnp.mean(jax.vmap(_loss, (None, 0))(final, data)))

    return jax.vmap(lambda key: jax.vmap(functools.partial(run, key))(sigmas))(keys)


def _loss(params: Params, example: Problem) -> jax.Array:
    return jnp.square(outputs(params, example.inputs) - example.targets) / 2
