"""Encoded images as Pillow is given them: what makes their pixels, and nothing else.

Metadata is left out before any library reads it: it may cost far more time and memory than the pixels. Only the
orientation is read, here. What a decoder must do for each pixel is bounded as well as how many pixels there are.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator

from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from moevlm.runtime.core.errors import RequestError

FORMATS = "PNG, JPEG, WebP, BMP or GIF"
MAX_SCANS = 64  # of a progressive JPEG, each of which goes over all pixels; encoders write about ten
MAX_BLOCKS = 10_000  # segments, chunks and extensions of a file, beside one for each 2 kB
MAX_TABLE_BYTES = 1 << 18  # of a JPEG's tables, which Pillow reads in Python; encoders write a few kB
MAX_RUN_BYTES = 1 << 22  # of a BMP in run-length code, which Pillow decodes in Python
_MAX_METADATA = 1 << 20  # as much of it is searched for the orientation

_EXIF = b"Exif\0\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_ORIENTATION = 0x0112  # EXIF 2.32, section 4.6.4
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)  # neither a stuffed byte nor a restart
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


class TooMuch(Exception):
    """A file asks for more work than an image of its size is worth."""


def open_encoded(data: bytes, name: str) -> tuple[ImageFile, int]:
    """Pillow's image, its header read and no pixel decoded, and the EXIF orientation, 1 to 8.

    Not Image.open: it warns about or refuses large images by a process-wide limit, before ours can be applied.
    Raises RequestError naming the image `name`.
    """
    readers = [reader for start, reader in _READERS.items() if data.startswith(start)]
    if not readers or (readers[0] is _webp and data[8:12] != b"WEBP"):
        raise RequestError(f"{name} is not a {FORMATS} image")
    try:
        image, orientation = readers[0](data)
    except TooMuch as error:
        raise RequestError(f"{name} {error}") from None
    except Exception as error:  # Decoders of untrusted bytes: Pillow does not say what they may raise.
        raise RequestError(f"{name} is damaged or incomplete") from error
    return image, orientation if 1 <= orientation <= 8 else 1


def _jpeg(data: bytes) -> tuple[ImageFile, int]:
    """ITU T.81, annex B. Kept: JFIF's and Adobe's segments, which say what the colours are, and the coded image."""
    view = memoryview(data)
    pieces: list[bytes | memoryview] = [b"\xff\xd8"]
    exif = xmp = b""
    scans = tables = 0
    for marker, begin, body, end in _jpeg_segments(data):
        segment = data[body : min(end, body + 32)]
        if marker == 0xE1 and segment.startswith(_EXIF) and not exif:
            exif = data[body + len(_EXIF) : end]
        elif marker == 0xE1 and segment.startswith(_XMP) and not xmp:
            xmp = data[body:end]
        scans += marker == 0xDA
        if scans > MAX_SCANS:
            raise TooMuch(f"has more than {MAX_SCANS} scans (the most that is allowed)")
        if segment.startswith((b"JFIF\0", b"Adobe")) if 0xE0 <= marker <= 0xEF else marker != 0xFE:
            pieces.append(view[begin:end])
            tables += end - begin if marker != 0xDA else 0
        if tables > MAX_TABLE_BYTES:
            raise TooMuch(f"has more than {MAX_TABLE_BYTES} bytes of tables (the most that is allowed)")
    return JpegImageFile(io.BytesIO(b"".join(pieces))), _orientation(exif, xmp)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(marker, where it begins, where its content begins, where it ends); a scan's coded data are part of it."""
    at = 2
    for _ in range(_most_blocks(data)):
        found = _MARKER.search(data, at)
        if found is None:
            return
        marker, begin, body = found[1][0], found.start(), found.end() + 2
        if marker == 0xD9 or body > len(data):  # end of image: what follows belongs to another
            yield marker, begin, found.end(), found.end()
            return
        end = found.end() + int.from_bytes(data[found.end() : body], "big")
        if marker == 0xDA:
            behind = _MARKER.search(data, end)
            end = len(data) if behind is None else behind.start()
        yield marker, begin, body, min(end, len(data))
        at = end
    raise TooMuch(f"has more than {_most_blocks(data)} segments (the most that is allowed)")


def _png(data: bytes) -> tuple[ImageFile, int]:
    """PNG, third edition, section 5. An animation's default image counts."""
    view = memoryview(data)
    pieces = [view[:8]]
    exif = xmp = b""
    at = 8
    for _ in range(_most_blocks(data)):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + min(length, _MAX_METADATA)] if kind not in _PIXEL_CHUNKS else b""
        if kind in _PIXEL_CHUNKS:
            pieces.append(view[at : at + 12 + length])
        elif kind == b"eXIf" and not exif:
            exif = body.removeprefix(_EXIF)
        elif kind == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0"):
            xmp = xmp or body
        elif kind in (b"zTXt", b"tEXt") and body.startswith(b"Raw profile type exif\0"):
            exif = exif or _raw_profile(kind, body)
        at += 12 + length
        if kind == b"IEND" or at >= len(data):
            return PngImageFile(io.BytesIO(b"".join(pieces))), _orientation(exif, xmp)
    raise TooMuch(f"has more than {_most_blocks(data)} chunks (the most that is allowed)")


def _raw_profile(kind: bytes, body: bytes) -> bytes:
    """EXIF as ImageMagick writes it into a PNG: hexadecimal digits behind three lines."""
    text = body.partition(b"\0")[2]
    try:
        if kind == b"zTXt":
            text = zlib.decompressobj().decompress(text[1:], _MAX_METADATA)
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii")).removeprefix(_EXIF)
    except (ValueError, zlib.error):
        return b""


def _gif(data: bytes) -> tuple[ImageFile, int]:
    """GIF 89a, appendix A. Kept of the extensions before the first image: graphic control, which has transparency."""
    flags = data[10]
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    pieces = [data[:at]]
    blocks = 0
    while data[at : at + 1] == b"\x21":
        begin, at = at, at + 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
            blocks += 1
            if blocks > _most_blocks(data):
                raise TooMuch(f"has more than {_most_blocks(data)} extension blocks (the most that is allowed)")
        at += 1
        if data[begin + 1 : begin + 2] == b"\xf9":
            pieces.append(data[begin:at])
    return GifImageFile(io.BytesIO(b"".join([*pieces, data[at:]]))), 1


def _webp(data: bytes) -> tuple[ImageFile, int]:
    image = WebPImageFile(io.BytesIO(data))
    exif, xmp = (image.info.get(name, b"")[:_MAX_METADATA] for name in ("exif", "xmp"))
    return image, _orientation(exif.removeprefix(_EXIF), xmp)


def _bmp(data: bytes) -> tuple[ImageFile, int]:
    if data[14:18] != b"\x0c\0\0\0" and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0") and len(data) > MAX_RUN_BYTES:
        raise TooMuch(f"has more than {MAX_RUN_BYTES} bytes of run-length code (the most that is allowed)")
    return BmpImageFile(io.BytesIO(data)), 1


_READERS = {
    b"\x89PNG\r\n\x1a\n": _png,
    b"\xff\xd8\xff": _jpeg,
    b"RIFF": _webp,
    b"GIF87a": _gif,
    b"GIF89a": _gif,
    b"BM": _bmp,
}


def _most_blocks(data: bytes) -> int:
    return MAX_BLOCKS + len(data) // 2048


def _orientation(exif: bytes, xmp: bytes) -> int:
    """The first orientation of the main image, 1 where there is none or the metadata are damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    try:
        if order is not None:
            (at,) = struct.unpack_from(order + "I", exif, 4)
            (count,) = struct.unpack_from(order + "H", exif, at)
            for i in range(count):
                tag, kind = struct.unpack_from(order + "HH", exif, at + 2 + 12 * i)
                if tag == _ORIENTATION:  # a number of two bytes, or, against the standard, of four
                    return int(struct.unpack_from(order + ("I" if kind == 4 else "H"), exif, at + 10 + 12 * i)[0])
    except struct.error:
        return 1
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found else 1
