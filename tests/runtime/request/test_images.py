"""Preprocessing is Hugging Face's, bit for bit, on real photos and on awkward files; what is no image is refused."""

import copy
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from transformers.image_utils import load_image
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from moevlm.runtime.core.errors import BundleError, RequestError
from moevlm.runtime.core.towers import GridTower
from moevlm.runtime.request.images.processor import ImageProcessor
from moevlm.runtime.request.images.registry import image_processor

VISION = GridTower(
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    channels=3,
    head_dim=8,
    rope_theta=10_000.0,
    position_grid=6,
    position_resampling="bilinear",
    deepstack=0,
)
# Small areas keep the tests fast; the photos (640 x 427) are then reduced, small crops enlarged.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": 64 * 64, "longest_edge": 300 * 300},
        "patch_size": 16,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "glm": {
        "image_processor_type": "Glm4vImageProcessor",
        "processor_class": "Glm4vProcessor",
        "size": {"shortest_edge": 112 * 112, "longest_edge": 2 * 250 * 250},
        "do_rescale": True,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
}
CONFIGS["glm46"] = CONFIGS["glm"] | {"image_processor_type": "Glm46VImageProcessor"}
ORACLES = {"qwen": Qwen2VLImageProcessorPil, "glm": Glm4vImageProcessorPil, "glm46": Glm46VImageProcessorPil}
CHINA, FLOWER = (Image.fromarray(photo) for photo in load_sample_images().images)


def processor(kind: str = "qwen", limit: int = 50_000_000, **fields: Any) -> ImageProcessor:
    config = CONFIGS[kind] | fields
    return image_processor(config, msgspec.structs.replace(VISION, patch_size=config["patch_size"]), limit)


def assert_same_as_hugging_face(
    kind: str, sources: list[Any], expected: list[Image.Image] | None = None, **fields: Any
) -> None:
    """Our `open` and `pack` of `sources` against Hugging Face's processor on `expected` (the sources by default)."""
    config = copy.deepcopy(CONFIGS[kind] | fields)  # transformers writes into `size`
    config = {name: value for name, value in config.items() if not name.endswith(("_type", "_class"))}
    wanted = ORACLES[kind](**config)(sources if expected is None else expected, return_tensors="np")
    ours = processor(kind, **fields)
    inputs, grids = ours.pack([piece for source in sources for piece in ours.fit(ours.open(source))])
    assert grids == [(h, w) for _, h, w in wanted["image_grid_thw"].tolist()]
    assert inputs.pixel_patches.dtype == np.float32
    np.testing.assert_array_equal(inputs.pixel_patches, wanted["pixel_values"])


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def crop(photo: Image.Image, width: int, height: int) -> Image.Image:
    return photo.crop((40, 30, 40 + width, 30 + height))


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises pixels that do not follow."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("photo", [CHINA, FLOWER], ids=["china", "flower"])
def test_real_photos_at_random_sizes_equal_hugging_face(kind: str, photo: Image.Image) -> None:
    rng = np.random.default_rng(20)
    crops = [crop(photo, int(w), int(h)) for w, h in rng.integers((2, 2), (590, 390), (12, 2))]
    for image in [photo, *crops]:
        assert_same_as_hugging_face(kind, [image])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 150), (150, 1), (2, 390), (13, 14), (27, 29), (28, 28), (33, 32), (42, 70), (80, 48), (351, 33)],
)
def test_tiny_thin_and_half_block_sizes_equal_hugging_face(kind: str, size: tuple[int, int]) -> None:
    assert_same_as_hugging_face(kind, [crop(FLOWER, *size)])


@pytest.mark.parametrize("kind", CONFIGS)
def test_images_of_different_sizes_in_one_call_equal_hugging_face_and_single_calls(kind: str) -> None:
    images = [CHINA, crop(FLOWER, 31, 300), crop(CHINA, 222, 97), crop(FLOWER, 5, 5)]
    assert_same_as_hugging_face(kind, images)
    ours = processor(kind)
    fitted = [piece for image in images for piece in ours.fit(image)]
    packed, grids = ours.pack(fitted)
    singles = [ours.pack([image])[0] for image in fitted]
    assert packed.rows.keys() == VISION.inputs.keys()
    for name, rows in packed.rows.items():
        np.testing.assert_array_equal(rows, np.concatenate([single.rows[name] for single in singles]), err_msg=name)
    np.testing.assert_array_equal(np.diff(packed.image_start), [h * w for h, w in grids])


def test_no_image_gives_inputs_of_no_patches() -> None:
    inputs, grids = processor().pack([])
    assert grids == []
    assert inputs.pixel_patches.shape == (0, 3 * 2 * 16 * 16)
    assert inputs.rows["position_index"].shape == (0, 4)


def gradient_alpha(photo: Image.Image) -> Image.Image:
    image = photo.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(photo.size))
    return image


def palette_with_transparency(transparency: int | bytes) -> bytes:
    return encode(crop(FLOWER, 201, 103).quantize(64), "PNG", transparency=transparency)


SMALL = crop(CHINA, 203, 131)
FILES: dict[str, Callable[[], bytes]] = {
    "grey": lambda: encode(SMALL.convert("L"), "PNG"),
    "grey jpeg": lambda: encode(SMALL.convert("L"), "JPEG"),
    "grey alpha": lambda: encode(gradient_alpha(SMALL).convert("LA"), "PNG"),
    "alpha": lambda: encode(gradient_alpha(SMALL), "PNG"),
    "alpha webp": lambda: encode(gradient_alpha(SMALL), "WEBP", lossless=True),
    "palette": lambda: encode(SMALL.quantize(17), "PNG"),
    "palette, one entry transparent": lambda: palette_with_transparency(5),
    "palette, graded transparency": lambda: palette_with_transparency(bytes(range(0, 256, 4))),
    "rgb with a transparent colour": lambda: encode(SMALL, "PNG", transparency=SMALL.getpixel((3, 4))),
    "grey with a transparent value": lambda: encode(SMALL.convert("L"), "PNG", transparency=120),
    "1 bit": lambda: encode(SMALL.convert("1"), "PNG"),
    "cmyk jpeg": lambda: encode(SMALL.convert("CMYK"), "JPEG"),
    "jpeg": lambda: encode(SMALL, "JPEG", quality=80, progressive=True),
    "webp": lambda: encode(SMALL, "WEBP"),
    "bmp": lambda: encode(SMALL, "BMP"),
    "gif of two frames": lambda: encode(SMALL, "GIF", save_all=True, append_images=[crop(FLOWER, 203, 131)]),
    "jpeg of two pictures": lambda: encode(SMALL, "MPO", save_all=True, append_images=[FLOWER]),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_equals_hugging_face(name: str) -> None:
    content = FILES[name]()
    assert_same_as_hugging_face("qwen", [content], [Image.open(io.BytesIO(content))])


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert processor().open(clear).getcolors() == [(1600, (255, 255, 255))]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_equals_hugging_face(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.jpg"
    SMALL.save(path, exif=exif)
    upright = load_image(str(path))
    assert upright.size == (SMALL.size if orientation < 5 else SMALL.size[::-1])
    assert_same_as_hugging_face("qwen", [path, path.read_bytes(), Image.open(path)], [upright] * 3)


def test_exif_orientation_and_alpha_together() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(gradient_alpha(SMALL), "PNG", exif=exif)
    assert_same_as_hugging_face("qwen", [content], [ImageOps.exif_transpose(Image.open(io.BytesIO(content)))])


def test_opening_an_opened_image_changes_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    once = processor().open(encode(SMALL, "JPEG", exif=exif))
    assert once.size == SMALL.size[::-1]
    np.testing.assert_array_equal(processor().open(once), once)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_hide_a_good_photo() -> None:
    content = encode(SMALL, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(processor().open(content), Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "fields",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"resample": 1, "image_mean": 0.25, "image_std": 0.75},
        {"resample": 2, "do_center_crop": False, "crop_size": None, "do_pad": None},
    ],
    ids=str,
)
def test_options_have_the_meaning_of_hugging_face(kind: str, fields: dict[str, Any]) -> None:
    assert_same_as_hugging_face(kind, [SMALL], **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"min_pixels": 90_000, "max_pixels": 160_000},
        {"max_pixels": 10_000, "size": {"shortest_edge": 2_000, "longest_edge": 10**6}},
        {"size": {"min_pixels": 1, "max_pixels": 2}, "min_pixels": 3_000, "max_pixels": 20_000},
        {"size": None, "min_pixels": None, "max_pixels": 20_000},
    ],
    ids=str,
)
def test_pixel_limits_replace_size(fields: dict[str, Any]) -> None:
    assert_same_as_hugging_face("qwen", [SMALL, CHINA], **fields)


@pytest.mark.parametrize("kind", CONFIGS)
def test_configuration_saved_by_hugging_face_is_accepted(kind: str) -> None:
    image_processor(ORACLES[kind]().to_dict(), VISION)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_processor_type", "CLIPImageProcessor"),
        ("image_processor_type", None),
        ("resample", 9),
        ("resample", "bicubic"),
        ("do_resize", False),
        ("do_convert_rgb", False),
        ("do_normalize", "yes"),
        ("do_rescale", None),
        ("image_mean", None),
        ("resample", None),
        ("do_center_crop", True),
        ("tile_size", 448),
        ("patch_size", 16),
        ("merge_size", 1),
        ("temporal_patch_size", 1),
        ("size", 448),
        ("size", {"shortest_edge": 0, "longest_edge": 9}),
        ("size", {"height": 448, "width": 448}),
        ("max_pixels", "big"),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", 1e300),
        ("image_std", [0.5, 0.0, 0.5]),
        ("image_std", 1e-60),
        ("rescale_factor", -1e300),
        ("rescale_factor", "1/255"),
    ],
)
def test_unsupported_field_is_refused_by_name(field: str, value: Any) -> None:
    config = {"image_processor_type": "Qwen2VLImageProcessor", field: value}
    with pytest.raises(
        BundleError, match=rf"^unsupported value in preprocessor\.json: {field}[^\n]*\(supported: .+\)$"
    ):
        image_processor(config, VISION)


def test_pixel_limits_are_refused_where_hugging_face_ignores_them() -> None:
    with pytest.raises(BundleError, match="max_pixels = 9"):
        processor("glm", max_pixels=9)


JPEG, PNG = encode(SMALL, "JPEG"), encode(SMALL, "PNG")
NO_IMAGES = {
    "nothing": b"",
    "text": b"<html>not an image</html>",
    "a format that is not allowed": encode(SMALL, "TIFF"),
    "half a jpeg": JPEG[: len(JPEG) // 2],
    "half a png": PNG[: len(PNG) // 2],
    "a jpeg's first bytes": JPEG[:5],
    "a png's first bytes": PNG[:20],
    "a png's header alone": png_header(50, 50),
    "a gif's header alone": encode(SMALL, "GIF")[:13],
    "half a webp": encode(SMALL, "WEBP")[:200],
    "half a bmp": encode(SMALL, "BMP")[:500],
    "noise in a png": PNG[:60] + bytes(200) + PNG[260:],
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_not_an_image_is_refused_in_one_line_of_ours(name: str) -> None:
    reason = "is damaged or incomplete|is not a PNG, JPEG, WebP, BMP or GIF image"
    with pytest.raises(RequestError, match=rf"^image ({reason})$"):
        processor().open(NO_IMAGES[name])


def test_every_truncation_of_a_small_file_is_refused_or_decodes() -> None:
    image = crop(CHINA, 9, 7)
    for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        content = encode(image, form)
        for length in range(len(content)):
            try:
                assert processor().open(content[:length]).size == image.size
            except RequestError as error:
                assert "\n" not in str(error)


def test_paths_that_are_not_image_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("notes")
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in [
        ("missing.png", "does not exist"),
        ("", "is not a file"),
        ("pipe.png", "is not a file"),
        ("notes.png", "is not a PNG, JPEG, WebP, BMP or GIF image"),
    ]:
        with pytest.raises(RequestError) as caught:
            processor().open(tmp_path / name)
        assert str(caught.value) == f"image {str(tmp_path / name)!r} {reason}"


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("size", [(5, 5), (31, 300), (222, 97), (640, 427)])
def test_tokens_of_an_image_are_counted_as_it_is_cut(kind: str, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    ours, content = processor(kind), encode(CHINA.resize(size), "JPEG", exif=exif)
    assert ours.layout(content).grids == [ours.grid(piece) for piece in ours.fit(ours.open(content))]


def test_counting_tokens_decodes_nothing() -> None:
    image = Image.open(io.BytesIO(encode(SMALL, "JPEG")))
    assert processor().layout(image) == processor().layout(encode(SMALL, "PNG"))
    assert processor().layout(PNG) == processor().layout(PNG[: len(PNG) // 2])
    assert image._im is None


def test_text_never_names_a_file(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    SMALL.save(path)
    for act in (processor().open, processor().layout):
        with pytest.raises(RequestError, match=r"^an image is the text '.*pathlib\.Path.*URLs are not fetched\)$"):
            act(str(path))
        with pytest.raises(RequestError, match=r"^an image is 5 \(allowed: a pathlib\.Path, "):
            act(5)


def test_100_megapixels_are_refused_from_the_header_without_a_warning() -> None:
    with warnings.catch_warnings(), pytest.raises(RequestError) as caught:
        warnings.simplefilter("error")
        processor().open(png_header(10_000, 10_000))
    assert str(caught.value) == "image is 10000 x 10000 pixels; at most 50000000 pixels are allowed"


def test_a_bomb_of_any_size_is_refused_by_our_limit() -> None:
    with pytest.raises(RequestError, match="2000000000 x 1000000000 pixels; at most"):
        processor().open(png_header(2_000_000_000, 1_000_000_000))


def test_the_limit_is_configurable_and_inclusive() -> None:
    width, height = SMALL.size
    for source in (JPEG, SMALL):
        assert processor(limit=width * height).open(source).size == SMALL.size
        with pytest.raises(RequestError, match=f"at most {width * height - 1} pixels"):
            processor(limit=width * height - 1).open(source)


def test_a_limit_above_pillows_own_lets_large_images_through_silently() -> None:
    content = encode(Image.new("1", (10_000, 10_000)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert processor(limit=100_000_000).open(content).size == (10_000, 10_000)


def test_a_gif_frame_larger_than_its_screen_counts() -> None:
    content = bytearray(encode(Image.new("P", (500, 400)), "GIF"))
    content[6:10] = struct.pack("<HH", 10, 10)
    with pytest.raises(RequestError, match="500 x 400 pixels"):
        processor(limit=1_000).open(bytes(content))


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match=r"^image has no pixels$"):
        processor().open(Image.new("RGB", size))


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_image_200_times_as_long_as_wide_is_the_longest_allowed(kind: str) -> None:
    assert processor(kind).fit(Image.new("RGB", (6400, 32)))[0].height == 2 * CONFIGS[kind]["patch_size"]
    with pytest.raises(RequestError, match=r"^image is 6401 x 32 pixels: one side is more than 200 times the other$"):
        processor(kind).fit(Image.new("RGB", (6401, 32)))
    with pytest.raises(RequestError, match="more than 200"):
        processor(kind).layout(Image.new("RGB", (32, 6401)))
