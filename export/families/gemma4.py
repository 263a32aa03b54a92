"""Gemma 4: sliding and full layers of different heads, sandwich norms, experts beside a dense layer, capped logits.

Source: transformers 5.24 `models/gemma4`. Checkpoint: google/gemma-4-26B-A4B-it, and dense ones without per-layer
embeddings. Audio is left out.
"""

from typing import TYPE_CHECKING, ClassVar

from moevlm.export.config import DecoderConfig, GQAConfig, LayerConfig, MLPConfig, ModelConfig, MoEConfig
from moevlm.export.families import shared
from moevlm.export.families.about import About
from moevlm.export.families.base import LEFT_OUT, Family, register
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.gemma4_vision import GEMMA4_TOWER, gemma4_tower, image_marks
from moevlm.export.families.rope import one_axis
from moevlm.export.families.sources import rooted
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.manifest import RopeMetadata

if TYPE_CHECKING:
    from torch import Tensor

_OURS, _THEIRS = "decoder.layers.{i}.", "model.language_model.layers.{i}."
_SLIDING, _FULL = "sliding_attention", "full_attention"
_ROPES = {
    _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}


@register("gemma4")
class Gemma4(Family):
    """See the module's docstring."""

    about = About(
        checkpoints=("Gemma-4-26B-A4B", "Gemma-4-31B"),
        mixer="GQA in windows and to all, values from keys, partial rope, sandwich norms",
        routing="softmax, renormalised, a factor for each expert; dense layer beside the experts",
        vision="packed grid, pooled; an image's tokens see each other",
    )
    router_suffix = ".router"
    config_names: ClassVar = {
        "head_dim without a window": "text_config.global_head_dim",
        "image_begin": "boi_token_id",
        "image_end": "eoi_token_id",
        "rotary_dim": "text_config.head_dim",
        "top_k": "text_config.top_k_experts",
    }
    left_out: ClassVar = {**LEFT_OUT, **dict.fromkeys((r"audio_tower\.", r"embed_audio\."), shared.AUDIO)}
    weights: ClassVar[shared.Weights] = {
        **shared.decoder_weights(Experts(f"{_THEIRS}experts", per_expert=False)),
        **shared.renamed(
            {
                f"{_OURS}{ours}": f"{_THEIRS}{theirs}"
                for ours, theirs in {
                    "attention_post_norm": "post_attention_layernorm",
                    "feed_forward_norm": "pre_feedforward_layernorm",
                    "feed_forward_post_norm": "post_feedforward_layernorm",
                    "feed_forward.mlp_norm": "pre_feedforward_layernorm",
                    "feed_forward.mlp_post_norm": "post_feedforward_layernorm_1",
                    "feed_forward.experts_norm": "pre_feedforward_layernorm_2",
                    "feed_forward.experts_post_norm": "post_feedforward_layernorm_2",
                    "feed_forward.router": "router.proj",
                    **{f"feed_forward.mlp.{part}": f"mlp.{part}_proj" for part in shared.GATED},
                }.items()
            }
        ),
        f"{_OURS}feed_forward.router_norm.weight": rooted(f"{_THEIRS}router.scale", -1),
        f"{_OURS}feed_forward.expert_scale": f"{_THEIRS}router.per_expert_scale",
        f"{_OURS}scale": f"{_THEIRS}layer_scalar",
        **GEMMA4_TOWER,
    }

    def routed(self, returned: "tuple[Tensor, ...]") -> "tuple[Tensor, Tensor]":
        probabilities, index = super().routed(returned)  # the softmax of whose logarithms they are
        return probabilities.clamp(min=2.0**-126).log(), index

    def translate(self, fields: Fields) -> ModelConfig:
        text = fields.sub("text_config")
        for key in ("audio_config", "vision_soft_tokens_per_image"):  # the image processor knows how many tokens
            fields.get(key, None)
        text.get("tie_word_embeddings", None)  # the outer field decides
        decoder = self._decoder(text, fields.flag("tie_word_embeddings", True))
        return ModelConfig(
            model_type="gemma4",
            decoder=decoder,
            vision=gemma4_tower(fields.sub("vision_config"), decoder.hidden),
            **shared.token_ids(fields, text),
            image_marks=image_marks(fields),
        )

    def _decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        hidden, layers = text.positive("hidden_size"), text.positive("num_hidden_layers")
        text.choice("hidden_size_per_layer_input", (0,), 256)
        text.choice("num_kv_shared_layers", (0,), 0)
        for key in ("vocab_size_per_layer_input", "use_double_wide_mlp"):  # of no use without those
            text.get(key, None)
        usual = tuple(_FULL if i % 6 == 5 else _SLIDING for i in range(layers))
        kinds = [*text.each("layer_types", (_SLIDING, _FULL), usual)[:-1], _FULL]  # the last one always is
        ropes, attention = self._attention(text, kinds)
        feed_forward = self._feed_forward(text)
        softcap = "final_logit_softcapping"
        return DecoderConfig(
            vocabulary=text.positive("vocab_size"),
            hidden=hidden,
            context=text.positive("max_position_embeddings"),
            epsilon=text.number("rms_norm_eps", 1e-6),
            tied_head=tied,
            ropes=ropes,
            layers=tuple(LayerConfig(attention[kind], feed_forward, "sandwich", scaled=True) for kind in kinds),
            embedding_scale=hidden**0.5,  # in bfloat16, transformers rounds it to 8 bits
            logit_softcap=text.number(softcap) if softcap in text else 0.0,
        )

    def _attention(self, text: Fields, kinds: list[str]) -> tuple[tuple[RopeMetadata, ...], dict[str, GQAConfig]]:
        """The rope of each kind of layer that there is, and its attention."""
        bias, keyed = text.flag("attention_bias", False), text.flag("attention_k_eq_v", False)
        window, images = text.positive("sliding_window", 512), "use_bidirectional_attention"
        bidirectional = images in text and text.choice(images, ("vision",)) == "vision"
        rope, heads = text.sub("rope_parameters", _ROPES), self._heads(text, kinds, keyed)
        ropes = tuple(one_axis(text, head_dim, rope=rope.sub(kind)) for kind, (head_dim, _) in heads.items())
        rope.get(_SLIDING, None)  # there may be no such layer
        return ropes, {
            kind: GQAConfig(
                heads=text.positive("num_attention_heads", 8),
                kv_heads=kv_heads,
                head_dim=head_dim,
                rotary_dim=head_dim,
                qk_norm=True,
                qkv_bias=bias,
                out_bias=bias,
                rope=group,
                window=window if kind == _SLIDING else 0,
                scale=1.0,
                value_norm=True,
                value_is_key=keyed and kind == _FULL,
                bidirectional_images=bidirectional and kind == _SLIDING,
            )
            for group, (kind, (head_dim, kv_heads)) in enumerate(heads.items())
        }

    def _heads(self, text: Fields, kinds: list[str], keyed: bool) -> dict[str, tuple[int, int]]:
        """head_dim and kv_heads of each kind of layer; transformers 5.24 writes them layer by layer."""
        head_dim, kv_heads = text.positive("head_dim", 256), text.positive("num_key_value_heads", 4)
        wide, few = text.positive("global_head_dim", 512), text.positive("num_global_key_value_heads", kv_heads)
        if "per_layer_config" not in text:
            found = {_SLIDING: (head_dim, kv_heads), _FULL: (wide, few if keyed else kv_heads)}
            return {kind: found[kind] for kind in sorted(set(kinds), reverse=True)}
        own, sizes = text.sub("per_layer_config"), dict[str, tuple[int, int]]()
        for i, kind in enumerate(kinds):
            key = str(i) if str(i) in own else str(i).zfill(len(str(len(kinds) - 1)))
            layer = own.sub(key, {})
            size = layer.positive("head_dim", head_dim), layer.positive("num_key_value_heads", kv_heads)
            if sizes.setdefault(kind, size) != size:
                raise own.invalid(key, list(size), f"heads like those of other layers of {kind}: {list(sizes[kind])}")
        return sizes

    def _feed_forward(self, text: Fields) -> MLPConfig | MoEConfig:
        width = text.positive("intermediate_size", 9216)
        activation = text.choice("hidden_activation", {"gelu_pytorch_tanh": "gelu_tanh"}, "gelu_pytorch_tanh")
        if not text.flag("enable_moe_block", False):
            for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
                text.get(key, None)
            return MLPConfig(width, activation)
        return MoEConfig(
            experts=text.positive("num_experts"),
            width=text.positive("moe_intermediate_size"),
            router=RouterSpec(top_k=text.positive("top_k_experts")),
            expert=ExpertsSpec(activation=activation),
            expert_scale=True,
            dense_width=width,
        )
