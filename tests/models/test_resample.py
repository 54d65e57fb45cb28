"""Resampling of position embeddings."""

import jax
import numpy as np
import pytest

from dpjax.models.weights import resample_grid
from dpjax.models.weights.resample import RESAMPLINGS


@pytest.mark.parametrize("method", RESAMPLINGS)
def test_resampling_keeps_constants_and_sizes(method):
    grid = np.random.default_rng(0).normal(size=(5, 5, 2)).astype(np.float32)
    np.testing.assert_array_equal(resample_grid(grid, 5, method), grid)
    for size in (3, 8):
        out = resample_grid(np.full((5, 5, 2), 3.0, np.float32), size, method)
        assert out.shape == (size, size, 2)
        np.testing.assert_allclose(out, 3.0, rtol=1e-6)
        # Rows and columns are treated alike.
        swapped = resample_grid(grid.swapaxes(0, 1), size, method).swapaxes(0, 1)
        np.testing.assert_allclose(resample_grid(grid, size, method), swapped, atol=1e-5)
    with pytest.raises(ValueError, match="method='nearest'"):
        resample_grid(grid, 3, "nearest")


def test_antialiased_resampling_is_the_one_of_jax():
    grid = np.random.default_rng(0).normal(size=(7, 7, 2)).astype(np.float32)
    for size in (4, 12):
        expected = jax.image.resize(grid, (size, size, 2), "cubic")
        ours = resample_grid(grid, size, "cubic_antialiased")
        np.testing.assert_allclose(ours, expected, atol=1e-5)
