"""`freeexport evaluate-exits`: which layer of a checkpoint to exit after."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from freeexport.commands.verb_options import MAX_NEW_TOKENS, SAMPLES
from freeexport.system.page import print_page
from freeexport.system.progress import progress
from freeexport.traces.share import Share
from freeexport.traces.verdict import ExitFacts, Verdict, verdict
from runtime.errors import OptionError

if TYPE_CHECKING:
    from freeexport.checkpoints.examples import Example
    from freeexport.costs.per_layer import StepCosts
    from freeexport.system.jsonl import Request
    from freeexport.traces.curve import Curve, Point
    from freeexport.traces.every_layer import Evaluation, Forcing

TARGETS = (0.99, 0.95, 0.90)


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
    each agreement asked for. `speedup` and `break_even` (an exit rate, None where exits never pay) are predicted.
    `exit_rate` and `exit_agreement` (None where none exits) are those of `point`, with their intervals."""

    exit_layer: int
    agreement: float
    accuracy: float
    at: dict[float, Point]
    point: Point
    speedup: float
    break_even: float | None
    curve: Curve
    exit_rate: Share | None = None
    exit_agreement: Share | None = None


@dataclass(frozen=True)
class Report:
    """`deep_accuracy` is the whole model's; accuracies count tokens that equal what was forced, and say something only
    where that was the data's targets."""

    model: str
    layers: int
    tokens: int
    examples: int
    options: Options
    deep_accuracy: float
    costs: StepCosts
    exits: tuple[Exit, ...]

    @property
    def best(self) -> Exit:
        """The exit with the largest speedup at the agreement asked for."""
        return max(self.exits, key=lambda one: one.speedup)

    @property
    def recommended(self) -> Exit | None:
        """The best; None where that is no faster than no exit."""
        return self.best if self.best.speedup > 1 else None

    @property
    def verdict(self) -> Verdict:
        """On the best exit."""
        best, target = self.best, self.options.agreement
        return verdict(
            ExitFacts(
                name=self.model,
                exit_layer=best.exit_layer,
                layers=self.layers,
                threshold=best.point.threshold,
                why_never=f"no layer has a confidence from which {target:.4g} of the exits agree",
                exit_rate=best.exit_rate,
                exit_agreement=best.exit_agreement,
                break_even=best.break_even,
                speedup=best.speedup,
                basis="measured" if self.costs.measured else "sizes",
                checkpoint=True,
            )
        )


def evaluate_exits(model: str, data: Path, options: Options) -> Report:
    """Evaluate every layer but the last as an exit, on `options.samples` lines of `data`.

    Raises DataError for data that cannot be used, CheckpointError, and OptionError for a bundle of another depth.
    """
    from freeexport.checkpoints.checkpoint import open_checkpoint
    from freeexport.checkpoints.examples import DataError
    from freeexport.checkpoints.text_format import text_format
    from freeexport.checkpoints.transformers_model import reference_model
    from freeexport.costs.per_layer import analytic
    from freeexport.traces.every_layer import evaluate, greedy_outputs
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
    from freeexport.traces.curve import Curve

    agrees, confidence = evaluation.agrees(layer), evaluation.layers[layer - 1].confidence
    curve = Curve.of(confidence, agrees)
    point = curve.at_agreement(options.agreement)
    exits = confidence.astype(np.float64) > point.threshold
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
        exit_rate=evaluation.share(exits),
        exit_agreement=evaluation.share(agrees, exits),
    )


def _measured(bundle: Path, layers: int) -> StepCosts:
    from freeexport.costs.per_layer import measured
    from runtime.bundle.bundle import Bundle

    manifest = Bundle.open(bundle).manifest
    if manifest.layers != layers:
        raise OptionError(f"{bundle} has {manifest.layers} layers, the checkpoint {layers}; name a bundle made from it")
    return measured(manifest)


def _examples(data: Path, form: Any, options: Options) -> list[Example]:
    from freeexport.checkpoints.examples import encode

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
    from freeexport.checkpoints.examples import DataError
    from freeexport.system.jsonl import BrokenLine, read_requests

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


@click.command()
@click.argument("model")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSONL with 'input' (and 'target').")
@click.option(
    "--on",
    "forcing",
    type=click.Choice(["output", "targets"]),
    default=Options.forcing,
    show_default=True,
    help="Text that the decoder reads: its own greedy output, or the data's targets.",
)
@click.option("--samples", type=click.IntRange(1), default=Options.samples, show_default=True, help=SAMPLES)
@click.option("--agreement", type=click.FloatRange(0, 1), default=Options.agreement, show_default=True,
              help="The share of exits that must agree with the last layer.")  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(1), default=Options.max_new_tokens, show_default=True,
              help=MAX_NEW_TOKENS)  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(2), default=Options.max_tokens, show_default=True,
              help="Read at most so many tokens of a line, prompt included.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=Options.batch_size, show_default=True,
              help="Lines to decode at once.")  # fmt: skip
@click.option(
    "--max-pending",
    type=click.IntRange(1),
    default=Options.max_pending,
    show_default=True,
    help="Maximum tokens in a sync pass.",
)
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Use the costs that were measured on this bundle of MODEL."
)
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
    from freeexport.traces import layers_plot as exit_plot
    from freeexport.traces.exit_report import as_dict, tables

    if plot is not None:
        exit_plot.check(plot)
    report = evaluate_exits(model, data, Options(**options))
    if plot is not None:
        exit_plot.write(report, plot)
    if as_json:
        click.echo(json.dumps(as_dict(report), indent=2))
    else:
        print_page(tables(report))
