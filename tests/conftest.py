"""For all tests. tests/gpu runs with nothing but torch, triton, numpy and pytest: other packages are imported late."""

import contextlib
from pathlib import Path

import pytest

with contextlib.suppress(ModuleNotFoundError):
    from hypothesis import settings

    settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
    settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random MatMamba-Vision checkpoint: 3 layers, width 64, 10 tokens. Not to be written to."""
    from support import vision_checkpoint

    return vision_checkpoint(tmp_path_factory.mktemp("vision") / "source")


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random MatMamba language model: 3 layers, width 64, 104 tokens. Not to be written to."""
    from support import language_checkpoint

    return language_checkpoint(tmp_path_factory.mktemp("language") / "source")
