"""The loss of a record: its mean over target tokens, in chunks, through the engine's products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from causal import causal_config

from dpjax import build, dp, metrics, models
from dpjax.build import next_token
from dpjax.dp.engines import bookkeeping

TINY = models.DecoderConfig(
    vocab_size=67, width=16, depth=1, heads=2, kv_heads=1, mlp=24, max_length=40
)
UNTIED = models.DecoderConfig(**{**vars(TINY), "tied": False})


def random_windows(*lead, length=40, vocab=67, seed=0):
    rng = np.random.default_rng(seed)
    out = rng.integers(0, vocab, (*lead, 3, length)).astype(np.int32)
    out[..., 1, :] = np.where(rng.random((*lead, length)) < 0.3, -1, out[..., 1, :])
    return out


@functools.lru_cache
def start(config, finetune="full"):
    tuning = build.model.finetuning_set(finetune)(models.decoder(config))
    params = tuning.model.init(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), params)
    return tuning, params


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("chunk", [2**22, 67 * 16])
@pytest.mark.one_in(3)
def test_chunks_do_not_change_the_loss(config, chunk, monkeypatch):
    monkeypatch.setattr(next_token, "_CHUNK", chunk)  # 40 tokens in chunks of 16, with padding
    tuning, params = start(config)
    facts, loss_fn = next_token.functions(tuning.model)
    windows = random_windows(3)
    logits = jax.jit(tuning.model.apply)(params, windows[:, 0])
    wanted = windows[:, 1] >= 0
    each = optax.softmax_cross_entropy_with_integer_labels(logits, np.maximum(windows[:, 1], 0))
    nll = np.where(wanted, each, 0)
    found = jax.jit(facts)(params, windows)
    np.testing.assert_allclose(found.nll, nll.sum(1), rtol=1e-5)
    np.testing.assert_array_equal(found.tokens, wanted.sum(1))
    correct = wanted & (np.argmax(logits, -1) == windows[:, 1])
    np.testing.assert_array_equal(found.correct, correct.sum(1))
    np.testing.assert_array_equal(found.bytes, np.where(wanted, windows[:, 2], 0).sum(1))
    means = nll.sum(1) / wanted.sum(1)
    one = {"input": windows[0], "label": jnp.int32(0)}
    loss_fn = jax.jit(loss_fn)
    np.testing.assert_allclose(loss_fn(params, one), means[0], rtol=1e-5)
    # A unit of windows: the mean over the tokens of those that are there.
    unit = {"input": windows, "label": jnp.zeros(3, int), "record": np.array([True, True, False])}
    expected = nll[:2].sum() / wanted[:2].sum()
    np.testing.assert_allclose(loss_fn(params, unit), expected, rtol=1e-5)


def test_a_record_without_targets_has_no_loss_and_no_gradient():
    tuning, params = start(TINY)
    _, loss_fn = next_token.functions(tuning.model)
    window = random_windows()
    window[1] = -1
    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(
        params, {"input": window, "label": jnp.int32(0)}
    )
    assert loss == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))


def test_whole_logits_are_never_in_memory_where_the_output_layer_is_frozen(monkeypatch):
    monkeypatch.setattr(next_token, "_CHUNK", 67 * 16)
    tuning, params = start(UNTIED, "lora:2:attn/|mlp/")
    _, loss_fn = next_token.functions(tuning.model)
    trainable, frozen = models.finetune.split(params, tuning.trainable)
    clipped = dp.clipped_sum(
        lambda p, e: loss_fn(models.finetune.join(p, frozen), e), dp.flat(1.0), method="bookkeeping"
    )
    windows = random_windows(4, length=160)
    batch = {"input": windows, "label": jnp.zeros(4, int)}
    jaxpr = str(jax.make_jaxpr(clipped)(trainable, batch, jnp.ones(4, bool)))
    assert "4,16,67]" in jaxpr  # of a chunk
    assert "160,67]" not in jaxpr
    assert "10,16,67]" not in jaxpr


CASES = {
    "lora": (UNTIED, "lora:2:attn/|mlp/"),
    "full": (UNTIED, "full"),
    "head": (UNTIED, "head"),
    "tied": (TINY, "full"),
    "norms": (TINY, "film"),
}


@pytest.mark.parametrize(
    ("case", "chunk"), [*((case, 67 * 16) for case in CASES), ("lora", 2**22), ("tied", 2**22)]
)
@pytest.mark.one_in(2)
def test_the_engine_gives_the_numbers_of_vmap(case, chunk, monkeypatch):
    monkeypatch.setattr(next_token, "_CHUNK", chunk)
    tuning, params = start(*CASES[case])
    _, loss_fn = next_token.functions(tuning.model)
    trainable, frozen = models.finetune.split(params, tuning.trainable)

    def loss(p, example):
        return loss_fn(models.finetune.join(p, frozen), example)

    windows = random_windows(3, 2)
    record = np.array([[True, True], [True, False], [False, False]])
    batch = {"input": windows, "label": jnp.zeros((3, 2), int), "record": record}
    mask = jnp.asarray([True, True, True])
    sums = {}
    for method in ("vmap", "bookkeeping"):
        engine = dp.clipped_sum(loss, dp.flat(0.05, normalized=False), method=method)
        sums[method], facts = jax.jit(engine)(trainable, batch, mask)
        assert facts.norms[2, 0] == 0
        assert facts.norms[0, 0] > 0.05
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), *sums.values()
    )
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    plan = bookkeeping.plan(loss, trainable, example)
    sizes = dict(zip((leaf.path for leaf in plan), jax.tree.leaves(trainable)))
    large = {leaf.path for leaf in plan if leaf.route == "direct" and sizes[leaf.path].size > 500}
    # A tied table is looked up and multiplied: the engine's own tests say how it is treated.
    assert large <= ({"embed/tokens"} if case == "tied" else set())


def test_examples_that_are_no_windows_are_refused():
    tuning, params = start(TINY)
    with pytest.raises(ValueError, match=r"shape \[40\] must be a window \[3, length\]"):
        next_token.independent(tuning.model, params, (40,))


def test_metrics_of_tokens():
    rng = np.random.default_rng(0)
    nll, correct, tokens, size = (rng.integers(1, 9, 6).astype(np.float32) for _ in range(4))
    mask = np.array([1, 1, 0, 1, 1, 0], bool)
    nll[2] = np.nan  # padding
    facts = metrics.TokenFacts(*(jnp.asarray(x) for x in (nll, correct, tokens, size)))
    halves = [jax.tree.map(lambda x, s=s: x[s], facts) for s in (slice(0, 3), slice(3, 6))]
    whole = metrics.token_sums(halves[0], mask[:3]) + metrics.token_sums(halves[1], mask[3:])
    result = metrics.summarize(whole)
    mean = nll[mask].sum() / tokens[mask].sum()
    assert result["nll"] == pytest.approx(mean)
    assert result["perplexity"] == pytest.approx(np.exp(mean))
    assert result["accuracy"] == pytest.approx(correct[mask].sum() / tokens[mask].sum())
    bits = nll[mask].sum() / np.log(2) / size[mask].sum()
    assert result["bits_per_byte"] == pytest.approx(bits)
    none = metrics.token_sums(facts._replace(tokens=0 * facts.tokens), mask)
    with pytest.raises(ValueError, match="no token was to be predicted"):
        metrics.summarize(none)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "causal"}, "task='causal' must be one of"),
        ({"task": "classification"}, r"does not fit model\.name='decoder'"),
        ({"model__name": "vit", "model__size": "mini", "model__options": {}}, "does not fit"),
        ({"data__long_records": "wrap"}, r"data\.long_records='wrap'"),
        ({"data__template": "{prompt}"}, r"data\.template="),
        ({"data__unit_records": 4}, r"data\.unit_records=4"),
        ({"lp__fraction": 0.5}, r"lp\.fraction=0\.5"),
        ({"data__label_key": "kind"}, r"data\.label_key='kind'"),
        ({"data__flip": True}, "augmentations are for images"),
        ({"data__tokenizer": "nowhere.json"}, r"no weight file nowhere\.json"),
        ({"data__tokenizer": "minilm_l6_tokenizer"}, r"name the tokenizer\.json"),
        ({"data__subset": 3, "data__long_records": "split"}, r"data\.subset=3"),
    ],
)
def test_mistakes_are_named(changes, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build.build(causal_config(tmp_path, **changes))
