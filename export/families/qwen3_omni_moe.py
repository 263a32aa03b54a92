"""Qwen3-Omni's thinker, on text and images: Qwen3-VL-MoE under other names. What hears and speaks is left out by name.

Source: transformers 5.24 `models/qwen3_omni_moe`.
"""

from typing import ClassVar

from moevlm.export.config import ModelConfig
from moevlm.export.families import qwen_vision, shared
from moevlm.export.families.about import About
from moevlm.export.families.base import LEFT_OUT, register
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.qwen3_vl_moe import Qwen3VLMoe

_MODEL = "thinker.model."
_SPEECH = ("talker_config", "code2wav_config", "enable_audio_output")


@register("qwen3_omni_moe")
class Qwen3OmniMoe(Qwen3VLMoe):
    """See the module's docstring."""

    about = About(
        checkpoints=("Qwen3-Omni-30B-A3B (thinker: text and images)",),
        mixer="GQA with q/k norms, interleaved M-RoPE",
        routing="softmax, renormalised where config.json says so",
        vision="packed grid, deepstack",
    )
    part = "thinker_config"
    usual: ClassVar = {"num_key_value_heads": 4, "intermediate_size": 18944}
    left_out: ClassVar = {
        **LEFT_OUT,
        **dict.fromkeys((r"^talker", r"^code2wav"), "speech is not supported"),
        r"^thinker\.audio_tower": shared.AUDIO,
    }
    weights: ClassVar[shared.Weights] = {
        **shared.decoder_weights(Experts(f"{_MODEL}layers.{{i}}.mlp.experts", per_expert=True), _MODEL),
        "decoder.head": "thinker.lm_head.weight",
        **qwen_vision.weights("thinker.visual.", qwen_vision.OMNI),
    }

    def translate(self, fields: Fields) -> ModelConfig:
        for name in _SPEECH:
            fields.get(name, None)  # of no use without speech
        thinker = fields.sub(self.part)
        for name in ("audio_config", "position_id_per_seconds", "seconds_per_chunk"):
            thinker.get(name, None)  # of sound and of video
        text, vision = thinker.sub("text_config"), thinker.sub("vision_config")
        for part in (fields, text):
            part.get("tie_word_embeddings", False)  # the thinker's own decides
        text.choice("use_qk_norm", (True,), True)
        vision.choice("apply_vit_abs_pos_embed", (True,), True)
        for name in ("image_size", "in_chans", "spatial_patch_size", "tokens_per_second"):
            vision.get(name, None)  # said otherwise, or of video
        return ModelConfig(
            model_type="qwen3_omni_moe",
            decoder=self.decoder(
                text,
                tied=thinker.flag("tie_word_embeddings", False),
                vision=vision,
                renormalize=text.flag("norm_topk_prob", True),
            ),
            vision=qwen_vision.config(vision, vision.counts("deepstack_visual_indexes")),
            **shared.token_ids(thinker, text),
        )
