"""What a tiny model of a family is: the fields that all have, and what a family's file here says of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
END, START, STOP, VISION_START, VISION_END, IMAGE, VIDEO = range(len(SPECIAL))
VOCABULARY = len(SPECIAL) + 256  # a token for every byte

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": [STOP, END],
    "pad_token_id": END,
}
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "in_channels": 3,
    "out_hidden_size": 32,
}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
SMALL: dict[str, Any] = {"vocab_size": 96}  # of a text model that is never given a text

Fields = dict[str, dict[str, Any]]


def qwen2_vl_preprocessor(vision: Mapping[str, Any]) -> dict[str, Any]:
    unit = vision["patch_size"] * vision["spatial_merge_size"]
    return {
        "patch_size": vision["patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "size": {"shortest_edge": unit**2, "longest_edge": 36 * unit**2},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


@dataclass(frozen=True)
class TinyFamily:
    """fields: of config.json, by part: text, vision, top. config, model: transformers' classes.

    A model of text alone has no fields of vision, no image processor, and what is text's at the top.

    configurations: options of `TinyCheckpoint` by name, at least four that vary what the family varies; all of them go
    through parity with transformers. values: what a tensor is filled with, from its name and standard normal numbers of
    its shape; None where `tiny` knows better. preprocessor: preprocessor_config.json, from vision_config.
    image: what the chat template writes for an image. named_tokens: of tokenizer_config.json. renamed: special tokens
    that the family's tokenizer calls otherwise.
    tokens: special ones of the tokenizer beyond those of all, numbered from SPECIAL's on.
    video_processor: its name, for a family that takes videos.
    published: makes of what transformers saves what is published.
    """

    fields: Fields
    config: str
    model: str
    image_processor: str
    configurations: Mapping[str, Mapping[str, Any]]
    values: Callable[[str, torch.Tensor], torch.Tensor | None] = lambda *_: None
    preprocessor: Callable[[Mapping[str, Any]], Mapping[str, Any]] = qwen2_vl_preprocessor
    image: str = "<|vision_start|><|image_pad|><|vision_end|>"
    renamed: Mapping[str, str] = field(default_factory=dict)
    named_tokens: Mapping[str, str] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    video_processor: str = ""
    published: Callable[[Path], None] = lambda _: None
