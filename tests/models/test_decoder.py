"""Decoders: the arithmetic, published weights both ways, generation."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dpjax import models

TINY = models.DecoderConfig(
    vocab_size=97, width=32, depth=2, heads=4, kv_heads=2, mlp=48, theta=100.0, max_length=12
)
VARIANTS = {
    "smollm2": TINY,
    "untied": dataclasses.replace(TINY, tied=False, kv_heads=4),
    "qwen2": dataclasses.replace(TINY, qkv_bias=True, epsilon=1e-6, kv_heads=1),
    "llama3": dataclasses.replace(TINY, rope_factor=32.0, rope_original=24, head_dim=16),
}


def random_params(config, seed=0):
    """Every leaf away from its initial value, at a scale that keeps signal."""
    shapes = models.flatten(jax.eval_shape(models.decoder(config).init, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    flat = {}
    for path, leaf in shapes.items():
        draw = rng.normal(size=leaf.shape).astype(np.float32)
        flat[path] = 1 + 0.2 * draw if path.endswith("scale") else 0.3 * draw
    return models.unflatten(flat)


def tokens(config, *shape, seed=1):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


def reference(config, params, ids):
    """The logits of one sequence, written apart in float64 NumPy: loops and no batch."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in models.flatten(params).items()}
    size, length = config.head_width, len(ids)

    def norm(x, path):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.epsilon) * p[f"{path}/scale"]

    def turn(vector, position):
        out = np.empty_like(vector)
        for i in range(size // 2):
            wave = config.theta ** (-2 * i / size)
            length = 2 * np.pi / wave
            if config.rope_factor > 1:
                if length > config.rope_original:
                    wave /= config.rope_factor
                elif length > config.rope_original / 4:
                    mix = (config.rope_original / length - 1) / 3
                    wave = (1 - mix) * wave / config.rope_factor + mix * wave
            z = (vector[i] + 1j * vector[i + size // 2]) * np.exp(1j * position * wave)
            out[i], out[i + size // 2] = z.real, z.imag
        return out

    x = p["embed/tokens"][ids]
    for block in range(config.depth):
        at = f"blocks_{block}"
        y = norm(x, f"{at}/norm1")

        def project(name, heads, y=y, at=at):
            out = y @ p[f"{at}/attn/{name}/kernel"]
            if config.qkv_bias:
                out = out + p[f"{at}/attn/{name}/bias"]
            return out.reshape(length, heads, size)

        q, k = project("query", config.heads), project("key", config.kv_heads)
        v = project("value", config.kv_heads)
        mixed = np.zeros((length, config.heads, size))
        for head in range(config.heads):
            group = head * config.kv_heads // config.heads
            for t in range(length):
                scores = [
                    turn(q[t, head], t) @ turn(k[s, group], s) / size**0.5 for s in range(t + 1)
                ]
                weights = np.exp(scores - np.max(scores))
                mixed[t, head] = weights @ v[: t + 1, group] / weights.sum()
        x = x + mixed.reshape(length, -1) @ p[f"{at}/attn/out/kernel"]
        y = norm(x, f"{at}/norm2")
        gate = y @ p[f"{at}/mlp/gate/kernel"]
        hidden = gate / (1 + np.exp(-gate)) * (y @ p[f"{at}/mlp/up/kernel"])
        x = x + hidden @ p[f"{at}/mlp/down/kernel"]
    table = p["embed/tokens"].T if config.tied else p["head/kernel"]
    return norm(x, "norm") @ table


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_formulas(name):
    config = VARIANTS[name]
    net, params = models.decoder(config), random_params(config)
    ids = tokens(config, 9)
    batch = np.stack([ids, ids[::-1]])
    expected = reference(config, params, ids)
    logits = jax.jit(net.apply)(params, batch)
    assert logits.shape == (2, 9, config.vocab_size)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-4)
    assert np.std(expected) > 0.5


def test_no_token_sees_a_later_one():
    net, params = models.decoder(TINY), random_params(TINY)
    ids = tokens(TINY, 10)
    changed = ids.copy()
    changed[6:] = (changed[6:] + 1) % TINY.vocab_size
    one, other = map(functools.partial(jax.jit(net.apply), params), (ids, changed))
    np.testing.assert_array_equal(one[:6], other[:6])
    assert np.all(np.abs(one[6:] - other[6:]).max(-1) > 1e-3)


def test_bfloat16_and_remat_are_close_and_the_same():
    ids, params = tokens(TINY, 10), random_params(TINY)
    full = jax.jit(models.decoder(TINY).apply)(params, ids)
    half = models.decoder(TINY, dtype="bfloat16")
    assert jax.eval_shape(half.features, params, ids).dtype == jnp.bfloat16
    logits = jax.jit(half.apply)(params, ids)
    assert logits.dtype == jnp.float32
    gap = np.abs(logits - full).max() / np.abs(full).max()
    assert 1e-5 < gap < 0.1
    again = models.decoder(TINY, remat=True)

    def loss(net):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(net.apply(p, ids)))))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3),
        loss(models.decoder(TINY)), loss(again),
    )  # fmt: skip


def test_sizes_are_the_published_ones():
    counts = {
        "smollm2_135m": 134_515_008, "smollm2_360m": 361_821_120,
        "llama3_2_1b": 1_235_814_400, "qwen2_5_0_5b": 494_032_768,
    }  # fmt: skip
    for name, count in counts.items():
        shapes = jax.eval_shape(models.decoder(models.DECODERS[name]).init, jax.random.key(0))
        assert models.finetune.count(shapes) == count, name


@pytest.mark.parametrize("field", [{"kv_heads": 3}, {"heads": 5}, {"head_dim": 7}, {"depth": 0}])
def test_wrong_shapes_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field)).removeprefix("kv_")):
        dataclasses.replace(TINY, **field)


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_go_to_hugging_face_and_back(name, tmp_path):
    config = VARIANTS[name]
    net, params = models.decoder(config), random_params(config)
    tensors, shape = models.to_hugging_face(params, config)
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (config.width, config.mlp)
    assert ("lm_head.weight" in tensors) is not config.tied
    json.dumps(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    start = net.init(jax.random.key(0))
    loaded = net.load(start, str(tmp_path / "model.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    # In two files and an index, as larger models come.
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, tmp_path / file)
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, net.load(start, str(path)), params)
    index["weight_map"]["model.layers.9.x"] = "a.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"layers\.9"):
        net.load(start, str(path))
    models.save_weights(params, tmp_path / "own.safetensors")
    own = net.load(start, str(tmp_path / "own.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, own, params)


def test_files_of_bfloat16_are_read(tmp_path):
    params = random_params(TINY)
    tensors, _ = models.to_hugging_face(params, TINY)
    half = {n: np.asarray(jnp.asarray(t, jnp.bfloat16)) for n, t in tensors.items()}
    half["lm_head.weight"] = half["model.embed_tokens.weight"]  # some tied files repeat it
    save_file(half, tmp_path / "model.safetensors")
    net = models.decoder(TINY)
    loaded = net.load(net.init(jax.random.key(0)), str(tmp_path / "model.safetensors"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), loaded, params)


@pytest.mark.parametrize("name", ["smollm2", "qwen2"])
def test_gguf_files_are_read(name, tmp_path):
    gguf = pytest.importorskip("gguf")
    config = VARIANTS[name]
    params = random_params(config)
    tensors, _ = models.to_hugging_face(params, config)
    kinds = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for theirs, tensor in tensors.items():
        parts = theirs.split(".")
        if "layers" in parts:
            short = f"blk.{parts[2]}.{kinds[parts[-2]]}.{parts[-1]}"
        else:
            short = {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[-2]] + ".weight"
        if name == "smollm2" and kinds.get(parts[-2]) in ("attn_q", "attn_k"):
            # As llama.cpp's converter stores Llama's: interleaved pairs for halves.
            heads = config.heads if "q_proj" in theirs else config.kv_heads
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2)
            tensor = np.ascontiguousarray(tensor.reshape(-1, tensor.shape[-1]))
        writer.add_tensor(short, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    net = models.decoder(config)
    loaded = net.load(net.init(jax.random.key(0)), str(tmp_path / "m.gguf"))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def greedy(apply, params, prompt, count):
    """Without a cache: everything again for each token, padded to one length."""
    ids = list(prompt)
    for _ in range(count):
        padded = np.zeros(48, np.int32)
        padded[: len(ids)] = ids
        ids.append(int(np.argmax(apply(params, padded)[len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["qwen2", "llama3"])
def test_generation_with_a_cache_is_generation_without(name):
    config = VARIANTS[name]
    apply, params = jax.jit(models.decoder(config).apply), random_params(config)
    prompts = [[5, 6, 7], [8], list(range(40))]  # the last one is longer than a round of padding
    out = models.generate(config, params, prompts, max_tokens=5, temperature=0.0)
    assert out == [greedy(apply, params, prompt, 5) for prompt in prompts]


def test_sampling_follows_the_softmax():
    params = random_params(TINY)
    prompts = [[3, 4]] * 2000
    logits = models.decoder(TINY).apply(params, jnp.asarray([3, 4]))[-1]
    probs = np.asarray(jax.nn.softmax(logits / 0.7))

    def counts(**kwargs):
        out = models.generate(TINY, params, prompts, max_tokens=1, temperature=0.7, **kwargs)
        return np.bincount([one[0] for one in out], minlength=TINY.vocab_size) / len(out)

    all_of_them = counts(seed=1)
    assert np.abs(all_of_them - probs).sum() / 2 < 0.1
    kept = counts(seed=1, top_p=0.5)
    order = np.argsort(-probs)
    nucleus = order[: np.searchsorted(np.cumsum(probs[order]), 0.5) + 1]
    assert 1 < len(nucleus) < TINY.vocab_size / 2
    assert set(np.flatnonzero(kept)) <= set(nucleus)
    assert np.abs(kept[nucleus] - probs[nucleus] / probs[nucleus].sum()).sum() / 2 < 0.1
    np.testing.assert_array_equal(counts(seed=1), all_of_them)
    assert not np.array_equal(counts(seed=2), all_of_them)


def test_an_end_token_ends_a_continuation():
    config, params = TINY, random_params(TINY)
    free = models.generate(config, params, [[5, 6, 7]], max_tokens=5, temperature=0.0)[0]
    end = free[2]
    out = models.generate(config, params, [[5, 6, 7]], max_tokens=5, temperature=0.0, end=end)
    assert out == [free[: free.index(end)]]


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"prompts": [[]]},
              {"prompts": [[97]]}]
)  # fmt: skip
def test_arguments_of_generation_are_checked(wrong):
    arguments = {"prompts": [[1]], "max_tokens": 2, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        models.generate(TINY, random_params(TINY), **arguments)


def test_lora_reaches_attention_and_mlp_and_merges():
    net = models.decoder(TINY)
    tuning = models.finetune.lora(rank=2, targets="attn/|mlp/")(net)
    params = tuning.model.init(jax.random.key(0))
    trainable, _ = models.finetune.split(params, tuning.trainable)
    # A decoder's output layer is pretrained: adapters do not take it along.
    assert {path.split("/")[0] for path in models.flatten(trainable)} == {"lora"}
    assert len(models.flatten(trainable)) == 2 * 2 * 7
    params["lora"] = jax.tree.map(lambda x: x + 0.1, params["lora"])
    ids = tokens(TINY, 8)
    merged = tuning.merge(params)
    apply, adapted = jax.jit(net.apply), jax.jit(tuning.model.apply)
    logits = apply(merged, ids)
    np.testing.assert_allclose(logits, adapted(params, ids), rtol=1e-4, atol=1e-4)
    assert (
        np.abs(logits - apply({k: v for k, v in params.items() if k != "lora"}, ids)).max() > 0.01
    )


def test_sets_of_a_decoder():
    def trains(config, tune):
        tuning = tune(models.decoder(config))
        params = tuning.model.init(jax.random.key(0))
        return set(models.flatten(models.finetune.split(params, tuning.trainable)[0]))

    assert trains(TINY, models.finetune.head()) == {"embed/tokens"}
    assert trains(VARIANTS["untied"], models.finetune.head()) == {"head/kernel"}
    norms = trains(TINY, models.finetune.film())
    assert norms == {"norm/scale", *(f"blocks_{i}/norm{j}/scale" for i in (0, 1) for j in (1, 2))}


@pytest.mark.real_data
@pytest.mark.filterwarnings("ignore")
def test_smollm2_knows_the_capital_of_france(tmp_path):
    weights = models.locate("smollm2_135m_instruct")
    config = models.DECODERS["smollm2_135m"]
    net = models.decoder(config)
    params = net.load(jax.eval_shape(net.init, jax.random.key(0)), weights)
    codec = models.text_codec(weights, net.input, end="<|im_end|>")
    speak = models.Generator(config, params, codec)
    (answer,) = speak(["The capital of France is"], temperature=0.0, max_tokens=4)
    assert answer.startswith(" Paris")
    text = (
        "The sun rises in the east and sets in the west. Water boils at one hundred degrees "
        "Celsius and freezes at zero. The Earth turns around the sun once a year."
    )
    ids = np.asarray(codec.encode(text).ids)
    logits = net.apply(params, ids)
    nll = jax.nn.logsumexp(logits[:-1], -1) - logits[np.arange(len(ids) - 1), ids[1:]]
    assert nll.mean() < 3.5
    torch, transformers = torch_and_transformers()
    tensors, shape = models.to_hugging_face(params, config)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(shape))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = peer(torch.as_tensor(ids.astype(np.int64))[None]).logits.numpy()[0]
    np.testing.assert_allclose(logits, expected, atol=1e-3)


def torch_and_transformers():
    torch = pytest.importorskip("torch")
    if not torch.backends.cuda.is_built():
        # The usual torchvision needs CUDA to load its operators. No language model calls them,
        # but transformers imports torchvision, which needs these two declared.
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            with contextlib.suppress(RuntimeError):  # declared before
                torch.library.define(f"torchvision::{name}", schema)
    return torch, pytest.importorskip("transformers")


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name, tmp_path):
    torch, transformers = torch_and_transformers()
    config = VARIANTS[name]
    params = random_params(config)
    tensors, shape = models.to_hugging_face(params, config)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(shape))
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    ids = tokens(config, 2, 40)
    with torch.no_grad():
        expected = peer(torch.as_tensor(ids.astype(np.int64))).logits.numpy()
    logits = models.decoder(config).apply(params, ids)
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    # And what transformers writes is read: its own names and its own choice of tensors.
    peer.save_pretrained(tmp_path / "again")
    net = models.decoder(config)
    again = net.load(net.init(jax.random.key(0)), str(tmp_path / "again" / "model.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, again, params)
