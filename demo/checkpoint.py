"""The checkpoint on disk: an ordinary Hugging Face directory in bf16."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3VLMoeForConditionalGeneration,
)

from demo.model import image_processor

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"


def save(model: Qwen3VLMoeForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Replaces `out` as a whole: a reader sees the old checkpoint or the new one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    fresh.chmod(0o755)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.bfloat16).save_pretrained(fresh)
    model.to(torch.float32).load_state_dict(kept)
    tokenizer.save_pretrained(fresh)
    processor = image_processor()
    processor.save_pretrained(fresh)
    name = fresh / "preprocessor_config.json"
    fields = json.loads(name.read_text())
    fields["image_processor_type"] = "Qwen2VLImageProcessorFast"
    name.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    for file in fresh.iterdir():
        file.chmod(0o644)
    stale = fresh.with_name(fresh.name + "-old")
    if out.exists():
        out.replace(stale)
    fresh.replace(out)
    shutil.rmtree(stale, ignore_errors=True)


def load(
    path: Path = CHECKPOINT,
) -> tuple[Qwen3VLMoeForConditionalGeneration, PreTrainedTokenizerFast]:
    """The model in fp32, with the checkpoint's bf16-rounded weights."""
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    model.set_experts_implementation("eager")
    return model.eval(), AutoTokenizer.from_pretrained(path)
