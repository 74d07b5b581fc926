"""`freeexport evaluate-exits`: which layer of a checkpoint to exit after."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from freeexport.page import pairs, print_page, table
from freeexport.progress import progress
from freeexport.verb_options import MAX_NEW_TOKENS, SAMPLES
from runtime.errors import OptionError

if TYPE_CHECKING:
    from rich.table import Table

    from freeexport.exit_cost import StepCosts
    from freeexport.exit_curve import Curve, Point
    from freeexport.exit_evaluation import Evaluation, Forcing
    from freeexport.jsonl import Request
    from freeexport.training_data import Example

TARGETS = (0.99, 0.95, 0.90)
_CURVE_POINTS = 100


@dataclass(frozen=True)
class Options:
    """`forcing` is what the decoder reads: its own greedy output or the data's targets. `max_tokens` limits a
    sequence, `max_new_tokens` a greedy output. `agreement` is what exits must reach to be recommended."""

    forcing: Forcing = "output"
    samples: int = 200
    max_new_tokens: int = 64
    max_tokens: int = 512
    batch_size: int = 8
    agreement: float = 0.99
    max_pending: int = 16
    bundle: Path | None = None


@dataclass(frozen=True)
class Exit:
    """A layer as an exit. `agreement` and `accuracy` count every token; `at` has the point with the most exits for
    each agreement asked for. `speedup` and `break_even` (an exit rate, None where exits never pay) are predicted."""

    exit_layer: int
    agreement: float
    accuracy: float
    at: dict[float, Point]
    point: Point
    speedup: float
    break_even: float | None
    curve: Curve


@dataclass(frozen=True)
class Report:
    """`deep_accuracy` is the whole model's; accuracies count tokens that equal what was forced."""

    model: str
    layers: int
    tokens: int
    examples: int
    options: Options
    deep_accuracy: float
    costs: StepCosts
    exits: tuple[Exit, ...]

    @property
    def recommended(self) -> Exit | None:
        """The exit with the largest speedup at the agreement asked for; None where none is faster than no exit."""
        best = max(self.exits, key=lambda one: one.speedup)
        return best if best.speedup > 1 else None


def evaluate_exits(model: str, data: Path, options: Options) -> Report:
    """Evaluate every layer but the last as an exit, on `options.samples` lines of `data`.

    Raises DataError for data that cannot be used, CheckpointError, and OptionError for a bundle of another depth.
    """
    from freeexport.checkpoint import open_checkpoint
    from freeexport.exit_cost import analytic
    from freeexport.exit_evaluation import evaluate, greedy_outputs
    from freeexport.reference import reference_model
    from freeexport.text_format import text_format
    from freeexport.training_data import DataError
    from graphs.families import describe

    checkpoint = open_checkpoint(model)
    description = describe(checkpoint.config, checkpoint)
    layers = len(description.decoder.layers)
    if layers < 2:
        raise OptionError(f"{checkpoint.name} has one decoder layer, and an exit needs at least two")
    costs = analytic(description, checkpoint) if options.bundle is None else _measured(options.bundle, layers)
    examples = _examples(data, text_format(checkpoint, description, options.max_tokens), options)
    reference = reference_model(checkpoint)
    if options.forcing == "output":
        with progress("decoding", len(examples)) as advance:
            examples = greedy_outputs(
                reference, checkpoint, examples, options.max_new_tokens, options.batch_size, advance
            )
    with progress("evaluating", len(examples)) as advance:
        evaluation = evaluate(reference, checkpoint, description, examples, options.batch_size, advance)
    if evaluation.tokens == 0:
        raise DataError(f"{data}: no output has a second token, and the first never exits; give longer texts")
    exits = tuple(exit_of(evaluation, layer, costs, options) for layer in range(1, layers))
    return Report(
        checkpoint.name, layers, evaluation.tokens, len(examples), options, evaluation.accuracy(layers), costs, exits
    )


def exit_of(evaluation: Evaluation, layer: int, costs: StepCosts, options: Options) -> Exit:
    from freeexport.exit_curve import Curve

    agrees = evaluation.agrees(layer)
    curve = Curve.of(evaluation.layers[layer - 1].confidence, agrees)
    point = curve.at_agreement(options.agreement)
    at_layer = costs.at(layer, len(evaluation.layers))
    return Exit(
        exit_layer=layer,
        agreement=float(agrees.mean()),
        accuracy=evaluation.accuracy(layer),
        at={target: curve.at_agreement(target) for target in TARGETS},
        point=point,
        speedup=at_layer.speedup(point.exit_rate, options.max_pending),
        break_even=at_layer.break_even(options.max_pending),
        curve=curve,
    )


def _measured(bundle: Path, layers: int) -> StepCosts:
    from freeexport.exit_cost import measured
    from runtime.bundle import Bundle

    manifest = Bundle.open(bundle).manifest
    if manifest.layers != layers:
        raise OptionError(f"{bundle} has {manifest.layers} layers, the checkpoint {layers}; name a bundle made from it")
    return measured(manifest)


def _examples(data: Path, form: Any, options: Options) -> list[Example]:
    from freeexport.training_data import encode

    forced = options.forcing == "targets"
    requests = [request if forced else replace(request, target="") for request in _requests(data, options)]
    if not forced and not form.seq2seq:
        # What is decoded shares the limit with the prompt.
        form = replace(form, limit=max(1, form.limit - options.max_new_tokens))
    examples, left_out = encode(requests, form, data)
    if left_out is not None:
        click.echo(f"warning: {left_out}", err=True)
    return examples


def _requests(data: Path, options: Options) -> list[Request]:
    from freeexport.jsonl import BrokenLine, read_requests
    from freeexport.training_data import DataError

    requests: list[Request] = []
    for line in read_requests(data):
        if len(requests) == options.samples:
            break
        if isinstance(line, BrokenLine):
            raise DataError(f"{data}, line {line.line_number}: {line.reason}; repair or remove the line")
        if options.forcing == "targets" and line.target is None:
            raise DataError(f"{data}, line {line.line_number}: 'target' is missing; add it, or use --on output")
        requests.append(line)
    if not requests:
        raise DataError(f"{data} has no examples; give one JSON object with 'input' a line")
    return requests


def as_dict(report: Report) -> dict[str, Any]:
    """The report for programs; curves at about a hundred exit rates."""
    best = report.recommended
    options = {
        **asdict(report.options),
        "bundle": None if report.options.bundle is None else str(report.options.bundle),
    }
    return {
        "model": report.model,
        "layers": report.layers,
        "tokens": report.tokens,
        "examples": report.examples,
        "options": options,
        "deep_accuracy": report.deep_accuracy,
        "costs": {"layer": report.costs.layer, "head": report.costs.head, "measured": report.costs.measured},
        "recommended": None if best is None else best.exit_layer,
        "exits": [
            {
                "exit_layer": one.exit_layer,
                "agreement": one.agreement,
                "accuracy": one.accuracy,
                "chosen": asdict(one.point),
                "at": {str(target): asdict(point) for target, point in one.at.items()},
                "speedup": one.speedup,
                "break_even": one.break_even,
                "curve": [asdict(point) for point in one.curve.sampled(_CURVE_POINTS)],
            }
            for one in report.exits
        ],
    }


def tables(report: Report) -> list[Table]:
    """The page: a line a layer, and what it comes to."""
    target = report.options.agreement
    columns = ("exit layer#", "agreement#", "accuracy#", *(f"exits at {one:.0%}#" for one in TARGETS))
    columns += ("threshold#", "exits#", "speedup#", "break-even#")
    return [
        table(f"Exits of {report.model}", columns, [_row(one) for one in report.exits]),
        pairs("Summary", _summary(report, target)),
    ]


def _row(one: Exit) -> tuple[str, ...]:
    return (
        str(one.exit_layer),
        f"{one.agreement:.1%}",
        f"{one.accuracy:.1%}",
        *(f"{one.at[target].exit_rate:.1%}" for target in TARGETS),
        f"{one.point.threshold:.3f}",
        f"{one.point.exit_rate:.1%}",
        f"{one.speedup:.2f}x",
        "never" if one.break_even is None else f"{one.break_even:.1%}",
    )


def _summary(report: Report, target: float) -> list[tuple[str, str]]:
    best, costs = report.recommended, report.costs
    forced = "the model's own greedy output" if report.options.forcing == "output" else "the targets"
    if best is None:
        advice = f"none: at {target:.4g} agreement no layer is faster than no exit; train one (freeexport train)"
    else:
        point = best.point
        advice = (
            f"exit after layer {best.exit_layer} above {point.threshold:.3f}: {point.exit_rate:.1%} of tokens exit, "
            f"{best.speedup:.2f}x"
        )
    unit = "ms, measured" if costs.measured else "MB of weights, not measured"
    scale = 1 if costs.measured else 1e-6
    return [
        ("tokens", f"{report.tokens} of {report.examples} examples, after {forced}"),
        ("accuracy of all layers", f"{report.deep_accuracy:.1%}"),
        ("costs", f"a layer {costs.layer * scale:.3g}, the head {costs.head * scale:.3g} ({unit})"),
        ("threshold, exits, speedup", f"where {target:.4g} of the exits agree with the last layer"),
        ("recommended", advice),
    ]


@click.command()
@click.argument("model")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSONL with 'input' (and 'target').")
@click.option(
    "--on",
    "forcing",
    type=click.Choice(["output", "targets"]),
    default=Options.forcing,
    show_default=True,
    help="What the decoder reads: its own greedy output, or the data's targets.",
)
@click.option("--samples", type=click.IntRange(1), default=Options.samples, show_default=True, help=SAMPLES)
@click.option("--agreement", type=click.FloatRange(0, 1), default=Options.agreement, show_default=True,
              help="The share of exits that must agree with the last layer.")  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(1), default=Options.max_new_tokens, show_default=True,
              help=MAX_NEW_TOKENS)  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(2), default=Options.max_tokens, show_default=True,
              help="Most tokens read of a line, prompt included.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=Options.batch_size, show_default=True,
              help="Lines that are decoded at once.")  # fmt: skip
@click.option(
    "--max-pending", type=click.IntRange(1), default=Options.max_pending, show_default=True, help="Rows of a sync pass."
)
@click.option("--bundle", type=click.Path(path_type=Path), help="Take the costs that this bundle of MODEL measured.")
@click.option("--json", "as_json", is_flag=True, help="Print the report, with the curves, as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write the curves to this PNG (needs the extra bench).")
def command(model: str, data: Path, as_json: bool, plot: Path | None, **options: Any) -> None:
    """Compare the layers of the checkpoint MODEL as exits, on the lines of a JSONL file.

    Agreement is with the last layer, over all tokens but the first of an output. A confidence above the threshold
    exits; `exits at 99%` is the largest share of tokens that can exit so that 99 % of them agree. Speedups are
    predicted, from the sizes of layers and head, or from a bundle's measurements.

    \b
    Example:
      freeexport evaluate-exits path/to/checkpoint --data validation.jsonl --plot exits.png
    """
    from freeexport import exit_plot

    if plot is not None:
        exit_plot.check(plot)
    report = evaluate_exits(model, data, Options(**options))
    if plot is not None:
        exit_plot.write(report, plot)
    if as_json:
        click.echo(json.dumps(as_dict(report), indent=2))
    else:
        print_page(tables(report))
