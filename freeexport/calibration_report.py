"""A calibration as a page: the advice, the pictures, the table of thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from freeexport.output_directory import output_directory

if TYPE_CHECKING:
    from freeexport.calibration import Calibrated

INDEX, DATA = "index.html", "calibration.json"
_STYLE = (
    "body{font-family:sans-serif;max-width:50em;margin:2em auto;padding:0 1em}"
    "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child"
    "{text-align:left}table{border-collapse:collapse}img{max-width:100%}.advice{font-size:1.2em}"
    ".chosen{background:#e8f0ff}"
)
_EXPLAINED = {
    "mixture.png": "Confidences of tokens at which both decoders agree, and of those at which they do not, with the "
    "fitted densities. The black line is the chance that a token agrees, by its confidence.",
    "thresholds.png": "What each threshold gives. Exits pay where the exit rate is above the dotted line.",
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
    from freeexport.calibration_plots import write_plots

    with output_directory(directory, INDEX, overwrite=True) as partial:
        pictures = write_plots(result, partial)
        (partial / DATA).write_text(result.calibration.to_json(), encoding="utf-8")
        (partial / INDEX).write_text(page(result, pictures), encoding="utf-8")


def page(result: Calibrated, pictures: Sequence[str]) -> str:
    """The page as HTML."""
    from freeexport.calibration import advice
    from freeexport.calibration_page import COLUMNS, row_cells, summary

    calibration = result.calibration
    figures = "".join(f'<p><img src="{name}" alt="{name}"><br>{_EXPLAINED[name]}</p>' for name in pictures)
    rows = "".join(
        f"<tr{' class=chosen' if row.threshold == calibration.threshold else ''}>{_cells('td', row_cells(row))}</tr>"
        for row in calibration.table
    )
    facts = "".join(f"<tr>{_cells('td', pair)}</tr>" for pair in summary(result))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Calibration</title><style>{_STYLE}</style>'
        f'<h1>Calibration</h1><p class="advice">{escape(advice(result))}</p>{figures}'
        f"<h2>Thresholds</h2><table><tr>{_cells('th', COLUMNS)}</tr>{rows}</table>"
        "<p>Exits and agreement follow the full model's own output. Speedups are of decoding, over mode full.</p>"
        f"<h2>How it was found</h2><table>{facts}</table></html>\n"
    )


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)
