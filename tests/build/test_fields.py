"""Where the fields of a config get their values; every config file of the repository is read."""

import pytest
from ml_collections import ConfigDict
from test_configs import CONFIGS

from dpjax.build import fields
from dpjax.config import default


def leaves(node):
    for value in node.values():
        yield from leaves(value) if isinstance(value, ConfigDict) else [value]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_files(path):
    config = fields.load(str(path))
    assert config.is_locked
    assert all(isinstance(v, (int, float, str, bool, tuple, type(None))) for v in leaves(config)), (
        "values only"
    )
    assert set(config) == set(default())
    assert f"dpjax train --config={path.stem}" in path.read_text()
    with pytest.raises(ValueError, match="arg="):
        fields.load(f"{path}:no such argument")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("dp.epsilom", "'epsilon'"),
        ("bacth_size", "'batch_size'"),
        ("dp.epsilon.x", "has no fields"),
        ("dp.zzz", "its fields are"),
    ],
)
def test_unknown_fields(path, text):
    assert text in fields.unknown_field(default(), path)


def test_known_fields():
    assert fields.unknown_field(default(), "optimizer.learning_rate") is None
