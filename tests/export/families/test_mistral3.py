"""Mistral 3: where its tensors lie, whether its head is tied, what is refused, and requests with images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.plan_launches import launches
from moevlm.export.build import build
from moevlm.export.families import family_for
from moevlm.export.parity.run import check_parity
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import CheckpointError, UnsupportedModelError
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_runtime
from tests.support.checkpoints import canonical, names, refused, with_field
from tests.support.fakes.gpu import gpu_bundle
from tests.support.gpu_steps import assert_steps_are_those_of_reference
from tests.support.published import FORMATS, floats
from tests.support.requests import assert_alone_as_together, assert_parity
from tests.support.tiny import TinyCheckpoint, edit_json, edit_tensors

MODEL = TinyCheckpoint("mistral3", text={"vocab_size": 96}, seed=66)
TARGETS = ("reference", "ort-cpu", "cpu:int8", "cpu:int4")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be left as it is."""
    return MODEL.save(tmp_path_factory.mktemp("mistral3") / "checkpoint")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_a_head_that_config_json_says_there_is_is_missed(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if "lm_head" in name])
    refused(CheckpointError, "the checkpoint lacks tensor lm_head.weight", act=lambda: canonical(copy))


def test_a_head_unlike_an_embedding_that_is_said_to_be_it_is_refused(copy: Path) -> None:
    edit_json(copy / "config.json", lambda config: config.update(tie_word_embeddings=True))
    told = "tensor lm_head.weight differs from the embedding, though config.json says tie_word_embeddings = true"
    refused(CheckpointError, told, act=lambda: canonical(copy))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("text_config.model_type", "mistral", 'text_config.model_type = "mistral" (supported: '),
        ("text_config.hidden_act", "gelu", 'text_config.hidden_act = "gelu" (supported: silu)'),
        ("vision_feature_layer", -2, "vision_feature_layer = -2 (supported: -1, 2)"),
        ("vision_config.hidden_act", "relu", 'vision_config.hidden_act = "relu"'),
        ("vision_config.num_attention_heads", 3, "vision_config.head_dim = 16 (supported: 10)"),
        ("image_token_index", 96, "image_token_index = 96"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else None,
)
def test_value_that_is_not_supported_is_refused_by_name(path: str, value: Any, told: str, saved: Path) -> None:
    config = with_field(saved, path, value)
    refused(UnsupportedModelError, told, act=lambda: family_for(config).config(config))


def test_a_tokenizer_without_the_tokens_of_images_is_refused_by_their_name(tmp_path: Path) -> None:
    directory = TinyCheckpoint("mistral3", side_files=True).save(tmp_path / "checkpoint")
    text = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(text.replace("[IMG_BREAK]", "[OTHER]"))
    refused(CheckpointError, "[IMG_BREAK]", act=lambda: build(directory, tmp_path / "bundle", ["reference"]))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """And its checkpoint."""
    folder = tmp_path_factory.mktemp("bundle")
    checkpoint = TinyCheckpoint("mistral3", side_files=True, seed=67).save(folder / "checkpoint")
    return build(checkpoint, folder / "tiny.moevlm", TARGETS), checkpoint


def test_every_target_and_its_requests_pass_parity(bundle: tuple[Bundle, Path]) -> None:
    assert assert_parity(*bundle, TARGETS) == ()


def test_an_image_has_a_break_behind_each_row_but_the_last_and_an_end(bundle: tuple[Bundle, Path]) -> None:
    """As transformers' PixtralProcessor writes it: [IMG] for each token of a row, then [IMG_BREAK] or [IMG_END]."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 3), np.uint8)  # 3 x 4 tokens of 8 x 8 pixels
    image = {"type": "image", "image": Image.fromarray(pixels)}
    with load_runtime(bundle[0].directory, "cpu:int8", LoadOptions(threads=1)) as runtime:
        prompt = runtime.prompt([{"role": "user", "content": [image, {"type": "text", "text": "?"}, image]}])
        row, (end,) = [runtime.model.image_token_id] * 4, runtime.model.image_marks.end
        (row_break,) = runtime.model.image_marks.row_break
        whole = [*row, row_break, *row, row_break, *row, end]
        ids = prompt.ids.tolist()
        first = ids.index(row[0])
        assert ids[first : first + 15] == whole
        assert ids[first + 16 : first + 31] == whole
        np.testing.assert_array_equal(prompt.positions, [range(len(ids))] * 3)
        assert_alone_as_together(runtime, prompt)


def test_steps_on_a_gpu_are_given_images_and_what_stands_between_their_rows(
    bundle: tuple[Bundle, Path], tmp_path: Path
) -> None:
    """On a fake GPU that evaluates the canonical graphs."""
    rng = np.random.default_rng(5)
    images = [
        {"type": "image", "image": Image.fromarray(rng.integers(0, 256, (height, 28, 3), np.uint8))}
        for height in (20, 9, 33)
    ]
    contents: list[list[dict[str, Any]]] = [[{"type": "text", "text": "hi"}], images[:2], images[2:]]
    directory = gpu_bundle(bundle[0].directory, tmp_path)
    assert_steps_are_those_of_reference(directory, [[{"role": "user", "content": each}] for each in contents], tmp_path)


@pytest.mark.parametrize("form", ["fp8-static-fused", "nvfp4-compressed"])
def test_published_formats_pass_parity(form: str, tmp_path: Path) -> None:
    """mistralai/Mistral-Small-4-119B-2603: experts fused or one by one, under the older prefix."""
    FORMATS[form].publish(floats("mistral3", tmp_path / "floats"), tmp_path / "published", tmp_path / "plain")
    assert "language_model.model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale" in str(
        names(tmp_path / "published")
    )
    bundle = build(tmp_path / "published", tmp_path / "b.moevlm", ["reference"])
    report = check_parity(bundle.directory, tmp_path / "published", quick=True)
    assert [check for check in report.checks if not check.passed] == []


def test_tensorrt_rtx_builds_plans_of_the_decoder_and_of_the_tower(saved: Path, tmp_path: Path) -> None:
    bundle = build(saved, tmp_path / "b.moevlm", ["rtx:sm89"])
    engine, layers = bundle.manifest.engines["rtx:sm89:bf16"], len(bundle.manifest.model.layers)
    found = {
        name: launches(bundle.path(plan).read_bytes()) for name, plan in (("d", engine.decoder), ("v", engine.vision))
    }
    for profile in found["d"]:
        assert [launch.plugin for launch in profile].count("PagedAttention") == layers
    for profile in found["v"]:
        assert [launch.plugin for launch in profile].count("SegmentAttention") == 2
