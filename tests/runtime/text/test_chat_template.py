"""Templates render as in transformers, and those without end are refused soon."""

from __future__ import annotations

import datetime
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries

from runtime.errors import BundleError, PromptError
from runtime.text.chat_template import MAX_SOURCE, ChatTemplate

CHAT = [{"role": "user", "content": "hello"}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def nested(begin: str, end: str, depth: int) -> str:
    return begin * depth + "x" + end * depth


HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursive loops": "{% for a in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "callers": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + nested("{% call f() %}", "{% endcall %}", 30),
    "spelled counter": r"{% for i in range(99999) %}{{ '\x00turns' | replace('x', '') }}{% for j in range(9) %}"
    "{% endfor %}{% endfor %}",
    "output": "{% set s = 'x' * 10**5 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "date": "{{ strftime_now('%c' * 500000) }}",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_endless_template_is_stopped_and_refused(name: str) -> None:
    began = time.thread_time()
    with pytest.raises(PromptError, match="the chat template") as caught:
        ChatTemplate(HOSTILE[name]).render(CHAT, {})
    assert time.thread_time() - began < 15  # at most 1.5 on an idle machine; without limits minutes or longer
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "source",
    [
        nested("{% for a in range(9) %}", "{% endfor %}", 25),
        "{{ " + nested("(", ")", 5000) + " }}",
        "{{ " + "9" * 5000 + " }}",
        "x" * (MAX_SOURCE + 1),
        "{{ messages | nothing }}",
        "x\n{% for %}",
    ],
    ids=["loops", "parentheses", "digits", "length", "filter", "syntax"],
)
def test_template_that_cannot_be_compiled_is_a_bundle_error(source: str) -> None:
    with pytest.raises(BundleError, match=r"^chat_template\.jinja") as caught:
        ChatTemplate(source)
    assert "\n" not in str(caught.value)


# In the manner of published ones: for Llama 3, Qwen 3, Mistral, Gemma and Phi.
PUBLISHED = {
    "tojson": "{{ messages | tojson }}{{ {'b': '<é>', 'a': 1} | tojson(indent=2, sort_keys=true) }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation block": "{% for m in messages %}{% generation %}{{ m.content }}!{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "tools": "{% if tools is not none %}T{% endif %}{% if documents %}D{% endif %}{{ bos_token }}{{ unknown }}",
    "methods": "{{ messages[0].content.split('l')[0].strip() | upper }}{{ messages[-1].get('name', '-') }}",
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
    "macros": """{%- macro turn(role, text) -%}
{{ '<start>' ~ role ~ '\\n' ~ text | trim | replace('\\r', '') | indent(2) ~ '<end>\\n' }}
{%- endmacro -%}
{{ bos_token }}{% for m in messages if m.role != 'system' %}{{ turn({'assistant': 'model'}.get(m.role, m.role) | upper,
m['content']) }}{{ "%s of %d, {:>4}".format(loop.revindex) % (loop.index, messages | length) }}{% else %}nothing{%
endfor %}{{ messages | map(attribute='role') | unique | sort | join(',') }}{{ messages | groupby('role') | length }}""",
}


@pytest.mark.parametrize(("turns", "system"), [(0, False), (5, True), (5, False), (200, True)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_templates_render_as_in_transformers(name: str, turns: int, system: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages: list[dict[str, Any]] = [{"role": "system", "content": " Be <b>brief</b>.\n"}] if system else []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"\n Hällo {turn} & '\"  "})
        messages.append({"role": "assistant", "content": f"<think>\nwell {turn}\n</think>\n\nAnswer\n{turn} "})
    messages.append({"role": "user", "content": "  x" * 20_000 if turns == 5 else "and now? "})
    theirs, _ = render_jinja_template([messages], chat_template=PUBLISHED[name], add_generation_prompt=True, **SPECIAL)
    assert ChatTemplate(PUBLISHED[name]).render(messages, SPECIAL) == theirs[0]


def test_templates_can_read_the_date() -> None:
    years = {str(datetime.date.today().year + days) for days in (0, 1)}
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(CHAT, {}) in years


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "refuses the messages .roles must alternate"),
        ("{{ messages[0].absent.deeper }}", "absent"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        # It cannot leave its sandbox.
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception.__globals__['json'] }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update({'content': 'x'}) }}", "unsafe"),
    ],
)
def test_template_that_fails_is_a_prompt_error(template: str, reason: str) -> None:
    with pytest.raises(PromptError, match=reason) as caught:
        ChatTemplate(template).render(CHAT, SPECIAL)
    assert "\n" not in str(caught.value)


def test_limits_grow_with_the_messages_and_apply_to_one_rendering() -> None:
    messages = [{"role": "user", "content": "x" * 3_000_000}]
    template = ChatTemplate("{% for i in range(90000) %}{% endfor %}{{ messages[0].content }}")
    assert template.render(messages, {}) == messages[0]["content"]
    assert {template.render(CHAT, {}) for _ in range(3)} == {"hello"}


PIECES = [
    *("{% for i in range(99) %}", "{% endfor %}", "{% set x = x ~ x[:9] %}", "{{ x * 9 }}", "{{ messages | tojson }}"),
    *("{% if x %}", "{% endif %}", "{{ x | indent(9) }}", "{{ [x, x] | join(x) }}", "{{ x.absent.deeper }}"),
    *("{% macro x() %}", "{% endmacro %}", "{{ x() }}", "{% set x %}", "{% endset %}", "{{ x.replace(x, x) }}"),
]


@tries(100)
@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_arbitrary_templates_render_or_are_refused(pieces: list[str]) -> None:
    try:
        text = ChatTemplate("{% set x = 'ab' %}" + "".join(pieces)).render(CHAT, {})
    except (PromptError, BundleError):
        return
    assert len(text) < 2_000_000
