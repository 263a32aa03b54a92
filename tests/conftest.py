import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.tiny import TinyCheckpoint

# Read when torch is first imported. At these sizes threads only wait for each other: twenty times the time, where the
# cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# ONNX Runtime's telemetry is off in the tests that import it themselves, too.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# A shell ignores interrupts for what it runs in the background, and children inherit that; some tests interrupt theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3_vl_moe checkpoint with tokenizer, chat template and preprocessor. To be left as it is."""
    return TinyCheckpoint(side_files=True).save(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The targets reference and ort-cpu of `tiny_checkpoint`. To be left as it is: copy before changing it."""
    from moevlm.export.build import build

    return build(tiny_checkpoint, tmp_path_factory.mktemp("tiny") / "demo.moevlm", ["reference", "ort-cpu"]).directory


@pytest.fixture(scope="module")
def hybrid_family() -> Iterator[None]:
    """The family that is made for tests, as long as a module's tests run."""
    from moevlm.export.families import base
    from tests.support.hybrid.family import Hybrid

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(base._REGISTRY, "hybrid_test", Hybrid)
        yield


@pytest.fixture(scope="session", autouse=True)
def _checked_passes() -> Iterator[None]:
    """Every graph rewrite of every test is held to what it requires and ensures."""
    from moevlm.export.passes.base import checked

    with checked():
        yield


@pytest.fixture
def save_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Saves TinyCheckpoint(**options) under `tmp_path`, each time to a new directory."""
    return lambda **options: TinyCheckpoint(**options).save(tmp_path / f"checkpoint{len(list(tmp_path.iterdir()))}")
