"""Compares the layers of a checkpoint as exits: `freeexport evaluate CHECKPOINT --layers`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import numpy as np

from freeexport.checkpoints.transformers_model import Dtype
from freeexport.measure.exit_verdict import ExitFacts, Share, Verdict, share, verdict
from freeexport.system.page import BLUE, GREY, ORANGE, legend_beside, new_figure, pairs, table
from freeexport.system.progress import progress
from runtime.bundle.beta import NEVER_EXIT
from runtime.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

    from freeexport.checkpoints.examples import Example
    from freeexport.measure.layers import Evaluation
    from graphs.step_costs import StepCosts

TARGETS = (0.99, 0.95, 0.90)
MAX_PENDING = 16
_CURVE_POINTS = 100  # of a curve as JSON
_MOST_CURVES, _MOST_VALUES = 12, 16  # drawn, and bars that have room for a number above each
_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)
_TOP = 0.999  # agreement beyond this is drawn here


@dataclass(frozen=True)
class LayersOptions:
    """`forcing` is what the decoder reads: its own greedy output or the data's targets. `max_tokens` limits a
    sequence, `max_new_tokens` a greedy output. `agreement` is what exits must reach to be recommended. `bundle`: use
    the costs measured on it. `device` and `dtype`: where and in which type the checkpoint runs."""

    forcing: Literal["output", "targets"] = "output"
    samples: int = 200
    max_new_tokens: int = 64
    max_tokens: int = 512
    batch_size: int = 8
    agreement: float = 0.99
    bundle: Path | None = None
    device: str = "cpu"
    dtype: Dtype = "float32"


@dataclass(frozen=True)
class Point:
    """One threshold: a token exits above it. `exit_rate` is the share of tokens that exit, `agreement` the share of
    those that the last layer agrees with (1 where none exits)."""

    threshold: float
    exit_rate: float
    agreement: float


NO_EXIT = Point(NEVER_EXIT, 0.0, 1.0)


@dataclass(frozen=True)
class Curve:
    """Points as arrays [P], exit rate ascending; only thresholds that separate two confidences are points."""

    threshold: np.ndarray
    exit_rate: np.ndarray
    agreement: np.ndarray

    @classmethod
    def of(cls, confidence: np.ndarray, agrees: np.ndarray) -> Curve:
        """The curve of `confidence` [N] in [0, 1] and `agrees` [N] bool, of at least one token."""
        order = np.argsort(-confidence, kind="stable")
        # A confidence of 0 never exits: nothing is above it, down to the threshold 0.
        descending = np.append(confidence[order].astype(np.float64), 0.0)
        cuts = np.flatnonzero(descending[:-1] > descending[1:])
        exits = cuts + 1
        return cls(
            threshold=(descending[cuts] + descending[cuts + 1]) / 2,
            exit_rate=exits / len(confidence),
            agreement=np.cumsum(agrees[order])[cuts] / exits,
        )

    def at_agreement(self, target: float) -> Point:
        """The largest exit rate whose agreement reaches `target`; NO_EXIT where none does."""
        reaching = np.flatnonzero(self.agreement >= target)
        return self._point(int(reaching[-1])) if len(reaching) else NO_EXIT

    def sampled(self, count: int) -> Iterator[Point]:
        """At most `count` points, evenly spaced in exit rate, the last one among them."""
        if len(self.exit_rate):
            wanted = np.linspace(0, self.exit_rate[-1], count + 1)[1:]
            for index in sorted(set(np.searchsorted(self.exit_rate, wanted).tolist())):
                yield self._point(min(index, len(self.exit_rate) - 1))

    def _point(self, index: int) -> Point:
        return Point(float(self.threshold[index]), float(self.exit_rate[index]), float(self.agreement[index]))


@dataclass(frozen=True)
class Exit:
    """A layer as an exit. `agreement` and `accuracy` count every token; `at` has the point with the most exits for
    each agreement asked for. `speedup`, at `point`, and `break_even` (an exit rate, None where exits never pay) are
    predicted. `exit_rate` and `exit_agreement` (None where none exits) are those of `point`, with their intervals.
    `heavy_head`: the head costs more than the layers below the exit."""

    exit_layer: int
    agreement: Share | None
    accuracy: float
    at: dict[float, Point]
    point: Point
    speedup: float
    break_even: float | None
    curve: Curve
    exit_rate: Share | None = None
    exit_agreement: Share | None = None
    heavy_head: bool = False


@dataclass(frozen=True)
class LayersReport:
    """`deep_accuracy` is the whole model's; accuracies count tokens that equal what was forced, and say something only
    where that was the data's targets. `trained`: the layer that the checkpoint was trained to exit after."""

    model: str
    layers: int
    tokens: int
    examples: int
    options: LayersOptions
    deep_accuracy: float
    costs: StepCosts
    exits: tuple[Exit, ...]
    trained: int | None = None

    @property
    def best(self) -> Exit:
        """The exit with the largest speedup at the agreement asked for; of several, the one that agrees most often."""
        return max(self.exits, key=lambda one: (one.speedup, one.agreement.value if one.agreement else 0.0))

    @property
    def recommended(self) -> Exit | None:
        """The best; None where that is no faster than no exit."""
        return self.best if self.best.speedup > 1 else None

    @property
    def verdict(self) -> Verdict:
        best, target = self.best, self.options.agreement
        return verdict(
            ExitFacts(
                name=self.model,
                exit_layer=best.exit_layer,
                layers=self.layers,
                trained=best.exit_layer == self.trained,
                threshold=best.point.threshold,
                why_never=f"no layer has a confidence from which {target:.4g} of the exits agree",
                agreement=best.agreement,
                exit_rate=best.exit_rate,
                exit_agreement=best.exit_agreement,
                break_even=best.break_even,
                speedup=best.speedup,
                basis="measured" if self.costs.measured else "sizes",
                checkpoint=True,
                heavy_head=best.heavy_head,
            )
        )


def evaluate_layers(model: str, data: Path, options: LayersOptions) -> LayersReport:
    """Evaluate every layer but the last as an exit, on `options.samples` lines of `data`.

    Raises DataError for data that cannot be used, CheckpointError, and OptionError for a bundle of another depth.
    """
    from freeexport.checkpoints.checkpoint import open_checkpoint
    from freeexport.checkpoints.examples import DataError, text_format
    from freeexport.checkpoints.transformers_model import reference_model
    from freeexport.measure.byte_model import measured
    from freeexport.measure.layers import LayerReader
    from graphs.families import describe
    from graphs.step_costs import analytic
    from runtime.bundle.bundle import Bundle

    checkpoint = open_checkpoint(model)
    description, found = describe(checkpoint.config, checkpoint), checkpoint.exit
    layers = len(description.decoder.layers)
    if layers < 2:
        raise OptionError(f"{checkpoint.name} has one decoder layer, and an exit needs at least two")
    if options.bundle is None:
        costs = analytic(description, checkpoint)
    else:
        manifest = Bundle.open(options.bundle).manifest
        if manifest.layers != layers:
            raise OptionError(
                f"{options.bundle} has {manifest.layers} layers, the checkpoint {layers}; name a bundle made from it"
            )
        costs = measured(manifest)
    examples = _examples(data, text_format(checkpoint, description, options.max_tokens), options)
    loaded = reference_model(checkpoint, options.device, options.dtype)
    reader = LayerReader(loaded, checkpoint, description, 1 if found is None else found.exit_layer)
    if options.forcing == "output":
        with progress("decoding", len(examples)) as advance:
            examples = reader.greedy_outputs(examples, options.max_new_tokens, options.batch_size, advance)
    with progress("evaluating", len(examples)) as advance:
        evaluation = reader.evaluate(examples, options.batch_size, advance)
    if evaluation.tokens == 0:
        raise DataError(f"{data}: no output has a second token, and the first never exits; give longer texts")
    parts = {}
    if found is not None:
        head = found.head_share(description.vocab_size) if options.bundle is None else 1.0
        parts[found.exit_layer] = found.exit_layers, head
    exits = tuple(exit_of(evaluation, layer, costs, options, *parts.get(layer, (0, 1.0))) for layer in range(1, layers))
    trained, whole = None if found is None else found.exit_layer, evaluation.accuracy(layers)
    return LayersReport(
        checkpoint.name, layers, evaluation.tokens, len(examples), options, whole, costs, exits, trained
    )


def exit_of(
    evaluation: Evaluation, layer: int, costs: StepCosts, options: LayersOptions, own: int = 0, head: float = 1.0
) -> Exit:
    """A layer's figures; `own`: layers that the exit has of its own, `head`: the share of the head that it reads."""
    agrees, confidence = evaluation.agrees(layer), evaluation.confidence[layer - 1]
    curve = Curve.of(confidence, agrees)
    point = curve.at_agreement(options.agreement)
    exits = confidence.astype(np.float64) > point.threshold
    at_layer, every = costs.at(layer, len(evaluation.prediction), own, head), np.bincount(evaluation.sequence)
    exits_by_sequence = np.bincount(evaluation.sequence, exits)
    return Exit(
        exit_layer=layer,
        agreement=share(np.bincount(evaluation.sequence, agrees), every),
        accuracy=evaluation.accuracy(layer),
        at={target: curve.at_agreement(target) for target in TARGETS},
        point=point,
        # Where nothing can exit, a session decodes as `full`.
        speedup=1.0 if point == NO_EXIT else at_layer.speedup(point.exit_rate, MAX_PENDING),
        break_even=at_layer.break_even(MAX_PENDING),
        curve=curve,
        exit_rate=share(exits_by_sequence, every),
        exit_agreement=share(np.bincount(evaluation.sequence, agrees & exits), exits_by_sequence),
        heavy_head=at_layer.head > at_layer.shallow_without_head,
    )


def _examples(data: Path, form: Any, options: LayersOptions) -> list[Example]:
    from freeexport.checkpoints.examples import encode, read_examples

    forced = options.forcing == "targets"
    requests = read_examples(data, options.samples, "add it, or use --on output" if forced else "")
    if not forced:
        requests = [replace(request, target="") for request in requests]
        if not form.seq2seq:  # what is decoded shares the limit with the prompt
            form = replace(form, limit=max(1, form.limit - options.max_new_tokens))
    examples, left_out = encode(requests, form, data)
    if left_out is not None:
        click.echo(f"warning: {left_out}", err=True)
    return examples


def as_dict(report: LayersReport) -> dict[str, Any]:
    """The report for programs; curves at about a hundred exit rates."""
    best, targets = report.recommended, report.options.forcing == "targets"
    bundle = report.options.bundle
    return {
        "model": report.model,
        "layers": report.layers,
        "tokens": report.tokens,
        "examples": report.examples,
        "options": {**asdict(report.options), "bundle": None if bundle is None else str(bundle)},
        "deep_accuracy": report.deep_accuracy if targets else None,
        "costs": {"layer": report.costs.layer, "head": report.costs.head, "measured": report.costs.measured},
        "recommended": None if best is None else best.exit_layer,
        "verdict": asdict(report.verdict),
        "exits": [
            {
                "exit_layer": one.exit_layer,
                "agreement": None if one.agreement is None else one.agreement.value,
                "accuracy": one.accuracy if targets else None,
                "chosen": asdict(one.point),
                "exit_rate": None if one.exit_rate is None else asdict(one.exit_rate),
                "exit_agreement": None if one.exit_agreement is None else asdict(one.exit_agreement),
                "at": {str(target): asdict(point) for target, point in one.at.items()},
                "speedup": one.speedup,
                "break_even": one.break_even,
                "curve": [asdict(point) for point in one.curve.sampled(_CURVE_POINTS)],
            }
            for one in report.exits
        ],
    }


def tables(report: LayersReport) -> list[Table]:
    """A line a layer, and the verdict."""
    # After the model's own output, accuracy would be agreement again, and that of all layers 100 %.
    targets = report.options.forcing == "targets"
    columns = ("layer#", "agrees#", "right#" if targets else "", *(f"at {one:.0%}#" for one in TARGETS))
    rows = [
        (
            str(one.exit_layer),
            f"{0 if one.agreement is None else one.agreement.value:.1%}",
            f"{one.accuracy:.1%}" if targets else "",
            *(f"{one.at[target].exit_rate:.1%}" for target in TARGETS),
            "never" if one.point == NO_EXIT else f"{one.point.threshold:.3f}",
            f"{one.point.exit_rate:.1%}",
            f"{one.speedup:.2f}x",
            "never" if one.break_even is None else f"{one.break_even:.1%}",
        )
        for one in report.exits
    ]
    costs, target, verdict = report.costs, report.options.agreement, report.verdict
    forced = "the targets" if targets else "the model's own greedy output"
    unit, scale = ("ms, measured", 1.0) if costs.measured else ("MB of weights, not measured", 1e-6)
    summary = [
        ("tokens", f"{report.tokens} of {report.examples} examples, after {forced}"),
        *([("accuracy of all layers", f"{report.deep_accuracy:.1%}")] if targets else []),
        ("costs", f"a layer {costs.layer * scale:.3g}, the head {costs.head * scale:.3g} ({unit})"),
        ("at 99%", "the largest share of tokens that can exit so that 99 % of them agree"),
        ("threshold, exits, speed", f"where {target:.4g} of the exits agree; speed over mode full, predicted"),
        ("verdict on the best layer", verdict.text),
        *([("next step", verdict.next_step)] if verdict.next_step else []),
    ]
    columns += ("threshold#", "exits#", "speed#", "pays from#")
    return [table(f"Layers of {report.model} as exits", columns, rows), pairs("Summary", summary)]


def check_plot(path: Path) -> None:
    """Raise, before any long work, what would keep a picture from being written: no matplotlib, or no place."""
    import matplotlib  # noqa: F401

    if path.suffix.lower() != ".png":
        raise OptionError(f"--plot is {path}, which is no PNG; end its name in .png")
    if not path.parent.is_dir():
        raise OptionError(f"--plot: there is no directory {path.parent}; make it first")


def draw(report: LayersReport) -> Figure:
    """Agreement of exits against exit rate, a curve a layer (evenly spaced layers, where there are many), and the
    predicted speedup by layer."""
    figure = new_figure(13, 5)
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    figure.suptitle(f"{report.model}: exits after each of {report.layers} layers")
    _curves(left, report)
    _speedups(right, report)
    return figure


def _curves(axes: Axes, report: LayersReport) -> None:
    from matplotlib import colormaps

    step = -(-len(report.exits) // _MOST_CURVES)
    shown = report.exits[step - 1 :: step]
    # Dark to light with depth, which survives grey printing, and dashes for neighbours.
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(shown)))
    for one, shade, dashes in zip(shown, shades, cycle(("-", "--", "-.", ":"))):
        disagree = 1 - np.minimum(one.curve.agreement, _TOP)
        axes.plot(one.curve.exit_rate, disagree, color=shade, linestyle=dashes, label=f"layer {one.exit_layer}")
    target = report.options.agreement
    axes.axhline(1 - min(target, _TOP), color=GREY, linewidth=0.8, linestyle="--", label=f"{100 * target:.4g} % agree")
    # By the logarithm of those that disagree: exits matter between 90 and 99.9 %, and bad layers are at 20.
    axes.set_yscale("log")
    axes.set(xlabel="tokens that exit", ylabel="exits that agree with the last layer", xlim=(0, 1))
    axes.set_ylim(1.1, 1 - _TOP)
    names = [*(f"{100 * tick:.4g} %" for tick in _TICKS), f"{100 * _TOP:.4g} % or more"]
    axes.set_yticks([1 - tick for tick in (*_TICKS, _TOP)], names)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    legend_beside(axes)


def _speedups(axes: Axes, report: LayersReport) -> None:
    """Bars from 1.0, which is mode full; those below are slower."""
    from matplotlib.ticker import MaxNLocator

    layers, speeds = zip(*((one.exit_layer, one.speedup) for one in report.exits), strict=True)
    colours = [BLUE if speed >= 1 else ORANGE for speed in speeds]
    bars = axes.bar(layers, [speed - 1 for speed in speeds], bottom=1, color=colours)
    if len(layers) <= _MOST_VALUES:
        axes.bar_label(bars, [f"{speed:.2f}x" for speed in speeds], padding=2, fontsize="small")
    axes.axhline(1, color="black", linewidth=0.9)
    low, high = min(1.0, *speeds), max(1.0, *speeds)
    room = 0.1 * max(high - low, 0.05)
    axes.set(xlim=(0.4, report.layers - 0.4), ylim=(low - room, high + room))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2f}x")
    axes.set(xlabel="exit layer", ylabel="predicted speed over mode full")
    axes.set_title(f"where {100 * report.options.agreement:.4g} % of the exits agree", fontsize="medium")
