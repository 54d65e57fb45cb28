"""CIFAR-10 from scratch: WRN-16-4 with group norm and weight standardization (arXiv 2204.13650).

    dpjax prepare cifar10 --source=cifar-10-python.tar.gz --data_dir=DATA
    dpjax train --config=scratch_wrn --workdir=DIR --config.data.data_dir=DATA

The gradients of sixteen augmented views of an example are averaged before clipping; batch size
4,096, flat clipping at 1, SGD at rate 2. Meant for an accelerator: every step computes gradients of
65,536 views. Not measured. The paper also averages the parameters over steps: add
`--config.ema=0.9999`.
"""

from ml_collections import ConfigDict

from dpjax.config import default


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; it takes no argument."""
    if arg is not None:
        raise ValueError(f"arg={arg!r} must be absent.")
    config = default()
    config.data.name = "cifar10"
    config.data.flip = True
    config.data.crop = 4
    config.data.multiplicity = 16
    config.model.name = "wide_resnet"
    config.model.size = "16_4"
    config.model.head_init = "random"
    config.finetune = "full"
    config.dp.epsilon = 8.0
    config.dp.bound = 1.0
    config.dp.normalized = False
    config.dp.sampler = "random_allocation"
    # As in the paper, and what the planner picks.
    config.batch_size = 4096
    config.physical_batch = 256
    config.microbatch = 16
    config.epochs = 168.0
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 2.0
    return config
