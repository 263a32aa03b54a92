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
    kinds = ("ours", "flash", "cudnn", "efficient", "flex")
    assert named == [(images, by) for by in kinds for images in ("one", "several")]
    assert {entry["by"] for entry in entries if "skipped" not in entry} >= {"ours", "flash", "flex"}
    assert not report.failures(entries)
    assert entries[0]["of_peak"] == pytest.approx(4 * 40**2 * 2 * 24 / 1e-3 / 1e9)
    text = report.text_of(entries)
    assert "attention among patches" in text
    assert ["several", "flash", "1000.0"] in [line.split()[:3] for line in text.splitlines()]
    assert {aim["reached"] for aim in report.aims(entries)} == {1.0}


TUNE = """
import json
from bench.gpu import tune_vision
from tests.support.interpreted_device import Interpreted
class Timed(Interpreted):
    def seconds(self, calls):
        calls[0]()
        return 1 / dict(calls[0].draft.kernels[1].constants)["BN"]
tiles = [[16, 16, 4, 1], [16, 64, 4, 2], [16, 128, 4, 8]]
print(json.dumps(list(tune_vision.measure(Timed(86), {"80": (1, 20)}, 40, tiles))))
"""


def test_tuning_picks_the_fastest_tile_that_fits() -> None:
    tile, table = interpreted(TUNE)
    assert (tile["tile"], tile["columns"]) == ([16, 64, 4, 2], "80")
    assert tile["seconds"] < tile["seconds_before"]
    assert table["table"]["segments"]["16"]["80"] == tile["tile"]
    assert report.tiles_text([tile, table]).startswith('86: {"segments": {"16": {"80": [16, 64, 4, 2]')


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


DELTA = """
import json
from bench.gpu import delta
from bench.gpu.shapes import Limits
from moevlm.plugins.gpu.ops.gated_delta import GatedDeltaOp
from moevlm.plugins.ops.spec import GatedDeltaSpec
from tests.support.interpreted_device import Interpreted
delta.MOST_SETS = 1
op, points = GatedDeltaOp(GatedDeltaSpec(1, 2, 16, 16, 4), "float16"), (delta.Point(2), delta.Point(1, 1, 20))
print(json.dumps(list(delta.measure(op, points, Interpreted(90), Limits(1e9, 1e9)))))
"""


def test_the_gated_delta_rule_is_timed_against_the_limits() -> None:
    decode, mixture = interpreted(DELTA)
    assert not report.failures([decode, mixture])
    kept = 2 * 16 * 16 + 3 * 64
    assert decode["bytes"] == 2 * 2 * 4 * kept + 2 * (64 + 4 + 32) * 2
    assert decode["of_bandwidth"] == pytest.approx(decode["bytes"] / 1e-3 / 1e9)
    assert (decode["operations"], decode["of_peak"]) == (0, 0)
    assert mixture["operations"] == 2 * 20 * 2 * (4 * 32 * 16 + 3 * 16 * 16 + 32 * 16)
    text = report.text_of([decode, mixture])
    assert "2 decoded" in text and "1 decoded + 1 x 20" in text
