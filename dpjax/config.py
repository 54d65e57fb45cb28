"""Every field of a run, with its default and its meaning. Values only; `build` makes objects.

A config file is a module with `get_config(arg=None)` that starts from `default()` and sets values:

>>> config = default()
>>> config.dp.epsilon = 1.0
>>> unknown_field(config, "dp.epsilom")
"config.dp has no field 'epsilom': did you mean 'epsilon'?"
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import math
import os
import re
import runpy
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from dpjax.files import did_you_mean, nearest

__all__ = [
    "ConfigFile",
    "assign",
    "assign_text",
    "default",
    "differences",
    "load",
    "run_file",
    "shipped",
    "unknown_field",
    "without_infinite_budget",
]


def default() -> ConfigDict:
    """Returns the default of every field, locked: assigning to an unknown field is an error."""
    config = ConfigDict(
        {
            # Public randomness: initialization, augmentation, subsets.
            "seed": 0,
            # Secret randomness: batches and noise. None draws it from the operating system, once
            # per run. A number makes the run repeatable and is for study, not for release.
            "private_seed": placeholder(int),
            "data": {
                # Of prepared data, or MODULE:FUNCTION of yours (split -> dpjax.data.Dataset).
                "name": "mnist5k",
                "data_dir": placeholder(str),  # None: the user's cache
                "train_split": "train",
                "test_split": "test",  # evaluated, never trained on
                "subset": placeholder(object),  # fraction (float) or shots per class (int)
                # Evaluate on this share of the training split, drawn example by example, instead
                # of the test split, to tune without touching it. It is private data too.
                "holdout": placeholder(float),
                "tokenizer": "minilm_l6_tokenizer",  # for text: file, or name of a published one
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
                # text_encoder, or MODULE:FUNCTION of yours (num_classes, head_init, dtype -> Model)
                "size": "mini",  # of the named family; for vit: mini, ti16, s16, b16
                # Overrides of the size's fields, such as depth or image_size; keywords of yours.
                "options": {},
                "weights": placeholder(str),  # file, or name of published weights; None: random
                "head_init": "zero",  # zero, near_zero or random
                "keep_head": False,  # take the head of the weights too: the classes are the same
                "dtype": "float32",  # of activations; parameters, sums and noise are float32
            },
            # full, head, film, bias, lora:RANK:TARGETS, blocks:first:K, blocks:last:K, regex:R, or
            # several with "+"
            "finetune": "full",
            # Linear probing first, then the set above, under one budget (arXiv 2402.18905).
            "lp": {
                "fraction": 0.0,  # of the epochs that train the head alone
                "learning_rate": placeholder(float),  # None: the optimizer's
                "noise_ratio": 1.0,  # sigma of this phase over sigma of the next
                "keep_optimizer": False,  # keep the head's moments; counters restart at 0
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
                # Fit one temperature on a share of the training data that nothing else reads, at
                # the same epsilon and delta, which disjoint data pays once (arXiv 2210.08248). The
                # head of weights.safetensors is scaled by it.
                "temperature": {
                    "share": 0.0,  # of the training examples; 0: none
                    "bound": 5.0,  # on an example's derivative of the loss
                    "steps": 10,  # noised signs of the derivative, each halving the range
                },
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
            # Parameters and optimizer state: "replicated", or spread over the devices: "fsdp" for
            # all of them, "fsdp:REGEX" for those whose path matches.
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


class ConfigFile(NamedTuple):
    """A config file that was run: its path, the names it defines, and the argument given with it.

    Attributes:
        path: of the file.
        names: what it defines.
        argument: what followed the colon; None if there was none.
    """

    path: str
    names: dict[str, Any]
    argument: str | None

    def call(self, name: str) -> Any:
        """Calls one of its functions, with the argument if it takes one; generators become lists.

        Raises:
            ValueError: there is no such function, or it raised, naming the file and the line.
        """
        if name not in self.names:
            raise ValueError(f"config={self.path!r} defines no {name}().")
        function = self.names[name]
        with _errors_by_line(self.path):
            takes = inspect.signature(function).parameters
            value = function(self.argument) if takes else function()
            return list(value) if inspect.isgenerator(value) else value


def shipped() -> dict[str, Path]:
    """Returns the files of the configs that come with the package, by name."""
    here = Path(__file__).parent
    installed = here / "configs"  # a checkout has them beside the package
    folder = installed if installed.is_dir() else here.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def run_file(file: str) -> ConfigFile:
    """Runs a config file.

    Args:
        file: "FILE" or "FILE:ARGUMENT"; FILE is a path or, if there is no such file, the name of a
            config that comes with the package.

    Raises:
        ValueError: there is no such file, or it raised, naming the file and the line.
    """
    name, _, argument = file.partition(":")
    path = name if os.path.isfile(name) else str(shipped().get(name, ""))
    if not path:
        hint = did_you_mean(Path(name).stem, shipped())
        raise ValueError(
            f"config={name!r} is neither a file nor one of {', '.join(shipped())}.{hint}"
        )
    with _errors_by_line(path):
        return ConfigFile(path, runpy.run_path(path), argument or None)


def load(file: str) -> ConfigDict:
    """Runs `get_config` of a config file, see `run_file`; the config that it returns is locked.

    Raises:
        ValueError: in one line, what is wrong with the file or with the fields it sets.
    """
    source = run_file(file)
    config = source.call("get_config")
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"config={source.path!r}: get_config() must return a config that starts from "
            f"dpjax.config.default(), got {type(config).__name__}."
        )
    problem = _wrong_fields(config, default(), "config")
    if problem is not None:
        raise ValueError(f"config={source.path!r}: {problem}")
    return config.lock()


@contextlib.contextmanager
def _errors_by_line(path: str) -> Iterator[None]:
    """Turns whatever a config file raises into one line that names the file and the line."""
    try:
        yield
    except Exception as error:
        where, text = path, str(error).split("\n")[0]
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        if isinstance(error, SyntaxError):
            where, text = f"{error.filename}, line {error.lineno}", f"syntax error: {error.msg}"
        elif frames:
            where = f"{path}, line {frames[-1].lineno}"
            if not isinstance(error, ValueError):
                where += f", `{frames[-1].line}`"
        # ml_collections lists all fields and hides the nearest name at the end of the list.
        missing = re.search(r"^\W*(?:Key )?\W*(\w+)\W* does not exist and cannot", str(error))
        near = re.search(r'Did you mean \W*"(\w+)\W*" instead of \W*"(\w+)', str(error))
        if near is not None:
            text = f"there is no field {near[2]!r}: did you mean {near[1]!r}?"
        elif missing is not None:
            text = f"there is no field {missing[1]!r}."
        elif not isinstance(error, (SyntaxError, ValueError)):
            text = f"{type(error).__name__}: {text}"
        raise ValueError(f"{where}: {text}") from error


def _wrong_fields(config: ConfigDict, like: ConfigDict, above: str) -> str | None:
    """Says which field a config lacks, or has though no run would read it; None if there is none.

    A block under `unlocked()` can add any field, misspelled ones too.
    """
    for name in config:
        if name not in like:
            return unknown_field(like, name, above=above)
    for name, value in like.items():
        if name not in config:
            return f"{above} has no field {name!r}: start from dpjax.config.default()."
        section = isinstance(value, ConfigDict) and name != "options"
        if not section or (name == "dp" and config.dp is None):
            continue
        if not isinstance(config[name], ConfigDict):
            return f"{above}.{name}={config[name]!r} must be a section with fields."
        problem = _wrong_fields(config[name], value, f"{above}.{name}")
        if problem is not None:
            return problem
    return None


def unknown_field(config: ConfigDict, path: str, *, above: str = "config") -> str | None:
    """Says what is wrong with a dotted field path, naming the nearest field; None if it exists.

    Sections named `options` take any field: what they go to checks them.
    """
    node: Any = config
    for name in path.split("."):
        if not isinstance(node, ConfigDict):
            return f"{above} has no fields (it is {node!r}), got {path!r}."
        if above.endswith(".options"):
            return None
        if name not in node:
            near = nearest(name, node)
            hint = f"did you mean {near!r}?" if near else f"its fields are {', '.join(node)}."
            return f"{above} has no field {name!r}: {hint}"
        node, above = node[name], f"{above}.{name}"
    return None


def assign(config: ConfigDict, path: str, value: Any) -> None:
    """Sets one field of a config that is, and stays, locked.

    Args:
        config: to change.
        path: dotted, such as "dp.epsilon".
        value: of the field's type; None where the field is optional.

    Raises:
        ValueError: an unknown field, naming the nearest, or a value of another type.
    """
    problem = unknown_field(config, path)
    if problem is not None:
        raise ValueError(problem)
    node, name = _node(config, path)
    shown = f"config.{path}={value!r}"
    if value is None and not _optional(path):
        raise ValueError(f"{shown} must be {_KINDS.get(node.get_type(name), 'set')}.")
    free = ".options." in path
    if isinstance(value, Mapping) and not free and name != "options":
        raise ValueError(f"{shown}: set its fields one by one, as in config.{path}.FIELD.")
    try:
        with config.unlocked(), node.ignore_type() if free else contextlib.nullcontext():
            node[name] = ConfigDict(value) if isinstance(value, Mapping) else value
    except (TypeError, ValueError) as error:
        kind = _KINDS.get(node.get_type(name), f"of type {node.get_type(name).__name__}")
        raise ValueError(f"{shown} must be {kind}.") from error


def assign_text(config: ConfigDict, path: str, text: str) -> None:
    """Sets one field from text, as a command line gives it; see `assign`.

    >>> config = default()
    >>> assign_text(config, "optimizer.options.b1", "0.8")
    >>> assign_text(config, "dp.bound_schedule", "((0.0, 1), (0.5, 2))")
    >>> assign_text(config, "dp.epsilon", "one")
    Traceback (most recent call last):
    ValueError: config.dp.epsilon='one' must be a number.
    """
    problem = unknown_field(config, path)
    if problem is not None:
        raise ValueError(problem)
    node, name = _node(config, path)
    free = ".options." in path or name not in node
    assign(config, path, _parse(text, object if free else node.get_type(name)))


def without_infinite_budget(config: ConfigDict) -> ConfigDict:
    """Returns the config with dp=None if its epsilon is infinite, which means the same."""
    if config.dp is None or config.dp.epsilon != math.inf:
        return config
    config = config.copy_and_resolve_references()
    config.dp = None
    return config


_KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a tuple, such as ((0.0, 1.0), (0.5, 2.0))",
    ConfigDict: "a section with fields",
}
_WORDS = {"true": True, "false": False, "inf": math.inf, "none": None}


def _parse(text: str, kind: type) -> Any:
    """Returns the value that text stands for; the text itself where it is of no use."""
    if text == "None" or kind is str:
        return None if text == "None" else text
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    try:
        value = _WORDS[text.lower()] if text.lower() in _WORDS else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return _tuples(value) if kind is tuple else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _node(config: ConfigDict, path: str) -> tuple[ConfigDict, str]:
    """The section that holds a field, and the field's name in it."""
    *above, name = path.split(".")
    return functools.reduce(lambda node, key: node[key], above, config), name


def _optional(path: str) -> bool:
    """Whether a field may be None: it is None by default, or it is `dp`, or no field of ours."""
    if path == "dp" or ".options." in path or unknown_field(default(), path) is not None:
        return True
    node, name = _node(default(), path)
    return node[name] is None


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
