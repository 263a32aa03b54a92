"""Video files: frames as transformers decodes them, and what a file cannot do."""

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.video_utils import read_video_pyav

from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.request.videos.file_clip import FileClip
from tests.support.videos import encoded, moving_square

KINDS = [("mp4", "mpeg4"), ("mp4", "libx264"), ("matroska", "mpeg4"), ("webm", "libvpx"), ("mpegts", "mpeg2video")]
COUNT, CHOSEN = 37, [0, 5, 18, 18, 36]


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return encoded(moving_square(COUNT, 64, 48), "mp4", "mpeg4")


def refused(source: Any, *words: str) -> None:
    with pytest.raises(RequestError) as raised:
        list(FileClip.of(source).read([0, COUNT - 1]))
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("kind", "codec"), KINDS)
def test_frames_are_those_that_transformers_decodes(kind: str, codec: str, tmp_path: Path) -> None:
    path = tmp_path / "clip"
    path.write_bytes(encoded(moving_square(COUNT, 64, 48), kind, codec))
    clip = FileClip.of(path)
    assert (clip.frames, clip.fps, clip.size) == (COUNT, 10.0, (64, 48))
    assert clip.seconds == pytest.approx(3.7)
    wanted, metadata = read_video_pyav(str(path), lambda **_: [0, 5, 18, 36])
    found = [np.asarray(frame) for frame in clip.read(CHOSEN)]
    np.testing.assert_array_equal(np.stack(found), wanted[[0, 1, 2, 2, 3]])
    assert float(metadata.fps) == clip.fps


def test_a_video_is_a_path_or_bytes_or_a_stream(mp4: bytes, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(mp4)
    sources = [tmp_path / "clip.mp4", mp4, bytearray(mp4), io.BytesIO(mp4)]
    found = [[frame.tobytes() for frame in FileClip.of(source).read([3, 9])] for source in sources]
    assert all(frames == found[0] for frames in found)
    assert found[0][0] != found[0][1]


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
NO_VIDEO = {
    "playlist": PLAYLIST,
    "list of files": b"ffconcat version 1.0\nfile 'clip.mp4'\n",
    "text": b"hello " * 100,
    "nothing": b"",
}


@pytest.mark.parametrize("content", NO_VIDEO.values(), ids=NO_VIDEO)
def test_what_is_no_video_or_names_other_files_is_refused(content: bytes, tmp_path: Path) -> None:
    refused(content, "video is no video of a supported format, or damaged")
    (tmp_path / "clip.mp4").write_bytes(content)
    refused(tmp_path / "clip.mp4", "clip.mp4' is no video of a supported format")


def test_a_damaged_file_is_refused_or_ends_early(mp4: bytes) -> None:
    refused(mp4[: len(mp4) // 2], "video is no video of a supported format, or damaged")
    stream = encoded(moving_square(COUNT, 64, 48), "mpegts", "mpeg2video")
    clip = FileClip.of(stream)
    with pytest.raises(RequestError, match=r"ends after .* of the 900 frames that its header tells of"):
        list(replace(clip, frames=900).read([0, 899]))


def test_text_and_what_is_no_file_are_refused(tmp_path: Path) -> None:
    refused("clip.mp4", "a video is the text 'clip.mp4'")
    refused(3, "a video is 3")
    refused(tmp_path / "absent.mp4", "absent.mp4' does not exist")
    refused(tmp_path, "is not a file")
    refused(Path("http://localhost/clip.mp4"), "URLs are not fetched")


def test_a_coding_that_is_not_decoded_is_refused_by_name() -> None:
    refused(encoded(moving_square(4, 64, 48), "matroska", "ffv1"), "video is coded as ffv1 (supported: h264")


def test_large_long_and_endless_files_are_refused(mp4: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moevlm.runtime.core.defaults.MAX_VIDEO_PIXELS", 64 * 48 - 1)
    refused(mp4, "video is 64 x 48 pixels; at most 3071 pixels are allowed")
    monkeypatch.undo()
    monkeypatch.setattr("moevlm.runtime.core.defaults.MAX_VIDEO_BYTES", 1000)
    with Path("/dev/zero").open("rb") as endless:
        refused(endless, "video has more than 1000 bytes")
    monkeypatch.undo()
    monkeypatch.setattr("moevlm.runtime.core.defaults.VIDEO_SECONDS", -1)
    refused(mp4, "takes longer than -1 seconds to decode")


def test_frames_that_change_their_size_are_refused(mp4: bytes) -> None:
    clip = replace(FileClip.of(mp4), size=(32, 32))
    with pytest.raises(RequestError, match="frame 1 of video is 64 x 48 pixels, the first 32 x 32"):
        list(clip.read([0]))


def test_without_pyav_a_file_is_refused_with_the_command_that_installs_it(
    mp4: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    refused(mp4, "a video file needs PyAV (pip install ", "[video]")


@pytest.mark.parametrize(("kind", "codec"), KINDS)
def test_changed_bytes_are_decoded_or_refused(kind: str, codec: str) -> None:
    rng, content = np.random.default_rng(1), encoded(moving_square(12, 64, 48), kind, codec)
    outcomes = set()
    for _ in range(150):
        data = bytearray(content)
        for place in rng.integers(0, len(data), rng.integers(1, 12)):
            data[place] = rng.choice([0, 127, 128, 255])
        try:
            clip = FileClip.of(bytes(data))
            list(clip.read([0, clip.frames - 1]))
            outcomes.add("decoded")
        except RequestError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes
