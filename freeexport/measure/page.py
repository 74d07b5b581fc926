"""An evaluation as one HTML file: the picture, the tables, and outputs whose exited tokens are marked."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined

from freeexport.measure.evaluate import Evaluation, as_dict, as_markdown, curves_sheet, facts, settings_sheet
from freeexport.measure.plot import quality_speed
from freeexport.measure.quality import Row
from freeexport.measure.table import Sheet, as_csv
from freeexport.system.output import write_whole
from freeexport.system.page import save_figure
from runtime.text.tokenizer import Tokenizer

SHOWN = 12
_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Evaluation on {{ data }}</title>
<style>
body{font-family:sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}
.number{text-align:right}.about{color:#555}svg{max-width:100%;height:auto}
.exited{color:#0072b2;text-decoration:underline;text-underline-offset:.2em}
.example{border-top:1px solid #ddd;padding:.6em 0}.example p{margin:.3em 0}
.output{display:grid;grid-template-columns:14em 1fr;gap:1em}.label{color:#555}
.tokens{white-space:pre-wrap;font-family:monospace}.verdict{font-weight:bold}
</style>
<h1>Evaluation on {{ data }}</h1>
{% for verdict in verdicts %}<p class="verdict">{{ verdict }}.</p>{% endfor %}
<p class="about">{{ lines }} lines, {{ threads }} thread(s), {{ processor }}</p>
{% for note in notes %}<p><b>Note:</b> {{ note }}.</p>{% endfor %}
<figure>{{ picture }}<figcaption class="about">Quality by speed; bars are 95 % intervals of a paired bootstrap over
lines, numbers are thresholds. Arrows stand for points below the picture.</figcaption></figure>
{% macro show(sheet) %}{% set names = sheet.columns %}
<table><tr>{% for name in names %}<th{% if name.endswith('#') %} class="number"{% endif %}>
{{- name.rstrip('#') }}</th>{% endfor %}</tr>
{% for row in sheet.rows %}
<tr>{% for cell in row %}<td{% if names[loop.index0].endswith('#') %} class="number"{% endif %}>
{{- cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endmacro %}
{{ show(settings) }}
{{ show(curves) }}
<h2>Outputs</h2>
<p>Tokens that <span class="exited">exited, blue and underlined,</span> took the shallow decoder alone; the others took
every layer.</p>
{% for example in examples %}<div class="example">
<p class="output"><span class="label">input, line {{ example.line }}</span><span>{{ example.input }}</span></p>
<p class="output"><span class="label">reference</span><span>{{ example.reference }}</span></p>
{% for output in example.outputs %}<p class="output"><span class="label">{{ output.name }}</span><span class="tokens">
{%- for text, exited in output.pieces %}{% if exited %}<span class="exited">{{ text }}</span>{% else %}{{ text }}
{%- endif %}{% endfor %}</span></p>
{% endfor %}</div>
{% endfor %}
<h2>How it was measured</h2>
<table>{% for name, value in about %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
</html>
"""


@dataclass(frozen=True)
class Output:
    """One setting's output: pieces of text, and whether the token exited."""

    name: str
    pieces: list[tuple[str, bool]]


@dataclass(frozen=True)
class Example:
    line: int
    input: str
    reference: str
    outputs: list[Output]


def page(found: Evaluation, settings: Sheet, curves: Sheet, facts: Sequence[tuple[str, str]]) -> str:
    """Render one self-contained file: it loads no other, and no address."""
    from markupsafe import Markup

    picture = io.StringIO()
    quality_speed(found).savefig(picture, format="svg")
    svg = picture.getvalue()
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_TEMPLATE)
    text: str = template.render(
        data=found.options.data.name,
        lines=found.rows[0].lines,
        threads=found.threads,
        processor=found.environment["machine"]["processor"],
        verdicts=found.verdicts,
        notes=found.notes,
        # Drawn by matplotlib, which escapes its texts.
        picture=Markup(svg[svg.index("<svg") :]),
        settings=settings,
        curves=curves,
        examples=examples(found),
        about=facts,
    )
    return text


def examples(found: Evaluation) -> list[Example]:
    """Choose lines spread over the data, with the outputs of full and of one setting of each method."""
    shown = shown_rows(found)
    tokenizers = {entry.name: Tokenizer.load(entry.bundle.path, entry.bundle.manifest.files) for entry in found.entries}
    ends = {entry.name: set(entry.bundle.manifest.eos_token_ids) for entry in found.entries}
    lines = list(found.records[shown[0].bundle, shown[0].setting])
    chosen = lines[:: max(1, len(lines) // SHOWN)][:SHOWN]
    several = len(found.entries) > 1
    made = []
    for line in chosen:
        outputs = []
        for row in shown:
            record = found.records[row.bundle, row.setting][line][0]
            texts = pieces(tokenizers[row.bundle], record.token_ids, ends[row.bundle])
            name = f"{row.setting}, {row.bundle}" if several else row.setting
            outputs.append(Output(name, list(zip(texts, record.exited, strict=True))))
        request = found.requests[line]
        asked = request.input if isinstance(request.input, str) else request.input[-1]["content"]
        made.append(Example(line, asked, found.references[line].texts[0], outputs))
    return made


def shown_rows(found: Evaluation) -> list[Row]:
    """Choose for each bundle and method the fastest that keeps the quality, else the calibrated one, else the last."""
    fastest = {(curve.bundle, curve.method): curve.fastest for curve in found.curves}
    chosen: dict[tuple[str, str], Row] = {}
    for row in found.rows:
        key = row.bundle, row.method
        best = fastest.get(key)
        if key not in chosen or (best is None and not chosen[key].calibrated) or row.setting == best:
            chosen[key] = row
    return list(chosen.values())


def pieces(tokenizer: Tokenizer | None, token_ids: Sequence[int], ends: set[int]) -> list[str]:
    """Split a text into what each token adds to it; the token's number where there is no tokenizer."""
    if tokenizer is None:
        return [f"{token} " for token in token_ids]
    texts, before = [], ""
    for count in range(1, len(token_ids) + 1):
        text = tokenizer.decode([token for token in token_ids[:count] if token not in ends])
        # A character of several tokens appears with its last one.
        shown = text.rstrip("�")
        texts.append(shown[len(before) :])
        before = shown if shown.startswith(before) else before
    return texts


def write(found: Evaluation) -> None:
    """Write figures, pictures and the page beside the outputs. Needs matplotlib."""
    out = found.options.output
    content = as_dict(found)
    write_whole(out / "evaluation.json", json.dumps(content, indent=2) + "\n")
    write_whole(out / "evaluation.csv", as_csv(content["rows"]))
    write_whole(out / "results.md", as_markdown(found))
    figure = quality_speed(found)
    for name in ("curve.png", "curve.svg"):
        save_figure(figure, out / name)
    write_whole(out / "report.html", page(found, settings_sheet(found), curves_sheet(found), facts(found)))
