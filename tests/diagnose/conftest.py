"""Tiny models, each made once."""

import pytest

from tests.support.tiny_models import tiny
from tests.support.tools import extra


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folder of a tiny model of the kind, made once."""
    extra("torch")
    extra("peft")
    held = {}

    def get(kind):
        if kind not in held:
            held[kind] = tiny(kind, tmp_path_factory.mktemp(kind))
        return held[kind]

    return get
