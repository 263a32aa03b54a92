"""What families have in common: fields that all of them call the same, and names of tensors by the names of modules."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moevlm.export.config import DecoderConfig, LayerConfig
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.interleaved_experts import InterleavedExperts
from moevlm.export.families.rope import axial_theta
from moevlm.export.families.sources import Source, named, side_by_side
from moevlm.runtime.core.manifest import QueryScaleMetadata, RopeMetadata, VideoMetadata

Weights = Mapping[str, str | Source]

GATED = ("gate", "up", "down")  # of a gated feed-forward layer
BOTH = ("weight", "bias")
# How models that join a tower to a whole language model were saved: transformers 5.24, the renamings "llava".
LANGUAGE_MODEL = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
# Why tensors are left out.
AUDIO = "audio is not supported"
NEXT_TOKENS = "layers that predict further tokens, which transformers does not load either"


def renamed(modules: Mapping[str, str], parts: Iterable[str] = ("weight",)) -> dict[str, str]:
    """Parameters of modules, ours to theirs."""
    return {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in modules.items() for part in parts}


def joined_qkv(attention: str) -> dict[str, Source]:
    """The projection of a tower's block out of three. attention: what comes before the names of these."""
    return {
        f"vision.blocks.{{i}}.attention.qkv.{part}": side_by_side(
            *(named(f"{attention}{name}_proj.{part}") for name in "qkv")
        )
        for part in BOTH
    }


def decoder_weights(experts: Experts | InterleavedExperts, model: str = "model.language_model.") -> Weights:
    """A decoder as most families name it; those that a model does not have are not asked for."""
    ours, theirs = "decoder.layers.{i}.", f"{model}layers.{{i}}."
    return {
        "decoder.embedding": f"{model}embed_tokens.weight",
        "decoder.head": "lm_head.weight",
        "decoder.norm.weight": f"{model}norm.weight",
        **renamed({f"{ours}attention_norm": f"{theirs}input_layernorm"}),
        **renamed({f"{ours}feed_forward_norm": f"{theirs}post_attention_layernorm"}),
        **renamed({f"{ours}attention.{part}": f"{theirs}self_attn.{part}_proj" for part in "qkv"}, BOTH),
        **renamed({f"{ours}attention.out": f"{theirs}self_attn.o_proj"}, BOTH),
        **renamed({f"{ours}attention.{norm}": f"{theirs}self_attn.{norm}" for norm in ("q_norm", "k_norm")}),
        **renamed({f"{ours}feed_forward.router": f"{theirs}mlp.gate"}),
        f"{ours}feed_forward.correction_bias": f"{theirs}mlp.gate.e_score_correction_bias",
        f"{ours}feed_forward.gate_up": experts.gate_up(),
        f"{ours}feed_forward.down": experts.down(),
        **renamed({f"{ours}feed_forward.{part}": f"{theirs}mlp.{part}_proj" for part in GATED}),
        **renamed({f"{ours}feed_forward.shared.{part}": f"{theirs}mlp.shared_experts.{part}_proj" for part in GATED}),
    }


def decoder(
    text: Fields,
    *,
    epsilon: float,
    tied: bool,
    rope: RopeMetadata,
    layer: Callable[[int], LayerConfig],
    deepstack: int = 0,
    query_scale: QueryScaleMetadata | None = None,
) -> DecoderConfig:
    """A decoder with one rope. epsilon: where config.json has none. layer: the config of each, by its number."""
    return DecoderConfig(
        vocabulary=text.positive("vocab_size"),
        hidden=text.positive("hidden_size"),
        context=text.positive("max_position_embeddings"),
        epsilon=text.number("rms_norm_eps", epsilon),
        tied_head=tied,
        ropes=(rope,),
        layers=tuple(map(layer, range(text.positive("num_hidden_layers")))),
        deepstack=deepstack,
        query_scale=query_scale,
    )


def all_attend(text: Fields) -> None:
    """Refuse layers of another kind than attention to all tokens."""
    text.each("layer_types", ("full_attention",), ("full_attention",) * text.positive("num_hidden_layers"))


def head_dim(text: Fields) -> int:
    """Of a head of the decoder, said or an equal part of a row."""
    equal = text.positive("hidden_size") // text.positive("num_attention_heads")
    return text.positive("head_dim", equal, equal)


def vision_sizes(vision: Fields) -> dict[str, Any]:
    """The fields of `GridVisionConfig` that all towers call the same."""
    vision.get("tie_word_embeddings", None)  # transformers 4 wrote it everywhere; a vision tower has no head
    hidden, heads = vision.positive("hidden_size"), vision.aliased("num_heads", "num_attention_heads")
    return {
        "hidden": hidden,
        "depth": vision.aliased("depth", "num_hidden_layers"),
        "heads": heads,
        "head_dim": hidden // heads,
        "patch_size": vision.positive("patch_size"),
        "temporal_patch_size": vision.positive("temporal_patch_size", 2),
        "merge_size": vision.positive("spatial_merge_size", 2),
        "channels": vision.positive("in_channels", 3),
        "rope_theta": axial_theta(vision),
    }


def token_ids(fields: Fields, text: Fields, eos: tuple[int, ...] = ()) -> dict[str, Any]:
    """The fields of `ModelConfig` that join text and images, and end it. eos: see `eos_ids`."""
    return {
        "image_token_id": fields.count("image_token_id"),
        "eos_token_ids": eos_ids(fields, text, eos),
    }


def eos_ids(fields: Fields, text: Fields, eos: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens that end a text; of two eos_token_id the outer goes first. eos: where config.json has none."""
    inner = text.ids("eos_token_id", eos)
    return fields.ids("eos_token_id", inner, inner)


def video(fields: Fields, begin: str, end: str, token: str = "video_token_id") -> VideoMetadata | None:
    """Ids of a video's tokens; None where config.json does not name all of them.

    begin, end: fields of the ids around a slice. token: of that of a visual token.
    """
    if any(name not in fields for name in ("video_token_id", token, begin, end)):
        return None
    return VideoMetadata(
        placeholder=fields.count("video_token_id"),
        token_id=fields.count(token),
        begin=(fields.count(begin),),
        end=(fields.count(end),),
    )
