"""Calibration of a checkpoint before it is exported.

transformers generates each output of the full model. Both exits then predict its tokens,
teacher-forced. The engines of a bundle do not run, so a threshold in fp32 precedes any conversion.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import click
import numpy as np
import torch

from freeexport.calibrate.beside import SAMPLE_TOKENS, TracedAnswer
from freeexport.calibrate.calibrate import (
    Calibrated,
    CalibrateOptions,
    CheckpointExit,
    check_enough,
    check_sequences,
    explained,
)
from freeexport.calibrate.sources import FIRST, check_unknown
from freeexport.calibrate.threshold import choose
from freeexport.calibrate.traces import TraceCache, Traces
from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.checkpoints.examples import (
    DataError,
    Example,
    TextFormat,
    prompts_of,
    read_examples,
    text_format,
)
from freeexport.checkpoints.special_tokens import forced
from freeexport.checkpoints.transformers_model import greedy_ids, reference_model
from freeexport.costs.bytes import step_bytes
from freeexport.system.jsonl import InputLine
from freeexport.system.progress import duration, progress
from freeexport.training.batches import Collator
from freeexport.training.exit_modules import trained_exit
from freeexport.training.losses import cross_entropy
from freeexport.training.shallow_deep import IGNORED, ShallowDeep, exits_of
from graphs.description import Description
from graphs.families import describe
from runtime.bundle.bundle import sha256_of
from runtime.bundle.costs import MAX_PENDING
from runtime.bundle.manifest import ConfidenceMeasure
from runtime.errors import CalibrationError, OptionError

# Longest sequence, the default capacity of a bundle.
LONGEST = 2048
# Sequences that are generated together, and rows whose logits are in memory at once.
BATCH = 8
ROWS = 512
# Measure of the confidence, the default of convert.
CONFIDENCE: ConfidenceMeasure = "softmax"


def calibrate_checkpoint(
    model: str, data: Path, options: CalibrateOptions
) -> tuple[Calibrated, list[TracedAnswer]]:
    """Calibrate the exit of a checkpoint.

    Writes only the traces, to a file beside the checkpoint.

    Returns:
        The calibration, and sequences to compare the engines of a conversion with.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
        DataError: If the data cannot be read, or no line can be used.
        CalibrationError: If the checkpoint has no trained exit, or the data do not suffice.
        OptionError: If an option needs a bundle.
    """
    if options.rule.needs_outputs:
        raise OptionError(
            "a metric compares what mode free writes, which needs a bundle; convert, calibrate that"
        )
    if options.rounds:
        raise OptionError("--rounds times engines, and a checkpoint has none; leave it out")
    checkpoint = open_checkpoint(model)
    if checkpoint.exit is None or not checkpoint.exit.trained:
        raise CalibrationError(
            f"{checkpoint.name} has no trained exit (exit.json); train one with freeexport train, "
            "or convert the checkpoint and calibrate the bundle"
        )
    description = describe(checkpoint.config, checkpoint)
    if description.spectrogram is not None:
        raise CalibrationError(
            f"{checkpoint.name} reads speech; convert it and calibrate the bundle"
        )
    requests = read_examples(data, options.samples)
    check_sequences(len(requests), options.rule)  # before long work
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    form = text_format(checkpoint, description, LONGEST)
    prompts = _fitting(requests, form, data)
    place = Path(model).expanduser().absolute()
    tracer = Tracer(checkpoint, description, form, options)
    cache = TraceCache(
        place.with_name(f"{place.name}.traces.jsonl"),
        {
            "model": checkpoint.sha256,
            "data": sha256_of(data),
            "exit_layer": checkpoint.exit.exit_layer,
            "confidence": CONFIDENCE,
            "max_new_tokens": options.max_new_tokens,
        },
    )
    traces = _collected(tracer, prompts, cache)
    check_enough(traces, options.rule)
    choice = choose(traces, options.rule)
    layers = len(description.decoder.layers)
    exit_file = checkpoint.exit
    vocabulary = exit_file.vocabulary
    share = 1.0
    if vocabulary is not None:
        share = (vocabulary.size + 1) / description.vocab_size
    costs = step_bytes(description, checkpoint).at(
        exit_file.exit_layer, layers, exit_file.exit_layers, share=share, reads=exit_file.exit_input
    )
    facts = CheckpointExit(
        source_sha256=checkpoint.sha256,
        vocab_size=description.vocab_size,
        layers=layers,
        exit_layer=exit_file.exit_layer,
        confidence=CONFIDENCE,
        max_pending=MAX_PENDING,
    )
    result = explained(
        choice, model, facts, traces=traces, costs=costs, rule=options.rule, data=str(data)
    )
    return result, sampled_answers(traces, prompts, choice.threshold)


def _fitting(requests: Sequence[InputLine], form: TextFormat, data: Path) -> dict[int, np.ndarray]:
    """Return the prompts that leave room for an output, by line.

    Raises:
        DataError: If there are none.
        CalibrationError: If the data need another vocabulary.
    """
    found = {
        request.line_number: np.asarray(prompt)
        for request, prompt in zip(requests, prompts_of(requests, form, data), strict=True)
    }
    longest = form.limit if form.seq2seq else form.limit - 2
    fitting = {line: prompt for line, prompt in found.items() if 0 < len(prompt) <= longest}
    if not fitting:
        raise DataError(
            f"none of the {len(found)} inputs of {data} can be used: they are empty, or longer "
            f"than {longest} tokens; give others"
        )
    if len(fitting) < len(found):
        click.echo(
            f"warning: {len(found) - len(fitting)} of {len(found)} inputs are left out: they are "
            f"empty, or longer than {longest} tokens",
            err=True,
        )
    check_unknown(fitting.values(), form.tokenizer.unk_token_id)
    return fitting


def _collected(tracer: Tracer, prompts: dict[int, np.ndarray], cache: TraceCache) -> Traces:
    """Return the traces of all prompts. New ones are added to the cache."""
    missing = [line for line in prompts if cache.get(line) is None]
    began = monotonic()
    with progress("decoding", len(prompts), len(prompts) - len(missing)) as advance:
        for start in range(0, len(missing), BATCH):
            lines = missing[start : start + BATCH]
            for trace in tracer.traces(lines, [prompts[line] for line in lines]):
                cache.add(trace)
                advance()
            left = len(missing) - start - len(lines)
            if start == 0 and left > FIRST:
                each = (monotonic() - began) / len(lines)
                click.echo(f"about {duration(each * left)} for {left} sequences", err=True)
    found = [cache.get(line) for line in prompts]
    return Traces.joined([trace for trace in found if trace is not None])


class Tracer:
    """Traces outputs of a checkpoint with torch."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        description: Description,
        form: TextFormat,
        options: CalibrateOptions,
    ) -> None:
        assert checkpoint.exit is not None
        self._checkpoint = checkpoint
        self._form = form
        self._most = options.max_new_tokens
        own, known = trained_exit(checkpoint, description)
        model = reference_model(checkpoint, options.device)
        exit_layer = checkpoint.exit.exit_layer
        self._module: Any = ShallowDeep(model, description, exit_layer, "ce", own=own, known=known)
        self._module.to(model.device).eval()
        generation = checkpoint.generation_config
        start = generation.get("decoder_start_token_id") if form.seq2seq else None
        self._collate = Collator(start)
        # Tokens at the beginning of an output that cannot exit: the first one after the prompt of a
        # decoder-only model, or a forced one.
        is_forced = forced(generation, "forced_bos_token_id") is not None
        self._skipped = int(is_forced) if form.seq2seq else 1

    def traces(self, lines: Sequence[int], prompts: Sequence[np.ndarray]) -> list[Traces]:
        """Generate the outputs of prompts, int [n] each, and return the trace of each."""
        room = self._most
        if not self._form.seq2seq:
            room = min(room, self._form.limit - max(map(len, prompts)))
        outputs = greedy_ids(self._module.model, self._checkpoint, prompts, room)
        examples = [
            Example(prompt, output, line)
            for prompt, output, line in zip(prompts, outputs, lines, strict=True)
        ]
        batch = {
            name: tensor.to(self._module.device) for name, tensor in self._collate(examples).items()
        }
        found = self._predicted(batch)
        place = 0
        traces = []
        for line, output in zip(lines, outputs, strict=True):
            rows = slice(place + self._skipped, place + len(output))
            place += len(output)
            traces.append(Traces.one(line, **{name: all_[rows] for name, all_ in found.items()}))
        return traces

    def _predicted(self, batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Return the fields of a trace for all N rows of a batch."""
        module = self._module
        tokens = None if module.known is None else module.known.vocabulary
        parts: dict[str, list[np.ndarray]] = {
            name: [] for name in ("confidence", "agrees", "nll", "token")
        }
        with torch.inference_mode():
            hidden = module.hidden_states(**batch)
            count = int((batch["labels"] != IGNORED).sum())
            normed = module.exit_normed(hidden)
            deep_normed = module.head.normed(hidden[module.layers])
            for start in range(0, count, ROWS):
                rows = slice(start, start + ROWS)
                token, confidence = exits_of(module.read_exit(normed[rows]), tokens, CONFIDENCE)
                deep = module.head.read(deep_normed[rows])
                values = {
                    "confidence": confidence,
                    "agrees": token == deep.argmax(-1),
                    "nll": cross_entropy(deep, token),
                    "token": token,
                }
                for name, value in values.items():
                    parts[name].append(value.cpu().numpy())
        return {name: np.concatenate(values) for name, values in parts.items()}


def sampled_answers(
    traces: Traces, prompts: dict[int, np.ndarray], threshold: float
) -> list[TracedAnswer]:
    """Select sequences to compare engines with, of about SAMPLE_TOKENS tokens."""
    above = traces.above(threshold)
    ends = np.cumsum(traces.length)
    samples: list[TracedAnswer] = []
    for line, length, end in zip(traces.line, traces.length, ends, strict=True):
        if sum(sample.tokens for sample in samples) >= SAMPLE_TOKENS:
            break
        rows = slice(int(end - length), int(end))
        if length:
            samples.append(
                TracedAnswer(
                    prompt=tuple(prompts[int(line)].tolist()),
                    tokens=int(length),
                    agreeing=int(traces.agrees[rows].sum()),
                    confident=int(above[rows].sum()),
                )
            )
    return samples
