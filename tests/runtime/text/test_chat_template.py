from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import BundleError, PromptError
from runtime.text.chat_template import MOST_SOURCE, ChatTemplate

CHAT = [{"role": "user", "content": "hello"}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
LIMIT = "takes more than|makes a text or list of|makes a number of|nests lists|formats a field|rounds to|adds up"


def growing(step: str, start: str = "'ab'") -> str:
    return "{% set n = namespace(x=" + start + ") %}{% for i in range(60) %}" + step + "{% endfor %}{{ n.x }}"


def often(expression: str, value: str = "'x' * 10**6") -> str:
    return "{% set s = " + value + " %}{% for i in range(99999) %}{% set a = " + expression + " %}{% endfor %}"


HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "loops over text": "{% for a in 'x' * 10**6 %}{% for b in 'x' * 10**6 %}{% endfor %}{% endfor %}",
    "long body": "{% for a in range(99999) %}" + "{{ a }}" * 5000 + "{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "callers": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 30
    + "x"
    + "{% endcall %}" * 30,
    "loop length": "{% for a in range(99999) %}{% for b in range(99999)|map('string') %}{{ loop.length }}"
    "{% break %}{% endfor %}{% endfor %}",
    "refund of steps": r"{% for i in range(99999) %}{% set a = [-10**9]|map('\x00step')|list %}{% endfor %}",
    "messages times": "{{ (messages * 10**8) | length }}",
    "text times": "{{ 'x' * 10**10 }}",
    "times text": "{{ 10**10 * 'x' }}",
    "constant": "{{ 'x' * 10000000000 }}",
    "list times": "{{ ([0] * 10**10) | length }}",
    "power": "{{ 7**99999999 }}",
    "squares": growing("{% set n.x = n.x * n.x %}", "3"),
    "doubled by ~": growing("{% set n.x = n.x ~ n.x %}"),
    "doubled by +": growing("{% set n.x = n.x + n.x %}"),
    "doubled by format": growing("{% set n.x = '{0}{0}'.format(n.x) %}"),
    "doubled by a block": growing("{% set b %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = b %}"),
    "doubled lists": growing("{% set n.x = [n.x, n.x] %}"),
    "doubled dictionaries": growing("{% set n.x = {'a': n.x, 'b': n.x} %}"),
    "doubled dict()": growing("{% set n.x = dict(a=n.x, b=n.x) %}"),
    "doubled namespaces": growing("{% set n.x = namespace(y=[n.x, n.x]) %}"),
    "compared lists": growing("{% set n.x = [n.x, n.x] %}{% set a = n.x == n.x %}", "[1]"),
    "deep lists": growing("{% for j in range(99) %}{% set n.x = [n.x] %}{% endfor %}"),
    "indent": "{{ 'x' | indent(10**8) }}",
    "indent of lines": "{{ ('a\n' * 100000) | indent(10000) }}",
    "indent of a block": "{% filter indent(10**8, true) %}x\n{% endfilter %}",
    "center": "{{ 'x' | center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "ljust by attr": "{{ ('x' | attr('ljust'))(10**9) }}",
    "zfill": "{{ '1'.zfill(10**9) }}",
    "expandtabs": "{{ '\t\t'.expandtabs(10**9) }}",
    "replace": "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "replace nothing": "{{ ('a' * 10**6) | replace('', 'b' * 10**6) }}",
    "join": "{{ ('b' * 10**6).join('a' * 10**5) }}",
    "join filter": "{{ ('a' * 10**5) | list | join('b' * 10**6) }}",
    "join of a generator": "{{ ('b' * 10**6).join(range(99999) | map('string')) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format in parts": "{{ '{:{}{}}'.format(1, 9999, 9999) }}",
    "format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "many formats": "{{ ('{0:9999}' * 10**5).format(1) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent filter": "{{ '%.1000000000f' | format(1.5) }}",
    "translate": "{{ ('a' * 10**6).translate({97: 'b' * 10**5}) }}",
    "bytes": "{{ (5).to_bytes(10**9, 'big') }}",
    "tojson": "{{ [1, 2] | tojson(indent=10**9) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "digits": "{{ ('1' * 10**6 ~ '%s%1111111s') % 1 }}",
    "strip": "{{ ('a' * 10**6).strip('b' * 10**6 ~ 'a') }}",
    "trim": "{{ ('a' * 10**6) | trim('b' * 10**6 ~ 'a') }}",
    "numbers of one hash": "{{ range(0, 2305843009213693951 * 90000, 2305843009213693951) | unique | list }}",
    "a power of one hash": "{{ range(0, 2**61 * 90000, 2**61 - 1) | unique | list }}",
    "digits of one hash": "{{ ('2305843009213693951 4611686018427387902' | string).split() | map('int') | list }}",
    "round": "{{ 1.5 | round(10**9, 'floor') }}",
    "sum of lists": "{{ [[1], [2]] | sum(start=[]) }}",
    "output": "{% set s = 'x' * 10**5 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "output of a macro": "{% macro f(s) %}{% for i in range(99999) %}{{ s }}{% endfor %}{% endmacro %}"
    "{{ f('x' * 10**5) }}",
    "output of a list": "{% set s = range(9000) | list %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "search": often("'y' in s"),
    "test": often("s is in s"),
    "select": often("s | select('in', s) | list", "['x' * 10**6]"),
    "title": often("s | title"),
    "format often": often("('{0}' * 10**4).format(1)"),
    "long path": "{{ (['x'] * 10**4) | map(attribute='0.' * 10**5) | list }}",
    "long paths": "{{ (['x'] * 10**4) | sort(attribute='0,' * 10**5) }}",
    "slice": often("s[1:]"),
    "strip often": often("s.strip()"),
    "first": often("s | reverse | first", "range(9000) | list"),
    "date": "{{ strftime_now('%c' * 500000) }}",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_without_end_is_refused_soon(name: str) -> None:
    began = time.thread_time()
    with pytest.raises(PromptError, match=LIMIT) as caught:
        ChatTemplate(HOSTILE[name]).render(CHAT, {})
    assert time.thread_time() - began < 3  # half a second where nothing else runs
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9) %}" * 25 + "x" + "{% endfor %}" * 25,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "9" * 5000 + " }}",
        "x" * (MOST_SOURCE + 1),
        "{{ messages | urlize }}",
    ],
    ids=["loops", "parentheses", "digits", "length", "filter"],
)
def test_a_template_that_cannot_be_compiled_is_a_bundle_error(source: str) -> None:
    with pytest.raises(BundleError, match=r"^chat_template\.jinja") as caught:
        ChatTemplate(source)
    assert "\n" not in str(caught.value)


# In the manner of published ones: for Llama 3, Qwen 2.5 and 3, SmolLM2, Mistral, Gemma and Phi.
PUBLISHED = {
    "headers": """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|header|>system<|end|>\\n\\nToday: " + date_string + "\\n\\n" + system_message + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|header|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {{- raise_exception("no tools") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|end|>\\n\\n' }}{%- endif %}""",
    "thinking": """{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- set ns = namespace(multi_step=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step = false %}{%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "default system": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{
'<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' +
message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%
endif %}""",
    "instructions": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "macros": """{%- macro turn(role, text) -%}
{{ '<start>' ~ role ~ '\\n' ~ text | trim | replace('\\r', '') | indent(2) ~ '<end>\\n' }}
{%- endmacro -%}
{{ bos_token }}{% for m in messages if m.role != 'system' %}{{ turn({'assistant': 'model'}.get(m.role, m.role) | upper,
m['content']) }}{{ "%s of %d, {:>4}".format(loop.revindex) % (loop.index, messages | length) }}{% else %}nothing{%
endfor %}{{ messages | map(attribute='role') | unique | sort | join(',') }}{{ messages | groupby('role') | length }}""",
}


@pytest.mark.parametrize("turns", [0, 1, 5, 400])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_render_as_in_transformers(name: str, system: bool, turns: int) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages: list[dict[str, Any]] = [{"role": "system", "content": " Be <b>brief</b>.\n"}] if system else []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"\n Hällo {turn} & '\"  "})
        messages.append({"role": "assistant", "content": f"<think>\nwell {turn}\n</think>\n\nAnswer\n{turn} "})
    messages.append({"role": "user", "content": "  x" * 20_000 if turns == 5 else "and now? "})
    theirs, _ = render_jinja_template([messages], chat_template=PUBLISHED[name], add_generation_prompt=True, **SPECIAL)
    assert ChatTemplate(PUBLISHED[name]).render(messages, SPECIAL) == theirs[0]


def test_limits_grow_with_the_messages() -> None:
    messages = [{"role": "user", "content": "x" * 3_000_000}]
    assert ChatTemplate("{{ messages[0].content }}").render(messages, {}) == messages[0]["content"]


def test_what_one_rendering_spends_is_no_matter_of_the_next() -> None:
    template = ChatTemplate("{% for i in range(90000) %}{% endfor %}{{ messages[0].content }}")
    assert {template.render(CHAT, {}) for _ in range(20)} == {"hello"}


PIECES = [
    *("{% for i in range(99) %}", "{% endfor %}", "{% set x = x ~ x %}", "{{ x * 99 }}", "{{ messages | tojson }}"),
    *("{% if x %}", "{% endif %}", "{{ x | indent(9999) }}", "{{ [x, x] | join(x) }}", "{{ x.ljust(99**9) }}"),
    *("{% macro x() %}", "{% endmacro %}", "{{ x() }}", "{% set x %}", "{% endset %}", "{{ x.replace(x, x) }}"),
]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(PIECES),
        max_size=12,
    )
)
def test_any_template_renders_or_is_refused(pieces: list[str]) -> None:
    try:
        text = ChatTemplate("{% set x = 'ab' %}" + "".join(pieces)).render(CHAT, {})
    except (PromptError, BundleError):
        return
    assert len(text) < 2_000_000
