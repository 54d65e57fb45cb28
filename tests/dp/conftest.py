"""Fixtures of the core's tests."""

import pytest

from dpjax.dp.engines import products


@pytest.fixture
def without_margins(monkeypatch):
    """The engines are compared to rounding; what margins add is tested in test_engine_bound."""
    monkeypatch.setattr(products, "UNIT", 0.0)
