"""Tiny models of qwen3_5_moe_text and of qwen3_5_text: those of qwen3_5_moe and of qwen3_5 without a tower."""

from tests.support.families import qwen3_5, qwen3_5_moe
from tests.support.families.base import TinyFamily


def alone(family: TinyFamily, config: str, model: str, seed: int) -> TinyFamily:
    """The first four of the family's configurations, each with another seed and without the fields of its tower."""
    configurations = {
        name.removesuffix(", merge of 3"): {key: value for key, value in options.items() if key != "vision"}
        | {"seed": seed + number}
        for number, (name, options) in enumerate([*family.configurations.items()][:4])
    }
    fields = family.fields | {"vision": {}, "top": {}}
    return TinyFamily(fields, config, model, "", configurations, values=family.values, image="")


MOE = alone(qwen3_5_moe.FAMILY, "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", 131)
DENSE = alone(qwen3_5.FAMILY, "Qwen3_5TextConfig", "Qwen3_5ForCausalLM", 141)
