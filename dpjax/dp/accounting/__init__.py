"""Epsilon and delta of events, and calibration of the noise."""

from dpjax.dp.accounting.accountant import (
    ACCOUNTANTS,
    RELATIONS,
    Events,
    calibrate_noise_multiplier,
    check_budget,
    check_supported,
    delta,
    epsilon,
    falling_root,
    lower_epsilon,
)
from dpjax.dp.accounting.events import (
    allocation,
    fixed_size,
    full_batch,
    poisson,
    truncated_poisson,
)

__all__ = [
    "ACCOUNTANTS", "RELATIONS", "Events", "allocation", "calibrate_noise_multiplier",
    "check_budget", "check_supported", "delta", "epsilon", "falling_root", "fixed_size",
    "full_batch", "lower_epsilon", "poisson", "truncated_poisson",
]  # fmt: skip
