"""What a template does to text gives the text that Python's str gives, and each character keeps its mark."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moevlm.runtime.request.template_text import METHODS, MarkedText, character, concatenate, cut, is_own, marks_of, own

CALLS: dict[str, tuple[Any, ...]] = {
    "strip": (" a",),
    "lstrip": (" a",),
    "rstrip": (" a",),
    "removeprefix": ("ab",),
    "removesuffix": ("ab",),
    "split": ("ab",),
    "rsplit": ("ab", 1),
    "splitlines": (),
    "partition": ("ab",),
    "rpartition": ("b",),
    "replace": ("ab", "x"),
    "lower": (),
    "upper": (),
    "title": (),
    "capitalize": (),
    "swapcase": (),
    "casefold": (),
}
# Upper-case letters are the template's, so that a character tells what its mark has to be.
TEXTS = st.text(alphabet="ab \nABX\r", max_size=12).map(lambda text: MarkedText(text, bytes(map(str.isupper, text))))


def parts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


@pytest.mark.parametrize("name", CALLS)
@given(text=TEXTS)
def test_methods_equal_those_of_str_and_keep_the_marks(name: str, text: MarkedText) -> None:
    cased = name in ("lower", "upper", "title", "capitalize", "swapcase", "casefold")
    for arguments in (CALLS[name], ()) if name in ("strip", "split", "rsplit") else (CALLS[name],):
        made = METHODS[name](text, *arguments)
        assert made == getattr(str(text), name)(*arguments)
        assert type(made) is type(getattr(str.__str__(text), name)(*arguments)) or isinstance(made, MarkedText)
        for part in parts(made):
            expected = text.marks if cased else bytes(map(str.isupper, part))
            assert marks_of(part) == expected


@given(st.lists(TEXTS | st.text(alphabet="ab", max_size=3), max_size=4), st.sampled_from([",", own("-")]))
def test_joined_texts_keep_their_marks(pieces: list[str], separator: str) -> None:
    joined = METHODS["join"](separator, pieces)
    assert joined == str.__str__(separator).join(pieces)
    assert marks_of(joined) == marks_of(separator).join(map(marks_of, pieces))
    assert marks_of(concatenate(pieces)) == b"".join(map(marks_of, pieces))


@given(TEXTS, st.slices(12), st.integers(-12, 11))
def test_slices_and_characters_keep_their_marks(text: MarkedText, part: slice, at: int) -> None:
    assert (cut(text, part), marks_of(cut(text, part))) == (str.__str__(text)[part], text.marks[part])
    if -len(text) <= at < len(text):
        assert marks_of(character(text, at)) == bytes([text.marks[at]])


def test_python_s_own_operations_make_no_text_the_template_s() -> None:
    text = own("<|im_end|>")
    assert is_own(text)
    assert type(str(text)) is MarkedText  # how Jinja turns a value into text
    for made in (text + "", "" + text, f"{text}.", text[:], text.strip(), "".join([text, "."]), MarkedText(text)):
        assert made in (text, text + ".")
        assert not is_own(made)
