"""Results as HTML: one page that loads nothing else but pictures beside it, and what `evaluate` writes."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

from freeexport.measure.evaluate import Evaluation, as_markdown, curves_sheet, facts, settings_sheet
from freeexport.measure.plot import quality_speed
from freeexport.measure.quality import Row
from freeexport.measure.table import as_csv
from freeexport.system.output import write_whole
from freeexport.system.page import save_figure
from runtime.text.tokenizer import Tokenizer

SHOWN = 12
# Beside the colour, for who does not see it.
_SIGNS = {"good": "✓", "neutral": "?", "bad": "✗", "": ""}
_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}: {{ about }}</title>
<style>
body{font-family:sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}
.number{text-align:right}.about,figcaption{color:#555}svg,img{max-width:100%;height:auto}
.chosen{background:#e8f0ff;font-weight:bold}
.exited{color:#0072b2;text-decoration:underline;text-underline-offset:.2em}
.example{border-top:1px solid #ddd;padding:.6em 0}.example p{margin:.3em 0}
.output{display:grid;grid-template-columns:14em 1fr;gap:1em}.label{color:#555}
.tokens{white-space:pre-wrap;font-family:monospace}
.verdict{font-size:1.2em;padding:.6em .9em;border-left:.4em solid;border-radius:.2em}.verdict p{margin:.2em 0}
.good{background:#e3f4ec;border-color:#009e73}.neutral{background:#fdf3d8;border-color:#e69f00}
.bad{background:#fbe6dc;border-color:#d55e00}
</style>
<h1>{{ title }}</h1><p class="about">{{ about }}</p>
{% for verdict in verdicts %}<div class="verdict {{ verdict.level }}"><p>{{ signs[verdict.level] }}
<b>{{ verdict.text[:1].upper() + verdict.text[1:] }}.</b></p>
{%- if verdict.next_step %}<p>Next: {{ verdict.next_step }}.</p>{% endif %}</div>{% endfor %}
{% for note in notes %}<p><b>Note:</b> {{ note }}.</p>{% endfor %}
{% for picture, text in figures %}<figure>{{ picture }}<figcaption>{{ text }}</figcaption></figure>{% endfor %}
{% for sheet in sheets %}{% set names = sheet.columns %}<h2>{{ sheet.title }}</h2>
<table class="numbers"><tr>{% for name in names %}<th{% if name.endswith('#') %} class="number"{% endif %}>
{{- name.rstrip('#') }}</th>{% endfor %}</tr>
{% for row in sheet.rows %}<tr{% if row[-1] == 'chosen' %} class="chosen"{% endif %}>
{%- for cell in row %}<td{% if names[loop.index0].endswith('#') %} class="number"{% endif %}>
{{- cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
{% if examples %}<h2>Outputs</h2>
<p>Tokens that <span class="exited">exited, blue and underlined,</span> took the shallow decoder alone; the others took
every layer.</p>{% endif %}
{% for example in examples %}<div class="example">
<p class="output"><span class="label">input, line {{ example.line }}</span><span>{{ example.input }}</span></p>
<p class="output"><span class="label">reference</span><span>{{ example.reference }}</span></p>
{% for name, pieces in example.outputs %}<p class="output"><span class="label">{{ name }}</span><span class="tokens">
{%- for text, exited in pieces %}{% if exited %}<span class="exited">{{ text }}</span>{% else %}{{ text }}
{%- endif %}{% endfor %}</span></p>
{% endfor %}</div>
{% endfor %}
<h2>How it was measured</h2>
<table>{% for name, value in facts %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
</html>
"""


def render(title: str, about: str, **parts: Any) -> str:
    """Render a page of `verdicts`, `notes`, `figures` (HTML and a caption), `sheets`, `examples` and `facts`."""
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(_TEMPLATE)
    return template.render(title=title, about=about, signs=_SIGNS, **parts)


def page(found: Evaluation) -> str:
    """Render an evaluation: its picture, its tables, and outputs whose exited tokens are marked."""
    from markupsafe import Markup

    picture = io.StringIO()
    quality_speed(found).savefig(picture, format="svg")
    svg, processor = picture.getvalue(), found.report["machine"]["processor"]
    caption = (
        "Quality by speed; bars are 95 % intervals of a paired bootstrap over lines, numbers are thresholds. Arrows "
        "stand for points below the picture."
    )
    return render(
        f"Evaluation on {found.options.data.name}",
        f"{found.report['lines']} lines, {found.report['threads']} thread(s), {processor}",
        verdicts=[{"text": text} for text in found.report["verdicts"]],
        notes=found.report["notes"],
        # Drawn by matplotlib, which escapes its texts.
        figures=[(Markup(svg[svg.index("<svg") :]), caption)],
        sheets=[settings_sheet(found), curves_sheet(found)],
        examples=examples(found),
        facts=facts(found),
    )


def examples(found: Evaluation) -> list[dict[str, Any]]:
    """Choose lines spread over the data, with the outputs of full and of one setting of each method."""
    shown = shown_rows(found)
    bundles = {entry.name: entry.bundle for entry in found.entries}
    tokenizers = {name: Tokenizer.load(bundle.path, bundle.manifest.files) for name, bundle in bundles.items()}
    lines = list(found.records[shown[0]["bundle"], shown[0]["setting"]])
    made = []
    for line in lines[:: max(1, len(lines) // SHOWN)][:SHOWN]:
        outputs = []
        for row in shown:
            bundle, setting = row["bundle"], row["setting"]
            record = found.records[bundle, setting][line][0]
            texts = pieces(tokenizers[bundle], record.token_ids, set(bundles[bundle].manifest.eos_token_ids))
            name = f"{setting}, {bundle}" if len(bundles) > 1 else setting
            outputs.append((name, list(zip(texts, record.exited, strict=True))))
        given = found.requests[line].input
        asked = given if isinstance(given, str) else given[-1]["content"]
        reference = found.references[line].texts[0]
        made.append({"line": line, "input": asked, "reference": reference, "outputs": outputs})
    return made


def shown_rows(found: Evaluation) -> list[Row]:
    """Choose for each bundle and method the fastest that keeps the quality, else the calibrated one, else the last."""
    fastest = {(curve["bundle"], curve["method"]): curve["fastest"] for curve in found.report["curves"]}
    chosen: dict[tuple[str, str], Row] = {}
    for row in found.rows:
        key = row["bundle"], row["method"]
        best = fastest.get(key)
        if key not in chosen or (best is None and not chosen[key]["calibrated"]) or row["setting"] == best:
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
    write_whole(out / "evaluation.json", json.dumps(found.report, indent=2) + "\n")
    write_whole(out / "evaluation.csv", as_csv(found.rows))
    write_whole(out / "results.md", as_markdown(found))
    figure = quality_speed(found)
    for name in ("curve.png", "curve.svg"):
        save_figure(figure, out / name)
    write_whole(out / "report.html", page(found))
