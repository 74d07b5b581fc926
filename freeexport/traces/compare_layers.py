"""Which layer of a checkpoint to exit after: every layer evaluated as an exit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from freeexport.checkpoints.transformers_model import Dtype
from freeexport.system.progress import progress
from freeexport.traces.share import Share
from freeexport.traces.verdict import ExitFacts, Verdict, verdict
from runtime.errors import OptionError

if TYPE_CHECKING:
    from freeexport.checkpoints.examples import Example
    from freeexport.costs.per_layer import StepCosts
    from freeexport.traces.curve import Curve, Point
    from freeexport.traces.every_layer import Evaluation, Forcing

TARGETS = (0.99, 0.95, 0.90)


@dataclass(frozen=True)
class Options:
    """`forcing` is what the decoder reads: its own greedy output or the data's targets. `max_tokens` limits a
    sequence, `max_new_tokens` a greedy output. `agreement` is what exits must reach to be recommended. `device` and
    `dtype`: where and in which type the checkpoint runs."""

    forcing: Forcing = "output"
    samples: int = 200
    max_new_tokens: int = 64
    max_tokens: int = 512
    batch_size: int = 8
    agreement: float = 0.99
    max_pending: int = 16
    bundle: Path | None = None
    device: str = "cpu"
    dtype: Dtype = "float32"


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
    reference = reference_model(checkpoint, options.device, options.dtype)
    if options.forcing == "output":
        with progress("decoding", len(examples)) as advance:
            examples = greedy_outputs(
                reference, checkpoint, examples, options.max_new_tokens, options.batch_size, advance
            )
    with progress("evaluating", len(examples)) as advance:
        evaluation = evaluate(reference, checkpoint, description, examples, options.batch_size, advance)
    if evaluation.tokens == 0:
        raise DataError(f"{data}: no output has a token that could exit; give longer texts")
    found = checkpoint.exit
    own = {} if found is None else {found.exit_layer: found.exit_layers}
    exits = tuple(exit_of(evaluation, layer, costs, options, own.get(layer, 0)) for layer in range(1, layers))
    return Report(
        checkpoint.name, layers, evaluation.tokens, len(examples), options, evaluation.accuracy(layers), costs, exits
    )


def exit_of(evaluation: Evaluation, layer: int, costs: StepCosts, options: Options, own: int = 0) -> Exit:
    """`own`: layers that the exit has of its own."""
    from freeexport.traces.curve import Curve

    agrees, confidence = evaluation.agrees(layer), evaluation.layers[layer - 1].confidence
    curve = Curve.of(confidence, agrees)
    point = curve.at_agreement(options.agreement)
    exits = confidence.astype(np.float64) > point.threshold
    at_layer = costs.at(layer, len(evaluation.layers), own)
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
    from freeexport.checkpoints.examples import encode, read_examples

    forced = options.forcing == "targets"
    requests = read_examples(data, options.samples, "add it, or use --on output" if forced else "")
    if not forced:
        requests = [replace(request, target="") for request in requests]
    if not forced and not form.seq2seq:
        # What is decoded shares the limit with the prompt.
        form = replace(form, limit=max(1, form.limit - options.max_new_tokens))
    examples, left_out = encode(requests, form, data)
    if left_out is not None:
        click.echo(f"warning: {left_out}", err=True)
    return examples
