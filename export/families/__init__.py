"""One file per model family; importing this package registers them all."""

from moevlm.export.families import (
    aria,
    ernie4_5_vl_moe,
    gemma4,
    glm4v_moe,
    internvl,
    kimi_k25,
    llama4,
    mistral3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_omni_moe,
    qwen3_vl_moe,
    text,
)
from moevlm.export.families.base import Family, family_for

__all__ = [
    "Family",
    "family_for",
    "aria",
    "ernie4_5_vl_moe",
    "gemma4",
    "glm4v_moe",
    "internvl",
    "kimi_k25",
    "llama4",
    "mistral3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni_moe",
    "qwen3_vl_moe",
    "text",
]
