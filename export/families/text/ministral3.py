"""Ministral 3: GQA whose queries grow with their place, dense feed-forward layers.

Source: transformers 5.24 `models/ministral3`. Checkpoints: mistralai/Ministral-3-3B, -8B, -14B.
"""

from moevlm.export.config import DecoderConfig, GQAConfig, LayerConfig, MLPConfig
from moevlm.export.families import shared
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import one_axis, rope_fields
from moevlm.export.families.text.base import TextModel, register_text
from moevlm.runtime.core.manifest import QueryScaleMetadata


@register_text("ministral3")
class Ministral3(TextModel):
    """See the module's docstring."""

    mixer = "GQA, queries by place"
    routing = "dense"
    eos = (2,)
    router_suffix = "mlp.gate"

    def decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        rope_parameters, head_dim = rope_fields(text), text.positive("head_dim", 128)
        rope = one_axis(text, head_dim, rope=rope_parameters)
        attention = GQAConfig(
            heads=text.positive("num_attention_heads", 32),
            kv_heads=text.positive("num_key_value_heads", 8),
            head_dim=head_dim,
            rotary_dim=rope.dim,
            window=text.positive("sliding_window") if "sliding_window" in text else 0,
            query_scale=True,
        )
        dense = MLPConfig(
            text.positive("intermediate_size", 14336), text.choice("hidden_act", {"silu": "silu"}, "silu")
        )
        for part, key in ((text, "layer_types"), (rope_parameters, "max_position_embeddings")):
            part.get(key, None)  # the reference does not read them
        return shared.decoder(
            text,
            epsilon=1e-5,
            tied=tied,
            rope=rope,
            layer=lambda _: LayerConfig(attention, dense),
            query_scale=QueryScaleMetadata(
                beta=rope_parameters.number("llama_4_scaling_beta"),
                original=rope_parameters.positive("original_max_position_embeddings"),
            ),
        )

    def weights(self, model: str, head: str) -> shared.Weights:
        none = Experts(f"{model}layers.{{i}}.mlp.experts", per_expert=False)
        return {**shared.decoder_weights(none, model), "decoder.head": head}
