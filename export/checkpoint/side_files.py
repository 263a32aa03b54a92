"""Which of a checkpoint's files say how to render a conversation and to cut up an image, where several could.

Rules of transformers 5.24 (`ProcessorMixin.get_processor_dict`, `PreTrainedTokenizerBase._from_pretrained`,
`ImageProcessingMixin.get_image_processor_dict`), see docs/checkpoint-files.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moevlm.export.checkpoint.files import find, optional_json, read_json, read_text
from moevlm.runtime.core.errors import CheckpointError

PROCESSOR = "processor_config.json"
PREPROCESSOR = "preprocessor_config.json"
VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
_JINJA = "chat_template.jinja"
_JSON = "chat_template.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_FOLDER = "additional_chat_templates"


@dataclass(frozen=True)
class FoundTemplate:
    """The chat template for messages without tools. file: where it stood. others: names of further templates."""

    text: str
    file: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class FoundPreprocessor:
    """The fields of an image or a video processor. file: where they stood."""

    fields: Mapping[str, Any]
    file: str


def chat_template(directory: Path) -> FoundTemplate | None:
    """None for a checkpoint without one.

    The processor's own comes first, in processor_config.json, then chat_template.json, then chat_template.jinja with
    its folder of others; the tokenizer's, in tokenizer_config.json, is what is left.
    Raises CheckpointError for a file of another shape, and where transformers finds no template to take.
    """
    inline = optional_json(directory, PROCESSOR).get("chat_template")
    names = _in_folder(directory)
    if find(directory, _JSON):
        if names:
            raise CheckpointError(
                f"{directory} has {_JSON} and {_FOLDER}, and transformers takes no checkpoint with both: make the "
                f"first a {_JINJA}"
            )
        legacy = read_json(directory, _JSON).get("chat_template")
        if not isinstance(legacy, str):
            raise CheckpointError(f"{directory / _JSON} has no text chat_template")
        if inline is None:
            return FoundTemplate(legacy, _JSON)
    if inline is not None:
        return _named(inline, PROCESSOR)
    others = tuple(name for name in names if name != "default")
    if find(directory, _JINJA):
        return FoundTemplate(read_text(directory, _JINJA), _JINJA, others)
    if "default" in names:
        file = f"{_FOLDER}/default.jinja"
        return FoundTemplate(read_text(directory, file), file, others)
    if names:
        raise CheckpointError(f"{directory / _FOLDER} has {', '.join(names)}, and there is no default: add {_JINJA}")
    of_tokenizer = optional_json(directory, _TOKENIZER_CONFIG).get("chat_template")
    return None if of_tokenizer is None else _named(of_tokenizer, _TOKENIZER_CONFIG)


def preprocessor(directory: Path) -> FoundPreprocessor | None:
    """None for a checkpoint without one. What a whole processor saved wins over the image processor's own file.

    Raises CheckpointError for a file of another shape.
    """
    return _preprocessor(directory, "image_processor", PREPROCESSOR)


def video_preprocessor(directory: Path) -> FoundPreprocessor | None:
    """As `preprocessor`, of videos. An image processor's own file is not taken for one."""
    return _preprocessor(directory, "video_processor", VIDEO_PREPROCESSOR)


def _preprocessor(directory: Path, part: str, file: str) -> FoundPreprocessor | None:
    nested = optional_json(directory, PROCESSOR).get(part)
    if nested is not None:
        if not isinstance(nested, dict):
            raise CheckpointError(f"{directory / PROCESSOR}: {part} is not an object")
        return FoundPreprocessor(nested, f"{PROCESSOR}: {part}")
    return FoundPreprocessor(read_json(directory, file), file) if find(directory, file) else None


def _in_folder(directory: Path) -> list[str]:
    try:
        return sorted(path.stem for path in (directory / _FOLDER).iterdir() if path.suffix == ".jinja")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read {directory / _FOLDER}: {error.strerror}") from error


def _named(value: Any, file: str) -> FoundTemplate:
    """A template's text, or several by name: an object, or a list of {"name": ..., "template": ...}."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, str):
        return FoundTemplate(value, file)
    text = value.get("default") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise CheckpointError(f"{file}: chat_template is neither text nor has it a text named default")
    return FoundTemplate(text, file, tuple(sorted(str(name) for name in value if name != "default")))
