"""Fields of a preprocessor: which are known, and what bytes of pixels become."""

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from moevlm.runtime.core.errors import BundleError, one_line, quoted
from moevlm.runtime.core.towers import Tower

IMAGE_FILE, VIDEO_FILE = "preprocessor.json", "video_preprocessor.json"  # of a bundle
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP, by colour
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_MOST = 1e6  # that means and scales may be, and what deviations may divide by: results are far inside of float32
KNOWN = {
    *("image_processor_type", "resample", "rescale_factor", "image_mean", "image_std"),
    *("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"),
}
# Either for other kinds of input, or about the file itself.
WITHOUT_EFFECT = {
    *("processor_class", "feature_extractor_type", "auto_map", "transformers_version", "default_to_square"),
    *("data_format", "input_data_format", "return_tensors", "device", "disable_grouping", "image_seq_length"),
    # Of sound: transformers' WhisperFeatureExtractor shares the file of Qwen3-Omni.
    *("feature_size", "sampling_rate", "hop_length", "chunk_length", "n_fft", "n_samples", "nb_max_frames", "dither"),
    *("padding_side", "padding_value", "return_attention_mask"),
}


def grid_sizes(patch: int, frames: int = 2) -> Mapping[str, tuple[int, str]]:
    """SIZES of a processor for a GridTower. patch: side of a patch, frames: of a patch, where the fields do not say."""
    return {
        "patch_size": (patch, "patch_size"),
        "merge_size": (2, "merge_size"),
        "temporal_patch_size": (frames, "temporal_patch_size"),
    }


def read_fields(
    preprocessor: Mapping[str, Any],
    known: set[str],
    sizes: Mapping[str, tuple[int, str]],
    vision: Tower,
    file: str = IMAGE_FILE,
) -> dict[str, Any]:
    """A preprocessor's fields, those that are null left out.

    known: beside those of all. sizes: see ImageProcessor. file: what errors name. Raises BundleError for a field that
    cannot be reproduced or that contradicts the manifest.
    """
    # A null is as good as absent, but not where the reference takes it for false or fails on it.
    strict = KNOWN | sizes.keys()
    fields = {name: value for name, value in preprocessor.items() if value is not None or name in strict}
    _check_fields(fields, known | sizes.keys(), file)
    for name, (default, called) in sizes.items():
        if (value := fields.get(name, default)) != getattr(vision, called):
            refuse(name, value, f"{getattr(vision, called)}, as in manifest.json", file)
    return fields


def _check_fields(fields: Mapping[str, Any], known: set[str], file: str) -> None:
    """Refuse what no processor does, and a field that is neither shared by all nor one of `known`.

    Absent fields have the reference's defaults. file: what errors name.
    """
    for name, value in fields.items():
        if name not in KNOWN | WITHOUT_EFFECT | known and value is not False:
            refuse(name, value, "absent", file)
    for name in ("do_resize", "do_convert_rgb"):
        if fields.get(name, True) is not True:
            refuse(name, fields[name], "true", file)
    for name in ("do_rescale", "do_normalize"):
        if not isinstance(fields.get(name, True), bool):
            refuse(name, fields[name], "true, false", file)
    if fields.get("resample", 3) not in list(Image.Resampling):
        allowed = ", ".join(str(int(one)) for one in sorted(Image.Resampling))
        refuse("resample", fields["resample"], allowed, file)


def pixel_values(
    fields: Mapping[str, Any],
    normalize: bool,
    means: tuple[float, ...],
    deviations: tuple[float, ...],
    file: str = IMAGE_FILE,
    dtype: np.dtype | type = np.float32,
) -> np.ndarray:
    """What each byte becomes: [3, 256] float32. The scale is applied in double precision, the rest in `dtype`.

    normalize, means, deviations: where the fields do not say. file: what errors name.
    """
    value = np.arange(256, dtype=np.float64)
    if fields.get("do_rescale", True):
        value = value * _numbers(fields, "rescale_factor", 1 / 255, file)[0]
    table = np.repeat(value.astype(dtype)[None], 3, axis=0)
    if fields.get("do_normalize", normalize):
        mean, std = _numbers(fields, "image_mean", means, file), _numbers(fields, "image_std", deviations, file)
        if not (np.abs(std) > 1 / _MOST).all():
            refuse("image_std", fields["image_std"], f"numbers of more than {1 / _MOST:g}", file)
        table = (table - mean.astype(dtype)[:, None]) / std.astype(dtype)[:, None]
    return table.astype(np.float32)


def _numbers(fields: Mapping[str, Any], name: str, default: float | tuple[float, ...], file: str) -> np.ndarray:
    """A number, or one per channel, as [3] float64."""
    value = fields.get(name, default)
    try:
        numbers = np.broadcast_to(np.asarray(value, np.float64), 3)
    except (TypeError, ValueError):
        numbers = np.full(3, np.nan)
    if not (np.abs(numbers) < _MOST).all():  # null makes NaN, which is not less either
        refuse(name, value, f"a number or three, below {_MOST:g}", file)
    return numbers


def refuse(field: str, value: Any, supported: str, file: str = IMAGE_FILE) -> NoReturn:
    raise BundleError(f"unsupported value in {file}: {one_line(field, 60)} = {quoted(value)} (supported: {supported})")
