"""A causal language model on your text: LoRA on attention and MLP, one record one unit.

    pip install tokenizers
    dpjax train --config=language_model --workdir=DIR --config.data.name=TEXT \\
        --config.data.tokenizer=MODEL/tokenizer.json --config.model.weights=MODEL/model.safetensors

TEXT is a folder with train.jsonl and test.jsonl, MODEL the files of SmolLM2-135M; the argument
names another size: --config=language_model:qwen2_5_0_5b. Records are cut to 128 tokens. For an
accelerator; not measured.
"""

from ml_collections import ConfigDict

from dpjax.config import default

SIZES = ("smollm2_135m", "smollm2_360m", "llama3_2_1b", "qwen2_5_0_5b")


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is one of `SIZES`, the first by default."""
    if arg not in (None, *SIZES):
        raise ValueError(f"arg={arg!r} must be absent or one of {', '.join(SIZES)}.")
    config = default()
    config.task = "causal_lm"
    config.data.name = "text"
    config.data.tokenizer = "tokenizer.json"
    config.model.name = "decoder"
    config.model.size = arg or SIZES[0]
    config.model.dtype = "bfloat16"
    config.finetune = "lora:16:attn/|mlp/"
    config.dp.epsilon = 8.0
    config.dp.sampler = "random_allocation"
    # N is that of your text. The planner picks 2048 for 5,000 records, which takes 20 steps. 512
    # takes 100, at 36 % more noise: the planner's rule was measured on heads, not on decoders.
    config.batch_size = 512
    config.physical_batch = 64
    config.epochs = 10.0
    config.optimizer.learning_rate = 1e-3
    config.model.remat = True
    return config
