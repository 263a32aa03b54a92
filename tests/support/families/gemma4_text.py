"""Tiny models of gemma4_text: those of gemma4 without a tower."""

from tests.support.families import gemma4
from tests.support.families.base import TinyFamily

FAMILY = TinyFamily(
    gemma4.FIELDS | {"vision": {}, "top": {}},
    "Gemma4TextConfig",
    "Gemma4ForCausalLM",
    "",
    {
        name.removesuffix(", pooling of 3"): {key: value for key, value in options.items() if key != "vision"}
        | {"seed": 151 + number}
        for number, (name, options) in enumerate(gemma4.FAMILY.configurations.items())
    },
    values=gemma4.values,
    image="",
)
