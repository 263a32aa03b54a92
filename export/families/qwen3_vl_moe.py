"""Qwen3-VL-MoE: GQA with per-head q/k norm, interleaved M-RoPE, softmax top-k routing, deepstack vision.

Source: transformers 5.24 `models/qwen3_vl_moe`. Checkpoints: Qwen/Qwen3-VL-30B-A3B-Instruct, ...-235B-A22B.
"""

from collections.abc import Mapping
from typing import ClassVar

from moevlm.export.config import DecoderConfig, ModelConfig
from moevlm.export.families import qwen_vision, shared
from moevlm.export.families.about import About
from moevlm.export.families.base import Family, register
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import mrope
from moevlm.export.families.text.qwen3_moe import qwen3_decoder


@register("qwen3_vl_moe")
class Qwen3VLMoe(Family):
    """See the module's docstring. usual: fields of text_config that it may leave out."""

    about = About(
        checkpoints=("Qwen3-VL-30B-A3B", "Qwen3-VL-235B-A22B"),
        mixer="GQA with q/k norms, interleaved M-RoPE",
        routing="softmax, renormalised",
        vision="packed grid, deepstack",
    )
    router_suffix = "mlp.gate"
    usual: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 16, "intermediate_size": 5632}
    weights: ClassVar[shared.Weights] = {
        **shared.decoder_weights(Experts("model.language_model.layers.{i}.mlp.experts", per_expert=False)),
        **qwen_vision.weights("model.visual."),
    }

    def translate(self, fields: Fields) -> ModelConfig:
        text, vision = fields.sub("text_config"), fields.sub("vision_config")
        text.get("tie_word_embeddings", False)  # the outer field decides
        return ModelConfig(
            model_type="qwen3_vl_moe",
            decoder=self.decoder(
                text,
                tied=fields.flag("tie_word_embeddings", False),
                vision=vision,
                renormalize=text.choice("norm_topk_prob", (True,), True),
            ),
            vision=qwen_vision.config(vision, vision.counts("deepstack_visual_indexes")),
            video=shared.video(fields, "vision_start_token_id", "vision_end_token_id"),
            **shared.token_ids(fields, text),
        )

    def decoder(self, text: Fields, *, tied: bool, vision: Fields, renormalize: bool) -> DecoderConfig:
        """The language model."""
        rope = mrope(text, shared.head_dim(text), interleaved=True, default_sections=(24, 20, 20))
        levels = len(vision.counts("deepstack_visual_indexes"))
        return qwen3_decoder(text, tied=tied, rope=rope, renormalize=renormalize, usual=self.usual, deepstack=levels)
