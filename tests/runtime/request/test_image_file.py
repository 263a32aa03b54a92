"""What an encoded image may cost, whatever its bytes say; and metadata that no decoder is given."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.request.image_file import MAX_BLOCKS, MAX_RUN_BYTES, MAX_SCANS, open_encoded
from tests.runtime.request.test_images import CHINA, JPEG, PNG, SMALL, crop, encode, processor

PHOTO = crop(CHINA, 60, 40)


def jpeg_segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def behind_png_header(*chunks: bytes) -> bytes:
    return PNG[:33] + b"".join(chunks) + PNG[33:]


def with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there more than once, so that it has `count`."""
    data = encode(PHOTO, "JPEG", progressive=True)
    starts = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    end = data.rindex(b"\xff\xd9")
    last = data[starts[-1] : end]
    return data[:end] + last * (count - len(starts)) + data[end:]


def gif_comment(blocks: int) -> bytes:
    data = encode(PHOTO, "GIF")
    at = 13 + (3 << (data[10] & 7) + 1)
    return data[:at] + b"\x21\xfe" + b"\x01x" * blocks + b"\0" + data[at:]


def run_length_bmp(size: int) -> bytes:
    """An 8-bit BMP of 4 x 4 pixels in run-length code, which zeros follow."""
    header = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 8, 1, 0, 0, 0, 256, 0)
    palette = bytes(1024)
    code = b"\x04\x07\0\0" * 4 + b"\0\1"
    body = header + palette + code
    return (struct.pack("<2sIHHI", b"BM", 0, 0, 0, 14 + 40 + 1024) + body).ljust(size, b"\0")


TOO_MUCH: dict[str, tuple[Callable[[int], bytes], int, str]] = {
    "scans": (with_scans, MAX_SCANS, "scans"),
    "jpeg segments": (lambda n: JPEG[:2] + jpeg_segment(0xFE, b"") * n + JPEG[2:], MAX_BLOCKS - 50, "segments"),
    "jpeg tables": (
        lambda n: JPEG[:2] + jpeg_segment(0xDB, b"\0" + bytes(range(1, 65))) * n + JPEG[2:],
        3000,
        "tables",
    ),
    "png chunks": (lambda n: behind_png_header(chunk(b"tEXt", b"a\0b") * n), MAX_BLOCKS, "chunks"),
    "png data in small chunks": (
        lambda n: PNG[:33] + chunk(b"IDAT", b"") * n + PNG[33:],
        MAX_BLOCKS,
        "chunks",
    ),
    "gif comments": (gif_comment, MAX_BLOCKS, "extension blocks"),
    "bmp run-length code": (run_length_bmp, MAX_RUN_BYTES, "run-length code"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_work_that_is_not_for_pixels_is_refused_before_it_is_done(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, most, words = TOO_MUCH[name]
    assert processor().open(make(most)).width > 0
    monkeypatch.setattr(ImageFile.ImageFile, "__init__", lambda *_: pytest.fail("read"))
    for act in (processor().open, processor().layout):
        with pytest.raises(RequestError, match=rf"^image has more than \d+ .*{words}.* \(the most that is allowed\)$"):
            act(make(most * 2))


def test_scans_of_a_thumbnail_do_not_count() -> None:
    thumbnail = b"Exif\0\0" + b"\xff\xda\0\2" * 200
    content = JPEG[:2] + jpeg_segment(0xE1, thumbnail) + JPEG[2:]
    np.testing.assert_array_equal(processor().open(content), Image.open(io.BytesIO(JPEG)))


def test_what_follows_the_end_of_an_image_is_another_s() -> None:
    np.testing.assert_array_equal(processor().open(JPEG + with_scans(500)), Image.open(io.BytesIO(JPEG)))


def test_a_file_far_larger_than_its_pixels_need_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.write(PNG)
        file.truncate(10_000_000_000)
    with pytest.raises(RequestError, match=r"^image '.*sparse\.png' has more than 400000000 bytes"):
        processor().open(path)
    path.unlink()


def metadata() -> dict[str, bytes]:
    """Files with many kinds of metadata; the pixels are those of the same file without."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 5000, zip=True)
    text.add_itxt("Title", "y" * 5000)
    exif = Image.Exif()
    exif[0x010E] = "a description" * 100
    return {
        "png": encode(PHOTO, "PNG", pnginfo=text, exif=exif, icc_profile=b"profile" * 1000),
        "jpeg": encode(PHOTO, "JPEG", exif=exif, icc_profile=b"profile" * 20_000, comment=b"z" * 60_000),
        "webp": encode(PHOTO, "WEBP", exif=exif, icc_profile=b"profile" * 1000, xmp=b"<x/>"),
        "gif": encode(PHOTO, "GIF", comment=b"c" * 3000),
    }


@pytest.mark.parametrize("form", ["png", "jpeg", "gif"])
def test_no_decoder_is_given_metadata(form: str) -> None:
    content = metadata()[form]
    image, _ = open_encoded(content, "image")
    assert not {"exif", "icc_profile", "comment", "Comment", "Title"} & set(image.info)
    np.testing.assert_array_equal(processor().open(content), Image.open(io.BytesIO(content)).convert("RGB"))


def exif_of(order: str, orientation: int, kind: str = "H") -> bytes:
    """EXIF in either byte order, the orientation as a number of two bytes or of four."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(order + kind, orientation).ljust(4, b"\0")
    entries = struct.pack(order + "HHI", 0x010F, 2, 1) + b"x\0\0\0"
    entries += struct.pack(order + "HHI", 0x0112, 3 if kind == "H" else 4, 1) + value
    return head + struct.pack(order + "IH", 8, 2) + entries + bytes(4)


def raw_profile(zipped: bool) -> bytes:
    exif = b"Exif\0\0" + exif_of(">", 6)
    text = f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode()
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", text, zip=zipped)
    return encode(SMALL, "PNG", pnginfo=info)


def png_with_xmp() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    return encode(SMALL, "PNG", pnginfo=info)


XMP = b"http://ns.adobe.com/xap/1.0/\0<tiff:Orientation>6</tiff:Orientation>"
SIDEWAYS = {
    "jpeg, little endian": lambda: encode(SMALL, "JPEG", exif=b"Exif\0\0" + exif_of("<", 6)),
    "jpeg, big endian": lambda: encode(SMALL, "JPEG", exif=b"Exif\0\0" + exif_of(">", 6)),
    "jpeg, four bytes": lambda: encode(SMALL, "JPEG", exif=b"Exif\0\0" + exif_of(">", 6, "I")),
    "jpeg, xmp": lambda: JPEG[:2] + jpeg_segment(0xE1, XMP) + JPEG[2:],
    "png": lambda: encode(SMALL, "PNG", exif=exif_of("<", 6)),
    "png, xmp": png_with_xmp,
    "png, raw profile": lambda: raw_profile(zipped=False),
    "png, compressed raw profile": lambda: raw_profile(zipped=True),
    "webp": lambda: encode(SMALL, "WEBP", exif=exif_of("<", 6)),
    "webp, xmp": lambda: encode(SMALL, "WEBP", xmp=b'<x tiff:Orientation="6"/>'),
}


@pytest.mark.parametrize("name", SIDEWAYS)
def test_orientation_in_every_kind_of_metadata_is_pillow_s(name: str) -> None:
    content = SIDEWAYS[name]()
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert expected.size == SMALL.size[::-1]
    np.testing.assert_array_equal(processor().open(content), expected)


@pytest.mark.parametrize("exif", [b"", b"II*\0", b"MM\0*\xff\xff\xff\xff", exif_of("<", 9), exif_of("<", 0), b"x" * 99])
def test_damaged_or_unknown_orientation_is_none(exif: bytes) -> None:
    assert processor().open(encode(SMALL, "PNG", exif=exif or None)).size == SMALL.size
    content = JPEG[:2] + jpeg_segment(0xE1, b"Exif\0\0" + exif) + JPEG[2:]
    np.testing.assert_array_equal(processor().open(content), Image.open(io.BytesIO(JPEG)))


PEAK = """
import sys
from pathlib import Path
from moevlm.runtime.request.images.registry import image_processor
from moevlm.runtime.core.towers import GridTower

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

size = {"shortest_edge": 4096, "longest_edge": 1 << 24}
config = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "size": size}
ours = image_processor(config, GridTower(
    patch_size=16, merge_size=2, channels=3, head_dim=8, rope_theta=1e4, temporal_patch_size=2, position_grid=6,
    position_resampling="bilinear",
))
for name in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    image = ours.open(Path(name))
    (fitted,) = ours.fit(image)
    size = image.width * image.height
    print((peak() - before - 2 * Path(name).stat().st_size) / size)
    del image, fitted
"""


def test_memory_of_one_image_is_within_the_stated_multiple_of_its_pixels(tmp_path: Path) -> None:
    width, height = 2400, 1600
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.linear_gradient("L").resize((width, height))
    colour = Image.merge("RGB", [grey, grey.transpose(Image.Transpose.ROTATE_180), grey])
    clear = colour.copy()
    clear.putalpha(grey)
    files = {
        "photo.jpg": (12, encode(colour, "JPEG", exif=exif)),
        "cmyk.jpg": (12, encode(colour.convert("CMYK"), "JPEG")),
        "progressive.jpg": (20, encode(colour, "JPEG", progressive=True, subsampling=0)),
        "clear.png": (12, encode(clear, "PNG", compress_level=1, exif=exif)),
        "deep.png": (12, encode(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG", compress_level=1)),
        "palette.png": (12, encode(colour.quantize(32), "PNG", transparency=3)),
        "clear.webp": (20, encode(clear, "WEBP", quality=30)),
        "animation.gif": (12, encode(colour.quantize(32), "GIF")),
        "plain.bmp": (12, encode(colour, "BMP")),
    }
    for name, (_, content) in files.items():
        (tmp_path / name).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *(tmp_path / name for name in files)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for (name, (most, _)), line in zip(files.items(), done.stdout.splitlines(), strict=True):
        assert float(line) < most + 1, name
