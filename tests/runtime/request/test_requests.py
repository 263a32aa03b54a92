"""Whatever a caller passes in: an answer, or a RequestError of one line that names the argument."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import moevlm.runtime
from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.request.chat import ChatTemplate
from moevlm.runtime.request.prompt import Prompt
from moevlm.runtime.request.sampling import SamplingParams
from tests.runtime.engine.test_generate import (
    END,
    IMAGE,
    MODEL,
    TEMPLATE,
    TOKENIZER,
    Scripted,
    ToyEngine,
    _runtime,
    _text,
)

HI: list[dict[str, Any]] = _text("hi")
THINKING = (
    TEMPLATE
    + "{% if enable_thinking is defined and not enable_thinking %}no thoughts{% endif %}{{ style | default('') }}"
    "{% for m in messages %}{% set seen = m.role %}{% endfor %}{{ '' if seen else '' }}"
)
ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
JSON = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
WORDS = st.sampled_from(
    ["user", "assistant", "system", "text", "image", "image_url", "<|end|>", "<|image|>", "a", "", "\ud800"]
)
VALUES = WORDS | JSON
PARTS = st.dictionaries(st.sampled_from(["type", "text", "image", "image_url", "url", "detail", "max_pixels"]), VALUES)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": WORDS, "content": WORDS | st.lists(PARTS, max_size=3)})
    | st.dictionaries(WORDS, VALUES),
    max_size=3,
)
OPTIONS = st.dictionaries(st.sampled_from(sorted(SamplingParams.__dataclass_fields__)), JSON, max_size=3)


def refusal(call: Any) -> str:
    with pytest.raises(RequestError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600
    return message


@settings(max_examples=300, deadline=None)
@given(messages=MESSAGES | JSON, options=OPTIONS, template_options=JSON)
def test_only_request_errors_come_out(messages: Any, options: dict[str, Any], template_options: Any) -> None:
    runtime = _runtime()
    for arguments in ({}, options, {"template_options": template_options}):
        try:
            runtime.generate(messages, **arguments)
        except RequestError as error:
            assert str(error).isprintable()
            assert len(str(error)) < 1000


def test_messages_of_usual_form_are_answered() -> None:
    messages = [{"role": "system", "content": "b"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert list(_runtime().generate(messages, max_new_tokens=2))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"type": "text", "text": "a", "cache_control": {}}, "cache_control"),
        ({"type": "image", "image": b"", "resized_height": 28}, "resized_height"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,", "name": "x"}}, "name"),
        ({"type": "text", "text": "a", 5: "b"}, "5"),
        ({"type": "text", "text": "a", "\x1b[0m" * 99: "b"}, "[0m"),
    ],
    ids=str,
)
def test_unknown_field_of_a_part_is_refused_by_name(part: dict[Any, Any], name: str) -> None:
    message = refusal(lambda: _runtime().generate([{"role": "user", "content": [part]}]))
    assert "unsupported field messages[0].content[0]" in message
    assert name in message


def test_what_cannot_fit_is_refused_before_it_is_looked_at() -> None:
    class Unread(dict[str, Any]):
        def get(self, *_: object) -> Any:
            raise AssertionError("read")

    context = MODEL.context
    messages = [Unread()] * (context + 1)
    assert refusal(lambda: _runtime().generate(messages)).startswith(
        f"the request has {context + 1} messages and parts"
    )
    parts = [{"type": "text", "text": ""}] * 1_000_000
    assert "1000001 messages and parts" in refusal(lambda: _runtime().generate([{"role": "user", "content": parts}]))
    assert "more than 4194304 characters" in refusal(lambda: _runtime().generate(_text("a" * 5_000_000)))


def test_long_text_is_refused_without_being_tokenized_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(TOKENIZER), "encodings", lambda *_: pytest.fail("tokenized"))
    message = refusal(lambda: _runtime().generate(_text("a" * 4_000_000)))
    assert message == f"the prompt has more tokens than the model's context of {MODEL.context}"


def test_options_of_the_template_reach_it_and_others_are_refused() -> None:
    runtime = Runtime(MODEL, TOKENIZER, ChatTemplate(THINKING), ToyEngine())
    plain = runtime.prompt(HI)
    quiet = runtime.prompt(HI, {"enable_thinking": False, "style": "<|end|>"})
    assert (
        TOKENIZER.decode(quiet.ids.tolist()).removeprefix(TOKENIZER.decode(plain.ids.tolist())) == "no thoughts<|end|>"
    )
    assert [i for i in quiet.ids if i in (END, IMAGE)] == [i for i in plain.ids if i in (END, IMAGE)]
    for name in ("thinking", "messages", "add_generation_prompt", "tools", "range", "loop", "\n", ""):
        message = refusal(lambda name=name: runtime.generate(HI, template_options={name: True}))
        assert message.endswith("(it reads: enable_thinking, style)")
    for value in (
        object(),
        {"a"},
        1 << 70,
        "\ud800",
        [[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]],
        (1,),
        [1] * 20_000,
        {3: object()},
    ):
        assert "template_options.style" in refusal(
            lambda value=value: runtime.generate(HI, template_options={"style": value})
        )
    assert "no effect" in refusal(lambda: runtime.generate(plain, template_options={"style": "x"}))
    assert "it reads: none" in refusal(lambda: _runtime().generate(HI, template_options={"enable_thinking": False}))


def test_last_message_of_the_assistant_is_continued() -> None:
    ids = _runtime().prompt([*HI, {"role": "assistant", "content": "so "}]).ids.tolist()
    whole = _runtime().prompt([*HI, {"role": "assistant", "content": "so far"}, *_text("a")]).ids.tolist()
    assert ids == whole[: len(ids)]
    assert TOKENIZER.decode(ids).endswith("assistant\nso ")
    image = {"type": "image", "image": Image.new("RGB", (8, 8))}
    assert "does not end with text" in refusal(
        lambda: _runtime().prompt([*HI, {"role": "assistant", "content": [{"type": "text", "text": "a"}, image]}])
    )
    forgets = Runtime(MODEL, TOKENIZER, ChatTemplate("{{ messages[0].content }}"), ToyEngine())
    assert "leaves out" in refusal(lambda: forgets.prompt([*HI, {"role": "assistant", "content": "so"}]))


def test_stop_that_cannot_match_is_refused_and_a_special_token_stops() -> None:
    assert "stop = 'a<|image|>'" in refusal(lambda: _runtime().generate(HI, stop=["x", "a<|image|>"]))
    assert list(_runtime().generate(HI, stop="a<|image|>", skip_special_tokens=False, max_new_tokens=1))
    engine = Scripted("fine ")
    engine.script = [*engine.script[:-1], IMAGE, *TOKENIZER.encode("more"), END]
    pieces = list(_runtime(engine).generate(HI, stop="<|image|>"))
    assert ("".join(piece.text for piece in pieces), pieces[-1].finish_reason) == ("fine ", "stop")
    engine.at = 0
    pieces = list(_runtime(engine).generate(HI, skip_special_tokens=False))
    assert "".join(piece.text for piece in pieces) == "fine <|image|>more"
    without = Runtime(MODEL, None, None, ToyEngine())
    ready = Prompt.from_ids([5], [], MODEL)
    assert "no tokenizer.json" in refusal(lambda: without.generate(ready, stop="a"))


@pytest.mark.parametrize("params", [{}, [], "x", 0, False], ids=repr)
def test_params_of_another_type_are_refused(params: Any) -> None:
    told = "false" if params is False else repr(params)
    assert refusal(lambda: _runtime().generate(HI, params=params)).startswith(f"unsupported value params = {told}")


@pytest.mark.parametrize(
    "ids",
    [["a"], [2**63], [2**64], None, [1.5], [[1]], [True], 3, "12", [None], [[1], [1, 2]], b"12", [-1], [1 << 20]],
)
def test_token_ids_are_checked(ids: Any) -> None:
    refusal(lambda: Prompt.from_ids(ids, [], MODEL))


@pytest.mark.parametrize(
    "grids", [None, 5, [5], [(2,)], [(2, 3)], [(0, 2)], [(-2, 2)], [("2", 2)], [(2**40, 2)]], ids=repr
)
def test_grids_are_checked(grids: Any) -> None:
    refusal(lambda: Prompt.from_ids([IMAGE], grids, MODEL))


@pytest.mark.parametrize("path", [b"path", "a\0b", "\ud800", None, 5, Path("a\0b"), []])
def test_path_of_a_bundle_is_checked(path: Any) -> None:
    assert "path = " in refusal(lambda: moevlm.runtime.load(path))


def test_other_arguments_of_load_are_checked() -> None:
    assert "target = 5" in refusal(lambda: moevlm.runtime.load("x", target=5))
    assert "spinning = 'no'" in refusal(lambda: moevlm.runtime.load("x", spinning="no"))


def test_public_names_are_listed() -> None:
    assert set(dir(moevlm.runtime)) >= {
        "BundleError",
        "EngineError",
        "RequestError",
        "Runtime",
        "SamplingParams",
        "load",
    }


def test_a_misspelt_option_fails_type_checking(tmp_path: Path) -> None:
    code = """
import moevlm.runtime
runtime = moevlm.runtime.load("x")
runtime.generate([], temperature=None, top_p=0.5, stop=["a"], seed=None)
runtime.generate([], temprature=0.5)
"""
    (tmp_path / "service.py").write_text(code)
    root = Path(__file__).parents[3]
    types = tmp_path / "types" / "moevlm"
    types.mkdir(parents=True)
    for part in ("export", "plugins", "runtime"):
        (types / part).symlink_to(root / part)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", "service.py"],
        env={"MYPYPATH": "types", "PATH": "/usr/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert [line.split(":")[1] for line in done.stdout.splitlines() if "error" in line and line[0] == "s"] == ["5"], (
        done.stdout
    )
