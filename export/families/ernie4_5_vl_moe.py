"""ERNIE 4.5 VL: experts for text and others, of another width, for images; rope on three axes. Videos are left out.

Source: transformers 5.24 `models/ernie4_5_vl_moe`, and its renamings of what is published (`conversion_mapping.py`).
Checkpoints: baidu/ERNIE-4.5-VL-28B-A3B-PT, ...-424B-A47B-PT.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from moevlm.export.config import ModelConfig
from moevlm.export.families import shared
from moevlm.export.families.about import About
from moevlm.export.families.base import Family, register
from moevlm.export.families.ernie_text import ernie_image_decoder, ernie_weights
from moevlm.export.families.ernie_vision import ernie_tower, ernie_vision_weights
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.sources import row_of, turned

_MLP = "model.layers.{i}.mlp."
_FEED, _IMAGES = "decoder.layers.{i}.feed_forward.", "decoder.layers.{i}.feed_forward.images."


@register("ernie4_5_vl_moe")
class Ernie45VLMoe(Family):
    """See the module's docstring. head_dim: of the decoder's heads."""

    about = About(
        checkpoints=("ERNIE-4.5-VL-28B-A3B", "ERNIE-4.5-VL-424B-A47B"),
        mixer="GQA, M-RoPE",
        routing="softmax, correction bias, renormalised; others for images; shared experts",
        vision="packed grid, resampler",
    )
    router_suffix = "_moe.gate"
    config_names: ClassVar = {"experts": "text_config.moe_num_experts", "top_k": "text_config.moe_k"}

    def __init__(self, head_dim: int) -> None:
        self._head_dim = head_dim

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        return cls(shared.head_dim(Fields(values).sub("text_config")))

    @property
    def weights(self) -> shared.Weights:
        images = Experts(f"{_MLP}experts", per_expert=True, bank=1)
        return {
            **ernie_weights("model.", self._head_dim, banks=2),
            f"{_FEED}router.weight": turned(f"{_MLP}gate.weight"),
            f"{_IMAGES}router.weight": turned(f"{_MLP}gate.weight_1"),
            f"{_IMAGES}correction_bias": row_of(f"{_MLP}moe_statics.e_score_correction_bias", 1, 2),
            f"{_IMAGES}gate_up": images.gate_up(),
            f"{_IMAGES}down": images.down(),
            **ernie_vision_weights(),
        }

    def translate(self, fields: Fields) -> ModelConfig:
        text = fields.sub("text_config")
        text.get("tie_word_embeddings", None)  # the outer field decides
        ids = shared.token_ids(fields, text)
        around = [fields.count(f"image_{side}_token_id") for side in ("start", "end")]
        decoder = ernie_image_decoder(text, fields.flag("tie_word_embeddings", True))
        decoder = replace(decoder, image_ids=(ids["image_token_id"], *around))
        return ModelConfig(
            model_type="ernie4_5_vl_moe",
            decoder=decoder,
            vision=ernie_tower(fields.sub("vision_config"), decoder.hidden, decoder.epsilon),
            **ids,
        )
