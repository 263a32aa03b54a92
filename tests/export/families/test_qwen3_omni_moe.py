"""Qwen3-Omni's thinker: its fields of config.json and its names, and what is left out of both by name."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.families import family_for
from moevlm.export.model import CanonicalModel
from moevlm.runtime.core.errors import CheckpointError, UnsupportedModelError
from moevlm.runtime.request.images.registry import image_processor
from tests.support.checkpoints import canonical, refused, with_field
from tests.support.tiny import TinyCheckpoint, edit_tensors

CHOICES = [
    ("thinker_config.text_config.use_qk_norm", False, "true"),
    ("thinker_config.text_config.hidden_act", "gelu", "silu"),
    ("thinker_config.vision_config.apply_vit_abs_pos_embed", False, "true"),
]
MODEL = TinyCheckpoint("qwen3_omni_moe", text={"vocab_size": 96}, seed=35)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be left as it is."""
    return MODEL.save(tmp_path_factory.mktemp("omni") / "checkpoint")


@pytest.mark.parametrize(("path", "value", "allowed"), CHOICES)
def test_value_that_is_not_supported_is_refused_by_its_whole_name(
    path: str, value: Any, allowed: str, checkpoint: Path
) -> None:
    config = with_field(checkpoint, path, value)
    told = f"unsupported value in config.json: {path} = "
    refused(UnsupportedModelError, told, f"(supported: {allowed})", act=lambda: family_for(config).config(config))


def test_size_that_does_not_fit_is_named_where_it_stands(checkpoint: Path) -> None:
    config = with_field(checkpoint, "thinker_config.text_config.num_experts_per_tok", 9)
    told = "thinker_config.text_config.num_experts_per_tok = 9"
    refused(UnsupportedModelError, told, act=lambda: family_for(config).config(config))


def test_fields_of_sound_speech_and_video_change_nothing(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    more = copy.deepcopy(config) | {"talker_config": {"speaker_id": {"ethan": 2302}}, "code2wav_config": {"depth": 1}}
    more |= {"system_token_id": 8948, "tts_pad_token_id": 7, "assistant_token_id": 9, "im_end_token_id": 2}
    thinker = more["thinker_config"] = more["thinker_config"] | {"position_id_per_seconds": 13, "seconds_per_chunk": 2}
    thinker |= {"audio_end_token_id": 92, "user_token_id": 872}
    thinker["text_config"] |= {"use_qk_norm": True, "shared_expert_intermediate_size": 0, "sliding_window": None}
    thinker["vision_config"] |= {"apply_vit_abs_pos_embed": True, "image_size": 768, "in_chans": 3}
    thinker["vision_config"] |= {"spatial_patch_size": 16, "tokens_per_second": 2}
    assert family_for(more).config(more) == family_for(config).config(config)


def test_tensors_of_sound_and_speech_are_left_out_and_counted(checkpoint: Path) -> None:
    with Checkpoint.open(checkpoint) as source:
        model = CanonicalModel.of(source)
        names = list(source.tensors)
    assert model.left_out == {
        "talker": sum(name.startswith("talker") for name in names),
        "code2wav": sum(name.startswith("code2wav") for name in names),
        "thinker.audio_tower": sum(name.startswith("thinker.audio_tower") for name in names),
    }
    assert min(model.left_out.values()) > 0
    hearing = model.left_out["thinker.audio_tower"]
    assert f"left out {hearing} tensors thinker.audio_tower: audio is not supported" in model.notes
    assert "left out 1 tensor talker: speech is not supported" in model.notes


def test_experts_one_by_one_and_fused_are_one_model(checkpoint: Path, save_checkpoint: Callable[..., Path]) -> None:
    from tests.export.families.test_tensor_names import fuse_experts

    for in_out in (False, True):
        other = save_checkpoint(model_type="qwen3_omni_moe", text=MODEL.text, seed=MODEL.seed)
        edit_tensors(other, lambda tensors, in_out=in_out: fuse_experts(tensors, in_out))
        ours, theirs = canonical(other), canonical(checkpoint)
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_missing_tensor_is_named(save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint(model_type="qwen3_omni_moe", text=MODEL.text)
    name = "thinker.visual.merger.ln_q.bias"
    edit_tensors(directory, lambda tensors: tensors.pop(name))
    refused(CheckpointError, f"the checkpoint lacks tensor {name}", act=lambda: canonical(directory))


def test_preprocessor_as_published_is_understood(checkpoint: Path) -> None:
    """It is a file that images share with sound."""
    config = json.loads((checkpoint / "config.json").read_text())
    vision = family_for(config).config(config).metadata().vision
    image_mean = image_std = [0.5, 0.5, 0.5]
    images = {"image_processor_type": "Qwen2VLImageProcessor", "image_mean": image_mean, "image_std": image_std}
    images |= {"min_pixels": 3136, "max_pixels": 12845056, "merge_size": 2, "patch_size": 4, "temporal_patch_size": 2}
    sound = {
        **{"feature_extractor_type": "WhisperFeatureExtractor", "processor_class": "Qwen3OmniMoeProcessor"},
        **{"feature_size": 128, "sampling_rate": 16000, "hop_length": 160, "chunk_length": 300, "n_fft": 400},
        **{"n_samples": 4800000, "nb_max_frames": 30000, "dither": 0.0, "padding_side": "left", "padding_value": 0.0},
        "return_attention_mask": True,
    }
    assert image_processor(images | sound, vision).max_patches == image_processor(images, vision).max_patches
