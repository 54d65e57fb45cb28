"""Epsilon and delta of events, and calibration of one quantity of a run from the others."""

from dpjax.dp.accounting.accountant import (
    ACCOUNTANTS,
    RELATIONS,
    BudgetArgs,
    Events,
    calibrate_batch_size,
    calibrate_epochs,
    calibrate_noise_multiplier,
    calibrate_sampling_prob,
    calibrate_steps,
    check_budget,
    delta,
    epsilon,
)
from dpjax.dp.accounting.events import fixed_size, full_batch, poisson, truncated_poisson

__all__ = [
    "ACCOUNTANTS", "RELATIONS", "BudgetArgs", "Events", "calibrate_batch_size", "calibrate_epochs",
    "calibrate_noise_multiplier", "calibrate_sampling_prob", "calibrate_steps", "check_budget",
    "delta", "epsilon", "fixed_size", "full_batch", "poisson", "truncated_poisson",
]  # fmt: skip
