"""Shared engines. Tests never change them."""

import pytest

from analyzers.engine import Engine, load
from tests import tiny


@pytest.fixture(scope="session")
def tiny_engine() -> Engine:
    return tiny.engine()


@pytest.fixture(scope="session", params=tiny.FAMILIES)
def any_engine(request) -> Engine:
    """One tiny engine of every family."""
    return tiny.engine(request.param)


@pytest.fixture(scope="session")
def smollm() -> Engine:
    """The default model in float32, really loaded."""
    return load()
