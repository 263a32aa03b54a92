"""Requests against transformers: the bundle's tokenizer, chat template and image preprocessing, and the checkpoint's.

transformers' processor classes need torchvision, for videos; so its tokenizer, its template and its image processor
are put together here as `ProcessorMixin.apply_chat_template` does.
"""

import io
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tokenizers
import transformers
from PIL import Image

from moevlm.export.parity.oracle_images import oracle_images
from moevlm.export.parity.report import Check
from moevlm.export.parity.their_text import IMAGE_COLUMNS, IMAGE_ROWS, Messages, TheirText
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import CheckpointError, RequestError, one_line, reason
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.towers import Grid
from moevlm.runtime.loading import load_images
from moevlm.runtime.request.chat import ChatTemplate
from moevlm.runtime.request.images.layout import ImageLayout
from moevlm.runtime.request.images.processor import ImageProcessor
from moevlm.runtime.request.messages import texts_alone
from moevlm.runtime.request.prompt_builder import PromptBuilder
from moevlm.runtime.request.special_tokens import control_tokens
from moevlm.runtime.request.tokenizer import Tokenizer

STEP = "requests"
PATCH_LIMIT = 1e-6  # of a normalised value
_TOKENS = 64  # of each kind that are tried
_CONTEXT = 1 << 20  # texts are compared whatever their length
_TEXTS = (
    "What is 12 + 345? It's 1,000.5 or 1234567890.",
    "na\u00efve cafe\u0301 \u2014 \ufb01 \u212b",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002 \ud55c\uad6d\uc5b4 \u0627\u0644\u0639 \u0e44\u0e17\u0e22",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f600",
    "def f(x):\n\treturn x  +  1\r\n\n\n  # I'LL we've a_b-c/d\\e\n",
    "  blanks before and behind \n",
)
_BLOCKS = ((0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x4E00, 0x9FFF), (0x1F300, 0x1F650))
_PICTURE = {"type": "image"}


def request_checks(bundle: Bundle, checkpoint: Path, seed: int, splitting: str = "") -> list[Check]:
    """Token ids of conversations, control tokens typed by a user, and patches of images. Raises CheckpointError.

    splitting: see `families.base.Family`, for a checkpoint with a tiktoken.model alone.
    What cannot be compared is one check that says so.
    """
    transformers.logging.set_verbosity_error()
    files, model = bundle.manifest.files, bundle.manifest.model
    found: list[Check] = []
    images = load_images(bundle)
    if "tokenizer.json" not in files:
        found.append(_not_compared("conversations", "the checkpoint has no tokenizer"))
    else:
        tokenizer = bundle.read_text("tokenizer.json")
        theirs = TheirText.load(checkpoint, splitting)
        if "chat_template.jinja" in files:
            template = ChatTemplate(bundle.read_text("chat_template.jinja"), bundle.manifest.template_variables)
            found += _Texts(tokenizer, template, theirs, msgspec.structs.replace(model, context=_CONTEXT)).checks(seed)
        else:
            found.append(_not_compared("conversations", "the checkpoint has no chat template"))
            found.append(_plain_texts(Tokenizer(tokenizer), theirs, seed))
    if model.vision is None:
        return found
    if images is None:
        found.append(_not_compared("images", "the checkpoint has no image processor"))
    else:
        found += _image_checks(images, checkpoint, model, seed)
    return found


def _check(quantity: str, value: float, limit: float, note: str = "") -> Check:
    return Check(STEP, quantity, value, limit, value <= limit, note)


def _not_compared(quantity: str, why: str) -> Check:
    return Check(STEP, quantity, 0, 0, True, why, compared=False)


def _plain_texts(ours: Tokenizer, theirs: TheirText, seed: int) -> Check:
    texts = _texts(np.random.default_rng(seed))
    differ = [number for number, text in enumerate(texts) if ours.encode(text) != theirs.ids(text, as_it_is=True)]
    return _check(f"{len(texts)} texts whose ids differ", len(differ), 0, f"text {differ[0]}" if differ else "")


class _Texts:
    def __init__(self, tokenizer: str, template: ChatTemplate, theirs: TheirText, model: ModelMetadata) -> None:
        """tokenizer: content of tokenizer.json."""
        self._core, self._theirs, self._model = tokenizers.Tokenizer.from_str(tokenizer), theirs, model
        self._tokenizer = Tokenizer(tokenizer)
        placeholder = model.image_placeholder
        self._placeholder = "" if placeholder is None else str(self._tokenizer.token(placeholder))
        self._builder = PromptBuilder(model, self._tokenizer, template, None)
        control = control_tokens(self._tokenizer, template, model.control_token_ids)
        self._control = {token for token, token_id in self._tokenizer.added.items() if token_id in control}

    def checks(self, seed: int) -> Iterator[Check]:
        conversations = list(_conversations(seed, [_PICTURE] if self._model.vision else []))
        plain = [token for token in self._tokenizer.added if token not in self._control][:_TOKENS]
        conversations += [(f"added token {token}", _user(f"a{token}b {token} c")) for token in plain]
        notes = [note for name, messages in conversations if (note := self._difference(name, messages))]
        note = notes[0] + self._own_rules() if notes else ""
        yield _check(f"{len(conversations)} conversations whose ids differ", len(notes), 0, note)
        typed = sorted(self._control - {self._placeholder})[:_TOKENS]
        notes = [note for token in typed if (note := self._obeyed(token))]
        yield _check(f"{len(typed)} typed control tokens that are not text", len(notes), 0, notes[0] if notes else "")

    def _own_rules(self) -> str:
        """Name the parts that transformers' class has of its own, instead of those of tokenizer.json."""
        backend = getattr(self._theirs.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return ""
        ours, theirs = (json.loads(core.to_str()) for core in (self._core, backend))
        own = [part for part in ("normalizer", "pre_tokenizer") if ours[part] != theirs[part]]
        return f" (class {type(self._theirs.tokenizer).__name__} has its own {' and '.join(own)})" if own else ""

    def _ours(self, messages: Messages) -> list[int] | None:
        """None for messages that the template refuses. Images are as large as those of `expanded`."""
        images = sum(part["type"] == "image" for message in messages for part in message["content"])
        try:
            return self._builder.prompt_ids(messages, [self._image() for _ in range(images)])
        except RequestError:
            return None

    def _image(self) -> list[int]:
        merge = self._model.tower.merge_size
        return ImageLayout((merge * IMAGE_ROWS, merge * IMAGE_COLUMNS)).ids(self._model)

    def _rendered(self, messages: Messages) -> str | None:
        return self._theirs.rendered(messages if self._model.vision else texts_alone(messages))

    def _difference(self, name: str, messages: Messages) -> str:
        ours, text = self._ours(messages), self._rendered(messages)
        theirs = None
        if text is not None:
            theirs = self._theirs.ids(self._theirs.expanded(text, self._placeholder, self._model.vision))
        if ours == theirs:
            return ""
        if ours is None or theirs is None:
            return f"{one_line(name, 40)}: {'transformers refuses it' if ours else 'refused, not so by transformers'}"
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        here, there = (str(ids[at]) if at < len(ids) else "the end" for ids in (ours, theirs))
        return f"{one_line(name, 40)}: token {at} is {here}, of transformers {there}"

    def _obeyed(self, token: str) -> str:
        """transformers obeys such a token, so texts are compared, and control tokens are counted."""
        messages = _user(f"a {token} b")
        ours, text, without = self._ours(messages), self._rendered(messages), self._ours(_user("a b"))
        if ours is None or text is None or without is None:
            return ""  # a token of one character cannot be text, and is refused
        control = [self._tokenizer.added[name] for name in self._control]
        if any(ours.count(i) != without.count(i) for i in control):
            return f"{one_line(token, 40)} of a message is a control token"
        spelled, meant = (
            self._tokenizer.decode(ids, skip_special_tokens=False) for ids in (ours, self._theirs.ids(text))
        )
        return "" if spelled == meant else f"{one_line(token, 40)} of a message is spelled otherwise"


def _user(text: str) -> Messages:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def _conversations(seed: int, pictures: Messages) -> Iterator[tuple[str, Messages]]:
    texts = _texts(np.random.default_rng(seed))
    for number, text in enumerate(texts):
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        question: Messages = [{"role": "user", "content": parts}]
        system: Messages = [{"role": "system", "content": [{"type": "text", "text": texts[number - 1]}]}]
        two: Messages = [{"role": "user", "content": [*pictures, *parts, *pictures, *parts]}]
        answer: Messages = [{"role": "assistant", "content": [{"type": "text", "text": texts[number - 2]}]}]
        yield f"text {number}", question
        yield f"text {number} after a system message", system + question
        yield f"text {number} about two images", two
        yield f"text {number} after a turn", question + answer + two
        yield f"text {number} after a system message and two turns", system + two + answer + question + answer + two


def _texts(rng: np.random.Generator) -> list[str]:
    return [*_TEXTS, *(_random_text(rng) for _ in range(6))]


def _random_text(rng: np.random.Generator) -> str:
    blocks = rng.integers(0, len(_BLOCKS), 24)
    return "".join(chr(rng.integers(*_BLOCKS[block])) + (" " if rng.random() < 0.2 else "") for block in blocks)


def _image_checks(ours: ImageProcessor, checkpoint: Path, model: ModelMetadata, seed: int) -> Iterator[Check]:
    if not ours.EXACT and find_spec("torchvision") is None:
        needed = "pip install torchvision, of the release that goes with this torch, and run parity again"
        yield _not_compared("images", f"transformers' image processor of this model needs torchvision ({needed})")
        return
    try:
        theirs = transformers.AutoImageProcessor.from_pretrained(
            checkpoint, backend="pil", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot load the image processor of {checkpoint}: {reason(error)}"
        ) from error
    reference, worst, notes, count = oracle_images(model.tower), 0.0, [], 0
    for image in _images(model, seed):
        count += 1
        name = f"{image.mode} of {image.width} x {image.height}"
        file = io.BytesIO()
        image.save(file, "PNG")
        try:
            wanted = theirs(images=[image], **{"return_tensors": "np"} | reference.processing(model.tower))
        except Exception as error:  # of fields that changed since the bundle was built
            raise CheckpointError(f"transformers cannot cut an image as {checkpoint} says: {reason(error)}") from error
        their_grids, patches = reference.patches(wanted, model.tower)
        inputs, grids = ours.pack(ours.fit(ours.open(file.getvalue())))
        if grids != their_grids or ours.layout(file.getvalue()).grids != grids:
            notes.append(f"{name}: {_grids_text(grids)} patches, of transformers {_grids_text(their_grids)}")
        else:
            worst = max(worst, float(np.abs(inputs.pixel_patches - patches).max()))
    yield _check(f"{count} images cut otherwise", len(notes), 0, notes[0] if notes else "")
    yield _check("values of their patches", worst, PATCH_LIMIT if ours.EXACT else float(np.diff(ours.values).max()))


def _grids_text(grids: Sequence[Grid]) -> str:
    return ", ".join(f"{height} x {width}" for height, width in grids)


def _images(model: ModelMetadata, seed: int) -> Iterator[Image.Image]:
    """Sizes below one block, between blocks, elongated, and larger; the modes that both sides take alike."""
    rng = np.random.default_rng(seed)
    unit = model.tower.patch_size * model.tower.merge_size
    sizes: Sequence[tuple[int, int]] = [
        (unit, unit), (3 * unit + 1, 2 * unit - 1), (1, 1), (unit // 2, 3), (5, 990), (1400, 9), (640, 480), (333, 1024)
    ]  # fmt: skip
    for size, mode in zip(sizes, ("RGB", "L", "RGB", "P", "RGB", "1", "RGB", "RGBA"), strict=True):
        noise = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        yield Image.fromarray(noise).convert(mode)
