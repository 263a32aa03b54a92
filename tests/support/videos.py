"""Synthetic clips, and what transformers' processors make of a clip without torchvision."""

from __future__ import annotations

import importlib.util
import io
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch


def moving_square(frames: int, width: int = 40, height: int = 24) -> list[Image.Image]:
    """A bright square that moves over a gradient, a frame for each step."""
    rows, columns = np.indices((height, width))
    clip = []
    for number in range(frames):
        pixels = np.stack([rows * 5, columns * 4, (rows + columns + 7 * number) % 256], axis=-1).astype(np.uint8)
        left = (3 * number) % (width - 8)
        pixels[4:12, left : left + 8] = 255
        clip.append(Image.fromarray(pixels))
    return clip


def encoded(frames: list[Image.Image], kind: str, codec: str, fps: int = 10) -> bytes:
    """A video file of these frames. kind: its format, as FFmpeg calls it."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return file.getvalue()


def processor_of(fields: dict[str, Any]) -> Any:
    """transformers' video processor with these fields of video_preprocessor_config.json."""
    from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    kinds = {
        "Glm46VVideoProcessor": _glm46v(),
        "Glm4vVideoProcessor": Glm4vVideoProcessor,
        "Qwen3VLVideoProcessor": Qwen3VLVideoProcessor,
    }
    own = {name: value for name, value in fields.items() if name != "video_processor_type"}
    return kinds[fields["video_processor_type"]](**own)


def _glm46v() -> Any:
    """Its module imports torchvision without asking whether it is there; nothing that is called here uses it."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
    absent = {name: ModuleType(name) for name in names if importlib.util.find_spec("torchvision") is None}
    if absent:
        absent[names[-1]].functional = None  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, absent):
        from transformers.models.glm46v.video_processing_glm46v import Glm46VVideoProcessor
    return Glm46VVideoProcessor


def metadata_of(theirs: Any, frames: int, fps: float, seconds: float | None = None) -> Any:
    """Of a clip, with the frames that the processor takes."""
    from transformers.video_utils import VideoMetadata

    metadata = VideoMetadata(total_num_frames=frames, fps=fps, duration=seconds)
    metadata.frames_indices = theirs.sample_frames(metadata, fps=theirs.fps)
    return metadata


def expansion_of(theirs: Any, metadata: Any, grid: tuple[int, int, int]) -> str:
    """What the processor writes for a video's placeholder, in the tiny vocabulary's words. grid: (t, h, w)."""
    from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
    from transformers.models.glm46v.processing_glm46v import Glm46VProcessor
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    kinds = {"Glm4v": Glm4vProcessor, "Glm46V": Glm46VProcessor, "Qwen3VL": Qwen3VLProcessor}
    kind = kinds[type(theirs).__name__.removesuffix("VideoProcessor")]
    processor = SimpleNamespace(
        video_processor=theirs,
        video_token="<|video_pad|>",
        image_token="<|image_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    for name in ("_calculate_timestamps", "replace_frame_token_id"):
        if (method := getattr(kind, name, None)) is not None:
            setattr(processor, name, method.__get__(processor))
    inputs = {"video_grid_thw": np.array([grid]), "video_metadata": [metadata]}
    text = kind.replace_video_token(processor, inputs, 0)
    return text.replace("<|begin_of_image|>", "<|vision_start|>").replace("<|end_of_image|>", "<|vision_end|>")


def patches_of(theirs: Any, frames: list[Image.Image]) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Patches [P, width] of frames that are resized already, and their (t, h, w)."""
    import torch

    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (theirs.image_mean, theirs.image_std))
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)
    pixels = (pixels.float() / 255 - mean) / std
    patches, *grid = theirs.patchify(pixels[None], theirs.patch_size, theirs.merge_size, theirs.temporal_patch_size)
    return patches[0], tuple(grid)
