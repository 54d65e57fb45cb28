"""Our numbers against other libraries': sums, noise, epsilon and sigma; run with `-m peers`.

Needs torch and opacus besides jax-privacy. `python tests/dp/test_peers.py` prints the comparisons
as a Markdown table with the versions compared. Published epsilons are in `test_accounting.py`,
backbones in `test_parity.py`, and calibration error against scikit-learn in `test_metrics.py`.
"""

import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from dpjax import dp, metrics
from dpjax.dp import accounting

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

BOUND, BATCH, CLASSES, ALPHA = 5.0, 12, 5, 1e-6

# (sampling probability, noise multiplier, steps)
SETTINGS = [(0.01, 1.0, 1000), (256 / 60_000, 1.1, 3516), (0.2, 3.0, 100), (1.0, 8.0, 20)]


# --- One small network, in JAX and in torch ------------------------------------------------------


def parameters():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(scale=0.3, size=shape).astype(np.float32)  # noqa: E731
    return {
        "conv": {"kernel": draw(3, 3, 2, 4), "bias": draw(4)},
        "norm": {"scale": 1 + draw(8), "bias": draw(8)},
        "dense": {"kernel": draw(36, 8), "bias": draw(8)},
        "head": {"kernel": draw(8, CLASSES), "bias": draw(CLASSES)},
    }


def batch():
    rng = np.random.default_rng(1)
    scale = np.geomspace(0.05, 5, BATCH).reshape(-1, 1, 1, 1)  # some are clipped, some are not
    return {
        "x": (scale * rng.normal(size=(BATCH, 5, 5, 2))).astype(np.float32),
        "y": rng.integers(0, CLASSES, BATCH).astype(np.int32),
    }


def loss_fn(params, example):
    x = jax.lax.conv_general_dilated(
        example["x"][None], params["conv"]["kernel"], (1, 1), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[0]  # fmt: skip
    x = jax.nn.relu(x + jnp.broadcast_to(params["conv"]["bias"], x.shape)).reshape(-1)
    x = x @ params["dense"]["kernel"] + params["dense"]["bias"]
    x = (x - x.mean()) / jnp.sqrt(x.var() + 1e-5)
    x = x * params["norm"]["scale"] + params["norm"]["bias"]
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])


def torch_module(torch):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(2, 4, 3)
            self.dense = torch.nn.Linear(36, 8)
            self.norm = torch.nn.LayerNorm(8)
            self.head = torch.nn.Linear(8, CLASSES)

        def forward(self, x):
            x = torch.relu(self.conv(x)).permute(0, 2, 3, 1).flatten(1)
            return self.head(self.norm(self.dense(x)))

    net, params = Net(), parameters()
    weights = {
        "conv.weight": params["conv"]["kernel"].transpose(3, 2, 0, 1),
        "norm.weight": params["norm"]["scale"],
        "dense.weight": params["dense"]["kernel"].T,
        "head.weight": params["head"]["kernel"].T,
        **{f"{name}.bias": layer["bias"] for name, layer in params.items()},
    }
    tensors = {k: torch.tensor(np.ascontiguousarray(v)) for k, v in weights.items()}
    net.load_state_dict(tensors, strict=True)
    return net


def as_ours(named):
    """Gradients of the torch module in our names and layouts."""
    got = {name: np.asarray(value.detach()) for name, value in named.items()}
    return {
        "conv": {"kernel": got["conv.weight"].transpose(2, 3, 1, 0), "bias": got["conv.bias"]},
        "norm": {"scale": got["norm.weight"], "bias": got["norm.bias"]},
        "dense": {"kernel": got["dense.weight"].T, "bias": got["dense.bias"]},
        "head": {"kernel": got["head.weight"].T, "bias": got["head.bias"]},
    }


@functools.cache
def ours(method):
    summed = dp.clipped_sum(loss_fn, dp.flat(BOUND), method=method)
    total, facts = summed(parameters(), batch(), jnp.ones(BATCH, bool))
    norms = np.asarray(facts.norms[:, 0])
    assert (norms < BOUND).any()
    assert (norms > BOUND).any()
    return jax.device_get(total.value), norms


def gap(one, other):
    """Largest difference over the largest entry."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(other))
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, other)
    return max(jax.tree.leaves(apart)) / largest


# --- What each peer says -------------------------------------------------------------------------


def opacus_sum(ghost):
    """(clipped sum, per-example norms) from hooks, or from ghost clipping."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("opacus")
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleModuleFastGradientClipping,
    )
    from opacus.optimizers import DPOptimizer
    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    net, values = torch_module(torch), batch()
    images = torch.tensor(values["x"].transpose(0, 3, 1, 2).copy())
    labels = torch.tensor(values["y"].astype(np.int64))
    options = {"noise_multiplier": 0.0, "max_grad_norm": BOUND, "expected_batch_size": BATCH}
    plain = torch.optim.SGD(net.parameters(), lr=0.0)
    if ghost:
        wrapped = GradSampleModuleFastGradientClipping(net, max_grad_norm=BOUND)
        optimizer = DPOptimizerFastGradientClipping(plain, **options)
        loss = torch.nn.CrossEntropyLoss(reduction="mean")
        DPLossFastGradientClipping(wrapped, optimizer, loss)(wrapped(images), labels).backward()
        grads = {name: p.grad for name, p in net.named_parameters()}
        norms = wrapped.get_norm_sample()
    else:
        wrapped = GradSampleModule(net)
        optimizer = DPOptimizer(plain, **options)
        torch.nn.functional.cross_entropy(wrapped(images), labels).backward()
        norms = torch.sqrt(sum((p.grad_sample.flatten(1) ** 2).sum(1) for p in net.parameters()))
        optimizer.clip_and_accumulate()
        grads = {name: p.summed_grad for name, p in net.named_parameters()}
    return as_ours(grads), np.asarray(norms.detach())


def jax_privacy_sum():
    jax_privacy = pytest.importorskip("jax_privacy")
    with jax.numpy_rank_promotion("allow"):
        clipped = jax_privacy.clipped_grad(loss_fn, l2_clip_norm=BOUND, keep_batch_dim=False)
        return jax.device_get(clipped(parameters(), batch()))


def opacus_epsilon(kind, q, sigma, steps, delta=1e-5):
    accountants = pytest.importorskip("opacus.accountants")
    made = {"prv": accountants.PRVAccountant, "rdp": accountants.RDPAccountant}[kind]()
    made.history = [(sigma, q, steps)]
    return float(made.get_epsilon(delta))


def jax_privacy_sigma(q, steps, epsilon, delta=1e-5):
    jax_privacy = pytest.importorskip("jax_privacy")
    peer = jax_privacy.accounting
    return peer.calibrate.calibrate_noise_multiplier(
        target_epsilon=epsilon,
        accountant=peer.analysis.DpsgdTrainingAccountant(
            dp_accountant_config=peer.accountants.PldAccountantConfig()
        ),
        batch_sizes=round(q * 50_000),
        num_updates=steps,
        num_samples=50_000,
        target_delta=delta,
        tol=1e-3,
    )


def our_sigma(q, steps, epsilon, delta=1e-5):
    return accounting.calibrate_noise_multiplier(
        lambda s: accounting.poisson(s, q, steps), epsilon=epsilon, delta=delta
    )


# --- The comparisons -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
def test_clipped_sums_are_jax_privacys(method):
    want = jax_privacy_sum()
    assert gap(ours(method)[0], want) < 1e-5
    assert gap(jax.tree.map(lambda x: 1.01 * x, ours(method)[0]), want) > 1e-5


@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
@pytest.mark.parametrize("ghost", [False, True], ids=["hooks", "ghost"])
def test_norms_and_clipped_sums_are_opacus(ghost, method):
    want, norms = opacus_sum(ghost)
    got, found = ours(method)
    np.testing.assert_allclose(found, norms, rtol=2e-5)
    assert gap(got, want) < 1e-5


@pytest.mark.parametrize("sigma,bound", [(1.0, 1.0), (2.5, 0.3)])
def test_the_noise_has_jax_privacys_law(sigma, bound):
    jax_privacy = pytest.importorskip("jax_privacy")
    zeros = {"a": jnp.zeros((100, 200)), "b": jnp.zeros(5000)}
    theirs = jax_privacy.noise_addition.gaussian_privatizer(
        stddev=sigma * bound, prng_key=jax.random.key(1)
    )
    noisy, _ = theirs.update(zeros, theirs.init(zeros))
    tx = dp.gaussian(sigma, 1.0, key=jax.random.key(2))
    mine, _ = tx.update(dp.ClippedSum(zeros, jnp.asarray(bound)), tx.init(zeros))
    for name in zeros:
        one, other = np.ravel(mine[name]), np.ravel(noisy[name])
        assert stats.ks_2samp(one, other).pvalue > ALPHA
        assert stats.ks_2samp(1.5 * one, other).pvalue < ALPHA


def test_the_noise_has_optax_contribs_law():
    rows = {"w": jnp.zeros((8, 20_000))}
    like = {"w": jnp.zeros(20_000)}
    theirs = optax.contrib.differentially_private_aggregate(0.5, 2.0, key=jax.random.key(3))
    with jax.numpy_rank_promotion("allow"):
        noisy, _ = theirs.update(rows, theirs.init(like))
    tx = dp.aggregate(0.5, 2.0, 8, key=jax.random.key(4))
    mine, _ = tx.update(rows, tx.init(like))
    assert stats.ks_2samp(np.asarray(mine["w"]), np.asarray(noisy["w"])).pvalue > ALPHA
    assert stats.ks_2samp(1.5 * np.asarray(mine["w"]), np.asarray(noisy["w"])).pvalue < ALPHA


@pytest.mark.parametrize("q,sigma,steps", SETTINGS)
def test_epsilon_is_opacus_prv_and_rdp(q, sigma, steps):
    event = accounting.poisson(sigma, q, steps)
    tight, loose = (accounting.epsilon(event, 1e-5, accountant=a) for a in ("pld", "rdp"))
    prv = opacus_epsilon("prv", q, sigma, steps)
    # PRV's answer is exact up to 0.01 in epsilon, its default error.
    assert tight == pytest.approx(prv, abs=0.012)
    assert loose == pytest.approx(opacus_epsilon("rdp", q, sigma, steps), rel=0.01)
    wrong = accounting.epsilon(accounting.poisson(0.95 * sigma, q, steps), 1e-5)
    assert wrong != pytest.approx(prv, abs=0.012)


@pytest.mark.parametrize("q,epsilon,steps", [(0.02, 1.0, 400), (0.2, 8.0, 40)])
def test_sigma_is_jax_privacys_and_opacus(q, epsilon, steps):
    utils = pytest.importorskip("opacus.accountants.utils")
    mine = our_sigma(q, steps, epsilon)
    assert mine == pytest.approx(jax_privacy_sigma(q, steps, epsilon), rel=5e-3)
    theirs = utils.get_noise_multiplier(
        target_epsilon=epsilon, target_delta=1e-5, sample_rate=q, steps=steps, accountant="prv"
    )
    assert mine == pytest.approx(theirs, rel=0.02)


def test_calibration_error_is_scikit_learns():
    calibration = pytest.importorskip("sklearn.calibration")
    rng = np.random.default_rng(0)
    logits, labels = 2 * rng.normal(size=(800, CLASSES)), rng.integers(0, CLASSES, 800)
    sums = metrics.eval_sums(
        jnp.asarray(logits, jnp.float32), jnp.asarray(labels), jnp.ones(800, bool), CLASSES
    )
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    accuracy, mean = calibration.calibration_curve(right, confidence, n_bins=15)
    share = np.histogram(confidence, np.linspace(0, 1, 16))[0] / 800
    want = (share[share > 0] * np.abs(accuracy - mean)).sum()
    assert metrics.summarize(sums)["ece"] == pytest.approx(want, abs=1e-5)


def comparison_table() -> str:
    """Returns the comparisons as Markdown, with the versions."""
    versions = {
        name: importlib.metadata.version(name)
        for name in ("jax", "dp-accounting", "jax-privacy", "opacus", "torch", "optax")
    }
    total, norms = ours("bookkeeping")
    rows = [("clipped sum, book-keeping", "ours, vmap", gap(total, ours("vmap")[0]))]
    rows.append(
        ("clipped sum, book-keeping", "jax-privacy `clipped_grad`", gap(total, jax_privacy_sum()))
    )
    for ghost, name in ((False, "hooks"), (True, "ghost")):
        theirs, their_norms = opacus_sum(ghost)
        rows.append(("clipped sum, book-keeping", f"Opacus {name}", gap(total, theirs)))
        rows.append(("per-example norms", f"Opacus {name}",
                     float(np.abs(norms / their_norms - 1).max())))  # fmt: skip
    lines = ["| quantity | compared with | relative difference |", "|---|---|---|"]
    lines += [f"| {a} | {b} | {c:.1e} |" for a, b, c in rows]
    lines += ["", "| q, sigma, steps | ours (PLD) | Opacus PRV | ours (RDP) | Opacus RDP |"]
    lines += ["|---|---|---|---|---|"]
    for q, sigma, steps in SETTINGS:
        event = accounting.poisson(sigma, q, steps)
        values = [
            accounting.epsilon(event, 1e-5), opacus_epsilon("prv", q, sigma, steps),
            accounting.epsilon(event, 1e-5, accountant="rdp"),
            opacus_epsilon("rdp", q, sigma, steps),
        ]  # fmt: skip
        cells = " | ".join(f"{v:.4f}" for v in values)
        lines.append(f"| {q:.4g}, {sigma:g}, {steps} | {cells} |")
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "."]
    return "\n".join(lines)


if __name__ == "__main__":
    print(comparison_table())
