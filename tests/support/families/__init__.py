"""Tiny models of every family, one file each."""

from tests.support.families import (
    deepseek_v3,
    ernie4_5_vl_moe,
    gemma4,
    glm4_moe,
    glm4v_moe,
    gpt_oss,
    internvl,
    kimi_k2,
    kimi_k25,
    llama4,
    llama4_text,
    mistral3,
    mixtral,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_omni_moe,
    qwen3_vl_moe,
)
from tests.support.families.base import TinyFamily

TINY: dict[str, TinyFamily] = {
    "qwen3_vl_moe": qwen3_vl_moe.FAMILY,
    "glm4v_moe": glm4v_moe.FAMILY,
    "qwen3_5": qwen3_5.FAMILY,
    "qwen3_5_moe": qwen3_5_moe.FAMILY,
    "qwen3_omni_moe": qwen3_omni_moe.FAMILY,
    "gemma4": gemma4.FAMILY,
    "llama4": llama4.FAMILY,
    "mistral3": mistral3.FAMILY,
    "internvl": internvl.FAMILY,
    "kimi_k25": kimi_k25.FAMILY,
    "ernie4_5_vl_moe": ernie4_5_vl_moe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "mixtral": mixtral.FAMILY,
    "glm4_moe": glm4_moe.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
    "kimi_k2": kimi_k2.FAMILY,
    "llama4_text": llama4_text.FAMILY,
}
