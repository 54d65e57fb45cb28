"""Pretraining of the quickstart's ViT on the UCI digits, which are public: without privacy.

    python -m dpjax.train --config=configs/pretrain_digits.py --workdir=/tmp/dpjax-pretrain
    cp /tmp/dpjax-pretrain/weights.safetensors dpjax/models/weights/vit_mini_digits.safetensors

The two commands made the shipped file. About two minutes on 2 CPU cores.
"""

from ml_collections import ConfigDict

from dpjax.config import default


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; it takes no argument."""
    if arg is not None:
        raise ValueError(f"arg={arg!r} must be absent.")
    config = default()
    config.data.name = "digits"
    config.data.pad = 1  # the digits then fill as much of the image as MNIST's do
    config.data.shift = 3
    config.data.pixel_noise = 0.2
    with config.unlocked():
        config.model.options = {"width": 64, "depth": 3, "heads": 4, "mlp": 128, "patch": 7}
    config.model.head_init = "random"
    config.dp = None
    config.batch_size = 128
    config.epochs = 125.0
    config.physical_batch = 160
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.log_every = 10
    config.checkpoint_every = 500
    return config
