"""The HTML template of an evaluation's page."""

from __future__ import annotations

from typing import Any

# Symbols in addition to colours, for accessibility.
_SIGNS = {"good": "✓", "neutral": "?", "bad": "✗", "": ""}
_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}: {{ about }}</title>
<style>
body{font-family:sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}\
td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}
.number{text-align:right}.about,figcaption{color:#555}svg,img{max-width:100%;height:auto}
.chosen{background:#e8f0ff;font-weight:bold}
.exited{color:#0072b2;text-decoration:underline;text-underline-offset:.2em}
.example{border-top:1px solid #ddd;padding:.6em 0}.example p{margin:.3em 0}
.output{display:grid;grid-template-columns:14em 1fr;gap:1em}.label{color:#555}
.tokens{white-space:pre-wrap;font-family:monospace}
.verdict{font-size:1.2em;padding:.6em .9em;border-left:.4em solid;border-radius:.2em}\
.verdict p{margin:.2em 0}
.good{background:#e3f4ec;border-color:#009e73}.neutral{background:#fdf3d8;border-color:#e69f00}
.bad{background:#fbe6dc;border-color:#d55e00}
</style>
<h1>{{ title }}</h1><p class="about">{{ about }}</p>
{% for verdict in verdicts %}<div class="verdict {{ verdict.level }}"><p>{{ signs[verdict.level] }}
<b>{{ verdict.text[:1].upper() + verdict.text[1:] }}.</b></p>
{%- if verdict.next_step %}<p>Next: {{ verdict.next_step }}.</p>{% endif %}</div>{% endfor %}
{% for note in notes %}<p><b>Note:</b> {{ note }}.</p>{% endfor %}
{% for picture, text in figures %}<figure>{{ picture }}\
<figcaption>{{ text }}</figcaption></figure>{% endfor %}
{% for sheet in sheets %}{% set names = sheet.columns %}<h2>{{ sheet.title }}</h2>
<table class="numbers"><tr>\
{% for name in names %}<th{% if name.endswith('#') %} class="number"{% endif %}>
{{- name.rstrip('#') }}</th>{% endfor %}</tr>
{% for row in sheet.rows %}<tr{% if row[-1] == 'chosen' %} class="chosen"{% endif %}>
{%- for cell in row %}<td{% if names[loop.index0].endswith('#') %} class="number"{% endif %}>
{{- cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
{% if examples %}<h2>Outputs</h2>
<p>Tokens that <span class="exited">exited, blue and underlined,</span> took the shallow decoder \
alone; the others took
every layer.</p>{% endif %}
{% for example in examples %}<div class="example">
<p class="output"><span class="label">input, line {{ example.line }}</span>\
<span>{{ example.input }}</span></p>
<p class="output"><span class="label">reference</span><span>{{ example.reference }}</span></p>
{% for name, pieces in example.outputs %}<p class="output"><span class="label">{{ name }}</span>\
<span class="tokens">
{%- for text, exited in pieces %}{% if exited %}\
<span class="exited">{{ text }}</span>{% else %}{{ text }}
{%- endif %}{% endfor %}</span></p>
{% endfor %}</div>
{% endfor %}
<h2>How it was measured</h2>
<table>\
{% for name, value in facts %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
</html>
"""


def render(title: str, about: str, **parts: Any) -> str:
    """Render an HTML page.

    Args:
        title: Title of the page.
        about: Line below the title.
        **parts: `verdicts`, `notes`, `figures` (HTML and caption), `sheets`, `examples` and
            `facts`.
    """
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(_TEMPLATE)
    return template.render(title=title, about=about, signs=_SIGNS, **parts)
