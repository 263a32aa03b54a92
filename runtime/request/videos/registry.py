"""Which video processor a preprocessor asks for."""

from collections.abc import Mapping
from typing import Any

from moevlm.runtime.core.towers import GridTower, VisionMetadata
from moevlm.runtime.request.images.fields import VIDEO_FILE, refuse
from moevlm.runtime.request.images.processor import ImageProcessor
from moevlm.runtime.request.videos.glm4v import Glm4vVideos, Glm46VVideos
from moevlm.runtime.request.videos.processor import VideoProcessor
from moevlm.runtime.request.videos.qwen3_vl import Qwen3VLVideos

_PROCESSORS: dict[str, type[VideoProcessor]] = {
    "Glm46VVideoProcessor": Glm46VVideos,
    "Glm4vVideoProcessor": Glm4vVideos,
    "Qwen3VLVideoProcessor": Qwen3VLVideos,
}


def video_processor(preprocessor: Mapping[str, Any], vision: VisionMetadata, images: ImageProcessor) -> VideoProcessor:
    """The processor of a tower's videos.

    preprocessor: the bundle's video_preprocessor.json. images: opens frames that come as images, and makes patches of
    all of them. Raises BundleError naming the field that cannot be reproduced.
    """
    name = preprocessor.get("video_processor_type")
    kind = str(name).removesuffix("Fast")
    if kind not in _PROCESSORS or not isinstance(vision, GridTower):
        refuse("video_processor_type", name, ", ".join(_PROCESSORS), VIDEO_FILE)
    return _PROCESSORS[kind](preprocessor, vision, images)
