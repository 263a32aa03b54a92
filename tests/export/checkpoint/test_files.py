"""Small files of a checkpoint: what else than a plain file, plain text or a plain object may lie there."""

import json
import os
from pathlib import Path

import pytest

from moevlm.export.checkpoint.files import MAX_BYTES, find, read_bytes, read_json, read_text
from moevlm.export.checkpoint.safetensors_file import read_header
from moevlm.runtime.core.errors import CheckpointError
from moevlm.runtime.core.json_object import MAX_DEPTH

NAME = "generation_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A snapshot of the Hugging Face cache."""
    (tmp_path / "models--a--b/blobs").mkdir(parents=True)
    (tmp_path / "models--a--b/snapshots/123").mkdir(parents=True)
    return tmp_path / "models--a--b/snapshots/123"


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        read_json(folder, NAME)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < len(str(folder)) + 300
    for word in (NAME, *words):
        assert word in message


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def test_a_plain_object_is_read(folder: Path) -> None:
    assert find(folder, NAME) is None
    (folder / NAME).write_text('{"a": [1, 2.5, "é"]}')
    assert find(folder, NAME) == folder / NAME
    assert read_json(folder, NAME) == {"a": [1, 2.5, "é"]}
    (folder / NAME).write_text(nested(MAX_DEPTH))
    assert read_json(folder, NAME)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not valid JSON"),
        ('{"a": 1', "not valid JSON"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ('"x"', "not a JSON object"),
        ("5", "not a JSON object"),
        (b'{"a": "\xff"}', "not UTF-8 text: invalid start byte at byte 7"),
        (nested(MAX_DEPTH + 1), f"nested more than {MAX_DEPTH} deep"),
        (nested(100_000), f"nested more than {MAX_DEPTH} deep"),
        ("[" * 100_000, f"nested more than {MAX_DEPTH} deep"),
        ('{"a": 1' + "0" * 400 + "}", "401 digits"),
        ('{"a": 1' + "0" * 5000 + "}", "5001 digits"),
        (r'{"a": {"b": ["\ud800"]}}', "not Unicode"),
        (r'{"\udfff": 1}', "not Unicode"),
        ('{"a": 1e400}', "1e400 is too large"),
        ('{"a": -1e400}', "-1e400 is too large"),
    ],
)
def test_anything_but_a_json_object_is_one_line(folder: Path, text: str | bytes, word: str) -> None:
    (folder / NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, word)


def test_missing_file_pipe_and_folder_are_refused(folder: Path) -> None:
    refused(folder, "has no")
    os.mkfifo(folder / NAME)
    refused(folder, "not a regular file")
    (folder / NAME).unlink()
    (folder / NAME).mkdir()
    refused(folder, "not a regular file")


def test_file_larger_than_its_kind_ever_is_is_not_read(folder: Path) -> None:
    with (folder / NAME).open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    refused(folder, "more than 16 MB")
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(4 << 30)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has more than 256 MB"):
        read_text(folder, "tokenizer.json")


def test_what_a_clone_without_git_lfs_leaves_is_refused_with_the_remedy(folder: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5\n"
    (folder / NAME).write_text(pointer)
    refused(folder, "not the file but Git LFS's pointer to it (git lfs pull fetches it)")
    shard = folder / "model.safetensors"
    shard.write_text(pointer)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not the file but Git LFS's pointer"):
        read_header(shard)


def test_links_lead_inside_the_checkpoint_or_to_the_blobs_of_its_cache(folder: Path) -> None:
    blob = folder.parents[1] / "blobs/0123"
    blob.write_text('{"from": "blob"}')
    (folder / NAME).symlink_to("../../blobs/0123")
    assert read_json(folder, NAME) == {"from": "blob"}
    (folder / "templates").mkdir()
    (folder / "templates" / NAME).symlink_to("../../../blobs/0123")
    assert read_json(folder, f"templates/{NAME}") == {"from": "blob"}
    assert read_json(folder / "templates", NAME) == {"from": "blob"}
    (folder / NAME).unlink()
    (folder / "other.json").write_text(json.dumps({"from": "inside"}))
    (folder / NAME).symlink_to("other.json")
    assert read_json(folder, NAME) == {"from": "inside"}


def test_a_checkpoint_may_be_reached_through_a_link(folder: Path, tmp_path: Path) -> None:
    (folder / NAME).write_text("{}")
    (tmp_path / "link").symlink_to(folder)
    assert read_bytes(tmp_path / "link", NAME) == b"{}"


@pytest.mark.parametrize("place", ["secret", "models--a--b/secret", "blobs/secret", "models--a--b/blobs/deeper/secret"])
def test_links_to_any_other_place_are_refused(folder: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("{}")
    (folder / NAME).symlink_to(tmp_path / place)
    refused(folder, "is a link to", "secret", "allowed: a place inside the checkpoint")
    (folder / "folder").symlink_to((tmp_path / place).parent)
    with pytest.raises(CheckpointError, match="is a link to"):
        read_bytes(folder, "folder/secret")


def test_links_that_lead_nowhere_are_refused(folder: Path) -> None:
    (folder / NAME).symlink_to("nowhere")
    refused(folder, "cannot read", "No such file")
    (folder / NAME).unlink()
    (folder / NAME).symlink_to(NAME)
    refused(folder, "cannot read")
    (folder / NAME).unlink()
    (folder / NAME).symlink_to("/dev/zero")
    refused(folder, "is a link to /dev/zero")
