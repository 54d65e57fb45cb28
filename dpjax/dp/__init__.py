"""Differentially private gradients as optax transforms.

Needs jax, numpy, optax and dp_accounting alone. Clip with `clipped_sum`, noise with `gaussian`
or a ready optimizer, and take the numbers from a `Mechanism`:

>>> import jax, jax.numpy as jnp, optax
>>> from dpjax import dp
>>> mechanism = dp.calibrated(
...     epsilon=2.0, delta=1e-4, num_examples=1000, batch_size=100, epochs=5)
>>> ledger = dp.Ledger((dp.Phase("train", mechanism),), epsilon=2.0, delta=1e-4)
>>> steps = dp.Steps(ledger, jnp.ones((1000, 2)), private_seed=0, chunk_size=64)
>>> loss = lambda params, example: jnp.sum((params - example) ** 2)
>>> grad = jax.jit(dp.clipped_sum(loss, dp.flat(1.0)))
>>> params = jnp.zeros(2)
>>> tx = optax.chain(mechanism.transform(key=jax.random.key(0)), optax.adam(1e-3))
>>> state = tx.init(params)
>>> for step, parts in steps:  # charged, one by one
...     clipped = sum(grad(params, batch, mask)[0] for batch, mask in parts)
...     updates, state = tx.update(clipped, state, params)
...     params = optax.apply_updates(params, updates)
>>> steps.ledger.steps_done
50
"""

from dpjax.dp import (
    accounting,
    least_squares,
    linear_head,
    lower_bound,
    repeat_and_select,
    sampling,
    seeds,
)
from dpjax.dp.adaptive import QuantileBound, quantile_bound
from dpjax.dp.batches import Steps, take
from dpjax.dp.clipping import (
    ClippedSum,
    ClipRule,
    PerExample,
    automatic,
    by_leaf,
    by_prefix,
    flat,
    global_,
    one_group,
    per_layer,
    rule,
)
from dpjax.dp.engines import (
    METHODS,
    EngineMismatch,
    Held,
    bookkeeping,
    check_engine,
    clipped_sum,
    estimate_memory,
    explain,
    route_shares,
)
from dpjax.dp.ledger import (
    AUDIT,
    SEED_POLICIES,
    BudgetExceeded,
    Ledger,
    Phase,
    gdp_mu,
    noise_draws,
    publishable,
    statement,
    to_markdown,
)
from dpjax.dp.mechanism import Mechanism, calibrated, calibrated_phases, epsilon_of, num_steps
from dpjax.dp.noise import aggregate, gaussian
from dpjax.dp.optimizers import adam, adam_corrected, lamb, scale_by_adam_corrected, sgd
from dpjax.dp.sampling import (
    PADDING,
    FixedSize,
    FullBatch,
    Poisson,
    RandomAllocation,
    Sampler,
    TruncatedPoisson,
    chunks,
)
from dpjax.dp.temperature import fit_temperature
from dpjax.dp.vote import noisy_vote

__all__ = [
    "AUDIT",
    "METHODS",
    "PADDING",
    "SEED_POLICIES",
    "BudgetExceeded",
    "ClipRule",
    "ClippedSum",
    "EngineMismatch",
    "FixedSize",
    "FullBatch",
    "Held",
    "Ledger",
    "Mechanism",
    "PerExample",
    "Phase",
    "Poisson",
    "QuantileBound",
    "RandomAllocation",
    "Sampler",
    "Steps",
    "TruncatedPoisson",
    "accounting",
    "adam",
    "adam_corrected",
    "aggregate",
    "automatic",
    "bookkeeping",
    "by_leaf",
    "by_prefix",
    "calibrated",
    "calibrated_phases",
    "check_engine",
    "chunks",
    "clipped_sum",
    "epsilon_of",
    "estimate_memory",
    "explain",
    "fit_temperature",
    "flat",
    "gaussian",
    "gdp_mu",
    "global_",
    "lamb",
    "least_squares",
    "linear_head",
    "lower_bound",
    "noise_draws",
    "noisy_vote",
    "num_steps",
    "one_group",
    "per_layer",
    "publishable",
    "quantile_bound",
    "repeat_and_select",
    "route_shares",
    "rule",
    "sampling",
    "scale_by_adam_corrected",
    "seeds",
    "sgd",
    "statement",
    "take",
    "to_markdown",
]
