"""The demo model through TensorRT, where one is installed that takes this GPU."""

import json
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
REFERENCE = "reference"
KINDS = {"rtx": "tensorrt_rtx", "trt": "tensorrt"}
NEW_TOKENS = 96


def run(sm: int) -> Iterator[dict[str, Any]]:
    """An entry for each kind of engine: what it answered and how fast, or in one line why there is none."""
    for kind, module in KINDS.items():
        entry: dict[str, Any] = {"kind": "engine", "target": f"{kind}:sm{sm}"}
        if find_spec(module) is None:
            yield entry | {"skipped": f"{module} is not installed"}
            continue
        try:
            yield entry | _measure(f"{kind}:sm{sm}", "bf16" if sm >= 80 else "fp16")
        except ImportError as error:
            yield entry | {"skipped": f"{error.name or error} is not installed"}
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            unfit = "takes no GPU" in text  # of the product; no failure of ours
            yield entry | {"skipped" if unfit else "error": text if unfit else f"{type(error).__name__}: {text}"}


def _measure(target: str, dtype: str) -> dict[str, Any]:
    import moevlm.runtime
    from moevlm.export.build import build

    with TemporaryDirectory() as folder:
        path = Path(folder) / "demo.moevlm"
        bundle = build(ROOT / "demo" / "checkpoint", path, [REFERENCE, target], dtype=dtype)
        names = sorted(bundle.manifest.engines, key=lambda name: name != REFERENCE)  # the other's has its dtype, too
        expected, found = (_answers(moevlm.runtime.load(path, name)) for name in names)
    same = sum(ours == theirs for (ours, _), (theirs, _) in zip(found, expected, strict=True))
    entry: dict[str, Any] = {"answers": len(found), "same": same}
    entry["seconds_per_token"] = min(seconds for _, seconds in found)
    # Rounding moves an answer of the small demo model now and then, but not one in ten.
    return entry if same >= 0.9 * len(found) else entry | {"error": f"only {same} of {len(found)} answers are the same"}


def _answers(runtime: Any) -> list[tuple[str, float]]:
    """(text, seconds per token) for each question about the demo's images."""
    samples = ROOT / "demo" / "samples"
    answers = []
    for sample in json.loads((samples / "samples.json").read_text()):
        for question in sample["questions"]:
            parts = [
                {"type": "image", "image": samples / sample["image"]},
                {"type": "text", "text": question["question"]},
            ]
            start = time.perf_counter()
            pieces = list(runtime.generate([{"role": "user", "content": parts}], max_new_tokens=NEW_TOKENS))
            seconds = (time.perf_counter() - start) / max(pieces[-1].usage.new_tokens, 1)
            answers.append(("".join(piece.text for piece in pieces), seconds))
    return answers
