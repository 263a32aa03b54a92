"""Videos against the video processors of transformers, as far as these run without torchvision."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.video_processing_utils import BaseVideoProcessor

from moevlm.runtime.core.errors import BundleError, RequestError
from moevlm.runtime.core.towers import GridTower
from moevlm.runtime.request.image_limits import NO_LIMITS, ImageLimits
from moevlm.runtime.request.images.registry import image_processor
from moevlm.runtime.request.messages import GivenVideo
from moevlm.runtime.request.videos.clip import FrameList
from moevlm.runtime.request.videos.file_clip import FileClip
from moevlm.runtime.request.videos.processor import PlannedVideo, VideoProcessor
from moevlm.runtime.request.videos.registry import video_processor
from tests.support.videos import expansion_of, metadata_of, moving_square, patches_of, processor_of

KINDS = {
    "Qwen3VLVideoProcessor": "Qwen2VLImageProcessor",
    "Glm4vVideoProcessor": "Glm4vImageProcessor",
    "Glm46VVideoProcessor": "Glm46VImageProcessor",
}
CLIPS = [(2, 1.0), (7, 24.0), (9, 2.0), (25, 12.5), (60, 29.97), (400, 10.0), (3000, 25.0)]


def fields_of(kind: str, **own: Any) -> dict[str, Any]:
    common = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    edges = {"shortest_edge": 4 * 64, "longest_edge": 72 * 64}
    return {"video_processor_type": kind, "size": edges, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5] * 3} | (
        common | own
    )


def ours_of(fields: dict[str, Any], **images: Any) -> VideoProcessor:
    tower = GridTower(
        patch_size=4,
        merge_size=2,
        channels=3,
        head_dim=8,
        rope_theta=1e4,
        temporal_patch_size=fields["temporal_patch_size"],
        position_grid=5,
        position_resampling="bilinear",
    )
    shared = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5] * 3, "patch_size": 4}
    shared["temporal_patch_size"] = fields["temporal_patch_size"]
    kind = KINDS.get(fields["video_processor_type"], "Qwen2VLImageProcessor")
    return video_processor(fields, tower, image_processor({"image_processor_type": kind} | shared | images, tower))


def given(frames: list[Any], fps: float | None, limits: ImageLimits = NO_LIMITS, most: int | None = None) -> GivenVideo:
    return GivenVideo(frames, fps, most, limits)


def planned(ours: VideoProcessor, frames: int, fps: float, size: tuple[int, int] = (40, 24)) -> PlannedVideo:
    """A plan of a clip of which only the first frame is there."""
    return ours.plan(given([Image.new("RGB", size)] * frames, fps))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(("frames", "fps"), CLIPS)
def test_frames_and_times_are_those_of_transformers(kind: str, copies: int, frames: int, fps: float) -> None:
    fields = fields_of(kind, temporal_patch_size=copies)
    if kind.startswith("Glm"):
        fields["max_duration"] = 60
    ours, theirs = ours_of(fields), processor_of(fields)
    plan, metadata = planned(ours, frames, fps), metadata_of(theirs, frames, fps)
    wanted = list(metadata.frames_indices)
    assert list(plan.indices) == wanted + [wanted[-1]] * (-len(wanted) % copies)
    width, height = plan.size
    tokens, slices = plan.slice_tokens, len(plan.times)
    text = expansion_of(theirs, metadata, (slices, height // 4, width // 4))
    token = "<|video_pad|>" if plan.text_first else "<|image_pad|>"
    found = "".join(f"{a}<|vision_start|>{token * n}<|vision_end|>{b}" for a, n, b in plan.texts())
    assert found == text
    assert tokens == width * height // 64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("frames", "fps"), [*CLIPS, (20_000, 59.94), (100_000, 25.0), (10, 0.01)])
def test_frames_of_a_file_are_those_of_transformers(
    kind: str, frames: int, fps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose header says how long it is."""
    clip = FileClip(b"", "video", frames, fps, (40, 24))
    monkeypatch.setattr(FileClip, "of", lambda _: clip)
    ours, theirs = (make(fields_of(kind)) for make in (ours_of, processor_of))
    plan, metadata = ours.plan(GivenVideo(b"", None, None, NO_LIMITS)), metadata_of(theirs, frames, fps, frames / fps)
    wanted = list(metadata.frames_indices)
    assert list(plan.indices) == wanted + [wanted[-1]] * (len(wanted) % 2)
    text = expansion_of(theirs, metadata, (len(plan.times), plan.size[1] // 4, plan.size[0] // 4))
    assert all(time in text for time in plan.times)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "own", [{}, {"size": {"shortest_edge": 4096, "longest_edge": 25165824}}, {"cap_pixels_per_frame": True}]
)
def test_sizes_are_those_of_transformers(kind: str, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if kind.startswith("Glm") and "cap_pixels_per_frame" in own:
        own = {"size": {"shortest_edge": 64, "longest_edge": 64}}
    fields = fields_of(kind, **own)
    ours, theirs = ours_of(fields), processor_of(fields)
    # What the class of all video processors would do of the pixels needs torchvision.
    monkeypatch.setattr(BaseVideoProcessor, "resize", lambda _, **given: given["size"])
    random = np.random.default_rng(3).integers(5, 700, (20, 2)).tolist()
    for number, (width, height) in enumerate([(4, 4), (3, 500), (640, 480), (1920, 1080), *random]):
        count = 9 + 3 * number
        frames = len(metadata_of(theirs, count, 3.0).frames_indices)
        video = torch.empty(1, frames, 3, height, width, device="meta")
        options = {"cap_pixels_per_frame": fields.get("cap_pixels_per_frame")} if kind.startswith("Qwen") else {}
        wanted = theirs.resize(video, SizeDict(**fields["size"]), 3, 8, 2, **options)
        assert planned(ours, count, 3.0, (width, height)).size == (wanted.width, wanted.height)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [5, 8])
def test_patches_are_those_of_transformers(kind: str, count: int) -> None:
    ours, theirs = (make(fields_of(kind)) for make in (ours_of, processor_of))
    plan = ours.plan(given(moving_square(count), 3.0))
    slices = plan.slices()
    inputs, grids = ours.images.pack(slices)
    frames = [frame for one in slices for frame in one.frames]
    wanted, (t, h, w) = patches_of(theirs, frames[: len(frames) - len(frames) % 2])
    assert grids == [(h, w)] * t
    np.testing.assert_allclose(inputs.pixel_patches, wanted.numpy(), atol=1e-6)
    assert np.ptp(inputs.pixel_patches.reshape(t, -1), axis=0).max() > 0.5  # slices differ


def test_frames_are_resized_as_torchvision_does_but_for_a_level() -> None:
    """torchvision's resize of bytes is torch's interpolation with antialiasing."""
    frames = moving_square(4, 96, 72)
    (first, second) = ours_of(fields_of("Qwen3VLVideoProcessor")).plan(given(frames, 4.0)).slices()
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)
    size = (first.height, first.width)
    wanted = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
    found = np.stack([np.asarray(frame) for one in (first, second) for frame in one.frames])
    assert np.abs(found.astype(int) - wanted.permute(0, 2, 3, 1).numpy()).max() <= 1


def test_limits_of_a_request_make_a_video_smaller() -> None:
    ours = ours_of(fields_of("Qwen3VLVideoProcessor"))
    frames = moving_square(40)
    usual, fewer = ours.plan(given(frames, 4.0)), ours.plan(given(frames, 4.0, most=6))
    assert (len(usual.indices), len(fewer.indices)) == (20, 6)
    assert fewer.indices[0] == 0
    assert fewer.indices[-1] == 39
    for limits in (ImageLimits(max_pixels=3 * 64), ImageLimits(max_tokens=3)):
        assert ours.plan(given(frames, 4.0, limits, most=6)).slice_tokens <= 3 < fewer.slice_tokens
    assert len(ours_of(fields_of("Glm4vVideoProcessor")).plan(given(frames, 4.0, most=6)).indices) == 6


def test_more_frames_than_are_ever_taken_are_left_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moevlm.runtime.core.defaults.MAX_VIDEO_FRAMES", 10)
    for kind in KINDS:
        indices = planned(ours_of(fields_of(kind)), 300, 10.0).indices
        assert len(indices) == 10
        assert max(np.diff(indices)) - min(np.diff(indices)) <= 5


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "a list of 0 frames"),
        ([Image.new("RGB", (9, 9))], "has 1 frames (allowed: 2 or more)"),
        ([Image.new("RGB", (900, 4))] * 4, "video is 900 x 4 pixels: one side is more than 200 times the other"),
        ("clip.mp4", "a video is the text 'clip.mp4' (allowed: a list of images, a pathlib.Path"),
        ([Image.new("RGB", (9, 9)), "frame.png"], "an image is the text 'frame.png'"),
    ],
)
def test_what_is_no_video_is_refused(source: Any, words: str) -> None:
    with pytest.raises(RequestError) as raised:
        ours_of(fields_of("Qwen3VLVideoProcessor")).plan(given(source, None)).slices()
    assert words in str(raised.value)


def test_frames_of_different_sizes_are_refused() -> None:
    ours = ours_of(fields_of("Qwen3VLVideoProcessor"))
    frames = [*moving_square(3), Image.new("RGB", (41, 24))]
    with pytest.raises(RequestError, match="frame 4 of a video is 41 x 24 pixels, the first 40 x 24"):
        ours.plan(given(frames, 2.0)).slices()


def test_a_list_without_a_rate_has_24_frames_a_second() -> None:
    plan = ours_of(fields_of("Qwen3VLVideoProcessor")).plan(given(moving_square(48), None))
    assert isinstance(plan.clip, FrameList)
    assert plan.clip.fps == 24
    assert len(plan.indices) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"merge_size": 4}, "merge_size = 4 (supported: 2"),
        ({"video_processor_type": "Other"}, 'video_processor_type = "Other"'),
        ({"do_sample_frames": False}, "do_sample_frames = false (supported: true)"),
        ({"num_frames": 8}, "num_frames = 8"),
        ({"fps": 0}, "fps = 0"),
        ({"min_frames": 1.5}, "min_frames = 1.5"),
        ({"size": {"shortest_edge": 1}}, "size.longest_edge = null"),
        ({"resample": 0}, "resample = 0 (supported: 2, 3)"),
        ({"bogus": 3}, "bogus = 3"),
        ({"image_mean": [0, 0, 0]}, "those of preprocessor.json"),
    ],
)
def test_fields_that_cannot_be_reproduced_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError) as raised:
        ours_of(fields_of("Qwen3VLVideoProcessor") | change)
    assert "video_preprocessor.json" in str(raised.value)
    assert words in str(raised.value)
