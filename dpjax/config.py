"""Every field of a run, with its default and its meaning. Values only; `build` makes objects.

A config file is a module with `get_config(arg=None)` that starts from `default()` and sets values;
`build.fields` runs it.

>>> config = default()
>>> config.dp.epsilon = 1.0
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

__all__ = ["MAY_CHANGE", "default", "differences", "without_infinite_budget"]


def default() -> ConfigDict:
    """Returns the default of every field, locked: assigning to an unknown field is an error."""
    config = ConfigDict(
        {
            # Public randomness: initialization, augmentation, subsets.
            "seed": 0,
            # classification, or causal_lm: predict the next token of text, with model.name=decoder
            "task": "classification",
            # Secret randomness: batches and noise. None draws it from the operating system, once
            # per run. A number makes the run repeatable and is for study, not for release.
            "private_seed": placeholder(int),
            "data": {
                # Of prepared data, or MODULE:FUNCTION of yours (split -> dpjax.data.Dataset).
                "name": "mnist5k",
                "data_dir": placeholder(str),  # None: the user's cache
                "train_split": "train",
                "test_split": "test",  # evaluated, never trained on
                # The labels, where the data set has several, such as coarse_label of cifar100.
                "label_key": placeholder(str),
                "subset": placeholder(object),  # fraction (float) or shots per class (int)
                # Evaluate on this share of the training split, drawn example by example, instead
                # of the test split, to tune without touching it. It is private data too.
                "holdout": placeholder(float),
                # User-level privacy: the column that says whose data a record is. Batches, clipping
                # and the guarantee are then about all records of one unit. None: one record each.
                "unit": placeholder(str),
                "unit_records": 1,  # the most records of a unit that a step reads; their mean loss
                "tokenizer": "minilm_l6_tokenizer",  # for text: file, or name of a published one
                # Of causal_lm. `name` is then a folder with SPLIT.jsonl (lines with text, or with
                # prompt and response) or with folders SPLIT of .txt files.
                "long_records": "cut",  # to the context; split: a record is a unit of windows
                "template": "{prompt}{response}",  # what comes before the response is not predicted
                "end_token": placeholder(str),  # ends every record; None: the tokenizer's own
                # Images of many sizes: crop and resize to this side while reading. None: as stored.
                "host_image_size": placeholder(int),
                "pad": 0,  # black border around the stored image, in its pixels
                "resample": "bilinear",  # resizing of images to the model's input
                "shift": 0,  # augmentation: random shifts by up to so many pixels
                "flip": False,  # augmentation: random horizontal flips
                "crop": 0,  # augmentation: random crops after padding by so many pixels
                "pixel_noise": 0.0,  # augmentation: Gaussian noise on normalized pixels
                # After these, MODULE:FUNCTION of yours (image, *, key -> image), on one image.
                "augmentation": placeholder(str),
                "multiplicity": 1,  # augmented views of an example, averaged before clipping
            },
            "model": {
                "name": "vit",  # vit, resnet8, resnet_v2, wide_resnet, efficientnet_lite,
                # text_encoder, decoder, or MODULE:FUNCTION of yours (num_classes, head_init, dtype
                # -> Model)
                "size": "mini",  # of the named family; for vit: mini, ti16, s16, b16
                # Overrides of the size's fields, such as depth or image_size; keywords of yours.
                "options": {},
                "weights": placeholder(str),  # file, or name of published weights; None: random
                "head_init": "zero",  # zero, near_zero or random
                "keep_head": False,  # take the head of the weights too: the classes are the same
                "dtype": "float32",  # of activations; parameters, sums and noise are float32
                # Of parameters that no phase trains: bfloat16 takes half the memory, int8 (of
                # language models) 28 %. None: float32
                "frozen_dtype": placeholder(str),
                # Compute a block's activations again in the backward pass, instead of keeping them.
                "remat": False,
            },
            # full, head, film, bias, lora:RANK:TARGETS, blocks:first:K, blocks:last:K,
            # blocks:at:I,J, regex:R, or several with "+". Or vote:K: the head, and the K blocks
            # that a noised vote of the training examples picks, within the budget (`dp.vote`).
            "finetune": "full",
            # Linear probing first, then the set above, under one budget (arXiv 2402.18905).
            "lp": {
                "fraction": 0.0,  # of the epochs that train the head alone
                "learning_rate": placeholder(float),  # None: the optimizer's
                "noise_ratio": 1.0,  # sigma of this phase over sigma of the next
                "keep_optimizer": False,  # keep the head's moments, and their age
            },
            # None trains without privacy, and so does an infinite epsilon.
            "dp": {
                "epsilon": 2.0,
                "delta": 1e-5,
                # poisson, random_allocation (each example in one random step of every epoch),
                # full_batch, fixed_size, truncated_poisson, or MODULE:FUNCTION of yours
                # (num_examples, batch_size -> dp.Sampler, which carries its privacy event)
                "sampler": "poisson",
                "max_batch_size": placeholder(int),  # for truncated_poisson
                # flat, per_layer, automatic, global, or MODULE:FUNCTION of yours
                # (bound, normalized -> dp.ClipRule)
                "clipping": "flat",
                "bound": 1.0,  # C, in units of gradient norm
                # C by fraction of the epochs, instead of `bound`: ((0.0, 0.1), (0.95, 20.0)) ends
                # with a larger one (arXiv 2106.07830). Costs no privacy: noise is relative to C.
                "bound_schedule": (),
                # Let C follow a quantile of the gradient norms, from `bound` on (arXiv 1905.03871).
                # The noised count that it needs is accounted: the gradient gets a bit more noise.
                "adaptive": {
                    "quantile": placeholder(float),  # share of norms that are to be below C
                    "rate": 0.2,  # log C moves by up to this in a step
                    "lower_bound": 0.1,  # C never falls below it (arXiv 2506.01396)
                    "count_noise": placeholder(float),  # standard deviation; None: B / 20
                },
                "normalized": True,  # divide by C: sensitivity 1, learning rate independent of C
                "gamma": 0.01,  # of automatic clipping
                "method": "auto",  # auto, bookkeeping, vmap
                # gaussian: float32 noise; secure: integers drawn from ChaCha20, added to exact
                # sums, for a release whose low bits an adversary may study (see dpjax.dp.secure).
                # Secure noise needs method vmap.
                "noise": "gaussian",
                # Fit one temperature on a share of the training data that nothing else reads, at
                # the same epsilon and delta, which disjoint data pays once (arXiv 2210.08248). The
                # head of weights.safetensors is scaled by it.
                "temperature": {
                    "share": 0.0,  # of the training examples; 0: none
                    "bound": 5.0,  # on an example's derivative of the loss
                    "steps": 10,  # noised signs of the derivative, each halving the range
                },
                # Of finetune="vote:K": the vote alone costs this share of epsilon. Training gets
                # what the whole budget then leaves.
                "vote": 0.1,
            },
            # Expected (logical) batch size B; "auto": the choice of `dpjax.build.planner`, which
            # looks at N, epochs, epsilon and delta alone.
            "batch_size": FieldReference(256, field_type=object),
            # B by fraction of the epochs, instead of `batch_size`, such as ((0.0, 256),
            # (0.5, 1024)). Sigma is the same throughout, so that the whole meets the budget.
            "batch_size_schedule": (),
            "epochs": 15.0,  # E; steps are round(E N / B)
            # Decay of a moving average of the parameters, evaluated beside them and saved as
            # weights_ema.safetensors; it costs no privacy (arXiv 2204.13650). 0: none
            "ema": 0.0,
            # Examples sent to the devices at once; "auto": as many as fit, from compiled memory.
            "physical_batch": FieldReference(64, field_type=object),
            "microbatch": placeholder(int),  # examples per device in memory at once
            # Parameters, frozen ones too, and optimizer state: "replicated", or spread over the
            # devices: "fsdp" for all of them, "fsdp:REGEX" for those whose path matches.
            "sharding": "replicated",
            "optimizer": {
                # adam, sgd, lamb, adam_corrected, or MODULE:FUNCTION such as optax:adamw
                # (learning_rate, **options -> optax transform of the noisy mean gradient; the
                # rate is a function of the step)
                "name": "adam",
                "learning_rate": 1e-3,
                # constant, cosine, linear, or MODULE:FUNCTION of yours (steps -> function from
                # the step, counted after the warm-up, to a fraction of the learning rate)
                "schedule": "constant",
                "warmup": 0,  # steps of linear warm-up
                "options": {},  # of the optax optimizer, such as b1 or momentum
            },
            # After training, attack the guarantee on runs of its own, see `dpjax.audit`; the result
            # stands in the statement. Its files are not covered by the run's guarantee.
            "audit": {
                "count": 0,  # canaries of a single run; 0 leaves the audit out
                "canaries": "gradient",  # gradient, mislabeled, random
                "runs": 1,  # or an even number of runs in two worlds
                "confidence": 0.95,
            },
            "log_every": 1,
            # Where rows go besides metrics.jsonl: tensorboard, wandb, or MODULE:FUNCTION of yours
            # (see dpjax.runtime.rows); several with "+". Private rows keep their names.
            "log_to": placeholder(str),
            "eval_every": placeholder(int),  # steps; None: ten times a run
            "checkpoint_every": 50,
            "keep_checkpoints": 2,  # the latest
            "keep_best": 0,  # and those with the lowest held-out loss, saved at evaluations
        },
        convert_dict=True,
        allow_dotted_keys=False,
    )
    config.lock()
    return config


# The fields that may differ when a run is resumed, and why. A step that a killed process had begun
# is executed again with the same noise: if its sum were another one, the difference of the two
# would be free of noise. So a field is listed only if it changes no sum beyond its rounding.
MAY_CHANGE = {
    **dict.fromkeys(
        ("audit.canaries", "audit.confidence", "audit.count", "audit.runs"),
        "audits are runs of their own, with seeds of their own",
    ),
    **dict.fromkeys(
        ("checkpoint_every", "eval_every", "keep_best", "keep_checkpoints", "log_every", "log_to"),
        "decides what is written, not what is computed",
    ),
    "data.data_dir": "the identity holds a digest of the data, wherever they are",
    # The order in which one sum is added up. (The engine, `dp.method`, is not listed: book-keeping
    # lowers a factor by the margin of its norm, up to 2e-4, which is no rounding.)
    **dict.fromkeys(
        ("microbatch", "physical_batch", "sharding"),
        "changes the order of additions only, so that a run may move to other devices",
    ),
}


def without_infinite_budget(config: ConfigDict) -> ConfigDict:
    """Returns the config with dp=None if its epsilon is infinite, which means the same."""
    if config.dp is None or config.dp.epsilon != math.inf:
        return config
    config = config.copy_and_resolve_references()
    config.dp = None
    return config


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], above: str = "config"
) -> list[str]:
    """Lists the fields in which two configs differ, as "config.dp.epsilon: 1.0 != 2.0"."""
    found = []
    for name in sorted(set(one) | set(other)):
        a, b, path = one.get(name), other.get(name), f"{above}.{name}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, path)
        elif a != b:
            found.append(f"{path}: {a!r} != {b!r}")
    return found
