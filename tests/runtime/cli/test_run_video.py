"""`moevlm run` with videos."""

import json
from pathlib import Path

import pytest

from tests.support.command_line import call
from tests.support.videos import encoded, moving_square

SHORT = ("--target", "ort-cpu", "--max-new-tokens", "3", "--json")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mkv"
    path.write_bytes(encoded(moving_square(12, 64, 48), "matroska", "mpeg4", fps=4))
    return path


def answer(*arguments: str | Path) -> dict[str, object]:
    said = call("run", *arguments, *SHORT)
    assert said.status == 0, said.err
    found: dict[str, object] = json.loads(said.out)
    return found


def test_a_video_is_asked_about_by_an_option_and_in_messages(tiny_bundle: Path, clip: Path, tmp_path: Path) -> None:
    first = answer(tiny_bundle, "--video", clip, "--prompt", "What moves?")
    parts = [{"type": "video", "video": str(clip)}, {"type": "text", "text": "What moves?"}]
    (tmp_path / "messages.json").write_text(json.dumps([{"role": "user", "content": parts}]))
    assert answer(tiny_bundle, "--messages", tmp_path / "messages.json")["token_ids"] == first["token_ids"]
    assert (
        first["image_tokens"]
        > answer(tiny_bundle, "--video", clip, "--prompt", "?", "--max-image-tokens", "2")["image_tokens"]
    )


def test_a_list_of_image_files_is_a_video_of_messages(tiny_bundle: Path, tmp_path: Path) -> None:
    for number, frame in enumerate(moving_square(6)):
        frame.save(tmp_path / f"{number}.png")
    video = {"type": "video", "video": [str(tmp_path / f"{number}.png") for number in range(6)], "fps": 2}
    (tmp_path / "messages.json").write_text(json.dumps([{"role": "user", "content": [video]}]))
    assert answer(tiny_bundle, "--messages", tmp_path / "messages.json")["image_tokens"]


def test_a_file_that_is_no_video_is_refused_in_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"#EXTM3U\n")
    for name, words in (("clip.mp4", "is no video of a supported format"), ("absent.mp4", "does not exist")):
        said = call("run", tiny_bundle, "--video", tmp_path / name, "--prompt", "?", *SHORT)
        assert said.status != 0
        assert len(said.errors) == 1
        assert words in said.errors[0]
