"""The average of iterates against its definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.averaging import moving_average


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
def test_against_the_definition(decay):
    iterates = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    average = {"w": jnp.zeros(3)}
    want = np.zeros(3)
    for step, iterate in enumerate(iterates):
        average = moving_average(average, {"w": iterate}, decay, jnp.int32(step))
        weight = min(decay, (1 + step) / (10 + step))
        want = weight * want + (1 - weight) * iterate
    np.testing.assert_allclose(average["w"], want, atol=1e-5)
    if decay == 0:
        np.testing.assert_array_equal(average["w"], iterates[-1])
