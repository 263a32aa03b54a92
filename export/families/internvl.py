"""InternVL: a tower for tiles of one size before a text model of Qwen or gpt-oss.

Source: transformers 5.24 `models/internvl`. Checkpoints: OpenGVLab/InternVL3_5-30B-A3B-HF, ...-241B-A28B-HF,
...-GPT-OSS-20B-A4B-Preview-HF.
"""

from typing import ClassVar

from moevlm.export.config import ModelConfig
from moevlm.export.families import shared
from moevlm.export.families.about import About
from moevlm.export.families.base import register
from moevlm.export.families.fields import Fields
from moevlm.export.families.internvl_vision import INTERNVL_LEFT_OUT, INTERNVL_TOWER, internvl_tower
from moevlm.export.families.text.wrapper import Wrapper


@register("internvl")
class InternVL(Wrapper):
    """See the module's docstring."""

    about = About(
        checkpoints=("InternVL3.5-30B-A3B", "InternVL3.5-241B-A28B", "InternVL3.5-GPT-OSS-20B-A4B"),
        mixer="GQA with q/k norms, or that of gpt-oss",
        routing="softmax, renormalised, or that of gpt-oss",
        vision="tiles of one size and an overview",
    )
    texts = ("gpt_oss", "qwen3_moe")
    tower = INTERNVL_TOWER
    older: ClassVar = shared.LANGUAGE_MODEL
    head_by_checkpoint = True
    own_left_out: ClassVar = INTERNVL_LEFT_OUT
    own_names: ClassVar = {"vision heads": "vision_config.num_attention_heads"}

    def translate(self, fields: Fields) -> ModelConfig:
        text, decoder = self.decoder(fields)
        vision = internvl_tower(fields.sub("vision_config"), fields, decoder.hidden)
        tokens = (vision.side // vision.merge_size) ** 2
        fields.choice("image_seq_length", (tokens,), tokens)
        return ModelConfig(
            model_type="internvl",
            decoder=decoder,
            vision=vision,
            mark_texts={"begin": "<img>", "end": "</img>"},
            **shared.token_ids(fields, text, self.text.eos),
        )
