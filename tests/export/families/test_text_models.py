"""Text models by their own model_type: behind a tower, whichever of those that it takes config.json names."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

from moevlm.export.config import ModelConfig
from moevlm.export.families.binding import bind
from moevlm.export.families.fields import Fields
from moevlm.export.families.text import text_model, text_models
from moevlm.export.families.text.wrapper import Wrapper
from moevlm.export.graph.weights import Constant
from moevlm.runtime.core.errors import FieldError, UnsupportedModelError


class Joined(Wrapper):
    """A family as they are written, without a tower to translate."""

    texts: ClassVar = ("qwen3_moe",)
    tower: ClassVar = {"vision.merger.weight": "merger.weight"}
    model: ClassVar = "language_model.model."
    head: ClassVar = "language_model.lm_head.weight"
    own_left_out: ClassVar = {r"^audio\.": "it hears nothing"}
    own_names: ClassVar = {"image_begin": "boi_token_id"}

    def translate(self, fields: Fields) -> ModelConfig:
        text = fields.sub("text_config")
        raise FieldError("experts", self.text.decoder(text, tied=False).hidden, "never")


def values(**text: Any) -> dict[str, Any]:
    return {
        "text_config": {
            "model_type": "qwen3_moe",
            **dict.fromkeys(("hidden_size", "vocab_size", "max_position_embeddings"), 32),
            **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2),
            **dict.fromkeys(("num_experts", "num_experts_per_tok", "moe_intermediate_size"), 4),
            "hidden_act": "silu",
            "rope_theta": 1e4,
        }
        | text
    }


def test_a_wrapper_has_the_weights_and_names_of_the_text_model_inside() -> None:
    family = Joined.of(values())
    assert isinstance(family.text, text_models()["qwen3_moe"])
    assert family.weights["decoder.norm.weight"] == "language_model.model.norm.weight"
    assert family.weights["decoder.head"] == "language_model.lm_head.weight"
    assert family.weights["vision.merger.weight"] == "merger.weight"
    assert set(family.left_out) == {r"rotary_emb\.inv_freq", r"^audio\."}
    assert (family.router_suffix, family.field_name("image_begin")) == ("mlp.gate", "boi_token_id")
    parameters = {"decoder.head": (4, 2), "vision.merger.weight": (3,), "decoder.embedding": (4, 2)}
    given = {
        "language_model.lm_head.weight": np.ones((4, 2), np.float32),
        "language_model.model.embed_tokens.weight": np.ones((4, 2), np.float32),
        "merger.weight": np.ones(3, np.float32),
    }
    bound = bind(family, parameters, {name: Constant(array) for name, array in given.items()})
    assert set(bound.used) == set(given)


def test_what_the_text_model_refuses_is_named_inside_of_text_config() -> None:
    config = values()
    with pytest.raises(UnsupportedModelError, match=r"text_config\.num_experts = 32 \(allowed: never\)"):
        Joined.of(config).config(config)


def test_another_text_model_is_refused_by_name() -> None:
    told = r'^unsupported value in config.json: text_config.model_type = "llama" \(supported: qwen3_moe\)$'
    with pytest.raises(UnsupportedModelError, match=told):
        Joined.of(values(model_type="llama"))
    with pytest.raises(UnsupportedModelError, match=r"text_config.model_type = .*\(supported: qwen3_moe\)"):
        text_model(Fields(values()["text_config"] | {"model_type": ["qwen3_moe"]}, "text_config"), ("qwen3_moe",))


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text", "ministral3", "mixtral"])
def test_heads_that_config_json_leaves_out_are_those_of_transformers(model_type: str) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(model_type, hidden_size=96, num_attention_heads=16)
    left = {"num_key_value_heads", "head_dim"}
    fields = Fields({name: value for name, value in theirs.to_dict().items() if name not in left})
    mixer: Any = text_model(fields, (model_type,)).decoder(fields, tied=False).layers[0].mixer
    assert (mixer.kv_heads, mixer.head_dim) == (theirs.num_key_value_heads, theirs.head_dim or 6)
