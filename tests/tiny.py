"""The smallest real run: one-block ViT on the UCI digits, a few steps."""

import os

from dpjax.config import default


def on_devices(count):
    """The environment of a process that compiles as fast as the tests, on host devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": flags}


def tiny_config(**changes):
    """`changes` are dotted paths with __ for dots: dp__epsilon=1."""
    config = default()
    config.data.name = "digits"
    with config.unlocked():
        config.model.options = {"width": 16, "depth": 1, "heads": 2, "mlp": 16, "image_size": 14}
    config.private_seed = 5
    config.dp.delta = 1e-4
    config.batch_size = 200
    config.physical_batch = 64
    config.epochs = 1.0
    config.checkpoint_every = 3
    for path, value in changes.items():
        *above, name = path.split("__")
        node = config
        for key in above:
            node = node[key]
        with config.unlocked():
            node[name] = value
    return config
