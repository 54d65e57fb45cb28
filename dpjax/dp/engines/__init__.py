"""Clipped sums of per-example gradients: one loop of vmap, and one backward pass for all."""
