"""The installed plugin library in a real TensorRT-RTX, which builds engines with it on a machine without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list[object]]:
    if find_spec("tensorrt_rtx_libs") is None:
        pytest.skip("no TensorRT-RTX (pip install tensorrt-rtx)")
    command = [sys.executable, "-m", "tests.plugins.tensorrt.rtx_build", tmp_path_factory.mktemp("links")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


EXPERT_OUTPUTS = [["y", "HALF", [-1, 12]]]
ATTENTION_OUTPUTS = [["y", "BF16", [-1, 16]], ["rows", "INT32", [-1]]]
ROUTER_OUTPUTS = [["expert_index", "INT32", [-1, 2]], ["expert_weight", "FLOAT", [-1, 2]]]


@pytest.mark.parametrize(
    ("case", "outputs"),
    [(0, ROUTER_OUTPUTS), (1, EXPERT_OUTPUTS), (2, EXPERT_OUTPUTS), (3, ATTENTION_OUTPUTS)],
    ids=["router", "experts", "program as a tensor", "attention"],
)
def test_engine_is_built_with_the_plugin_and_its_program(
    results: list[list[object]], case: int, outputs: list[object]
) -> None:
    size, has_program, layers, made, errors = results[case]
    assert size
    assert has_program
    assert (layers, made, errors) == (["PLUGIN_V3"], outputs, [])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (4, "MoEExperts: input gate_up has shape [9, 12, 12], its kernels were compiled for [8, 12, 12]"),
        (5, "MoEExperts: input x has T = 1..4097 (allowed: 1 to 4096)"),
        (6, "PagedAttention: input query_start has N = 1..65 (allowed: 1 to 64)"),
    ],
    ids=["shape", "tokens", "sequences"],
)
def test_engine_with_other_shapes_is_refused_by_name(results: list[list[object]], case: int, message: str) -> None:
    size, _, layers, _, errors = results[case]
    assert (size, layers, errors) == (0, ["PLUGIN_V3"], [message])
