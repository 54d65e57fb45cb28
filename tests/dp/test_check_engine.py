"""A run notices when its engine is wrong: faults put back by hand are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax import dp
from dpjax.dp.engines import bookkeeping, forms, products, sites, summation


def conv(x, w, layout):
    dims = ("NHWC", layout, "NHWC")
    return jax.lax.conv_general_dilated(x[None], w, (1, 1), "SAME", dimension_numbers=dims)[0]


def two_layouts(params, x):
    w = params["w"] - jnp.mean(params["w"], (0, 1, 2), keepdims=True)
    x = jnp.tanh(conv(x, w, "HWIO"))
    return jnp.sum(jnp.sin(conv(x, w, "HWOI")) * params["scale"])


def layers(params, x):
    return jnp.sum(jnp.tanh(jnp.tanh(x @ params["a"].reshape(5, 4)) @ params["zero"]))


NUMBERS = np.random.default_rng(0)
CONV = (
    two_layouts,
    {"w": NUMBERS.standard_normal((3, 3, 4, 4), np.float32), "scale": np.float32(1.0)},
    NUMBERS.standard_normal((3, 2, 2, 4), np.float32),
)
DENSE = (
    layers,
    {
        "a": NUMBERS.standard_normal(20, np.float32),
        "zero": np.zeros((4, 2), np.float32),
    },
    NUMBERS.standard_normal((3, 6, 5), np.float32),
)


def without_layout(identity):
    """The fault of two uses of a derived weight whose layout was not part of its identity."""
    return lambda site: identity(site) if site.view else ((site.leaves, site.weight), ())


def other_order(restore):
    return lambda site, w: jnp.reshape(jnp.swapaxes(w, 1, 2), site.shape)


FAULTS = {
    "layout": (CONV, sites, "_identity", without_layout),
    "restore": (DENSE, forms, "restore", other_order),
    "norm": (
        DENSE, products, "gram_measure",
        lambda measure: lambda t: measure(t)._replace(square=0.9 * measure(t).square),
    ),
    "sum": (
        DENSE, summation, "weighted_sum",
        lambda product: lambda t, factors, usable: product(t, 1.1 * factors, usable),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [CONV, DENSE], ids=["conv", "dense"])
def test_a_right_engine_passes(case):
    dp.check_engine(*case)
    assert {leaf.route for leaf in bookkeeping.plan(*case[:2], case[2][0])} - {
        "direct"
    } or case is CONV


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_engine_is_refused(fault, monkeypatch):
    case, module, name, change = FAULTS[fault]
    wrong = change(getattr(module, name))
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(dp.EngineMismatch, match=r"another gradient than vmap for '(w|a|zero)'"):
        dp.check_engine(*case)


def test_what_is_not_finite_in_both_is_no_mismatch():
    loss, params, x = DENSE
    dp.check_engine(loss, params, np.where(np.arange(3)[:, None, None] == 1, np.nan, x))


@pytest.mark.parametrize(
    "scale", [0.5, jnp.ones(4, jnp.float8_e4m3fn), jnp.ones(4, jnp.bfloat16)], ids=str
)
def test_parameters_of_any_kind_that_can_be_clipped(scale):
    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params["w"] * jnp.asarray(params["scale"], jnp.float32)))

    dp.check_engine(loss, {"w": np.ones((3, 4), np.float32), "scale": scale}, np.ones((2, 3)))
