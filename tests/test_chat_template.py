"""Chat templates: rendered as transformers renders them, and harmless when they are hostile."""

import json
import threading
import time
import tracemalloc
from typing import Any

import pytest

from jaxinfer.errors import CheckpointError, RequestError
from jaxinfer.text import sandbox
from jaxinfer.text.template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 < 2 & 'é'?"},
    {"role": "assistant", "content": " Yes.\n"},
    {"role": "user", "content": "Why?"},
]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(source: str, **variables: Any) -> str:
    given = {"messages": MESSAGES, "add_generation_prompt": True, "bos_token": "<s>", "tools": None}
    return ChatTemplate(source).render(given | variables)


# --- as transformers renders them -------------------------------------------------------------------------------------


def test_chatml():
    assert render(CHATML) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 < 2 & 'é'?<|im_end|>\n"
        "<|im_start|>assistant\n Yes.\n<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(CHATML, messages=MESSAGES[3:], add_generation_prompt=False) == (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    )


LLAMA2 = """{% if messages[0]['role'] == 'system' %}
    {% set rest = messages[1:] %}
    {% set system = '<<SYS>>\n' ~ messages[0]['content'] ~ '\n<</SYS>>\n\n' %}
{% else %}
    {% set rest, system = messages, '' %}
{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant') }}
    {% endif %}
    {% if message.role == 'user' %}
        {{- bos_token + '[INST] ' ~ (system if loop.first else '') ~ message.content | trim ~ ' [/INST]' -}}
    {% else %}
        {{- ' ' ~ message.content.strip() ~ ' </s>' -}}
    {% endif %}
{% endfor %}"""


def test_blocks_lines_and_whitespace():
    expected = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n1 < 2 & 'é'? [/INST] Yes. </s><s>[INST] Why? [/INST]"
    assert render(LLAMA2) == expected


def test_what_templates_use():
    tools = [{"name": "f", "parameters": {"x": "<é>"}}]
    cases = {
        "{{ tools | tojson }}": json.dumps(tools, ensure_ascii=False),
        "{{ tools | tojson(indent=4) }}": json.dumps(tools, ensure_ascii=False, indent=4),
        "{% set ns = namespace(n=0, seen=[]) %}{% for m in messages[1:] %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.seen = ns.seen + [m.role] %}{% endfor %}{{ ns.n }}{{ ns.seen | join(',') }}": "3user,assistant,user",
        "{% macro row(m, i=0) %}{{ i }}:{{ m.role | upper }} {% endmacro %}"
        "{% for m in messages %}{{ row(m, loop.index) }}{% endfor %}": "1:SYSTEM 2:USER 3:ASSISTANT 4:USER ",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ loop.revindex }}{% endfor %}": "432",
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}": "2",
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}": "role=system;content=Be brief.;",
        "{% generation %}{{ messages[2].content }}{% endgeneration %}": " Yes.\n",
        "{{ 'a,b'.split(',')[-1] }}{{ 'x' * 3 }}{{ '%02d' % 7 }}{{ '{} {}'.format('p', 'q') }}": "bxxx07p q",
        "{{ x is defined }}{{ none is none }}{{ x | default('d') }}{{ 'a' in 'abc' }}": "FalseTruedTrue",
        "{{ 'a\nb' | indent(2) }}|{{ range(3) | list }}|{{ dict(a=1) }}": "a\n  b|[0, 1, 2]|{'a': 1}",
        "{%- set x %}in {{ bos_token }} block{% endset %}{{ x }}{{ strftime_now('%Y') | length }}": "in <s> block4",
        "{% for m in messages if m.role == 'user' %}{{ loop.index }}{% else %}none{% endfor %}{{ 2 ** 10 }}": "121024",
        "{% macro each() %}{% for m in messages %}{{ caller(m) }}{% endfor %}{% endmacro %}"
        "{% call(m) each() %}{{ m.role[0] }}{% endcall %}": "suau",
    }
    for source, expected in cases.items():
        assert render(source, tools=tools) == expected, source


def test_a_template_that_refuses_is_the_requests_fault():
    with pytest.raises(RequestError, match="roles must alternate"):
        render(LLAMA2, messages=[MESSAGES[2]])


def test_long_conversations_fit():
    messages = [{"role": "user", "content": "x" * 2000} for _ in range(1000)]
    assert len(render(CHATML, messages=messages)) > 2_000_000
    accumulate = (
        "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t ~ m.content %}{% endfor %}{{ ns.t }}"
    )
    assert len(render(accumulate, messages=messages[:300])) == 600_000


def test_threads_share_a_template():
    template, results = ChatTemplate(CHATML), {}

    def work(n: int) -> None:
        for _ in range(20):
            results[n] = template.render({"messages": [{"role": "system", "content": str(n)}]})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: f"<|im_start|>system\n{n}<|im_end|>\n" for n in range(8)}


# --- hostile ----------------------------------------------------------------------------------------------------------


def grow(step: str, start: str = "'aaaaaaaa'") -> str:
    return f"{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{step}{{% endfor %}}{{{{ ns.x }}}}"


BIG = "{% set a = 'a' * 200000 %}"
HOSTILE = {
    # time
    "nested loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "loops that filter": "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "a range": "{{ range(10 ** 12) | list }}",
    "macros that fork": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for a in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "sorting": "{% for i in range(100000) %}{% set x = ('ab' * 100000) | sort %}{% endfor %}",
    "searching": BIG + "{% for i in range(100000) %}{{ (a ~ 'b') in a }}{% endfor %}",
    # text
    "str * int": "{{ 'a' * 10 ** 10 }}",
    "int * str": "{{ 10 ** 10 * 'a' }}",
    "list * int": "{{ ([0] * 10 ** 10) | length }}",
    "doubling by ~": grow("{% set ns.x = ns.x ~ ns.x %}"),
    "doubling by +": grow("{% set ns.x = ns.x + ns.x %}"),
    "doubling by format": grow("{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
    "doubling by str.format": grow("{% set ns.x = '{0}{0}'.format(ns.x) %}"),
    "doubling by join": grow("{% set ns.x = [ns.x, ns.x] | join %}"),
    "doubling by str.join": grow("{% set ns.x = ns.x.join([ns.x, ns.x]) %}"),
    "doubling by replace": grow("{% set ns.x = ns.x | replace('a', 'aa') %}"),
    "doubling by a set block": grow("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "doubling by a macro": "{% macro m(x) %}{{ m(x ~ x) }}{% endmacro %}{{ m('a') }}",
    "constant text in loops": "{% for a in range(100000) %}{% for b in range(100000) %}"
    + "x" * 9000
    + "{% endfor %}" * 2,
    "constant text in one loop": "{% set x %}{% for a in range(100000) %}" + "x" * 9000 + "{% endfor %}{% endset %}",
    "constant text in a block": "{% block b %}"
    + "y" * 9000
    + "{% endblock %}{% for i in range(9999) %}{{ self.b() }}{% endfor %}",
    "width in %": "{{ '%010000000000d' % 1 }}",
    "width in % from arguments": "{{ '%*d' % (60000, 1) }}",
    "width in format": "{{ '{:9999999999}'.format(1) }}",
    "width in format from arguments": "{{ '{:{w}}'.format(1, w='9999999999') }}",
    "width in format_map": "{{ '{x:9999999999}'.format_map({'x': 1}) }}",
    "a bound format": "{% set f = '{:9999999999}'.format %}{{ f(1) }}",
    "width in a filter": "{{ '%010000000000d' | format(1) }}",
    "center": "{{ 'x'.center(10000000000) }}",
    "center, a filter": "{{ 'x' | center(10000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(10000000000) }}",
    "replace": BIG + "{{ a.replace('a', a) }}",
    "replace, a filter": BIG + "{{ a | replace('', a) }}",
    "replace that fits in memory": "{% set a = 'a' * 20000 %}{% set b = a | replace('a', a) %}",
    "join": BIG + "{{ range(100000) | join(a) }}",
    "join of a generator": BIG + "{{ range(100000) | map('string') | map('replace', '1', a) | join(a) }}",
    "indent": "{{ ('\n' * 100000) | indent(60000) }}",
    "tojson": "{{ [[1]] | tojson(indent=1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "strftime": "{{ strftime_now('%9999999999d') }}",
    "lorem ipsum": "{{ lipsum(n=100000) }}",
    # objects that are small in memory and endless in print
    "lists of lists": grow("{% set ns.x = [ns.x, ns.x] %}", "[1]"),
    "tuples as keys": "{% set ns = namespace(x=(1,)) %}{% for i in range(26) %}{% set ns.x = (ns.x, ns.x) %}"
    "{% endfor %}{% set y = {ns.x: 1} %}",
    "dicts of dicts": grow("{% set ns.x = {'a': ns.x, 'b': ns.x} %}", "{}"),
    "dict()": grow("{% set ns.x = dict(a=ns.x, b=ns.x) %}", "{}"),
    "namespaces": "{% set o = namespace(n=namespace()) %}{% for i in range(60) %}"
    "{% set o.n = namespace(a=o.n, b=o.n) %}{% endfor %}{{ o.n }}",
    # numbers
    "squares": grow("{% set ns.x = ns.x * ns.x %}", "99"),
    "powers": "{{ 10 ** (10 ** 10) }}",
    "digits": "{{ ('f' * 200000) | int(base=16) }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "to_bytes": "{{ (1).to_bytes(10000000000, 'big') }}",
    # ways out
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "init": "{{ namespace.__init__.__globals__ }}",
    "class by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "class by attr": "{{ '' | attr('__class__') }}",
    "context": "{{ self._TemplateReference__context.environment }}",
    "changing messages": "{{ messages.clear() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    # syntax
    "unfinished": "{% for a in b %}",
    "deep": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "deep not": "{{ " + "not " * 10000 + "1 }}",
    "deep if": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "long sum": "{{ 1" + "+1" * 25000 + " }}",
    "many expressions": "{{ a | d | d }}" * 7000,
    "long": "x" * 200_000,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_end_at_once(case: str):
    start = time.thread_time()
    with pytest.raises(CheckpointError, match="chat template"):
        render(HOSTILE[case])
    assert time.thread_time() - start < 2
    assert render("{{ messages[0].content }}") == "Be brief."  # the messages are as they were


@pytest.mark.parametrize(
    "case",
    [
        "doubling by ~",
        "lists of lists",
        "constant text in one loop",
        "join",
        "str * int",
        "replace that fits in memory",
    ],
)
def test_hostile_templates_take_little_memory(case: str):
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            render(HOSTILE[case])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_nothing_leaks_through_undefined():
    for source in [
        "{{ raise_exception.__globals__ }}",
        "{{ ''.__class__ }}",
        "{{ [''] | map(attribute='__class__') | join }}",
    ]:
        try:
            assert render(source) == ""
        except CheckpointError as error:
            assert "unsafe" in str(error)


def test_hostile_templates_end_in_threads_too():
    caught: list[Exception] = []

    def work() -> None:
        try:
            render(HOSTILE["nested loops"])
        except CheckpointError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert len(caught) == 1 and f"more than {sandbox.SECONDS} s" in str(caught[0])


def test_what_is_allowed_exists():
    from jinja2.filters import FILTERS

    assert set(FILTERS) >= sandbox.FILTERS
    assert all(hasattr(str, name) for name in sandbox.STR_METHODS)
