from collections.abc import Iterator
from pathlib import Path

import pytest

from moevlm.export.families import base
from tests.support.checkpoints import FAMILIES
from tests.support.tiny import TinyCheckpoint


@pytest.fixture(scope="module")
def hybrid_family() -> Iterator[None]:
    """The family that is made for tests, as long as a module's tests run."""
    from tests.support.hybrid.family import Hybrid

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(base._REGISTRY, "hybrid_test", Hybrid)
        yield


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint per family, to be left as it is."""
    root = tmp_path_factory.mktemp("saved")
    return {name: TinyCheckpoint(name).save(root / name) for name in FAMILIES}
