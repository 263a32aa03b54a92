"""Messages to text to token ids: the bundle's chat template and tokenizer."""

from __future__ import annotations

import base64
import binascii
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moevlm.runtime.errors import BundleError, RequestError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]
ROLES = ("assistant", "system", "user")
MAX_CHARACTERS = 1 << 22


class Tokenizer:
    """The bundle's tokenizer.json, without truncation, padding, or tokens added around the text."""

    def __init__(self, text: str) -> None:
        """text: content of tokenizer.json. Raises BundleError if it is not a tokenizer."""
        import tokenizers

        try:
            self._core = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"tokenizer.json is not a tokenizer: {_line(error)}") from error
        self._core.no_truncation()
        self._core.no_padding()
        added = self._core.get_added_tokens_decoder()
        self.special: dict[str, int] = {token.content: i for i, token in sorted(added.items()) if token.special}
        self.special_ids = frozenset(self.special.values())

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written out in `text` become their ids."""
        return list(self._core.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return str(self._core.decode(ids, skip_special_tokens=True))

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token (byte-level alphabet), None outside the vocabulary."""
        text: str | None = self._core.id_to_token(token_id)
        return text


class ChatTemplate:
    """The bundle's chat_template.jinja in a sandbox, rendered as Hugging Face's `apply_chat_template` does."""

    def __init__(self, source: str, max_characters: int = MAX_CHARACTERS) -> None:
        """source: text of the template, from the bundle and never from a request. Raises BundleError on bad syntax."""
        import jinja2

        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BundleError(f"chat_template.jinja, line {error.lineno}: {_line(error)}") from error
        self._max = max_characters

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt text, up to where the assistant's turn starts; one placeholder for each image.

        Raises RequestError for messages that are malformed, too long, or refused by the template itself, and
        BundleError for a template that uses a variable that there is not, or leaves its sandbox.
        """
        import jinja2.exceptions

        plain = plain_messages(messages)
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=plain, add_generation_prompt=True, tools=None, documents=None
            ):
                pieces.append(piece)
                size += len(piece)
                if size > self._max:
                    break
        except BundleError as error:
            supported = "messages of role and content, add_generation_prompt"
            raise BundleError(f"chat_template.jinja: {error} (supported: {supported})") from error
        except jinja2.exceptions.SecurityError as error:
            raise BundleError(f"chat_template.jinja leaves its sandbox: {_line(error)}") from error
        except Exception as error:  # a template is code: it can fail in any way on messages that it did not expect
            raise RequestError(f"the chat template refuses these messages: {_line(error)}") from error
        if size > self._max:
            raise RequestError(f"prompt has more than {self._max} characters (the most that is allowed)")
        return "".join(pieces)


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Checked copies of role and content that hold only str, list and dict; an image part becomes {"type": "image"}.

    A template sees nothing else: no image objects, whose methods a sandbox cannot judge.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages must be a non-empty list of {role, content}")
    plain = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{where} must be an object with role and content")
        for key in message:
            if key not in ("role", "content"):
                raise RequestError(f"unsupported field {where}.{key} (supported: content, role)")
        role = message.get("role")
        if role not in ROLES:
            raise RequestError(f"unsupported value {where}.role = {role!r} (supported: {', '.join(ROLES)})")
        plain.append({"role": role, "content": _plain_content(message.get("content"), f"{where}.content")})
    return plain


def images_of(messages: Sequence[Message]) -> list[Any]:
    """Images in the order of their placeholders: what an "image" part holds, or the bytes of an "image_url" part.

    A URL must be a data: URI. Nothing is fetched, and no text from a URL is ever taken for a file's name.
    """
    images = []
    for i, message in enumerate(messages):
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, (list, tuple)) else ()):
            where = f"messages[{i}].content[{j}]"
            if part["type"] == "image":
                if part.get("image") is None:
                    raise RequestError(f"{where}.image is missing")
                images.append(part["image"])
            elif part["type"] == "image_url":
                images.append(_data_uri(part.get("image_url"), f"{where}.image_url"))
    return images


def _plain_content(content: object, where: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return _plain_text(content, where)
    if not isinstance(content, (list, tuple)):
        raise RequestError(f"{where} must be text or a list of parts")
    parts = []
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            parts.append({"type": "text", "text": _plain_text(part.get("text"), f"{where}[{j}].text")})
        elif kind in ("image", "image_url"):
            parts.append({"type": "image"})
        else:
            raise RequestError(f"unsupported value {where}[{j}].type = {kind!r} (supported: image, image_url, text)")
    return parts


def _plain_text(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise RequestError(f"{where} must be text")
    try:
        return text.encode().decode()  # also turns a subclass of str into str
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} is not Unicode text: lone surrogate at character {error.start}") from error


def _data_uri(value: object, where: str) -> bytes:
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str):
        raise RequestError(f"{where}.url is missing")
    head, comma, body = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise RequestError(f"unsupported value {where}.url = {url[:40]!r} (supported: data:image/...;base64,...)")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{where}.url is not base64: {_line(error)}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    import jinja2.sandbox
    import jinja2.utils

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks the assistant's words for training; here it only contains them."""

        tags = {"generation"}  # noqa: RUF012  (Jinja declares it on the instance)

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        """Attributes that start with an underscore are Python's, and closed to a template."""

        def __setitem__(self, name: str, value: object) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
            super().__setitem__(name, value)

    class Undefined(jinja2.Undefined):
        """May be tested, as templates do, but not printed: "" in its place would be a prompt nobody was trained on."""

        def __init__(
            self,
            hint: str | None = None,
            obj: Any = jinja2.utils.missing,
            name: str | None = None,
            exc: type[Exception] = jinja2.UndefinedError,
        ) -> None:
            # A variable is the template's own mistake; a missing element may be the messages'.
            super().__init__(hint, obj, name, BundleError if obj is jinja2.utils.missing else exc)  # type: ignore[arg-type]

        def __str__(self) -> str:
            raise BundleError(self._undefined_message)

    def namespace(*pairs: Any, **values: object) -> Namespace:
        filled = Namespace()
        for name, value in dict(*pairs, **values).items():
            filled[name] = value
        return filled

    def raise_exception(message: object) -> None:
        raise jinja2.TemplateError(str(message))

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML, which no model was trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=Undefined,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.datetime.now().strftime(form),
        namespace=namespace,
    )
    return environment


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
