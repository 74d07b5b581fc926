"""The curves of an exit evaluation as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from freeexport.output_file import replacing
from runtime.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from freeexport.evaluate_exits import Report

_MOST_CURVES = 12


def check(path: Path) -> None:
    """Raise, before any long work, what would keep `write` from writing: no matplotlib, no directory, no PNG."""
    import matplotlib  # noqa: F401

    if path.suffix.lower() != ".png":
        raise OptionError(f"--plot is {path}, which is no PNG; end its name in .png")
    if not path.parent.is_dir():
        raise OptionError(f"--plot: there is no directory {path.parent}; make it first")


def write(report: Report, path: Path) -> None:
    """Agreement of exits against exit rate, a curve a layer (evenly spaced layers, where there are many), and the
    predicted speedup by layer. Replaces `path`, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    step = -(-len(report.exits) // _MOST_CURVES)
    for one in report.exits[step - 1 :: step]:
        left.plot(one.curve.exit_rate, one.curve.agreement, label=f"layer {one.exit_layer}")
    left.axhline(report.options.agreement, color="grey", linewidth=0.8, linestyle="--")
    left.set(xlabel="tokens that exit", ylabel="exits that agree with the last layer", xlim=(0, 1), ylim=(0, 1.02))
    left.set_title(report.model)
    left.legend(fontsize="small")
    layers = [one.exit_layer for one in report.exits]
    right.bar(layers, [one.speedup for one in report.exits], color="tab:blue")
    right.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    right.set(xlabel="exit layer", ylabel="speedup (predicted)")
    right.set_title(f"where {report.options.agreement:.4g} of the exits agree")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Replace `path`, whole or not at all."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
