"""A config becomes a run.

`build` does everything that can fail on a user's mistake, and writes nothing but caches, so that
a mistake costs nothing. Every name and option is checked before any data is opened.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from dpjax.build import data, loss, model, next_token, optimizer, privacy, schedules
from dpjax.build.run import Run
from dpjax.config import without_infinite_budget
from dpjax.data import Dataset
from dpjax.models import (
    Model,
    Params,
    TextSpec,
    check_examples_independent,
    finetune,
    int8,
    locate,
    probe,
)
from dpjax.runtime import rows, sharding

__all__ = ["build"]

_DTYPES = ("float32", "bfloat16", "float16")


def build(config: ConfigDict, *, datasets: tuple[Dataset, Dataset] | None = None) -> Run:
    """Makes every object of a run and checks that they fit.

    Args:
        config: from `dpjax.config.default`.
        datasets: training data and held-out data in place of those that `config.data` names.

    Returns:
        The run, ready for `loop.train`.

    Raises:
        ValueError: naming the field and its value, or what is missing where.
    """
    # What needs no data comes first: a wrong name costs no reading, which can take minutes.
    config = without_infinite_budget(config)
    _check_values(config)
    privacy.check_vote(config)
    rows.check(config.log_to)
    layout = sharding.layout(config.sharding)
    adaptive = rule = None
    if config.dp is not None:
        privacy.check(config.dp)
        adaptive = privacy.adaptive_bound(config.dp)
        # All bounds are tried, and the first one stays.
        rule, *_ = [privacy.clip_rule(config.dp, bound) for _, bound in schedules.bounds(config)]
    optimizer.check(config.optimizer, private=config.dp is not None)
    schedules.batch_sizes(config, None)
    trial = model.tuned(config, num_classes=2).model  # however many classes there will be
    spec = trial.input
    next_token.check(config, spec)
    loss.check(spec, config.data)
    data.check(config.data)
    schedules.check(config, None if datasets else data.most_examples(config))
    if isinstance(spec, TextSpec):
        locate(config.data.tokenizer)
    weights = model.weights_file(config.model)
    if weights is None or ":" in config.model.name:  # ours with weights: below, with them
        shape = spec.example().shape
        shape = (3, *shape) if config.task == "causal_lm" else shape
        _check_independent(config, trial, model.initial(trial, config, None), shape)

    train, test = data.given(config, datasets) if datasets else data.opened(config, spec)
    train, temperature = privacy.temperature(config, train)
    sizes, plan = schedules.batch_sizes(config, len(train))
    tuning = model.tuned(config, train.num_classes)
    apply, loss_fn = loss.functions(tuning.model, config.data, train.shape)
    with layout.on_host():
        params = model.initial(tuning.model, config, weights)
        if weights is not None:  # which may show what small random numbers hide
            _check_independent(config, tuning.model, params, train.shape)
    finetune.split(params, tuning.trainable)  # raises if nothing trains
    phases = schedules.phases(config, tuning, sizes, len(train), params)
    vote = privacy.vote(config, len(train))
    params = model.frozen_as(config, params, lambda path: any(p.trainable(path) for p in phases))
    net, merge = tuning.model, tuning.merge
    if config.model.frozen_dtype == "int8":  # what uses parameters first makes floats of them
        net = net._replace(features=_on_floats(net.features), apply=_on_floats(net.apply))
        merge, apply, loss_fn = _on_floats(merge), _on_floats(apply), _on_floats(loss_fn)
    return Run(
        config=config,
        train=train,
        test=test,
        model=net,
        params=params,
        merge=merge,
        apply=apply,
        loss_fn=loss_fn,
        rule=rule,
        adaptive=adaptive,
        temperature=temperature,
        vote=vote,
        batch_plan=plan,
        phases=phases,
        ledger=privacy.ledger(config, phases, temperature, vote),
        layout=layout,
    )


def _on_floats(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, *args: function(int8.whole(params), *args)


def _check_independent(
    config: ConfigDict, net: Model, params: Params, shape: tuple[int, ...]
) -> None:
    """Refuses a model in which one example's output depends on another, as with batch norm."""
    if config.task == "causal_lm":
        next_token.independent(net, params, shape)
    else:
        apply, _ = loss.functions(net, config.data, shape)
        check_examples_independent(apply, params, probe(net.input, shape))


def _check_values(config: ConfigDict) -> None:
    for field in ("log_every", "checkpoint_every", "epochs",
                  "keep_checkpoints", "microbatch", "eval_every"):  # fmt: skip
        value = config[field]
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{field}={value} must be > 0.")
    if not 0 <= config.lp.fraction <= 1:
        raise ValueError(f"lp.fraction={config.lp.fraction} must be in [0, 1].")
    if not 0 < config.lp.noise_ratio < math.inf:
        raise ValueError(f"lp.noise_ratio={config.lp.noise_ratio} must be > 0 and finite.")
    rate = config.lp.learning_rate
    if rate is not None and not 0 < rate < math.inf:
        raise ValueError(f"lp.learning_rate={rate} must be > 0 and finite.")
    if not 0 <= config.ema < 1:
        raise ValueError(f"ema={config.ema} must be in [0, 1).")
    size = config.physical_batch
    if size != "auto" and not (isinstance(size, int) and size > 0):
        raise ValueError(f"physical_batch={size!r} must be 'auto' or a whole number > 0.")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed} must be in [0, 2**32).")
    if config.keep_best < 0:
        raise ValueError(f"keep_best={config.keep_best} must be >= 0.")
    if config.model.dtype not in _DTYPES:
        raise ValueError(f"model.dtype={config.model.dtype!r} must be one of {_DTYPES}.")
    if config.model.frozen_dtype not in (None, "bfloat16", "int8"):
        raise ValueError(
            f"model.frozen_dtype={config.model.frozen_dtype!r} must be None, 'bfloat16' or 'int8'."
        )
    if config.model.frozen_dtype == "int8" and config.task != "causal_lm":
        raise ValueError(
            "model.frozen_dtype='int8' is for task='causal_lm'; 'bfloat16' is for every model."
        )
    rate = config.optimizer.learning_rate
    if not 0 < rate < math.inf:
        raise ValueError(f"optimizer.learning_rate={rate} must be > 0 and finite.")
    if config.private_seed is not None and not 0 <= config.private_seed < 2**128:
        raise ValueError(f"private_seed={config.private_seed} must be in [0, 2**128).")
