"""GLM-4.5V: sigmoid routing with a correction bias and expert groups, shared experts, dense first layers, partial rope.

Source: transformers 5.24 `models/glm4v_moe`. Checkpoint: zai-org/GLM-4.5V.
"""

from typing import ClassVar

from moevlm.export.config import (
    DecoderConfig,
    GridVisionConfig,
    MergerConfig,
    MLPConfig,
    ModelConfig,
)
from moevlm.export.families import shared
from moevlm.export.families.about import About
from moevlm.export.families.base import LEFT_OUT, Family, register
from moevlm.export.families.convolutions import channels_last, flattened
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import mrope
from moevlm.export.families.text.glm4_moe import NEXT_TOKENS, glm4_decoder

_TOWER = "model.visual."
_BLOCK = f"{_TOWER}blocks.{{i}}."


@register("glm4v_moe")
class Glm4vMoe(Family):
    """See the module's docstring."""

    about = About(
        checkpoints=("GLM-4.5V", "GLM-4.6V"),
        mixer="GQA, partial M-RoPE",
        routing="sigmoid, correction bias, groups; shared experts",
        vision="packed grid, gated merger",
    )
    router_suffix = "mlp.gate"
    config_names: ClassVar = {
        "experts": "text_config.n_routed_experts",
        "video_begin": "image_start_token_id",
        "video_end": "image_end_token_id",
    }
    left_out: ClassVar = {**LEFT_OUT, **NEXT_TOKENS}
    weights: ClassVar[shared.Weights] = {
        **shared.decoder_weights(Experts("model.language_model.layers.{i}.mlp.experts", per_expert=True)),
        "vision.patch_embedding.weight": flattened(f"{_TOWER}patch_embed.proj.weight"),
        "vision.patch_embedding.bias": f"{_TOWER}patch_embed.proj.bias",
        "vision.position_embedding": f"{_TOWER}embeddings.position_embedding.weight",
        "vision.merger.downsample.weight": channels_last(f"{_TOWER}downsample.weight"),
        "vision.merger.downsample.bias": f"{_TOWER}downsample.bias",
        **shared.renamed(
            {
                "vision.first_norm": f"{_TOWER}post_conv_layernorm",
                "vision.last_norm": f"{_TOWER}post_layernorm",
                "vision.blocks.{i}.attention_norm": f"{_BLOCK}norm1",
                "vision.blocks.{i}.mlp_norm": f"{_BLOCK}norm2",
                "vision.blocks.{i}.attention.out": f"{_BLOCK}attn.proj",
                **{f"vision.blocks.{{i}}.mlp.{part}": f"{_BLOCK}mlp.{part}_proj" for part in shared.GATED},
                "vision.merger.projection": f"{_TOWER}merger.proj",
                **{f"vision.merger.mlp.{part}": f"{_TOWER}merger.{part}_proj" for part in shared.GATED},
            }
        ),
        **shared.renamed(
            {
                "vision.blocks.{i}.attention.qkv": f"{_BLOCK}attn.qkv",
                "vision.merger.norm": f"{_TOWER}merger.post_projection_norm",
            },
            shared.BOTH,
        ),
    }

    def translate(self, fields: Fields) -> ModelConfig:
        text, vision = fields.sub("text_config"), fields.sub("vision_config")
        tied = [part.flag("tie_word_embeddings", False) for part in (fields, text)]  # either will do
        return ModelConfig(
            model_type="glm4v_moe",
            decoder=self._decoder(text, any(tied)),
            vision=self._vision(vision),
            video=shared.video(fields, "image_start_token_id", "image_end_token_id", token="image_token_id"),
            **shared.token_ids(fields, text),
        )

    def _decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        head_dim = shared.head_dim(text)
        rope = mrope(text, head_dim, interleaved=False, default_sections=(8, 12, 12), default_partial=0.5)
        text.choice("use_qk_norm", (False,), False)
        return glm4_decoder(text, tied=tied, rope=rope, bias=True, qk_norm=False)

    def _vision(self, vision: Fields) -> GridVisionConfig:
        sizes, out = shared.vision_sizes(vision), vision.positive("out_hidden_size")
        activation = vision.choice("hidden_act", {"silu": "silu"})
        return GridVisionConfig(
            **sizes,
            mlp=MLPConfig(out, activation),  # the blocks' feed-forward is as wide as the tower's output
            norm="rms",
            epsilon=vision.number("rms_norm_eps", 1e-5),
            qkv_bias=vision.flag("attention_bias", False),
            out_bias=False,
            outer_norms=True,
            position_grid=vision.positive("image_size") // sizes["patch_size"],
            position_resampling="bicubic",
            out=out,
            merger=MergerConfig("gated", width=vision.positive("intermediate_size")),
        )
