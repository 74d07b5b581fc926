"""A calibration as a page: the verdict, the pictures, the table of thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from freeexport.system.machine import Machine, detect_machine
from freeexport.system.output_directory import output_directory
from freeexport.system.page import filled

if TYPE_CHECKING:
    from freeexport.calibration.calibrate import Calibrated
    from freeexport.traces.verdict import Level, Verdict

INDEX, DATA = "index.html", "calibration.json"
_STYLE = (
    "body{font-family:sans-serif;max-width:56em;margin:2em auto;padding:0 1em;color:#222}"
    "h1{margin-bottom:.2em}.about{color:#555;margin-top:0}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}"
    ".numbers td,.numbers th{text-align:right}.numbers td:last-child{text-align:left}"
    "figure{margin:1.5em 0}figcaption{color:#555}img{max-width:100%}.chosen{background:#e8f0ff;font-weight:bold}"
    ".verdict{font-size:1.2em;padding:.6em .9em;border-left:.4em solid;border-radius:.2em}.verdict p{margin:.2em 0}"
    ".good{background:#e3f4ec;border-color:#009e73}.neutral{background:#fdf3d8;border-color:#e69f00}"
    ".bad{background:#fbe6dc;border-color:#d55e00}"
)
# Beside the colour, for who does not see it.
_SIGNS: dict[Level, str] = {"good": "&#10003;", "neutral": "?", "bad": "&#10007;"}
_EXPLAINED = {
    "mixture.png": "Above: the confidences of tokens at which both decoders agree, and of those at which they do not, "
    "with the fitted densities. Below: the chance that a token agrees, by its confidence, as fitted and as seen.",
    "thresholds.png": "What each threshold gives: exits, how many of them agree, and where it is known, speed as a "
    "multiple of mode full. Exits pay where that is above 1.0.",
    "reliability.png": "Is the chance what it says? Each point is a tenth of the tokens, by confidence; on the "
    "diagonal the mixture is right. Bars are two standard errors.",
}


class _Checked(Exception):
    pass


def check(directory: Path) -> None:
    """Raise, before any long work, what would keep `write` from writing: no matplotlib, or something in the way."""
    import matplotlib  # noqa: F401

    # An error leaves what was there.
    with suppress(_Checked), output_directory(directory, INDEX, overwrite=True):
        raise _Checked


def write(result: Calibrated, directory: Path) -> None:
    """Replaces a report that stands there, whole or not at all."""
    from freeexport.calibration.plots import write_plots

    with output_directory(directory, INDEX, overwrite=True) as partial:
        pictures = write_plots(result, partial)
        (partial / DATA).write_text(result.calibration.to_json(), encoding="utf-8")
        text = page(result, pictures, detect_machine(), datetime.now().astimezone())
        (partial / INDEX).write_text(text, encoding="utf-8")


def page(result: Calibrated, pictures: Sequence[str], machine: Machine, made: datetime) -> str:
    """The page as HTML; `machine` is where it was made, and when."""
    from freeexport.calibration.calibrate import verdict_of
    from freeexport.calibration.page import found
    from freeexport.calibration.plots import unreliable

    title = f"Calibration of {result.name}"
    about = f"exit after layer {result.calibration.exit_layer} of {result.layers}, {made:%Y-%m-%d}, {_named(machine)}"
    figures = "".join(map(_figure, pictures))
    if reason := unreliable(result):
        figures += f"<p>{escape(reason)}</p>"
    notes = "".join(f"<p>Note: {escape(note)}.</p>" for note in result.notes)
    facts = "".join(f"<tr>{_cells('td', pair)}</tr>" for pair in found(result))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(f"{title}: {about}")}</title>'
        f"<style>{_STYLE}</style>"
        f'<h1>{escape(title)}</h1><p class="about">{escape(about)}</p>{_verdict(verdict_of(result))}{notes}{figures}'
        f'<h2>Thresholds</h2><table class="numbers">{_thresholds(result)}</table>'
        "<p>Exits and agreement follow the full model's own output. Speedups are of decoding, over mode full.</p>"
        f"<h2>How it was found</h2><table>{facts}</table></html>\n"
    )


def _named(machine: Machine) -> str:
    counts = ((machine.cores, "cores"), (machine.threads, "threads"))
    return ", ".join([machine.cpu, *(f"{count} {name}" for count, name in counts if count is not None)])


def _verdict(verdict: Verdict) -> str:
    text = verdict.text[:1].upper() + verdict.text[1:]
    following = f"<p>Next: {escape(verdict.next_step)}.</p>" if verdict.next_step else ""
    return (
        f'<div class="verdict {verdict.level}"><p>{_SIGNS[verdict.level]} <b>{escape(text)}.</b></p>{following}</div>'
    )


def _figure(name: str) -> str:
    text = escape(_EXPLAINED[name])
    return f'<figure><img src="{name}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _thresholds(result: Calibrated) -> str:
    from freeexport.calibration.page import COLUMNS, row_cells

    table, chosen = result.calibration.table, result.calibration.threshold
    marked = [(*row_cells(row), "chosen" if row.threshold == chosen else "") for row in table]
    columns, rows = filled((*COLUMNS, ""), marked)
    lines = "".join(
        f"<tr{' class=chosen' if row.threshold == chosen else ''}>{_cells('td', cells)}</tr>"
        for row, cells in zip(table, rows, strict=True)
    )
    return f"<tr>{_cells('th', columns)}</tr>{lines}"


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)
