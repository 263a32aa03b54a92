"""Qwen3-VL-MoE: GQA with per-head q/k norm, interleaved M-RoPE, softmax top-k routing, deepstack vision.

Source: transformers 5.23 `models/qwen3_vl_moe`. Checkpoints: Qwen/Qwen3-VL-30B-A3B-Instruct, ...-235B-A22B.
"""

import math
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
from moevlm.export.families.sources import Experts, Source, flattened
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec

_LAYER = "model.language_model.layers.{i}."
_BLOCK = "model.visual.blocks.{i}."
_MERGER = "model.visual.merger."
_DEEPSTACK = "model.visual.deepstack_merger_list.{i}."
_EXPERTS = Experts(_LAYER + "mlp.experts", per_expert=False)


@register("qwen3_vl_moe")
class Qwen3VLMoe(Family):
    """See the module's docstring."""

    router_suffix = "mlp.gate"

    def translate(self, fields: Fields) -> ModelConfig:
        text, vision = fields.sub("text_config"), fields.sub("vision_config")
        text.get("tie_word_embeddings", False)  # the outer field decides
        return ModelConfig(
            model_type="qwen3_vl_moe",
            decoder=self._decoder(text, tied=fields.flag("tie_word_embeddings", False), vision=vision),
            vision=self._vision(vision),
            image_token_id=fields.count("image_token_id"),
            eos_token_ids=fields.ids("eos_token_id", text.ids("eos_token_id")),  # the outer one goes first
        )

    def _decoder(self, text: Fields, tied: bool, vision: Fields) -> DecoderConfig:
        hidden, heads = text.positive("hidden_size"), text.positive("num_attention_heads")
        head_dim = text.positive("head_dim", hidden // heads)
        rope = mrope(text, head_dim, interleaved=True, default_sections=(24, 20, 20))
        activation = text.choice("hidden_act", {"silu": "silu"})
        text.choice("norm_topk_prob", (True,), True)
        text.choice("use_sliding_window", (False,), False)
        text.get("max_window_layers", None)  # how many layers would have a window
        bias = text.flag("attention_bias", False)
        layers = text.positive("num_hidden_layers")
        text.every("layer_types", "full_attention", layers)
        moe = MoEConfig(
            experts=text.aliased("num_experts", "num_local_experts"),
            width=text.positive("moe_intermediate_size"),
            router=RouterSpec(top_k=text.positive("num_experts_per_tok"), scoring="softmax", renormalize=True),
            expert=ExpertsSpec(activation=activation),
        )
        dense = MLPConfig(text.positive("intermediate_size", 4 * hidden), activation)
        dense_layers, step = text.counts("mlp_only_layers", ()), text.positive("decoder_sparse_step", 1)
        attention = GQAConfig(
            heads=heads,
            kv_heads=text.positive("num_key_value_heads", heads),
            head_dim=head_dim,
            rotary_dim=rope.dim,
            qk_norm=True,
            qkv_bias=bias,
            out_bias=bias,
        )
        return DecoderConfig(
            vocabulary=text.positive("vocab_size"),
            hidden=hidden,
            context=text.positive("max_position_embeddings"),
            epsilon=text.number("rms_norm_eps", 1e-6),
            tied_head=tied,
            ropes=(rope,),
            layers=tuple(
                LayerConfig(attention, dense if i in dense_layers or (i + 1) % step else moe) for i in range(layers)
            ),
            deepstack=len(vision.counts("deepstack_visual_indexes")),
        )

    def _vision(self, vision: Fields) -> VisionConfig:
        vision.get("tie_word_embeddings", None)  # transformers 4 wrote it everywhere; a vision tower has no head
        hidden, merge = vision.positive("hidden_size"), vision.positive("spatial_merge_size", 2)
        positions = vision.positive("num_position_embeddings")
        if math.isqrt(positions) ** 2 != positions:
            raise vision.invalid("num_position_embeddings", positions, "a square number")
        return VisionConfig(
            hidden=hidden,
            depth=vision.aliased("depth", "num_hidden_layers"),
            heads=vision.aliased("num_heads", "num_attention_heads"),
            mlp=MLPConfig(
                vision.positive("intermediate_size"),
                vision.choice("hidden_act", {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu"}),
                gated=False,
            ),
            norm="layer",
            epsilon=1e-6,
            qkv_bias=True,
            out_bias=True,
            outer_norms=False,
            patch_size=vision.positive("patch_size"),
            temporal_patch_size=vision.positive("temporal_patch_size", 2),
            merge_size=merge,
            channels=vision.positive("in_channels", 3),
            position_grid=math.isqrt(positions),
            position_resampling="bilinear",
            rope_theta=axial_theta(vision),
            merger=MergerConfig("mlp", out=vision.positive("out_hidden_size"), width=hidden * merge**2),
            deepstack_layers=vision.counts("deepstack_visual_indexes"),
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
        "decoder.layers.{i}.attention.q_norm.weight": _LAYER + "self_attn.q_norm.weight",
        "decoder.layers.{i}.attention.k_norm.weight": _LAYER + "self_attn.k_norm.weight",
        "decoder.layers.{i}.feed_forward.router.weight": _LAYER + "mlp.gate.weight",
        "decoder.layers.{i}.feed_forward.gate_up": _EXPERTS.gate_up(),
        "decoder.layers.{i}.feed_forward.down": _EXPERTS.down(),
        **{
            f"decoder.layers.{{i}}.feed_forward.{part}.weight": f"{_LAYER}mlp.{part}_proj.weight"
            for part in ("gate", "up", "down")
        },
        "vision.patch_embedding.weight": flattened("model.visual.patch_embed.proj.weight"),
        "vision.patch_embedding.bias": "model.visual.patch_embed.proj.bias",
        "vision.position_embedding": "model.visual.pos_embed.weight",
        **{
            f"vision.{ours}.{part}": f"{theirs}.{part}"
            for part in ("weight", "bias")
            for ours, theirs in (
                ("blocks.{i}.attention_norm", _BLOCK + "norm1"),
                ("blocks.{i}.mlp_norm", _BLOCK + "norm2"),
                ("blocks.{i}.attention.qkv", _BLOCK + "attn.qkv"),
                ("blocks.{i}.attention.out", _BLOCK + "attn.proj"),
                ("blocks.{i}.mlp.up", _BLOCK + "mlp.linear_fc1"),
                ("blocks.{i}.mlp.down", _BLOCK + "mlp.linear_fc2"),
                ("merger.norm", _MERGER + "norm"),
                ("merger.mlp.up", _MERGER + "linear_fc1"),
                ("merger.mlp.down", _MERGER + "linear_fc2"),
                ("deepstack_mergers.{i}.norm", _DEEPSTACK + "norm"),
                ("deepstack_mergers.{i}.mlp.up", _DEEPSTACK + "linear_fc1"),
                ("deepstack_mergers.{i}.mlp.down", _DEEPSTACK + "linear_fc2"),
            )
        },
    }
