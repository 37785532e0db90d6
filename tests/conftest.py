from pathlib import Path

import pytest
from hypothesis import settings

from support import language_checkpoint, vision_checkpoint

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random MatMamba-Vision checkpoint: 3 layers, width 64, 10 tokens. Not to be written to."""
    return vision_checkpoint(tmp_path_factory.mktemp("vision") / "source")


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random MatMamba language model: 3 layers, width 64, 104 tokens. Not to be written to."""
    return language_checkpoint(tmp_path_factory.mktemp("language") / "source")
