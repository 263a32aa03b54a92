"""A video file, decoded frame by frame: nothing that it names is opened, and its time and memory are bounded."""

from __future__ import annotations

import io
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any

from PIL import Image

from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import MoevlmError, RequestError, one_line, shown
from moevlm.runtime.core.installation import install_command
from moevlm.runtime.request.image_source import open_regular, path_name, read_stream

# Playlists and other formats that name further files or addresses are no videos here.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,gif"
_CODECS = "h264,hevc,vp8,vp9,libvpx,libvpx-vp9,av1,libdav1d,mpeg4,mpeg2video,mjpeg,gif"
_ALLOWED = "a list of images, a pathlib.Path, the bytes of a file, or a binary file"


@dataclass(frozen=True)
class FileClip:
    """source: where the file is, or its bytes. The other fields: see Clip."""

    source: os.PathLike[str] | bytes
    name: str
    frames: int = 0
    fps: float = 0.0
    size: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, source: Any) -> FileClip:
        """Read the header. Raises RequestError for what is no video, or too large a one."""
        if isinstance(source, os.PathLike):
            clip = cls(source, f"video {path_name(os.fsdecode(source))}")
        elif isinstance(source, bytes | bytearray | memoryview):
            clip = cls(bytes(source), "video")
        elif hasattr(source, "read"):
            clip = cls(read_stream(source, defaults.MAX_VIDEO_BYTES, "video"), "video")
        else:
            kind = "the text " if isinstance(source, str) else ""
            raise RequestError(f"a video is {kind}{shown(source)} (allowed: {_ALLOWED})")
        with clip._opened() as (container, stream, _):
            if not stream.average_rate:
                raise RequestError(f"{clip.name} does not say how many frames a second it has")
            width, height = clip._allowed(stream.width, stream.height)
            # Some formats do not say how many frames there are: each packet holds one.
            frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        if not 1 <= frames <= defaults.MAX_FILE_FRAMES:
            raise RequestError(f"{clip.name} has {frames} frames (allowed: 1 to {defaults.MAX_FILE_FRAMES})")
        return replace(clip, frames=frames, fps=float(stream.average_rate), size=(width, height))

    @property
    def seconds(self) -> float:
        """The reference counts them so, too."""
        return self.frames / self.fps

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """See Clip. A frame is given as it is stored, not turned."""
        wanted, last = Counter(indices), indices[-1]
        number = -1
        with self._opened() as (container, stream, file):
            for number, frame in enumerate(container.decode(stream)):
                file.check()
                if (frame.width, frame.height) != self.size:
                    width, height = self._allowed(frame.width, frame.height)
                    raise RequestError(
                        f"frame {number + 1} of {self.name} is {width} x {height} pixels, the first {self.size[0]} x "
                        f"{self.size[1]} (allowed: one size)"
                    )
                if number in wanted:
                    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                    yield from [image] * wanted[number]
                if number == last:
                    return
        raise RequestError(f"{self.name} ends after {number + 1} of the {self.frames} frames that its header tells of")

    def _allowed(self, width: int, height: int) -> tuple[int, int]:
        if not 0 < width * height <= defaults.MAX_VIDEO_PIXELS:
            raise RequestError(
                f"{self.name} is {width} x {height} pixels; at most {defaults.MAX_VIDEO_PIXELS} pixels are allowed"
            )
        return width, height

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any, _Timed]]:
        """(container, video stream, file). What is in the way of its use is a RequestError of this clip."""
        try:
            import av
        except ImportError as error:
            raise RequestError(f"a video file needs PyAV ({install_command('video')})") from error
        options = {"format_whitelist": _FORMATS, "codec_whitelist": _CODECS, "protocol_whitelist": "none"}
        file = _Timed(self._file(), self.name)
        try:
            with av.open(file, options=options) as container:
                if not container.streams.video:
                    raise RequestError(f"{self.name} has no pictures")
                stream = container.streams.video[0]
                codec = stream.codec_context  # None of a coding that FFmpeg does not know
                if codec is None or codec.name not in _CODECS.split(","):
                    coding = one_line(codec.name, 40) if codec else "nothing that is known"
                    raise RequestError(f"{self.name} is coded as {coding} (supported: {_CODECS})")
                # The decoder keeps frames with wide borders; what it may take at all is bounded here.
                codec.options = {"max_pixels": str(4 * defaults.MAX_VIDEO_PIXELS)}
                yield container, stream, file
        except MoevlmError:
            raise
        except (av.error.FFmpegError, ValueError, OSError, MemoryError) as error:
            what = "is no video of a supported format, or damaged"
            raise RequestError(f"{self.name} {what} ({one_line(error, 80)})") from error
        finally:
            file.close()

    def _file(self) -> IO[bytes]:
        if isinstance(self.source, bytes):
            return io.BytesIO(self.source)
        return open_regular(os.fsdecode(self.source), defaults.MAX_VIDEO_BYTES, self.name)


class _Timed:
    """A file that is read within a time, decoding what was read included. Raises RequestError after it."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = file, name
        self._end = time.monotonic() + defaults.VIDEO_SECONDS

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise RequestError(f"{self._name} takes longer than {defaults.VIDEO_SECONDS} seconds to decode")

    def read(self, size: int) -> bytes:
        self.check()
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.check()
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
