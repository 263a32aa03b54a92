from pathlib import Path

import pytest

from tests.support.families import TINY
from tests.support.tiny import TinyCheckpoint


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint per family, to be left as it is."""
    root = tmp_path_factory.mktemp("saved")
    return {name: TinyCheckpoint(name).save(root / name) for name in TINY}
