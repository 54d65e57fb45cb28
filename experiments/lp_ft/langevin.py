"""Two-layer networks under Langevin dynamics: loss bounds for probing and full fine-tuning.

Ke et al. (arXiv 2402.18905) study DP-SGD on two-layer networks through its Langevin diffusion and
give approximate upper and lower bounds on the loss of DP linear probing (DP-LP) and DP full
fine-tuning (DP-FFT). We had access to summaries of the paper but not to its formulas: THE FOLLOWING
IS OUR OWN DERIVATION. From the paper we took the setting (two layers, a pretrained first one, a
random or zero head, isotropic noise) and the questions.

Setting. f_i = phi(B x_i) . v with B `[k, d]`, v `[k]`, phi the identity or ReLU;
L = (1/2n) sum_i (f_i - y_i)^2. One DP-SGD step of rate eta that clips nothing, with noise
multiplier sigma, bound C and batch size b, is an Euler step over time eta of

    d theta = -grad L dt + s dW,    s = sqrt(eta) sigma C / b.    (`two_layer.noise_level`)

(A1) Gradients stay below C, and the gradient of a batch is that of the whole set: what clipping
does to the drift, and sampling, are not modeled.

Let e = f - y, K(theta) = J J' / n for the Jacobian J of f with respect to what trains. Then
|grad L|^2 = e'K e / n, and Ito's formula gives, with M a martingale,

    dL = -(e'K e / n) dt + (s^2 / 2) tr K dt + (s^2 / 2n) sum_i e_i lap(f_i) dt + dM.

The Laplacian of f_i is zero for the linear network (f is linear in every single parameter). (A2)
For ReLU it lives on the kinks b_j x_i = 0, has both signs and is weighted by the residuals; it is
dropped, so that for ReLU the bounds on DP-FFT are approximate.

Probing. K = Phi Phi'/n is constant and the head is an Ornstein-Uhlenbeck process. With L* and v*
the best loss and head on the features, lambda_j the eigenvalues of Phi'Phi/n `[k, k]`, and u_j
the coordinates of v0 - v* along its eigenvectors,

    E L(t) = L* + sum_j lambda_j u_j^2 exp(-2 lambda_j t) / 2 + (s^2/4) (1 - exp(-2 lambda_j t)),

exactly (`probe`). Knowing only the least and the largest of the r nonzero eigenvalues, this lies
between the two (`probe_bounds`)

    L* + (L0 - L*) exp(-2 lambda_max t) + (r s^2/4) (1 - exp(-2 lambda_min t)),
    L* + (L0 - L*) exp(-2 lambda_min t) + (r s^2/4) (1 - exp(-2 lambda_max t)).

Full fine-tuning. (A3) Up to time t the path stays in a tube in which, as functions of time,
kmin <= eigenvalues of K <= kmax and tmin <= tr K <= tmax. As 2L = |e|^2/n, inside it the drift
of L lies between -2 kmax L + (s^2/2) tmin and -2 kmin L + (s^2/2) tmax. Times the integrating
factor, and stopped where the path leaves the tube, L is a super- (sub-) martingale, and so the
solutions of

    U' = -2 kmin U + (s^2/2) tmax,    l' = -2 kmax l + (s^2/2) tmin,    U(0) = l(0) = E L(0)

satisfy E[L(t); tube not left] <= U(t), and l(t) <= E L(t) if no path leaves it (`full_bounds`).
The tube lies around the noiseless path, which is computed from the start alone. With tau = s^2 t
the noise variance that an entry has received, c = 8, g^2 and G the largest eigenvalue and the trace
of X'X/n,

    kmin = (smin - c g sqrt(tau))_+^2,      kmax = (smax + c g sqrt(tau))^2 + g^2 w tau,
    tmin = (norm - c g sqrt(tau))_+^2,      tmax = (norm + c g sqrt(tau))^2 + (D + c sqrt(2 D)) tau,

where smin, smax and norm are the least and largest singular value and the Frobenius norm of
J/sqrt(n) on the noiseless path, w = (sqrt(k) + sqrt(d))^2 + k, and D = 2 k G is the expected square
of the noise in J/sqrt(n) per tau: a Gaussian matrix is aligned with a given direction only to
within a few sqrt(tau), and what is orthogonal adds. That paths stay inside is an assumption:
`left_tube` counts those that do not, and the tests and the study's report show the count.

Probing first. After a time t1 of probing, v is Gaussian with known mean and covariance and E L is
known exactly. Full fine-tuning starts there with U(0) = l(0) = E L(t1), around the noiseless path
from the mean head, tau counting from the start of probing. `split_bounds` is that, as a function of
the share t1 / T at a fixed T and s, which is one budget. Where its upper bound, or the prediction
below, is least over shares is the predicted best share.

`linearized` is no bound but a prediction: K is replaced by its value on the noiseless path plus
what noise adds to its mean, 2 k tau XX'/n (half of that for ReLU); then m' = -K m and
V' = -K V - V K + s^2 K for mean and covariance of e / sqrt(n), and E L = (|m|^2 + tr V) / 2.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.lp_ft.two_layer import Paths, Problem, Theta, activate, gradient, kernel, loss

__all__ = [
    "Bounds", "Probe", "full_bounds", "left_tube", "probe", "probe_bounds", "split_bounds",
]  # fmt: skip

_WIDTH = 8.0  # c: of the tube, in standard deviations


class Bounds(NamedTuple):
    """Lower and upper bound, and the linearized prediction, each `[points]` over `times`."""

    times: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    linearized: np.ndarray


class Probe(NamedTuple):
    """Linear probing after `times`: expected loss, and mean and covariance of the head."""

    loss: np.ndarray  # [points]
    mean: np.ndarray  # [points, k]
    covariance: np.ndarray  # [points, k, k]


def _modes(theta: Theta, data: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Eigenvalues and eigenvectors of Phi'Phi/n, the best head, and its loss."""
    body = np.asarray(theta.body, np.float64)
    hidden = activate(data.inputs @ body.T, data.relu)
    values, vectors = np.linalg.eigh(hidden.T @ hidden / len(hidden))
    best = np.linalg.pinv(hidden) @ data.targets
    least = float(np.mean((hidden @ best - data.targets) ** 2) / 2)
    return np.maximum(values, 0.0), vectors, best, least


def probe(theta: Theta, data: Problem, noise: float, times: np.ndarray) -> Probe:
    """The exact law of probing with the body of `theta` from its head."""
    values, vectors, best, least = _modes(theta, data)
    start = vectors.T @ (np.asarray(theta.head, np.float64) - best)
    fade = np.exp(-np.outer(times, values))
    some = np.where(values > 1e-12, values, 1.0)
    spread = np.where(values > 1e-12, (1 - fade**2) / (2 * some), np.asarray(times)[:, None])
    mean = best + (fade * start) @ vectors.T
    covariance = np.einsum("ij,tj,kj->tik", vectors, noise**2 * spread, vectors)
    excess = values * ((fade * start) ** 2 + noise**2 * spread) / 2
    return Probe(least + excess.sum(axis=1), mean, covariance)


def probe_bounds(
    theta: Theta, data: Problem, noise: float, times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound on the expected loss of probing, from extreme eigenvalues alone."""
    values, _, _, least = _modes(theta, data)
    values = values[values > 1e-9 * values.max()]
    gap = float(loss(theta, data)) - least
    slow, fast = (np.exp(-2 * rate * np.asarray(times)) for rate in (values.min(), values.max()))
    floor = len(values) * noise**2 / 4
    return least + gap * fast + floor * (1 - slow), least + gap * slow + floor * (1 - fast)


def full_bounds(
    theta: Theta,
    data: Problem,
    noise: float,
    *,
    time: float,
    step: float,
    before: float = 0.0,
    law: tuple[float, np.ndarray] | None = None,
) -> Bounds:
    """Bounds on the expected loss of full fine-tuning.

    Args:
        theta: the start; its mean, if it is random.
        data: the task.
        noise: s.
        time: length of the phase.
        step: of the integration, small against the rates of the flow.
        before: time for which the head has received noise already.
        law: expected loss and covariance of the head at the start; None if it is not random.
    """
    steps = max(1, round(time / step))
    path, tube = _tube(theta, data, noise, steps=steps, step=step, before=before)
    expected, covariance = law or (float(loss(theta, data)), np.zeros((len(theta.head),) * 2))
    lower, upper = [expected], [expected]
    for at in range(steps):
        pair = tube[:, at : at + 2]
        slow, fast = pair[0].min(), pair[1].max()
        upper.append(_relax(upper[-1], slow, noise**2 / 2 * pair[3].max(), step))
        lower.append(_relax(lower[-1], fast, noise**2 / 2 * pair[2].min(), step))
    guess = _linearized(theta, data, noise, path, covariance, step=step, before=before)
    times = step * np.arange(steps + 1)
    return Bounds(times, np.array(lower), np.array(upper), guess)


def _relax(value: float, rate: float, source: float, step: float) -> float:
    """Solves x' = -2 rate x + source over one step."""
    if rate * step < 1e-9:
        return value + source * step
    fade = np.exp(-2 * rate * step)
    return float(value * fade + source * (1 - fade) / (2 * rate))


def _noiseless(theta: Theta, data: Problem, *, steps: int, step: float) -> np.ndarray:
    """K along gradient descent from `theta`, `[steps + 1, n, n]`."""
    at = Theta(*(np.asarray(x, np.float64) for x in theta))
    found = []
    for _ in range(steps + 1):
        found.append(kernel(at, data))
        slope = gradient(at, data)[1]
        at = Theta(*(p - step * g for p, g in zip(at, slope)))
    return np.stack(found)


def _tube(
    theta: Theta, data: Problem, noise: float, *, steps: int, step: float, before: float
) -> tuple[np.ndarray, np.ndarray]:
    """K along the noiseless path, and (kmin, kmax, tmin, tmax) `[4, points]` of (A3)."""
    path = _noiseless(theta, data, steps=steps, step=step)
    values = np.maximum(np.linalg.eigvalsh(path), 0.0)
    tau = noise**2 * (before + step * np.arange(steps + 1))
    gram = np.linalg.eigvalsh(data.inputs.T @ data.inputs / len(data.inputs))
    width, dims = theta.body.shape
    reach = _WIDTH * np.sqrt(gram.max() * tau)
    bulk = gram.max() * ((np.sqrt(width) + np.sqrt(dims)) ** 2 + width) * tau
    size = 2 * width * gram.sum()
    norm = np.sqrt(values.sum(axis=1))
    tube = np.stack(
        [
            np.maximum(np.sqrt(values[:, 0]) - reach, 0.0) ** 2,
            (np.sqrt(values[:, -1]) + reach) ** 2 + bulk,
            np.maximum(norm - reach, 0.0) ** 2,
            (norm + reach) ** 2 + (size + _WIDTH * np.sqrt(2 * size)) * tau,
        ]
    )
    return path, tube


def _linearized(
    theta: Theta,
    data: Problem,
    noise: float,
    path: np.ndarray,
    covariance: np.ndarray,
    *,
    step: float,
    before: float,
) -> np.ndarray:
    """The linearized prediction at every point of the path."""
    body, head = (np.asarray(x, np.float64) for x in theta)
    root = np.sqrt(len(data.inputs))
    hidden = activate(data.inputs @ body.T, data.relu) / root
    mean = hidden @ head - data.targets / root
    spread = hidden @ covariance @ hidden.T
    outer = data.inputs @ data.inputs.T / len(data.inputs)
    grown = outer * len(head) * (0.5 if data.relu else 1.0) * noise**2
    found = []
    for at, now in enumerate(path):
        found.append((mean @ mean + np.trace(spread)) / 2)
        later = now + grown * (2 * step * at + before)
        shrink = np.eye(len(later)) - step * later
        mean = shrink @ mean
        spread = shrink @ spread @ shrink.T + step * noise**2 * later
    return np.array(found)


def split_bounds(
    theta: Theta,
    data: Problem,
    noise: float,
    *,
    time: float,
    step: float,
    share: float,
) -> Bounds:
    """Probing for a share of the time, then full fine-tuning: the loss over the whole run.

    Returns:
        Bounds over `time`; in the first phase all three are the exact expectation.
    """
    first = round(share * time / step)
    total = round(time / step)
    times = step * np.arange(total + 1)
    law = probe(theta, data, noise, times[: first + 1])
    if first == total:
        return Bounds(times, law.loss, law.loss, law.loss)
    middle = Theta(theta.body, law.mean[-1])
    after = full_bounds(
        middle,
        data,
        noise,
        time=time - times[first],
        step=step,
        before=times[first],
        law=(float(law.loss[-1]), law.covariance[-1]),
    )
    joined = (np.concatenate([law.loss, part[1:]]) for part in after[1:])
    return Bounds(times, *joined)


def left_tube(
    paths: Paths, theta: Theta, data: Problem, noise: float, *, step: float, share: float
) -> float:
    """Fraction of simulated paths that were seen outside the tube of (A3) while all trained."""
    seen = np.rint(paths.times / step).astype(int)
    total, first = seen[-1], round(share * seen[-1])
    if first == total:
        return 0.0
    law = probe(theta, data, noise, np.array([first * step]))
    middle = Theta(theta.body, law.mean[-1])
    _, tube = _tube(middle, data, noise, steps=total - first, step=step, before=first * step)
    after = seen >= first
    tube = tube[:, seen[after] - first]
    low, high, trace = (x[:, after] for x in (paths.lowest, paths.highest, paths.trace))
    slack = 1e-4 * tube[1].max()  # of float32 eigenvalues
    out = (low < tube[0] - slack) | (high > tube[1] + slack)
    out |= (trace < tube[2] - slack) | (trace > tube[3] + slack)
    return float(np.mean(out.any(axis=1)))
