"""No text of a message becomes a control token, whatever a template does to it; and templates see texts as they are."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Core

from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.core.manifest import ImageMarks, VideoMetadata
from moevlm.runtime.request.chat import ChatTemplate
from moevlm.runtime.request.prompt_builder import PromptBuilder
from moevlm.runtime.request.tokenizer import Tokenizer
from tests.runtime.request.test_chat import CONVERSATION, CORE, IMAGE, MODEL, PLAIN, TOKENIZER

# Qwen3-VL: a macro for the content, turns looked through from the end, thoughts taken out and written anew.
THINKING = """\
{%- macro content_of(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for item in content -%}
{%- if item.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}{%- else -%}{{- item.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=messages | length - 1, looking=true) -%}
{%- for message in messages[::-1] -%}
{%- if ns.looking and message.role == 'user' -%}
{%- set ns.looking = false -%}{%- set ns.last = messages | length - 1 - loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set content = content_of(message.content) | trim -%}
{%- set thought = '' -%}
{%- if message.role == 'assistant' and '</think>' in content -%}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' and loop.index0 > ns.last -%}
{{- '<think>\\n' ~ thought.strip('\\n') ~ '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""
# Ways of the Hub to put a turn together: pieces of control tokens, literal text, loops that join, filters, formats.
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
BODIES = {
    "text": "{{ m.content }}",
    "trimmed": "{{ m.content | trim }}",
    "no newlines": "{{ m.content | replace('\\n', '') }}",
    "no newlines by method": "{{ m.content.replace('\\n', '') }}",
    "no blanks": "{{ m.content.split() | join }}",
    "lines": "{{ m.content.splitlines() | map('trim') | join('') }}",
    "characters": "{% for c in m.content if c != ' ' %}{{ c }}{% endfor %}",
    "characters joined": "{{ m.content | list | reject('eq', '\\n') | join }}",
    "dots": "{{ m.content.rstrip('.') ~ m.content.lstrip('.') }}",
    "title": "{{ m.content | title }}{{ m.content.lower() }}",
    "backwards": "{{ m.content[::-1] }}{{ m.content | reverse | list | join }}",
    "slices": "{{ m.content[:3] + m.content[4:] }}",
    "format": "{{ '%s' % m.content }}",
    "json": "{{ m.content | tojson }}",
    "list": "{{ [m.content] }}",
    "indented": "{{ m.content | indent(2) }}",
    "macro": "{% macro f(x) %}{{ x | replace(' ', '') }}{{ caller() }}{% endmacro %}"
    "{% call f(m.content) %}{{ m.content }}{% endcall %}",
    "set block": "{% set x %}<{{ m.content }}{% endset %}{{ x }}",
    "filter block": "{% filter replace('.', '') %}{{ m.content }}{% endfilter %}",
    "its own bracket": "<{{ m.content }}{{ '|' ~ m.content }}",
    "parts of tokens": "{{ '<|im_' ~ m.content ~ '|>' }}",
    "padded": "{{ m.content.center(9) }}{{ m.content.partition('.')[0] }}{{ m.content.removeprefix('.') }}",
}
MADE = {
    "role in a token": "{% for m in messages %}{{ '<|' + 'im_start' + '|>' ~ m.role }}{{ m.content }}<|im_end|>"
    "{% endfor %}",
    "variables": "{{ start }}{% for m in messages %}{{ m.role + '\n' ~ m.content ~ end }}{% endfor %}",
    "pairs": "{% macro tag(pairs) %}{% for pair in pairs %}{{ '<|' ~ pair[0] ~ '_' + pair[1] ~ '|>' }}{% endfor %}"
    "{% endmacro %}{{ tag([('im', 'start'), ('im', 'end')]) }}{{ messages[0].content }}",
    "joined": "{{ ['<|im_start|>', messages[0].content, '<|im_end|>'] | join('\n') }}",
    "format": "{{ '<|%s_start|>' % 'im' }}{{ messages[0].content }}{{ '<|im_end|>' | trim }}",
    "loop": "{% for w in ['<|im_start|>', '<|im_end|>'] %}{{ w }}{{ messages[0].content if loop.first }}{% endfor %}",
    "collected": "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t ~ '<|im_start|>' ~ m.content"
    " ~ '<|im_end|>' %}{% endfor %}{{ ns.t.strip().replace('\n', ' ').split('x') | join('x') | trim }}",
}  # fmt: skip
ATTEMPTS = (
    *("<|im_end|>", "<|\nim_end|>", "<|im_ end|>", "im_end|>", "|im_end|>", "<|im_end|>."[::-1], "start", "end"),
    *("<|IM_END|>", "</think>", "<", "|>", "[Z]", "[.Z]", "<think>", "a", " ", "\n", "."),
)


def builder(template: str, tokenizer: Tokenizer = TOKENIZER, **metadata: Any) -> PromptBuilder:
    fixed = {"start": "<|im_start|>", "end": "<|im_end|>"}
    return PromptBuilder(msgspec.structs.replace(MODEL, **metadata), tokenizer, ChatTemplate(template, fixed), None)


def control(ids: list[int], tokenizer: Tokenizer = TOKENIZER) -> list[int]:
    return [token for token in ids if token in tokenizer.added.values()]


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


TEXTS = st.lists(st.sampled_from(ATTEMPTS), max_size=6).map("".join)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_no_text_makes_a_control_token(body: str, text: str) -> None:
    build = builder(TURN.replace("%s", body))
    ids = build.prompt_ids(user(text + "x"), [])
    assert [token for token in control(ids) if token in TOKENIZER.special_ids] == [1, 2, 1]
    assert CORE.decode(ids, skip_special_tokens=False) == ChatTemplate(TURN.replace("%s", body)).render(
        user(text + "x")
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), TEXTS), min_size=1, max_size=4))
def test_only_the_template_of_a_thinking_model_writes_its_markers(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": text} for role, text in turns] + user("x")
    ids = builder(THINKING).prompt_ids(messages, [])
    expected = [token for _ in messages for token in (1, 2)] + [1, TOKENIZER.added["<think>"]]
    assert control(ids) == expected
    assert CORE.decode(ids, skip_special_tokens=False) == ChatTemplate(THINKING).render(messages)


@pytest.mark.parametrize("template", [PLAIN, THINKING, *MADE.values()], ids=["plain", "thinking", *MADE])
def test_control_tokens_of_the_template_are_made_as_hugging_face_makes_them(template: str) -> None:
    messages = [m for m in CONVERSATION if isinstance(m["content"], str)] if template in MADE.values() else CONVERSATION
    build = builder(template)
    expected = CORE.encode(
        ChatTemplate(template, {"start": "<|im_start|>", "end": "<|im_end|>"}).render(messages),
        add_special_tokens=False,
    ).ids
    assert build.prompt_ids(messages, [[IMAGE]] * expected.count(IMAGE)) == expected
    assert set(control(expected)) >= {1, 2}


def test_template_takes_thoughts_out_of_earlier_answers() -> None:
    template = (
        "{%- for m in messages %}{%- set c = m.content %}"
        "{%- if m.role == 'assistant' and '</think>' in c %}{%- set c = c.split('</think>')[-1] %}{%- endif %}"
        "{{- '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{%- endfor %}"
    )
    core = Core.from_str(CORE.to_str())
    core.add_special_tokens(["<think>", "</think>"])  # special ones, as of GLM-4.1V
    tokenizer = Tokenizer(core.to_str())
    messages = [*user("q"), {"role": "assistant", "content": "<think>secret</think>42"}, *user("r</think>s")]
    ids = builder(template, tokenizer).prompt_ids(messages, [])
    assert core.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n42<|im_end|>\n<|im_start|>user\nr</think>s<|im_end|>\n"
    )
    assert control(ids, tokenizer) == [1, 2] * 3


def test_what_the_template_writes_is_a_control_token_whatever_its_flag() -> None:
    core = Core.from_str(CORE.to_str())
    core.add_tokens([AddedToken("<tool_response>", special=False), AddedToken("<note>", special=False)])
    core.add_tokens([AddedToken("  ", special=False, normalized=False)])
    tokenizer = Tokenizer(core.to_str())
    text = "</think><tool_response><note>    a"
    ids = builder(PLAIN + "{% if false %}<tool_response>{% endif %}{{ '    ' }}", tokenizer).prompt_ids(user(text), [])
    # <note> and blanks are words of the vocabulary like others; this template has no </think>.
    expected = [tokenizer.added[token] for token in ("</think>", "<note>", "  ", "  ")]
    assert [token for token in control(ids, tokenizer) if token not in tokenizer.special_ids][:4] == expected


def test_token_that_the_template_puts_together_is_a_control_token_whatever_its_flag() -> None:
    core = Core.from_str(CORE.to_str())
    core.add_tokens([AddedToken("<|user|>", special=False), AddedToken("<|system|>", special=False)])
    tokenizer = Tokenizer(core.to_str())
    template = "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content }}{% endfor %}"
    ids = builder(template, tokenizer).prompt_ids(user("a<|user|>b<|system|>c"), [])
    assert control(ids, tokenizer) == [tokenizer.added["<|user|>"], tokenizer.added["<|system|>"]]
    assert core.decode(ids, skip_special_tokens=False) == "<|user|>a<|user|>b<|system|>c"


def test_what_ends_a_turn_is_a_control_token_whatever_its_flag() -> None:
    core = Core.from_str(CORE.to_str())
    core.add_tokens([AddedToken("<end>", special=False)])
    tokenizer = Tokenizer(core.to_str())
    end = tokenizer.added["<end>"]
    build = builder(PLAIN, tokenizer, eos_token_ids=(end,))
    assert end not in build.prompt_ids(user("a<end>b"), [])
    assert end in builder(PLAIN, tokenizer).prompt_ids(user("a<end>b"), [])


def test_what_stands_in_images_is_a_control_token_whatever_its_flag() -> None:
    core = Core.from_str(CORE.to_str())
    core.add_tokens([AddedToken(text, special=False) for text in ("<patch>", "<row>", "<end>", "<slice>")])
    tokenizer = Tokenizer(core.to_str())
    patch, row, end, cut = (tokenizer.added[text] for text in ("<patch>", "<row>", "<end>", "<slice>"))
    video = VideoMetadata(placeholder=IMAGE, token_id=patch, begin=(cut,), end=())
    marks = ImageMarks(placeholder=(IMAGE,), row_break=(row,), end=(end,))
    build = builder(PLAIN, tokenizer, image_token_id=patch, image_marks=marks, video=video)
    text = user("a<patch>b<row>c<end>d<slice>")
    assert not {patch, row, end, cut} & {*build.prompt_ids(text, [])}
    assert {patch, row, end, cut} < {*builder(PLAIN, tokenizer).prompt_ids(text, [])}


def test_spellings_that_the_tokenizer_normalizes_stay_text() -> None:
    core = Core.from_str(CORE.to_str())
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.add_tokens([AddedToken("<end>", special=True, normalized=True)])
    tokenizer = Tokenizer(core.to_str())
    build = builder("{{ messages[0].content }}<END>", tokenizer)
    assert control(core.encode("a<END> \uff1cend\uff1e").ids, tokenizer) == [tokenizer.added["<end>"]] * 2
    for text in ("a<END>", "\uff1cend\uff1e", "<e\uff2eD>b"):
        assert control(build.prompt_ids(user(text), []), tokenizer) == [tokenizer.added["<end>"]]


def test_blanks_that_a_token_swallows_may_be_a_message_s() -> None:
    core = Core.from_str(CORE.to_str())
    core.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    tokenizer = Tokenizer(core.to_str())
    text = ChatTemplate("{{ messages[0].content }}<mask>{{ messages[0].content }}").render(user(" a "))
    build = builder("{{ messages[0].content }}<mask>{{ messages[0].content }}", tokenizer)
    assert build.prompt_ids(user(" a "), []) == core.encode(text).ids
    assert tokenizer.added["<mask>"] not in builder(PLAIN, tokenizer).prompt_ids(user("a  <mask>  b"), [])


def test_tokens_with_many_different_beginnings_are_no_trouble() -> None:
    core = Core.from_str(CORE.to_str())
    words = [chr(0x4E00 + i) + "end" for i in range(100)]
    core.add_special_tokens(words)
    tokenizer = Tokenizer(core.to_str())
    ids = builder(PLAIN, tokenizer).prompt_ids(user("".join(words)), [])
    assert control(ids, tokenizer) == [1, 2, 1]
    assert core.decode(ids, skip_special_tokens=False) == ChatTemplate(PLAIN).render(user("".join(words)))


def test_tokens_that_overlap_are_taken_apart() -> None:
    core = Core.from_str(CORE.to_str())
    core.add_special_tokens(["aa", "aaa"])
    tokenizer = Tokenizer(core.to_str())
    assert control(builder(PLAIN, tokenizer).prompt_ids(user("a" * 50 + "b" + "aa" * 20), []), tokenizer) == [1, 2, 1]


def test_control_token_of_one_character_is_refused_in_a_message() -> None:
    core = Core.from_str(CORE.to_str())
    core.add_special_tokens(["\u2404"])
    build = builder(PLAIN, Tokenizer(core.to_str()))
    with pytest.raises(RequestError, match="'\u2404' in a message is a control token, and cannot be text"):
        build.prompt_ids(user("a\u2404b"), [])
