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
        with moevlm.runtime.load(path, names[0]) as reference:
            expected, _ = alone(reference, questions())
        with moevlm.runtime.load(path, names[1]) as runtime:
            return compare(runtime, expected) | {"graphs": runtime.engine.graphs}


def compare(runtime: Any, expected: list[str]) -> dict[str, Any]:
    """Answers of an engine, one after the other and then all at once, against those that are right."""
    found, seconds = alone(runtime, questions())
    many, together_seconds = together(runtime, questions())
    same, same_together = (sum(map(str.__eq__, texts, expected)) for texts in (found, many))
    entry: dict[str, Any] = {"answers": len(found), "same": same, "same_together": same_together}
    entry |= {"seconds_per_token": seconds, "together_seconds_per_token": together_seconds}
    # Rounding moves an answer of the small demo model now and then, but not one in ten.
    least = min(same, same_together)
    return (
        entry if least >= 0.9 * len(found) else entry | {"error": f"only {least} of {len(found)} answers are the same"}
    )


def questions() -> list[list[dict[str, Any]]]:
    """All about the demo's images, as messages."""
    samples = ROOT / "demo" / "samples"
    return [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": samples / sample["image"]},
                    {"type": "text", "text": question["question"]},
                ],
            }
        ]
        for sample in json.loads((samples / "samples.json").read_text())
        for question in sample["questions"]
    ]


def alone(runtime: Any, asked: list[Any]) -> tuple[list[str], float]:
    """Answers one after the other, and the least seconds per token."""
    texts, seconds = [], []
    for messages in asked:
        start = time.perf_counter()
        pieces = list(runtime.generate(messages, max_new_tokens=NEW_TOKENS, temperature=0))
        seconds.append((time.perf_counter() - start) / max(pieces[-1].usage.new_tokens, 1))
        texts.append("".join(piece.text for piece in pieces))
    return texts, min(seconds)


def together(runtime: Any, asked: list[Any]) -> tuple[list[str], float]:
    """Answers of requests that share steps, and seconds per token of all."""
    runtime.forget()  # else the prompts would not be read again
    start = time.perf_counter()
    answers = runtime.generate_many(asked, max_new_tokens=NEW_TOKENS, temperature=0)
    seconds = time.perf_counter() - start
    return [answer.text for answer in answers], seconds / sum(answer.usage.new_tokens for answer in answers)
