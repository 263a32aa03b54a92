"""A chat template cannot take the process's time or memory, whatever it does, and says so in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest
from jinja2.exceptions import SecurityError

from moevlm.runtime.core.errors import BundleError, MoevlmError, RequestError
from moevlm.runtime.request.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "a"}]
DOUBLED = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}"


def doubled(start: str, step: str, end: str = "{{ ns.x | length }}") -> str:
    return DOUBLED.replace("START", start).replace("STEP", step) + end


STEPS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "filters": "{% for i in range(99999) %}{{ range(99999) | map('string') | select | list | length }}{% endfor %}",
    "sorts": "{% for i in range(99999) %}{% set x = range(99999) | sort | unique | list %}{% endfor %}",
    "tests": "{% for i in range(99999) %}{% set x = range(99999) | select('in', [1, 2, 3]) | list %}{% endfor %}",
    "loop's length": "{% for i in range(99999) %}{% for j in range(99999) %}{{ loop.length }}{% break %}"
    "{% endfor %}{% endfor %}",
    "recursive loop": "{% for i in range(9) recursive %}{{ loop(range(9)) if loop.depth < 30 }}{% endfor %}",
    "recursive macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "caller": "{% macro f(n) %}{% if n %}{% call f(n - 1) %}{% endcall %}{% call f(n - 1) %}{% endcall %}{% endif %}"
    "{{ caller() }}{% endmacro %}{% call f(40) %}{% endcall %}",
    "comparisons": "{% set x = range(50000) | list %}{% set y = range(50000) | list %}"
    "{% for i in range(99999) %}{% if x == y %}{% endif %}{% endfor %}",
    "membership": "{% set x = range(50000) | list %}{% for i in range(99999) %}{% if -1 in x %}{% endif %}{% endfor %}",
    "search": "{% set x = 'a' * 500000 %}{% for i in range(99999) %}{% if x.find('b') > 0 %}{% endif %}{% endfor %}",
    "changed": "{% set x = range(50000) | list %}{% for i in range(99999) %}{{ loop.changed(x) }}{% endfor %}",
    "keys": doubled("(1,)", "(ns.x, ns.x) if i < 15 else ns.x", "{% for i in range(99999) %}{% set y = {ns.x: 1} %}"
    "{% endfor %}"),
    "looked up": doubled("(1,)", "(ns.x, ns.x) if i < 15 else ns.x", "{% set y = {ns.x: 1} %}"
    "{% for i in range(99999) %}{{ y[ns.x] }}{{ y.get(ns.x) }}{% endfor %}"),
    "membership of a range": "{% for i in range(99999) %}{% if 'a' in range(99999) %}{% endif %}{% endfor %}",
    "own text": doubled("'aa'", "ns.x ~ ns.x if i < 17 else ns.x", "{% for i in range(99999) %}{% if 'b' in ns.x %}"
    "{% endif %}{% endfor %}"),
    "count": "{% set x = range(50000) | list %}{% for i in range(99999) %}{% if x.count(-1) %}{% endif %}{% endfor %}",
}  # fmt: skip
MEMORY = {
    "one split": "{{ ('a ' * 500000).split() | length }}",
    "text times number": "{{ 'a' * 10**9 }}",
    "number times text": "{{ 10**9 * 'a' }}",
    "list times number": "{{ [1] * 10**9 }}",
    "tuple times number": "{{ (1, 2) * 10**9 }}",
    "doubled text": doubled("'aa'", "ns.x + ns.x"),
    "joined text": doubled("'aa'", "ns.x ~ ns.x"),
    "doubled list": doubled("[1]", "ns.x + ns.x"),
    "list in lists": doubled("[1]", "[ns.x, ns.x]", "{{ ns.x }}"),
    "tuple in tuples": doubled("(1,)", "(ns.x, ns.x)", "{{ ns.x | string }}"),
    "object in objects": doubled("{}", "{'a': ns.x, 'b': ns.x}", "{{ ns.x | tojson }}"),
    "objects by function": doubled("{}", "dict(a=ns.x, b=ns.x)", "{{ ns.x | tojson }}"),
    "compared lists": doubled("[1]", "[ns.x, ns.x]", "{{ ns.x == ns.x[0] }}"),
    "arguments in arguments": "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}{{ varargs }}"
    "{% endif %}{% endmacro %}{{ f(45) }}",
    "keywords in keywords": "{% macro f(n) %}{% if n %}{{ f(n - 1, a=kwargs, b=kwargs) }}{% else %}{{ kwargs }}"
    "{% endif %}{% endmacro %}{{ f(45) }}",
    "deep lists": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}",
    "replace": doubled("'aa'", "ns.x | replace('a', ns.x)"),
    "replaced nothing": doubled("'aa'", "ns.x.replace('', ns.x)"),
    "join": doubled("'aa'", "ns.x.join(ns.x)"),
    "join filter": doubled("'aa'", "ns.x | join(ns.x)"),
    "set block": "{% set x %}{% for i in range(99999) %}" + "b" * 9999 + "{% endfor %}"
    "{% endset %}",
    "macro": "{% macro f() %}{% for i in range(99999) %}" + "b" * 9999 + "{% endfor %}{% endmacro %}{{ f() | length }}",
    "filter block": "{% filter upper %}{% for i in range(99999) %}" + "b" * 9999 + "{% endfor %}{% endfilter %}",
    "split": "{% set x = ' a' * 400000 %}{% for i in range(99999) %}{% set y = x.split() %}{% endfor %}",
    "slices": "{% set x = range(50000) | list %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "big number": "{{ 10 ** (10 ** 8) }}",
    "grown number": doubled("10", "ns.x * ns.x", "{{ ns.x }}"),
    "json": "{{ messages | tojson(indent=10**9) }}",
    "negative widths": "{% for i in range(9) %}{{ [1] | tojson(indent=-10**9) }}{{ 'a' | indent(-10**9) }}"
    "{{ 'a' * -9 }}{% endfor %}{{ 'a' * 10**8 }}",
    "json separators": "{{ range(9999) | list | tojson(separators=('a' * 100000, ':')) }}",
    "indent": "{{ 'a\nb' | indent(10**9) }}",
    "indent by text": "{{ ('a\n' * 9999) | indent('a' * 900) }}",
    "padded": "{{ 'a'.center(10**9) }}{{ 'a'.zfill(10**9) }}",
    "format": "{{ '%1000000000d' % 1 }}",
    "format by argument": "{{ '%*d' % (10**9, 1) }}",
    "format of much": "{{ ('%(a)s' * 10000) % {'a': 'a' * 100000} }}",
    "error": "{{ raise_exception('a' * 10**8) }}",
    "date": "{{ strftime_now('%1000000000Y') }}",
}  # fmt: skip
CLOSED = {
    "lipsum": "{{ lipsum(n=10**7) }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "encode": "{{ 'a'.encode('utf-32') }}",
    "translate": "{{ 'a'.translate({97: 'b' * 1000}) }}",
    "expandtabs": "{{ 'a\t'.expandtabs(10**9) }}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "fromkeys": "{{ {}.fromkeys('ab', messages) }}",
    "attribute of a class": "{{ messages.__class__ }}",
    "marks": "{{ 'a'.marks.zfill(10**9) }}",
}
SYNTAX = {
    "nested ifs": "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "nested loops": "{% for a in b %}" * 60 + "{% endfor %}" * 60,
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "sum": "{{ " + "1+" * 20000 + "1 }}",
    "include": "{% include 'a' %}",
    "import": "{% import 'a' as b %}",
    "extends": "{% extends 'a' %}",
    "autoescape": "{% autoescape true %}{{ a }}{% endautoescape %}",
    "unknown filter": "{{ 'a' | urlize }}",
    "elifs": "{% if a %}" + "{% elif a %}b" * 10000 + "{% endif %}",
    "negations": "{{ " + "not " * 20000 + "1 }}",
    "filters": "{{ 'a'" + " | trim" * 20000 + " }}",
    "attributes": "{{ a" + ".b" * 20000 + " }}",
    "long": "a" * (1 << 18) + "b",
}


def one_line(error: MoevlmError) -> bool:
    return "\n" not in str(error) and len(str(error)) < 600


@pytest.mark.parametrize("template", STEPS.values(), ids=STEPS)
def test_work_is_limited(template: str) -> None:
    with pytest.raises(RequestError, match=r"takes more than|makes more than|makes lists that") as caught:
        ChatTemplate(template).render(MESSAGES)
    assert one_line(caught.value)


def test_memory_is_limited() -> None:
    # In a process of its own, which ends where one of these templates gets what it asks for.
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
from moevlm.runtime.request.chat import ChatTemplate
from moevlm.runtime.core.errors import MoevlmError
for name, template in {MEMORY!r}.items():
    try:
        length = len(ChatTemplate(template).render({MESSAGES!r}))
    except MoevlmError as error:
        assert "\\n" not in str(error) and len(str(error)) < 600, name
        assert not isinstance(error.__cause__, MemoryError), name
    else:
        raise AssertionError(f"{{name}}: {{length}} characters")
print("all")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=300)
    assert done.stdout == "all\n", done.stderr[-2000:]


@pytest.mark.parametrize("template", CLOSED.values(), ids=CLOSED)
def test_what_no_chat_template_needs_may_not_be_called(template: str) -> None:
    with pytest.raises(BundleError) as caught:
        ChatTemplate(template).render(MESSAGES)
    assert isinstance(caught.value.__cause__, (SecurityError, BundleError))
    assert one_line(caught.value)


@pytest.mark.parametrize("template", SYNTAX.values(), ids=SYNTAX)
def test_template_that_cannot_be_compiled_is_a_bundle_error(template: str) -> None:
    with pytest.raises(BundleError, match=r"^chat_template\.jinja") as caught:
        ChatTemplate(template)
    assert one_line(caught.value)


def test_own_words_of_a_refusal_are_shortened_and_hold_no_control_characters() -> None:
    template = ChatTemplate("{{ raise_exception('\\x1b]0;title\\x07' ~ 'a' * 5000) }}")
    with pytest.raises(RequestError, match=r"refuses these messages: .]0;title.a+\.{3}$") as caught:
        template.render(MESSAGES)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_long_conversation_is_far_from_the_limits() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if loop.index0 != messages | length - 1 and 'x' in m.content %}"
        "{{- '<' ~ m.role ~ '>' + m.content.split('</think>')[-1].strip() | replace('a', 'b') }}"
        "{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "x a " * 500}] * 1000
    assert template.render(messages).count("<user>") == 999


def test_each_rendering_has_a_budget_of_its_own() -> None:
    template = ChatTemplate("{% for i in range(99999) %}{% endfor %}ok")
    assert [template.render(MESSAGES) for _ in range(15)] == ["ok"] * 15
