"""A zoo of tiny models after public architectures: book-keeping gives vmap's numbers on each.

The table states the share of parameters on the direct route, which is differentiated for each
example, and names those that are not biases or scales of norms: in models as small as these, biases
are a large part. The everyday suite runs a third, chosen for its routes; `-m slow` runs the rest.
"""

import re
from typing import NamedTuple

import jax
import libraries
import pytest
import sequences
import structures
import vision
from compare_engines import agree

from dpjax import dp
from dpjax.dp.engines import bookkeeping, products


class Row(NamedTuple):
    """What the engine does with a model.

    Attributes:
        direct: share of the parameters on the direct route.
        leaves: paths of direct leaves that are not biases or scales of norms.
        slow: whether the everyday suite leaves it out.
    """

    direct: float
    leaves: str = ""
    slow: bool = False


def rare(direct, leaves=""):
    return Row(direct, leaves, slow=True)


ZOO = {
    vision.vit: rare(0.149, "cls position"),
    vision.mixer: rare(0.123),
    vision.convnext: rare(0.088, "scale_0 scale_1"),
    vision.resnet: rare(0.022),
    vision.wide_resnet: rare(0.034),
    vision.densenet: rare(0.069),
    vision.efficientnet: rare(0.145),
    vision.senet: rare(0.049),
    vision.unet: Row(0.026),
    vision.diffusion: rare(0.037),
    vision.swin: rare(0.165),
    vision.nerf: Row(0.032),
    vision.pointnet: Row(0.129),
    vision.clip: rare(0.034, "heat"),
    vision.autoencoder: rare(0.106),
    sequences.bert: rare(0.116, "Embed_2/embedding"),
    sequences.gpt: Row(0.310, "position"),
    sequences.t5: rare(0.042, "Embed_1/embedding Embed_2/embedding"),
    sequences.llama: rare(0.030),
    sequences.lstm: rare(0.069),
    sequences.gru: rare(0.085),
    sequences.s4: Row(0.580, "a_imag a_real c_imag c_real skip step"),
    sequences.s5: rare(0.799, "a_imag a_real b_imag b_real c_imag c_real skip"),
    sequences.mamba: rare(0.123, "a_log skip"),
    sequences.experts: Row(0.011),
    sequences.perceiver: rare(0.189, "queries"),
    sequences.transformer_xl: Row(0.079, "u v"),
    sequences.tcn: rare(0.086),
    sequences.gated_convolutions: rare(0.044),
    sequences.hopfield: rare(0.308, "stored"),
    sequences.highway: rare(0.116),
    sequences.fnet: rare(0.152),
    sequences.linear_attention: Row(0.009, "decay"),
    sequences.neural_ode: rare(0.158),
    structures.dlrm: Row(0.062),
    structures.graph_network: rare(0.096),
    structures.fno: Row(0.823, "imaginary_0 imaginary_1 real_0 real_1"),
    structures.deep_sets: rare(0.148),
    structures.weight_normed: Row(0.0),
    structures.hypernetwork: Row(0.254, "codes"),
    structures.conditioned: rare(0.162),
    structures.siren: rare(0.180, "Dense_1/kernel"),
    structures.splines: Row(0.0),
    structures.meta_learning: Row(1.0, "first second"),
    libraries.nnx_transformer: rare(0.105),
    libraries.nnx_cnn: Row(0.127),
    libraries.nnx_scan: rare(0.143),
    libraries.eqx_transformer: rare(0.063),
    libraries.eqx_cnn: rare(0.088),
    libraries.eqx_gru: Row(0.155, "start"),
    libraries.hk_resnet: rare(0.047),
    libraries.hk_transformer: rare(0.144),
    libraries.hk_lstm: Row(0.108),
}

_NEEDS = {"eqx": "equinox", "hk": "haiku"}  # by the beginning of a name
_BIAS_OR_NORM = re.compile(r"bias|(^|/)b$|norm|Norm|layers/1/weight|(^|/)(scale|offset)$")


@pytest.mark.parametrize(
    ("make", "row"),
    [pytest.param(*item, marks=[pytest.mark.slow] * item[1].slow) for item in ZOO.items()],
    ids=lambda part: part.__name__ if callable(part) else "",
)
def test_the_zoo(make, row, monkeypatch):
    pytest.importorskip(_NEEDS.get(make.__name__.partition("_")[0], "jax"))
    monkeypatch.setattr(products, "UNIT", 0.0)  # to rounding; what margins add is tested elsewhere
    # Models are written as their authors would: they broadcast, and both engines read one key.
    with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        loss_fn, params, batch = make()
        plan = bookkeeping.plan(loss_fn, params, jax.tree.map(lambda x: x[0], batch))
        direct = [leaf.path for leaf in plan if leaf.route == "direct"]
        named = [path for path in direct if not _BIAS_OR_NORM.search(path)]
        assert " ".join(path.removeprefix("_S4D_0/") for path in named) == row.leaves
        share = dp.route_shares(plan, params).get("direct", 0.0)
        assert share == pytest.approx(row.direct, abs=5e-4)
        agree(loss_fn, params, batch, tolerance=3e-5)
