"""Cassava leaf disease (5 classes, about 6,000 images) with AugReg ViT-Ti/16 and FiLM.

    dpjax train --config=cassava --workdir=DIR \\
        --config.data.data_dir=DATA --config.model.weights=FILE.npz

DATA contains the TFDS data set `cassava`, prepared elsewhere with `tfds build cassava
--file_format=array_record`. 32 epochs, as in arXiv 2510.20616 for this small data set. Meant for an
accelerator. Not measured: data and weights were not available.
"""

from ml_collections import ConfigDict

from dpjax.config import default


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; it takes no argument."""
    if arg is not None:
        raise ValueError(f"arg={arg!r} must be absent.")
    config = default()
    config.data.name = "cassava"
    config.data.host_image_size = 224
    config.model.name = "vit"
    config.model.size = "ti16"
    config.model.weights = "vit_ti16_augreg"
    config.finetune = "film"
    config.dp.epsilon = 1.0
    config.dp.sampler = "random_allocation"
    # As in arXiv 2510.20616, at 0.3 % above the least noise; the planner picks 128, at 2.4 %.
    config.batch_size = 1024
    config.physical_batch = 256
    config.epochs = 32.0
    config.optimizer.learning_rate = 3e-3
    return config
