"""What a language model reveals of its training text, with and without privacy, as a study.

    python -m experiments.run_study --config=experiments/memorization/study.py:laptop --workdir=DIR
    dpjax report DIR

Secrets are planted in the training text in 1 to 16 copies (see `corpus`), and a model is trained on
it without privacy, at epsilon 8 and 2 per record, and at epsilon 8 per person, whose copies are one
unit. After training, every possible code is ranked: the *exposure* of a canary is
log2 |codes| - log2 rank (Carlini et al. 2018, arXiv 1802.08232, definition 5), so that a code of
four digits has at most 13.3 bits, and 1.4 bits on average if nothing was learned. It is *extracted*
if the model, given what an attacker knows, writes the code as its most likely continuation.

Sizes: "smoke" and "laptop" train a decoder of bytes from scratch on made-up messages; "paper" is
SmolLM2-135M with LoRA on e-mails, for an accelerator, with `corpus` run first and the files
--data_dir=DATA --weights=SmolLM2-135M/model.safetensors, and tokenizer.json where it is started.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib import pyplot as plt
from ml_collections import ConfigDict

from dpjax import build, data, files, models
from dpjax.config import default
from experiments import study
from experiments.memorization import corpus
from experiments.study import Figure, Metric, Result, Row, Table

__all__ = ["exposure", "get_config", "measure", "report", "sweep"]

_ARMS: tuple[tuple[str, float, str | None], ...] = (
    ("not private", math.inf, None),
    ("epsilon 8 per record", 8.0, None),
    ("epsilon 2 per record", 2.0, None),
    ("epsilon 8 per person", 8.0, "person"),
)
_MESSAGES = {"smoke": (150, 20), "laptop": (1200, 200)}  # training, held out
_SEEDS = {"smoke": 1, "laptop": 3, "paper": 3}
_CHANCE = math.log2(math.e)  # mean exposure of a code whose rank is uniform
_CHUNK = 1000  # candidates scored at once


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the base config; `arg` is a size, see `study.size`."""
    config = default()
    config.task = "causal_lm"
    config.checkpoint_every = 10_000
    config.log_every = 10
    config.model.name = "decoder"
    chosen = study.size(arg)
    if chosen == "paper":
        config.data.name, config.data.tokenizer = "memorization", "tokenizer.json"
        config.model.size, config.model.dtype = "smollm2_135m", "bfloat16"
        config.finetune = "lora:16:attn/|mlp/"
        config.batch_size, config.physical_batch, config.epochs = 512, 64, 10.0
        config.optimizer.learning_rate = 1e-3
        config.model.remat = True
        with config.unlocked():
            config.model.options = {"max_length": 256}
        return config
    folder = files.cache_dir(f"memorization-{chosen}")
    train, test = _MESSAGES[chosen]
    texts = corpus.messages(train + test, seed=0)
    corpus.write(folder, texts[test:], texts[:test])
    corpus.write_byte_tokenizer(folder / "tokenizer.json")
    config.data.name, config.data.tokenizer = str(folder), str(folder / "tokenizer.json")
    config.model.size = "tiny"
    config.batch_size, config.physical_batch = 64, 64
    config.epochs = 15.0 if chosen == "laptop" else 1.0
    config.optimizer.learning_rate = 5e-3
    with config.unlocked():
        config.model.options = {"vocab_size": 257, "max_length": 48, "tied": False}
        if chosen == "smoke":
            config.model.options.update({"width": 16, "depth": 1, "heads": 2, "mlp": 16})
    return config


def sweep(arg: str | None = None) -> Iterator[Row]:
    """Yields the overrides of every run."""
    for seed in range(_SEEDS[study.size(arg)]):
        for _, epsilon, unit in _ARMS:
            yield {"seed": seed, "private_seed": seed, "dp.epsilon": epsilon, "data.unit": unit}


def exposure(scores: np.ndarray, secret: int) -> float:
    """Returns log2 |codes| - log2 rank, in bits.

    Args:
        scores: negative log-likelihood of every code `[codes]`; ties count half.
        secret: index of the true one.
    """
    lower = np.sum(scores < scores[secret])
    ties = np.sum(scores == scores[secret]) - 1
    return math.log2(len(scores)) - math.log2(1 + lower + ties / 2)


def measure(run: build.Run, initial: models.Params, final: models.Params) -> dict[str, Any]:
    """Measures exposure and extraction of every canary, on plain weights after training."""
    config = run.config
    shape = build.model.size("model.options", models.DECODERS, config.model)
    net = models.decoder(shape, dtype=config.model.dtype)
    spec = models.TextSpec(shape.max_length, shape.vocab_size, causal=True)
    codec = models.text_codec(models.locate(config.data.tokenizer), spec)
    facts, _ = build.next_token.functions(net)
    score = jax.jit(lambda windows: facts(final, windows).nll)
    speak = models.Generator(shape, final, codec, config.model.dtype)
    planted = corpus.canaries()
    codes = [f"{number:0{corpus.DIGITS}d}" for number in range(10**corpus.DIGITS)]
    written = speak([one.prefix for one in planted], temperature=0.0, max_tokens=2 * corpus.DIGITS)
    found = []
    for one, text in zip(planted, written, strict=True):
        table = np.concatenate([data.windows(one.prefix, code, codec, 32) for code in codes])
        parts = [table[start : start + _CHUNK] for start in range(0, len(table), _CHUNK)]
        scores = np.concatenate([np.asarray(score(part)) for part in parts])
        found.append(
            {
                "copies": one.copies,
                "exposure": exposure(scores, int(one.code)),
                "extracted": text.startswith(one.code),
            }
        )
    return {"canaries": found}


def _of(copies: int | None, field: str) -> Metric:
    """The mean of a fact over the canaries of so many copies; None: of all."""

    def mean(result: Result) -> float:
        rows = result.measured["canaries"]
        return float(np.mean([r[field] for r in rows if copies in (None, r["copies"])]))

    return mean


_METRICS: dict[str, Metric] = {
    "held-out perplexity": lambda r: r.evaluation["perplexity"],
    "bits per byte": lambda r: r.evaluation["bits_per_byte"],
    **{f"exposure, {n} copies [bits]": _of(n, "exposure") for n in corpus.COPIES},
    "extracted [%]": lambda r: 100 * _of(None, "extracted")(r),
}


def report(workdir: Path) -> list[Path]:
    """Rebuilds the table and the figure from the files of the runs."""
    results = study.read(workdir)
    ended = [r for r in results if r.config and r.measured]
    rows = []
    for name, epsilon, unit in _ARMS:
        arm = [
            r for r in ended
            if r.overrides["data.unit"] == unit and float(r.overrides["dp.epsilon"]) == epsilon
        ]  # fmt: skip
        for row in study.summarize(arm, {"epsilon": "dp.epsilon"}, _METRICS):
            row.pop("epsilon")
            rows.append({"training": name, **row})
    limit = math.log2(10**corpus.DIGITS)
    parts = [
        f"Two secrets of {corpus.DIGITS} digits for each number of copies. Exposure is at most "
        f"{limit:.1f} bits (the true code ranks first of all) and {_CHANCE:.1f} bits on average if "
        "nothing was learned; a secret counts as extracted if greedy decoding after the known "
        "words writes it. Mean ± half width of the 95 % interval over seeds, which change initial "
        "weights, batches and noise. Epsilon per record does not cover a secret of 16 records as a "
        "whole; epsilon per person does.",
        Table("memorization", "What was learned of the text, and of the secrets", rows),
        *_figure(rows, limit),
    ]
    return study.write(workdir, "Secrets in the training text of a language model", parts, results)


def _figure(rows: Sequence[Row], limit: float) -> list[Figure]:
    if not rows:
        return []
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    for row in rows:
        names = [f"exposure, {n} copies [bits]" for n in corpus.COPIES]
        left.errorbar(
            corpus.COPIES, [row[name] for name in names],
            np.nan_to_num([row[f"{name} ±"] for name in names]), fmt="o-", capsize=3,
            label=row["training"],
        )  # fmt: skip
    left.axhline(limit, color="0.4", ls="--", lw=1)
    left.text(1, limit + 0.2, "the code is the model's first guess", va="bottom", fontsize=8)
    left.axhline(_CHANCE, color="0.4", ls=":", lw=1)
    left.text(1, _CHANCE, "nothing learned, on average", va="bottom", fontsize=8)
    left.set(
        xscale="log", xlabel="copies of the secret in the training text", ylabel="exposure [bits]",
        title="What the model knows of a secret", ylim=(0, limit + 1),
    )  # fmt: skip
    left.set_xticks(corpus.COPIES, [str(n) for n in corpus.COPIES], minor=False)
    left.xaxis.minorticks_off()
    left.grid(alpha=0.3)
    left.legend(fontsize=8, loc="center left")
    names = [row["training"] for row in rows]
    values = [row["bits per byte"] for row in rows]
    spread = np.nan_to_num([row["bits per byte ±"] for row in rows])
    right.barh(names, values, xerr=spread, color=[f"C{i}" for i in range(len(rows))], capsize=3)
    right.invert_yaxis()
    right.set(xlabel="bits per byte of held-out text", title="What it knows of the language")
    right.grid(alpha=0.3, axis="x")
    return [Figure("exposure", "Bars are 95 % intervals over seeds; lower bits are better", figure)]
