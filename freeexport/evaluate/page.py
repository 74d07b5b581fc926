"""Files of an evaluation: JSON, CSV, Markdown, figures and an HTML page."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freeexport.costs.verdict import Verdict
from freeexport.evaluate.evaluate import Evaluation
from freeexport.evaluate.plot import quality_speed
from freeexport.evaluate.tables import curves_sheet, facts, settings_sheet
from freeexport.system.output import write_whole
from freeexport.system.page import save_figure
from freeexport.system.sheet import Sheet, as_csv, markdown
from runtime.text.tokenizer import Tokenizer

# Number of example lines on the page.
SHOWN = 12
FILES = "report.html, results.md, evaluation.json and .csv, curve.png and .svg"
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


@dataclass(frozen=True)
class Story:
    """Content that turns an evaluation into a page about more.

    Attributes:
        verdict: Verdict above those of the evaluation.
        sheets: Tables about earlier steps.
    """

    title: str
    verdict: Verdict
    sheets: tuple[Sheet, ...]


def as_markdown(found: Evaluation, story: Story | None = None) -> str:
    """Format the verdicts, tables and facts as Markdown."""
    notes = [("note", note) for note in found.report["notes"]]
    return "\n".join(
        [
            *([] if story is None else [f"# {story.title}\n", f"**{story.verdict}**\n"]),
            *(f"**{verdict}.**\n" for verdict in found.report["verdicts"]),
            *(markdown(settings_sheet(found)), "", markdown(curves_sheet(found)), ""),
            *(f"- {name}: {text}" for name, text in (*facts(found), *notes)),
            *(
                []
                if story is None
                else [f"\n## {sheet.title}\n\n{markdown(sheet)}" for sheet in story.sheets]
            ),
            "",
        ]
    )


def page(found: Evaluation, story: Story | None = None) -> str:
    """Render an evaluation as HTML, with its figure, its tables and example outputs."""
    from markupsafe import Markup

    picture = io.StringIO()
    quality_speed(
        found.rows, found.metrics[0].name, found.metrics[0].label, found.options.quality
    ).savefig(picture, format="svg")
    svg = picture.getvalue()
    processor = found.report["machine"]["processor"]
    caption = (
        "Quality by speed; bars are 95 % intervals of a paired bootstrap over lines, "
        "numbers are thresholds. Arrows stand for points below the picture."
    )
    return render(
        f"Evaluation on {Path(found.report['data']).name}" if story is None else story.title,
        f"{found.report['lines']} lines, {found.report['threads']} thread(s), {processor}",
        verdicts=[
            *([] if story is None else [story.verdict]),
            *({"text": text} for text in found.report["verdicts"]),
        ],
        notes=found.report["notes"],
        # matplotlib escapes all texts.
        figures=[(Markup(svg[svg.index("<svg") :]), caption)],
        sheets=[
            settings_sheet(found),
            curves_sheet(found),
            *([] if story is None else story.sheets),
        ],
        examples=example_outputs(found),
        facts=facts(found),
    )


def example_outputs(found: Evaluation) -> list[dict[str, Any]]:
    """Select lines across the data, with the outputs of one setting per bundle and method."""
    # Prefers the fastest setting that keeps the quality, then the calibrated one, then the last.
    best = {(curve["bundle"], curve["fastest"]) for curve in found.report["curves"]}
    rows = sorted(
        found.rows, key=lambda row: ((row["bundle"], row["setting"]) in best, row["calibrated"])
    )
    chosen = {(row["bundle"], row["method"]): row for row in rows}
    shown = [row for row in found.rows if row is chosen[row["bundle"], row["method"]]]
    bundles = {entry.name: entry.bundle for entry in found.entries}
    tokenizers = {
        name: Tokenizer.load(bundle.path, bundle.manifest.files) for name, bundle in bundles.items()
    }
    lines = list(found.records[shown[0]["bundle"], shown[0]["setting"]])
    made = []
    for line in lines[:: max(1, len(lines) // SHOWN)][:SHOWN]:
        outputs = []
        for row in shown:
            bundle = row["bundle"]
            setting = row["setting"]
            record = found.records[bundle, setting][line][0]
            texts = pieces(
                tokenizers[bundle], record.token_ids, set(bundles[bundle].manifest.eos_token_ids)
            )
            name = f"{setting}, {bundle}" if len(bundles) > 1 else setting
            outputs.append((name, list(zip(texts, record.exited, strict=True))))
        given = found.requests[line].input
        question = given[-1]["content"] if isinstance(given, list) else str(given)
        reference = found.references[line].texts[0]
        made.append({"line": line, "input": question, "reference": reference, "outputs": outputs})
    return made


def pieces(tokenizer: Tokenizer | None, token_ids: Sequence[int], ends: set[int]) -> list[str]:
    """Split a text into the part that each token adds. Without a tokenizer, return token ids."""
    if tokenizer is None:
        return [f"{token} " for token in token_ids]
    texts = []
    before = ""
    for count in range(1, len(token_ids) + 1):
        text = tokenizer.decode([token for token in token_ids[:count] if token not in ends])
        # A character of several tokens appears with its last token.
        shown = text.rstrip("�")
        texts.append(shown[len(before) :])
        before = shown if shown.startswith(before) else before
    return texts


def write_evaluation(found: Evaluation, out: Path, story: Story | None = None) -> None:
    """Write JSON, CSV, Markdown, figures and the HTML page to `out`. Requires matplotlib."""
    write_whole(out / "evaluation.json", json.dumps(found.report, indent=2) + "\n")
    write_whole(out / "evaluation.csv", as_csv(found.rows))
    write_whole(out / "results.md", as_markdown(found, story))
    figure = quality_speed(
        found.rows, found.metrics[0].name, found.metrics[0].label, found.options.quality
    )
    for name in ("curve.png", "curve.svg"):
        save_figure(figure, out / name)
    write_whole(out / "report.html", page(found, story))


def render(title: str, about: str, **parts: Any) -> str:
    """Render an HTML page with a title and a line `about` it.

    `parts` are `verdicts`, `notes`, `figures` (HTML and caption), `sheets`, `examples`, `facts`.
    """
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(_TEMPLATE)
    return template.render(title=title, about=about, signs=_SIGNS, **parts)
