"""Layers of a checkpoint's decoder as exits: their traces, and `freeexport evaluate CHECKPOINT --layers`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import numpy as np

from freeexport.checkpoints.examples import DataError, Example, TextFormat, encode, read_examples, text_format
from freeexport.checkpoints.transformers_model import Dtype, greedy_ids, reference_model
from freeexport.measure.exit_verdict import ExitFacts, verdict
from freeexport.measure.traces import Traces
from freeexport.system.jsonl import Request
from freeexport.system.page import pairs, table
from freeexport.system.progress import Advance, progress
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import Bundle
from runtime.errors import OptionError

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from freeexport.checkpoints.checkpoint import Checkpoint
    from graphs.description import Description
    from graphs.step_costs import StepCosts

TARGETS = (0.99, 0.95, 0.90)
MAX_PENDING = 16
_LOGIT_ROWS = 256  # tokens whose logits are in memory at a time: a vocabulary of 150,000 takes 150 MB


class LayerReader:
    """A loaded checkpoint whose layers are read through the final norm and the head; the exit layer of one whose exit
    has parameters of its own, through those."""

    def __init__(self, model: Any, checkpoint: Checkpoint, description: Description, exit_layer: int) -> None:
        from freeexport.training.batches import Collator
        from freeexport.training.exit_modules import trained_exit
        from freeexport.training.shallow_deep import EXIT, ShallowDeep

        self._model, self._checkpoint = model, checkpoint
        own, known = trained_exit(checkpoint, description)
        # The loss of all layers keeps the states of all.
        module = ShallowDeep(model, description, exit_layer, "weighted-ce", own=own, known=known)
        self._module, self.layers = module.eval().to(model.device), module.layers
        normed = module.head.normed if own is None else own.norm
        # The name of each layer's state, the head that reads it, and the tokens that this knows, None for all.
        self._readers: dict[int, tuple[int, Any, Any]] = {n: (n, module.head, None) for n in range(1, self.layers + 1)}
        self._readers[exit_layer] = (
            exit_layer if own is None else EXIT,
            lambda hidden: module.read_exit(normed(hidden)),
            None if known is None else known.vocabulary,
        )
        start = checkpoint.generation_config.get("decoder_start_token_id") if module.seq2seq else None
        self._collate = Collator(start)

    def greedy_outputs(
        self, examples: Sequence[Example], new_tokens: int, batch_size: int, advance: Advance
    ) -> list[Example]:
        """The examples with the model's own greedy output, at most `new_tokens` ids, in place of their targets."""
        outputs = []
        for batch in _batches(examples, batch_size):
            written = greedy_ids(self._model, self._checkpoint, [example.prompt for example in batch], new_tokens)
            outputs += [replace(example, target=ids) for example, ids in zip(batch, written, strict=True)]
            advance(len(batch))
        return outputs

    def every_layer(
        self, examples: Sequence[Example], batch_size: int, advance: Advance
    ) -> tuple[list[Traces], np.ndarray]:
        """Traces of each layer, the last being the whole model, over the examples' targets, and the forced tokens [N].
        Takes the memory of all hidden states of a batch, not of their logits."""
        layers = list(range(1, self.layers + 1))
        parts, targets = list[list[Traces]](), [np.zeros(0, np.int64)]
        # Long examples first: where memory does not do, it shows at once.
        for batch in _batches(sorted(examples, key=lambda one: -len(one.prompt) - len(one.target)), batch_size):
            traces, forced = self.traces(batch, layers)
            parts.append(traces)
            targets.append(forced)
            advance(len(batch))
        return [Traces.joined(each) for each in zip(*parts, strict=True)], np.concatenate(targets)

    def traces(self, batch: Sequence[Example], layers: Sequence[int]) -> tuple[list[Traces], np.ndarray]:
        """Traces of `layers` over a batch's targets, in its order, and the targets that may exit, int64 [N]."""
        import torch

        from freeexport.training.shallow_deep import IGNORED, exits_of

        module = self._module
        with torch.no_grad():
            inputs = {name: value.to(module.device) for name, value in self._collate(batch).items()}
            labels = inputs.pop("labels")
            if not module.seq2seq:  # the first token comes from the prompt's pass, which always runs all layers
                labels = labels.scatter(1, (labels != IGNORED).int().argmax(dim=1, keepdim=True), IGNORED)
            hidden = module.hidden_states(labels, **inputs)
            parts: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in layers]
            count = len(hidden[module.layers])
            for rows in (slice(start, start + _LOGIT_ROWS) for start in range(0, max(1, count), _LOGIT_ROWS)):
                deep = module.head(hidden[module.layers][rows]).float().log_softmax(-1)
                for part, layer in zip(parts, layers, strict=True):
                    state, head, known = self._readers[layer]
                    logits = deep if layer == module.layers else head(hidden[state][rows])
                    token, confidence = exits_of(logits, known)
                    nll = -deep.gather(1, token[:, None])[:, 0]
                    part.append((confidence, token == deep.argmax(-1), nll, token.int()))
        length = (labels != IGNORED).sum(dim=1).cpu().numpy()
        line = np.array([example.line for example in batch])
        found = [
            Traces(line, length, *(torch.cat(values).cpu().numpy() for values in zip(*part, strict=True)))
            for part in parts
        ]
        return found, labels[labels != IGNORED].cpu().numpy()


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def encoded(requests: Sequence[Request], form: TextFormat, data: Path, new_tokens: int | None = None) -> list[Example]:
    """Encode what fits, with a warning for the rest; or for `new_tokens`, only the inputs that leave room for them."""
    if new_tokens is not None:
        requests = [replace(request, target="") for request in requests]
        if not form.seq2seq:  # what is decoded shares the limit with the prompt
            form = replace(form, limit=max(1, form.limit - new_tokens))
    examples, left_out = encode(requests, form, data)
    if left_out is not None:
        click.echo(f"warning: {left_out}", err=True)
    return examples


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
        thresholds = (descending[cuts] + descending[cuts + 1]) / 2
        return cls(thresholds, exits / len(confidence), np.cumsum(agrees[order])[cuts] / exits)

    def at_agreement(self, target: float) -> Point:
        """The largest exit rate whose agreement reaches `target`; NO_EXIT where none does."""
        reaching = np.flatnonzero(self.agreement >= target)
        return self._point(int(reaching[-1])) if len(reaching) else NO_EXIT

    def _point(self, index: int) -> Point:
        return Point(float(self.threshold[index]), float(self.exit_rate[index]), float(self.agreement[index]))


def evaluate_layers(model: str, data: Path, options: LayersOptions) -> dict[str, Any]:
    """Evaluate every layer but the last as an exit, on `options.samples` lines of `data`, and return what JSON keeps.

    Raises DataError for data that cannot be used, CheckpointError, and OptionError for a bundle of another depth.
    """
    from freeexport.checkpoints.checkpoint import open_checkpoint
    from freeexport.measure.costs import measured_steps
    from graphs.families import describe
    from graphs.step_costs import analytic

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
        costs = measured_steps(manifest)
    form, forced = text_format(checkpoint, description, options.max_tokens), options.forcing == "targets"
    requests = read_examples(data, options.samples, "add it, or use --on output" if forced else "")
    examples = encoded(requests, form, data, None if forced else options.max_new_tokens)
    trained, own, head, inputs = None, 0, 1.0, 1
    if found is not None:
        trained, own, inputs = found.exit_layer, found.exit_layers, found.inputs
        head = found.head_share(description.vocab_size) if options.bundle is None else 1.0
        if not trained:
            raise OptionError(f"{checkpoint.name} has its exit before the first layer; evaluate a bundle of it instead")
    loaded = reference_model(checkpoint, options.device, options.dtype)
    reader = LayerReader(loaded, checkpoint, description, trained or 1)
    if not forced:
        with progress("decoding", len(examples)) as advance:
            examples = reader.greedy_outputs(examples, options.max_new_tokens, options.batch_size, advance)
    with progress("evaluating", len(examples)) as advance:
        traces, targets = reader.every_layer(examples, options.batch_size, advance)
    if not len(targets):
        raise DataError(f"{data}: no output has a second token, and the first never exits; give longer texts")
    return layers_report(checkpoint.name, traces, targets, len(examples), costs, options, trained, own, head, inputs)


def layers_report(
    model: str,
    traces: Sequence[Traces],
    targets: np.ndarray,
    examples: int,
    costs: StepCosts,
    options: LayersOptions,
    trained: int | None = None,
    own: int = 0,
    head: float = 1.0,
    inputs: int = 1,
) -> dict[str, Any]:
    """The figures of every layer but the last, whose `traces` come in order, and the verdict on the best one: that with
    the largest speedup at the agreement asked for; of several, the one that agrees most often.

    A layer's `agreement` and `accuracy` count every token; `at` has the point with the most exits for each of TARGETS,
    `chosen` that for the agreement asked for, at which are `exit_rate`, `exit_agreement` and the predicted `speedup`.
    Accuracies count tokens that equal what was forced, and are None where that was the model's own output. `trained`:
    the layer that the checkpoint was trained to exit after, with `own` layers of its own, which read so many `inputs`,
    and a share of the `head`.
    """
    layers, forced, wanted = len(traces), options.forcing == "targets", options.agreement
    exits: list[dict[str, Any]] = []
    facts: list[ExitFacts] = []
    for layer, one in enumerate(traces[:-1], start=1):
        at_layer = costs.at(layer, layers, *((own, head, inputs) if layer == trained else ()))
        curve = Curve.of(one.confidence, one.agrees)
        point = curve.at_agreement(wanted)
        above = one.above(point.threshold)
        fact = ExitFacts(
            name=model,
            exit_layer=layer,
            layers=layers,
            trained=layer == trained,
            threshold=point.threshold,
            why_never=f"no layer has a confidence from which {wanted:.4g} of the exits agree",
            agreement=one.share(one.agrees),
            exit_rate=one.share(above),
            exit_agreement=one.share(one.agrees, above),
            break_even=at_layer.break_even(MAX_PENDING),
            # Where nothing can exit, a session decodes as `full`.
            speedup=1.0 if point == NO_EXIT else at_layer.speedup(point.exit_rate, MAX_PENDING),
            basis="measured" if costs.measured else "sizes",
            checkpoint=True,
            heavy_head=at_layer.head > at_layer.shallow_without_head,
        )
        facts.append(fact)
        exits.append(
            {
                "exit_layer": layer,
                "agreement": float(one.agrees.mean()),
                "accuracy": float((one.token == targets).mean()) if forced else None,
                "chosen": asdict(point),
                "exit_rate": None if fact.exit_rate is None else asdict(fact.exit_rate),
                "exit_agreement": None if fact.exit_agreement is None else asdict(fact.exit_agreement),
                "at": {str(target): asdict(curve.at_agreement(target)) for target in TARGETS},
                "speedup": fact.speedup,
                "break_even": fact.break_even,
            }
        )
    best = max(range(len(exits)), key=lambda number: (exits[number]["speedup"], exits[number]["agreement"]))
    return {
        "model": model,
        "layers": layers,
        "tokens": len(targets),
        "examples": examples,
        "options": {**asdict(options), "bundle": None if options.bundle is None else str(options.bundle)},
        "deep_accuracy": float((traces[-1].token == targets).mean()) if forced else None,
        "costs": {"layer": costs.layer, "head": costs.head, "measured": costs.measured},
        "recommended": exits[best]["exit_layer"] if exits[best]["speedup"] > 1 else None,
        "verdict": asdict(verdict(facts[best])),
        "exits": exits,
    }


def tables(report: Mapping[str, Any]) -> list[Table]:
    """A line a layer, and the verdict."""
    # After the model's own output, accuracy would be agreement again, and that of all layers 100 %.
    targets = report["options"]["forcing"] == "targets"
    columns = (*("layer#", "agrees#", "right#"), *(f"at {one:.0%}#" for one in TARGETS),
               *("threshold#", "exits#", "speed#", "pays from#"))  # fmt: skip
    rows = [
        (
            str(one["exit_layer"]),
            f"{one['agreement']:.1%}",
            f"{one['accuracy']:.1%}" if targets else "",
            *(f"{one['at'][str(target)]['exit_rate']:.1%}" for target in TARGETS),
            "never" if one["chosen"]["threshold"] >= NEVER_EXIT else f"{one['chosen']['threshold']:.3f}",
            f"{one['chosen']['exit_rate']:.1%}",
            f"{one['speedup']:.2f}x",
            "never" if one["break_even"] is None else f"{one['break_even']:.1%}",
        )
        for one in report["exits"]
    ]
    costs, found, agreement = report["costs"], report["verdict"], report["options"]["agreement"]
    unit, scale = ("ms, measured", 1.0) if costs["measured"] else ("MB of weights, not measured", 1e-6)
    forced = "the targets" if targets else "the model's own greedy output"
    summary = {
        "tokens": f"{report['tokens']} of {report['examples']} examples, after {forced}",
        "accuracy of all layers": f"{report['deep_accuracy']:.1%}" if targets else "",
        "costs": f"a layer {costs['layer'] * scale:.3g}, the head {costs['head'] * scale:.3g} ({unit})",
        "at 99%": "the largest share of tokens that can exit so that 99 % of them agree",
        "threshold, exits, speed": f"where {agreement:.4g} of the exits agree; speed over mode full, predicted",
        "verdict on the best layer": found["text"],
        "next step": found["next_step"],
    }
    shown = [(name, text) for name, text in summary.items() if text]
    return [table(f"Layers of {report['model']} as exits", columns, rows), pairs("Summary", shown)]
