"""A real engine of TensorRT-RTX, built once."""

from pathlib import Path

import pytest

from moevlm.runtime.bundle.reader import Bundle


@pytest.fixture(scope="session")
def rtx_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`tiny_checkpoint` for two kinds of GPUs. To be left as it is."""
    from moevlm.export.build import build

    return build(tiny_checkpoint, tmp_path_factory.mktemp("rtx") / "tiny.moevlm", ["rtx:sm89,sm86"])
