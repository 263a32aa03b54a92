"""Questions about a video: token ids, positions, features and logits of transformers, through a whole bundle."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from moevlm.export.build import build
from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.loading import load_runtime
from moevlm.runtime.request.images.slices import Slice
from moevlm.runtime.request.sampling import SamplingParams
from tests.support.families import TINY
from tests.support.tiny import TinyCheckpoint
from tests.support.videos import expansion_of, metadata_of, moving_square, patches_of, processor_of

FRAMES, FPS, TOKENS = 11, 4.0, 4
GREEDY = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True, logprobs=3)
FAMILIES = sorted(family for family in TINY if TINY[family].video_processor)


@dataclass(frozen=True)
class Loaded:
    runtime: Runtime
    model: Any
    tokenizer: Any
    processor: Any
    token_id: int


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = TinyCheckpoint(request.param, side_files=True, seed=7).save(folder / "checkpoint")
    bundle = build(checkpoint, folder / "tiny.moevlm", ["reference"]).directory
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager").eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))
    processor = processor_of(json.loads((checkpoint / "video_preprocessor_config.json").read_text()))
    with load_runtime(bundle, "reference") as runtime:
        assert runtime.model.video is not None
        yield Loaded(runtime, model, tokenizer, processor, runtime.model.video.token_id)


def question(frames: list[Any], *more: dict[str, Any], fps: float = FPS) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": "In "}, {"type": "video", "video": frames, "fps": fps}, *more]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": ", what moves?"}]}]


@torch.no_grad()
def test_a_video_is_read_as_transformers_reads_it(loaded: Loaded) -> None:
    frames, runtime = moving_square(FRAMES), loaded.runtime
    prompt = runtime.prompt(question(frames))
    slices = [one for one in prompt.images if isinstance(one, Slice)]
    assert len(slices) == len(prompt.images) > 1
    assert prompt.sources == ("video 1",) * len(slices)

    metadata = metadata_of(loaded.processor, FRAMES, FPS)
    taken = [frames[index].resize(slices[0].size, 3) for index in metadata.frames_indices]
    patches, grid = patches_of(loaded.processor, taken)
    expansion = expansion_of(loaded.processor, metadata, grid)
    video = f"<|vision_start|>{expansion}<|vision_end|>"
    text = f"<|im_start|>user\nIn {video}, what moves?<|im_end|>\n<|im_start|>assistant\n"
    ids = loaded.tokenizer.encode(text, add_special_tokens=False)
    assert prompt.ids.tolist() == ids

    answer = list(runtime.generate(prompt, params=GREEDY))
    chosen = [token for piece in answer for token in piece.sampled]
    whole = torch.tensor([[*ids, *(token.token_id for token in chosen)]])
    kinds, grids = 2 * (whole == loaded.token_id).int(), torch.tensor([grid])
    positions, delta = loaded.model.model.get_rope_index(whole, kinds, video_grid_thw=grids)
    np.testing.assert_array_equal(prompt.positions, positions[:, 0, : len(ids)].numpy())
    assert prompt.next_position == len(ids) + int(delta)

    pooled = loaded.model.model.get_video_features(patches, grids, return_dict=True).pooler_output
    found = np.concatenate([one.to_host().embeds for one in runtime.encode([prompt])])
    np.testing.assert_allclose(found, torch.cat(list(pooled)).numpy(), atol=1e-4)

    inputs = {"pixel_values_videos": patches, "video_grid_thw": grids, "mm_token_type_ids": kinds}
    logits = loaded.model(input_ids=whole, attention_mask=torch.ones_like(whole), **inputs, use_cache=False).logits[0]
    wanted = torch.log_softmax(logits[len(ids) - 1 : -1].double(), -1)
    assert [token.token_id for token in chosen] == wanted.argmax(-1).tolist()
    np.testing.assert_allclose([token.logprob for token in chosen], wanted.max(-1).values, atol=2e-4)


def logprobs(runtime: Runtime, messages: list[dict[str, Any]]) -> list[float]:
    return [token.logprob for piece in runtime.generate(messages, params=GREEDY) for token in piece.sampled]


def test_what_is_kept_of_a_video_is_taken_for_no_other(loaded: Loaded) -> None:
    """Slices are kept by all their frames: one that differs in its second frame alone is another."""
    frames = moving_square(4)
    changed = [*frames[:3], moving_square(9)[8]]
    first, other = (logprobs(loaded.runtime, question(clip)) for clip in (frames, changed))
    assert first != other
    assert logprobs(loaded.runtime, question(frames)) == first
    loaded.runtime.forget()
    assert logprobs(loaded.runtime, question(changed)) == other


def test_a_video_and_an_image_stand_where_the_message_has_them(loaded: Loaded) -> None:
    frames = moving_square(4)
    mixed = loaded.runtime.prompt(question(frames, {"type": "image", "image": frames[0]}))
    assert [isinstance(one, Slice) for one in mixed.images] == [True, True, False]
    alone = loaded.runtime.prompt(question(frames))
    assert mixed.image_tokens > alone.image_tokens
    size = len(alone.ids) - len(", what moves?<|im_end|>")
    np.testing.assert_array_equal(mixed.ids[: size - 40], alone.ids[: size - 40])
    assert len(logprobs(loaded.runtime, question(frames, {"type": "image", "image": frames[0]}))) == TOKENS


def test_videos_of_more_tokens_than_the_context_are_refused_before_they_are_decoded(loaded: Loaded) -> None:
    frames, context = moving_square(4), loaded.runtime.model.context
    each = loaded.runtime.prompt(question(frames)).image_tokens
    unread = [frames[0], *["no image"] * 3]
    more = [{"type": "video", "video": unread, "fps": FPS}] * (context // each)
    with pytest.raises(RequestError, match=rf"prompt's {1 + len(more)} images and videos have .* context {context} "):
        loaded.runtime.prompt(question(frames, *more))


def test_a_checkpoint_without_video_preprocessing_takes_no_videos(tmp_path: Path) -> None:
    checkpoint = TinyCheckpoint(side_files=True).save(tmp_path / "checkpoint")
    (checkpoint / "video_preprocessor_config.json").unlink()
    bundle = build(checkpoint, tmp_path / "tiny.moevlm", ["reference"]).directory
    with load_runtime(bundle) as runtime, pytest.raises(RequestError, match="no video preprocessing"):
        runtime.prompt(question(moving_square(4)))
