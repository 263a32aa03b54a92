"""Fixtures of the GPU tests: one interpreter for all."""

from collections.abc import Iterator

import pytest

from tests.plugins.gpu.interpreter import Interpreter, interpreter


@pytest.fixture(scope="session")
def triton_interpreter() -> Iterator[Interpreter]:
    with interpreter() as process:
        yield process
