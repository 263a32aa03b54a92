"""GLM-4.5V: sigmoid routing with a correction bias and expert groups, shared experts, dense first layers, partial rope.

Source: transformers 5.23 `models/glm4v_moe`. Checkpoint: zai-org/GLM-4.5V.
"""

from collections.abc import Mapping
from typing import ClassVar

from moevlm.export.config import (
    DecoderConfig,
    GQAConfig,
    LayerConfig,
    MergerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    VisionConfig,
)
from moevlm.export.families.base import Family, register
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import axial_theta, mrope
from moevlm.export.families.sources import Experts, Source, channels_last, flattened
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec

_LAYER = "model.language_model.layers.{i}."
_EXPERTS = Experts(_LAYER + "mlp.experts", per_expert=True)
_BLOCK = "model.visual.blocks.{i}."
_PARTS = ("gate", "up", "down")


@register("glm4v_moe")
class Glm4vMoe(Family):
    """See the module's docstring."""

    router_suffix = "mlp.gate"
    # Layers behind the last one, of GLM-4.5V and a larger model: they predict a second token, for training.
    left_out = (*Family.left_out, r"model\.layers\.92.*", r"model\.layers\.46.*")

    def translate(self, fields: Fields) -> ModelConfig:
        text, vision = fields.sub("text_config"), fields.sub("vision_config")
        tied = [part.flag("tie_word_embeddings", False) for part in (fields, text)]  # either will do
        return ModelConfig(
            model_type="glm4v_moe",
            decoder=self._decoder(text, any(tied)),
            vision=self._vision(vision),
            image_token_id=fields.count("image_token_id"),
            eos_token_ids=fields.ids("eos_token_id", text.ids("eos_token_id")),  # the outer one goes first
        )

    def _decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        hidden, heads = text.positive("hidden_size"), text.positive("num_attention_heads")
        head_dim = text.positive("head_dim", hidden // heads)
        rope = mrope(text, head_dim, interleaved=False, default_sections=(8, 12, 12), default_partial=0.5)
        activation = text.choice("hidden_act", {"silu": "silu"})
        text.choice("use_qk_norm", (False,), False)
        layers, width = text.positive("num_hidden_layers"), text.positive("moe_intermediate_size")
        text.every("layer_types", "full_attention", layers)
        experts, groups = text.aliased("n_routed_experts", "num_local_experts"), text.positive("n_group", 1)
        if experts < 2:  # a group scores by its best two
            raise text.invalid("n_routed_experts", experts, "2 or more")
        if experts % groups or experts < 2 * groups:
            raise text.invalid("n_group", groups, f"a divisor of the {experts} experts up to {experts // 2}")
        router = RouterSpec(
            top_k=text.positive("num_experts_per_tok"),
            scoring="sigmoid",
            renormalize=text.flag("norm_topk_prob", True),
            epsilon=1e-20,
            scale=text.number("routed_scaling_factor", 1.0),
            n_group=groups,
            topk_group=text.positive("topk_group", 1),
            group_score="top2_sum",
        )
        moe = MoEConfig(
            experts=experts,
            width=width,
            router=router,
            expert=ExpertsSpec(activation=activation),
            correction_bias=True,
            shared_width=width * text.positive("n_shared_experts", 1),
        )
        dense = MLPConfig(text.positive("intermediate_size"), activation)
        dense_layers = text.count("first_k_dense_replace", 1)
        attention = GQAConfig(
            heads=heads,
            kv_heads=text.positive("num_key_value_heads"),
            head_dim=head_dim,
            rotary_dim=rope.dim,
            qk_norm=False,
            qkv_bias=text.flag("attention_bias", True),
            out_bias=False,
        )
        return DecoderConfig(
            vocabulary=text.positive("vocab_size"),
            hidden=hidden,
            context=text.positive("max_position_embeddings"),
            epsilon=text.number("rms_norm_eps", 1e-5),
            tied_head=tied,
            ropes=(rope,),
            layers=tuple(LayerConfig(attention, dense if i < dense_layers else moe) for i in range(layers)),
        )

    def _vision(self, vision: Fields) -> VisionConfig:
        vision.get("tie_word_embeddings", None)  # transformers 4 wrote it everywhere; a vision tower has no head
        out = vision.positive("out_hidden_size")
        activation = vision.choice("hidden_act", {"silu": "silu"})
        return VisionConfig(
            hidden=vision.positive("hidden_size"),
            depth=vision.aliased("depth", "num_hidden_layers"),
            heads=vision.aliased("num_heads", "num_attention_heads"),
            mlp=MLPConfig(out, activation),  # the blocks' feed-forward is as wide as the tower's output
            norm="rms",
            epsilon=vision.number("rms_norm_eps", 1e-5),
            qkv_bias=vision.flag("attention_bias", False),
            out_bias=False,
            outer_norms=True,
            patch_size=vision.positive("patch_size"),
            temporal_patch_size=vision.positive("temporal_patch_size", 2),
            merge_size=vision.positive("spatial_merge_size", 2),
            channels=vision.positive("in_channels", 3),
            position_grid=vision.positive("image_size") // vision.positive("patch_size"),
            position_resampling="bicubic",
            rope_theta=axial_theta(vision),
            merger=MergerConfig("gated", out=out, width=vision.positive("intermediate_size")),
        )

    weights: ClassVar[Mapping[str, str | Source]] = {
        "decoder.embedding": "model.language_model.embed_tokens.weight",
        "decoder.head": "lm_head.weight",
        "decoder.norm.weight": "model.language_model.norm.weight",
        "decoder.layers.{i}.attention_norm.weight": _LAYER + "input_layernorm.weight",
        "decoder.layers.{i}.feed_forward_norm.weight": _LAYER + "post_attention_layernorm.weight",
        **{
            f"decoder.layers.{{i}}.attention.{ours}.{part}": f"{_LAYER}self_attn.{theirs}_proj.{part}"
            for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))
            for part in ("weight", "bias")
        },
        "decoder.layers.{i}.feed_forward.router.weight": _LAYER + "mlp.gate.weight",
        "decoder.layers.{i}.feed_forward.correction_bias": _LAYER + "mlp.gate.e_score_correction_bias",
        "decoder.layers.{i}.feed_forward.gate_up": _EXPERTS.gate_up(),
        "decoder.layers.{i}.feed_forward.down": _EXPERTS.down(),
        **{
            f"decoder.layers.{{i}}.feed_forward.shared.{part}.weight": f"{_LAYER}mlp.shared_experts.{part}_proj.weight"
            for part in _PARTS
        },
        **{f"decoder.layers.{{i}}.feed_forward.{part}.weight": f"{_LAYER}mlp.{part}_proj.weight" for part in _PARTS},
        "vision.patch_embedding.weight": flattened("model.visual.patch_embed.proj.weight"),
        "vision.patch_embedding.bias": "model.visual.patch_embed.proj.bias",
        "vision.position_embedding": "model.visual.embeddings.position_embedding.weight",
        "vision.first_norm.weight": "model.visual.post_conv_layernorm.weight",
        "vision.last_norm.weight": "model.visual.post_layernorm.weight",
        "vision.blocks.{i}.attention_norm.weight": _BLOCK + "norm1.weight",
        "vision.blocks.{i}.mlp_norm.weight": _BLOCK + "norm2.weight",
        "vision.blocks.{i}.attention.qkv.weight": _BLOCK + "attn.qkv.weight",
        "vision.blocks.{i}.attention.qkv.bias": _BLOCK + "attn.qkv.bias",
        "vision.blocks.{i}.attention.out.weight": _BLOCK + "attn.proj.weight",
        **{f"vision.blocks.{{i}}.mlp.{part}.weight": f"{_BLOCK}mlp.{part}_proj.weight" for part in _PARTS},
        "vision.merger.downsample.weight": channels_last("model.visual.downsample.weight"),
        "vision.merger.downsample.bias": "model.visual.downsample.bias",
        "vision.merger.projection.weight": "model.visual.merger.proj.weight",
        "vision.merger.norm.weight": "model.visual.merger.post_projection_norm.weight",
        "vision.merger.norm.bias": "model.visual.merger.post_projection_norm.bias",
        **{f"vision.merger.mlp.{part}.weight": f"model.visual.merger.{part}_proj.weight" for part in _PARTS},
    }
