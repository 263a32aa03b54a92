"""One file per text model; importing this package registers them all."""

from moevlm.export.families.text import (
    aria_text,
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    llama4_text,
    ministral3,
    mistral4,
    mixtral,
    qwen3_moe,
)
from moevlm.export.families.text.base import TextModel, text_model, text_models

__all__ = [
    "TextModel",
    "aria_text",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "llama4_text",
    "ministral3",
    "mistral4",
    "mixtral",
    "qwen3_moe",
    "text_model",
    "text_models",
]
