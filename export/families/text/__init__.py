"""One file per text model; importing this package registers them all."""

from moevlm.export.families.text import gpt_oss, llama4_text, qwen3_moe
from moevlm.export.families.text.base import TextModel, text_model, text_models

__all__ = ["TextModel", "gpt_oss", "llama4_text", "qwen3_moe", "text_model", "text_models"]
