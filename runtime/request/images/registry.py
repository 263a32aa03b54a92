"""Which image processor a preprocessor asks for."""

from collections.abc import Mapping
from typing import Any

from moevlm.runtime.core import defaults
from moevlm.runtime.core.towers import VisionMetadata
from moevlm.runtime.request.images.aria import AriaImages
from moevlm.runtime.request.images.ernie import ErnieImages
from moevlm.runtime.request.images.fields import refuse
from moevlm.runtime.request.images.gemma4 import Gemma4Images
from moevlm.runtime.request.images.got_ocr2 import GotOcr2Images
from moevlm.runtime.request.images.kimi_k25 import KimiK25Images
from moevlm.runtime.request.images.llama4 import Llama4Images
from moevlm.runtime.request.images.pixtral import PixtralImages
from moevlm.runtime.request.images.processor import ImageProcessor
from moevlm.runtime.request.images.qwen2_vl import Glm4vImages, Qwen2VLImages

# By image_processor_type, without the suffix of the implementation.
_PROCESSORS: dict[str, type[ImageProcessor]] = {
    "AriaImageProcessor": AriaImages,
    "Ernie4_5_VLMoeImageProcessor": ErnieImages,
    "Gemma4ImageProcessor": Gemma4Images,
    "GotOcr2ImageProcessor": GotOcr2Images,
    "Kimi_K25ImageProcessor": KimiK25Images,
    "Llama4ImageProcessor": Llama4Images,
    "Glm46VImageProcessor": Glm4vImages,
    "Glm4vImageProcessor": Glm4vImages,
    "PixtralImageProcessor": PixtralImages,
    "Qwen2VLImageProcessor": Qwen2VLImages,
}


def image_processor(
    preprocessor: Mapping[str, Any],
    vision: VisionMetadata,
    max_pixels: int = defaults.MAX_IMAGE_PIXELS,
    max_tokens: int | None = None,
) -> ImageProcessor:
    """The processor of a tower's images.

    preprocessor: the bundle's preprocessor.json. max_pixels: the largest image, as its header states it, that is
    decoded. max_tokens: the most that an image takes; larger ones are made smaller, as `ImageLimits` say.
    Raises BundleError naming the field that cannot be reproduced or that contradicts the manifest.
    """
    name = preprocessor.get("image_processor_type")
    known = {kind: processor for kind, processor in _PROCESSORS.items() if isinstance(vision, processor.TOWER)}
    # transformers goes by the model's type where the file names none.
    only = next(iter(known)) if name is None and len(known) == 1 else str(name)
    kind = only.removesuffix("Fast").removesuffix("Pil")
    if kind not in known:
        refuse("image_processor_type", name, ", ".join(known))
    return known[kind](preprocessor, vision, max_pixels, max_tokens)
