"""Messages to the text of a prompt: the bundle's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from moevlm.runtime.core.errors import BundleError, MoevlmError, RefusedOption, RequestError, one_line, reason, shown
from moevlm.runtime.request.messages import MAX_CHARACTERS, Message, plain_messages, texts_of
from moevlm.runtime.request.tokenizer import Tokenizer

__all__ = ("ChatTemplate", "Message", "Tokenizer")  # where programs have imported them from since 0.1

NOTHING: Mapping[str, Any] = MappingProxyType({})
_MAX_VALUES, _MAX_DEPTH = 10_000, 16  # of a template option
_GIVEN = ("messages", "add_generation_prompt", "tools", "documents")


class ChatTemplate:
    """The bundle's chat_template.jinja in a sandbox, rendered as Hugging Face's `apply_chat_template` does.

    options: names of the variables that a request may set, its `template_options`.
    """

    def __init__(
        self, source: str, variables: Mapping[str, str] = NOTHING, max_characters: int = MAX_CHARACTERS
    ) -> None:
        """source: text of the template, from the bundle and never from a request.

        variables: further names that it may use, the tokenizer's eos_token and the like. Raises BundleError for a
        template that is malformed, or uses what no chat template needs.
        """
        import jinja2

        from moevlm.runtime.request.template_budget import Budget
        from moevlm.runtime.request.template_code import TemplateCode
        from moevlm.runtime.request.template_environment import ChatEnvironment

        environment = ChatEnvironment(Budget(0))
        try:
            self._code = TemplateCode(source, environment)
        except BundleError:
            raise
        except jinja2.TemplateSyntaxError as error:
            raise BundleError(f"chat_template.jinja, line {error.lineno}: {one_line(error.message)}") from error
        except Exception as error:  # nested too deep for Jinja or for Python: RecursionError, SyntaxError, MemoryError
            raise BundleError(f"chat_template.jinja cannot be compiled: {reason(error)}") from error
        self._fixed = dict(variables)
        self._max = max_characters
        self.options = self._code.variables - {*_GIVEN, *self._fixed, *environment.globals}

    def writes(self, text: str) -> bool:
        """Tell whether the template's own words contain this text."""
        return any(text in literal for literal in (*self._code.literals, *self._fixed.values()))

    def render(self, messages: Sequence[Message], options: Mapping[str, Any] = NOTHING) -> str:
        """The prompt text, up to where the assistant's turn starts; one placeholder for each image.

        Where the last message is the assistant's, the text ends with it, to be continued. options: variables of the
        template, JSON values. Returns a MarkedText, which knows the characters that the template wrote.
        Raises RequestError for messages that are malformed, too long, or refused by the template itself, and
        BundleError for a template that uses a variable that there is not, or leaves its sandbox.
        """
        plain = plain_messages(messages)
        options = self._checked(options)
        end = _mark_end(plain) if plain[-1]["role"] == "assistant" else None
        text = self._rendered(plain, options, end is None)
        return text if end is None else _until(text, end)

    def _checked(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(options, Mapping):
            raise RefusedOption("template_options", options, "an object")
        for name, value in options.items():
            if name not in self.options:
                known = ", ".join(sorted(self.options)) or "none"
                raise RequestError(f"the chat template has no option {shown(name)} (it reads: {known})")
            _require_json(value, f"template_options.{name}")
        return options

    def _rendered(self, plain: list[dict[str, Any]], options: Mapping[str, Any], add_generation_prompt: bool) -> str:
        import jinja2

        from moevlm.runtime.request.template_budget import Budget
        from moevlm.runtime.request.template_environment import ChatEnvironment
        from moevlm.runtime.request.template_text import concatenate, own

        budget = Budget(sum(len(text) for message in plain for text in texts_of(message["content"])))
        environment = ChatEnvironment(budget)
        variables = {name: own(value) for name, value in self._fixed.items()} | dict(options)
        variables |= {"messages": [_as_the_template_s(message) for message in plain], "tools": None, "documents": None}
        variables["add_generation_prompt"] = add_generation_prompt
        pieces: list[str] = []
        room = self._max
        try:
            for piece in environment.run(self._code.code, variables):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise RequestError(f"prompt has more than {self._max} characters (the most that is allowed)")
        except BundleError as error:
            supported = ", ".join(["messages of role and content", "add_generation_prompt", *self._fixed])
            raise BundleError(f"chat_template.jinja: {one_line(error)} (supported: {supported})") from error
        except MoevlmError:
            raise
        except jinja2.exceptions.SecurityError as error:
            raise BundleError(f"chat_template.jinja leaves its sandbox: {one_line(error)}") from error
        except Exception as error:  # a template is code: it can fail in any way on messages that it did not expect
            raise RequestError(f"the chat template refuses these messages: {reason(error)}") from error
        return concatenate(pieces)


def _as_the_template_s(message: Mapping[str, Any]) -> dict[str, Any]:
    """A plain message in which role and kinds of parts count as the template's own words: a user cannot choose them."""
    from moevlm.runtime.request.template_text import own

    content = message["content"]
    if not isinstance(content, str):
        content = [{own(name): own(part[name]) if name == "type" else part[name] for name in part} for part in content]
    return {own("role"): own(message["role"]), own("content"): content}


def _mark_end(plain: list[dict[str, Any]]) -> str:
    """Put a mark behind the last message's text, as Hugging Face's continue_final_message does."""
    texts = [text for message in plain for text in texts_of(message["content"])]
    number = 0
    while any((mark := f"<end-of-text-{number}>") in text for text in texts):
        number += 1
    message = plain[-1]
    if isinstance(message["content"], str):
        message["content"] += mark + " "
    elif message["content"] and message["content"][-1]["type"] == "text":
        message["content"][-1]["text"] += mark + " "
    else:
        raise RequestError("the last message is the assistant's, and does not end with text that could be continued")
    return mark


def _until(text: str, mark: str) -> str:
    """The text before the mark."""
    from moevlm.runtime.request.template_text import METHODS, cut

    at = text.rfind(mark)
    if at < 0:
        raise RequestError(
            "the last message is the assistant's, but the chat template leaves out what is to be continued"
        )
    before = cut(text, slice(0, at))
    # The blank behind the mark is gone where the template trims, and then it would have trimmed the text's end, too.
    stripped: str = before if text.startswith(mark + " ", at) else METHODS["rstrip"](before)
    return stripped


def _require_json(value: Any, where: str) -> None:
    waiting, count = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        inner = len(item) if type(item) in (list, dict) else 0
        if count + len(waiting) + inner > _MAX_VALUES or depth > _MAX_DEPTH:
            raise RefusedOption(where, value, f"{_MAX_VALUES} values, {_MAX_DEPTH} in each other")
        if type(item) is list:
            waiting += [(one, depth + 1) for one in item]
        elif type(item) is dict:
            waiting += [(one, depth + 1) for pair in item.items() for one in pair]
        elif isinstance(item, str):
            if not _is_unicode(item) or len(item) > MAX_CHARACTERS:
                raise RequestError(f"{where} is not Unicode text of at most {MAX_CHARACTERS} characters")
        elif not (item is None or isinstance(item, (bool, float)) or (isinstance(item, int) and abs(item) < 1 << 63)):
            raise RefusedOption(where, value, "JSON")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
