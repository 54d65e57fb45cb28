"""Our text encoder against transformers': random weights, the same file, equal features.

Needs torch and transformers; run with `-m peers`.
"""

import dataclasses

import jax
import numpy as np
import pytest
from test_parity import CLASSES, TOLERANCE, assert_equal_logits, loaded, randomize, torch, warn

from dpjax import models

__all__ = ["torch"]  # a fixture

pytestmark = pytest.mark.peers

TEXT = models.TextConfig(
    vocab_size=50, width=24, depth=2, heads=3, mlp=40, positions=16, max_length=12
)
# Long enough to reach the last bucket of distances.
MPNET = dataclasses.replace(
    TEXT, positions=202, max_length=200, first_position=2, token_types=0, relative=32, pad_id=1
)


def tokens(config):
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (4, config.max_length))
    for row, length in enumerate((config.max_length, 7, 1, 3)):
        ids[row, length:] = config.pad_id
    return ids.astype(np.int32)


def hidden_states(torch, net, ids, pad_id):
    with torch.no_grad():
        ids = torch.from_numpy(ids).long()
        out = net(input_ids=ids, attention_mask=(ids != pad_id).long())
        return out.last_hidden_state.numpy()


@warn
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
def test_text_encoder(torch, tmp_path, family, pooling):
    transformers = pytest.importorskip("transformers")
    if family == "bert":
        net = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=TEXT.vocab_size,
                hidden_size=TEXT.width,
                num_hidden_layers=TEXT.depth,
                num_attention_heads=TEXT.heads,
                intermediate_size=TEXT.mlp,
                max_position_embeddings=TEXT.positions,
            )
        )
    elif family == "mpnet":
        net = transformers.MPNetModel(
            transformers.MPNetConfig(
                vocab_size=MPNET.vocab_size,
                hidden_size=MPNET.width,
                num_hidden_layers=MPNET.depth,
                num_attention_heads=MPNET.heads,
                intermediate_size=MPNET.mlp,
                max_position_embeddings=MPNET.positions,
                relative_attention_num_buckets=MPNET.relative,
                pad_token_id=MPNET.pad_id,
            )
        )
    else:
        net = transformers.DistilBertModel(
            transformers.DistilBertConfig(
                vocab_size=TEXT.vocab_size,
                dim=TEXT.width,
                n_layers=TEXT.depth,
                n_heads=TEXT.heads,
                hidden_dim=TEXT.mlp,
                max_position_embeddings=TEXT.positions,
            )
        )
    net = randomize(torch, net)
    net.save_pretrained(tmp_path)
    config = dataclasses.replace(MPNET if family == "mpnet" else TEXT, pooling=pooling)
    if family == "distilbert":
        config = dataclasses.replace(config, token_types=0)
    model = models.text_encoder(config, CLASSES)
    params = loaded(model, tmp_path / "model.safetensors", head=False)
    ids = tokens(config)
    hidden = hidden_states(torch, net, ids, config.pad_id)
    real = (ids != config.pad_id)[..., None]
    pooled = hidden[:, 0] if pooling == "cls" else (hidden * real).sum(1) / real.sum(1)
    assert np.ptp(pooled) > 0.1
    np.testing.assert_allclose(jax.jit(model.features)(params, ids), pooled, atol=TOLERANCE)
    logits = pooled @ params["head"]["kernel"] + params["head"]["bias"]
    assert_equal_logits(model, params, ids, logits)
