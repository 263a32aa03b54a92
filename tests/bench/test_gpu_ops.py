"""The parts of the check on a GPU that time single ops, as far as they run without one: kernels are interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import report

ROOT = Path(__file__).parents[2]


def interpreted(program: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


VISION = """
import json
from bench.gpu import vision
from bench.gpu.shapes import Limits
from moevlm.plugins.gpu.ops.segment_attention import SegmentAttentionOp
from tests.support.interpreted_device import Interpreted
op, calls = SegmentAttentionOp(2, 24, "bfloat16"), {"one": (1, 40), "several": (3, 16)}
print(json.dumps(list(vision.measure(op, calls, Interpreted(90), Limits(1e12, 1e9)))))
"""


def test_attention_among_patches_is_timed_and_held_to_torch() -> None:
    entries = interpreted(VISION)
    named = [(entry["images"], entry["by"]) for entry in entries]
    assert sorted(named) == [(images, by) for images in ("one", "several") for by in ("flex", "ours", "sdpa")]
    assert not report.failures(entries)
    assert entries[0]["of_peak"] == pytest.approx(4 * 40**2 * 2 * 24 / 1e-3 / 1e9)
    text = report.text_of(entries)
    assert "attention among patches" in text
    assert "several  sdpa" in text
    assert {aim["reached"] for aim in report.aims(entries)} == {1.0}


CANDIDATES = """
import json
from bench.gpu import candidates
from bench.gpu.shapes import Limits
from moevlm.plugins.gpu.ops.candidates import CandidatesOp
from tests.support.interpreted_device import Interpreted
candidates.TURNS = 1
print(json.dumps(list(candidates.measure(CandidatesOp(900, 20), (1, 3), Interpreted(90), Limits(1e9, 1e9)))))
"""


def test_candidates_are_timed_and_held_to_torch() -> None:
    entries = interpreted(CANDIDATES)
    assert [(entry["logits"], entry["rows"]) for entry in entries] == [
        (logits, rows) for logits in ("float32", "bfloat16") for rows in (1, 3)
    ]
    assert not report.failures(entries)
    assert entries[1]["of_bandwidth"] == pytest.approx(3 * 900 * 4 / 1e-3 / 1e9)
    assert "3 of bfloat16" in report.text_of(entries)
