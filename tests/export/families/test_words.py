"""What `moevlm inspect` and a dry run say of a model, family by family."""

import pytest

from moevlm.export.families import family_for
from moevlm.runtime.cli.model_text import _TOWERS, model_rows
from moevlm.runtime.core.towers import VisionMetadata
from tests.support.tiny import TinyCheckpoint


@pytest.mark.parametrize(
    ("family", "row", "words"),
    [
        ("kimi_k25", "attention", "MLA on a latent cache, 4 heads on 1 key-value head of 40 and 32"),
        ("llama4", "attention", "3 layers: GQA with q/k norms, 4 heads on 2 key-value heads of 16, chunks of 16; "),
        ("llama4", "images", "tiles of one size and an overview, patches of 4 pixels, 4 of them a token"),
        ("ernie4_5_vl_moe", "routing", "(softmax, correction bias, renormalised; others for images, shared experts)"),
        ("qwen3_5_moe", "attention", "gated delta rule"),
        ("qwen3_vl_moe", "layers", "2 of width 32; interleaved M-RoPE"),
        ("gpt_oss", "layers", "scaled rope"),
    ],
    ids=lambda text: text[:20],
)
def test_a_model_is_told_in_the_words_of_its_family(family: str, row: str, words: str) -> None:
    config = TinyCheckpoint(family).config().to_dict()
    assert words in dict(model_rows(family_for(config).config(config).metadata()))[row]


def test_partial_rope_is_not_scaled_rope() -> None:
    config = TinyCheckpoint("gemma4").config().to_dict()
    assert "scaled" not in dict(model_rows(family_for(config).config(config).metadata()))["layers"]


def test_every_kind_of_tower_has_words() -> None:
    assert {kind.__struct_config__.tag for kind in VisionMetadata.__args__} <= set(_TOWERS)
