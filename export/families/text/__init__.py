"""One file per text model; importing this package registers them all."""

from moevlm.export.families.text import (
    aria_text,
    deepseek_v3,
    ernie4_5_moe,
    gemma4_text,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    llama4_text,
    ministral3,
    mistral4,
    mixtral,
    qwen3_5_text,
    qwen3_moe,
    qwen3_next,
)
from moevlm.export.families.text.base import TextModel, text_model, text_models

__all__ = [
    "TextModel",
    "aria_text",
    "deepseek_v3",
    "ernie4_5_moe",
    "gemma4_text",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "llama4_text",
    "ministral3",
    "mistral4",
    "mixtral",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "text_model",
    "text_models",
]
