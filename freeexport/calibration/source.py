"""What is calibrated: a bundle, which decodes with its engines, or a checkpoint, with transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click
import numpy as np

from freeexport.calibration.options import CalibrateOptions
from freeexport.calibration.outputs import Outputs
from freeexport.checkpoints.examples import DataError, TextFormat
from freeexport.checkpoints.text_format import known_ends, text_format
from freeexport.costs.forced_exits import ForcedExitSession
from freeexport.costs.measured import measured_costs
from freeexport.costs.threshold_speed import measured_speedups
from freeexport.metrics import Reference
from freeexport.system.jsonl import Request
from freeexport.traces.from_bundle import trace_of
from freeexport.traces.trace import Trace
from runtime import Session
from runtime.bundle.beta_mixture import NEVER_EXIT
from runtime.bundle.calibration import is_calibration
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import ConfidenceMeasure, Manifest
from runtime.bundle.precision import ExitVocabulary
from runtime.errors import CalibrationError, OptionError, PromptError
from runtime.json_file import read_object
from runtime.text.prompt import encode_prompt
from runtime.text.tokenizer import TOKENIZER

if TYPE_CHECKING:
    from freeexport.checkpoints.checkpoint import Checkpoint
    from graphs.description import Description

# A few unknown characters are in any text; so many are text that the tokenizer was not made for.
MOST_UNKNOWN = 0.2


@dataclass(frozen=True)
class Facts:
    """What a calibration says about its model. `hash` is of all that traces depend on; `ends` are the tokens that end a
    sequence; `threshold` is 1.0 where not calibrated. `path` is how commands name the model; `trained`: for this exit,
    None where that is not known."""

    name: str
    source_sha256: str
    hash: str
    vocab_size: int
    layers: int
    exit_layer: int
    confidence: ConfidenceMeasure
    max_pending: int
    ends: tuple[int, ...]
    threshold: float = NEVER_EXIT
    exit_vocabulary: ExitVocabulary | None = None
    path: str = "BUNDLE"
    trained: bool | None = None


class Source(Protocol):
    @property
    def facts(self) -> Facts: ...

    def traces(self, requests: Sequence[Request], max_new_tokens: int) -> Iterator[Trace]:
        """Of the requests that fit, in order."""
        ...

    def token_ids(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Without special tokens; of nothing where there is no tokenizer."""
        ...

    def costs(self, requests: Sequence[Request], tokens: int) -> Costs:
        """Of decoding requests like these, `tokens` each."""
        ...

    def outputs(self, requests: Sequence[Request], max_new_tokens: int) -> Outputs:
        """What is written in mode free. OptionError where there are no engines, as for what follows."""
        ...

    def check_speed(self) -> None:
        """Whether `speedups` can be had."""
        ...

    def speedups(
        self, requests: Sequence[Request], thresholds: Sequence[float], max_new_tokens: int, rounds: int
    ) -> dict[float, float]:
        """Measured, by threshold."""
        ...


class BundleSource:
    """A bundle and an open session of it."""

    def __init__(self, path: Path, session: ForcedExitSession) -> None:
        self.path, self.session = path, session
        self._unknown = unknown_of_bundle(path, session.manifest.files)

    @property
    def facts(self) -> Facts:
        manifest = self.session.manifest
        return Facts(
            manifest.source,
            manifest.source_sha256,
            engines_hash(manifest),
            manifest.vocab_size,
            manifest.layers,
            manifest.exit_layer,
            manifest.confidence,
            manifest.max_pending,
            manifest.eos_token_ids,
            manifest.threshold,
            manifest.exit_vocabulary,
            str(self.path),
            manifest.exit_trained,
        )

    def traces(self, requests: Sequence[Request], max_new_tokens: int) -> Iterator[Trace]:
        for request, prompt in self.prompts(requests):
            yield trace_of(self.session, request.line_number, prompt, max_new_tokens)

    def prompts(self, requests: Sequence[Request]) -> list[tuple[Request, np.ndarray]]:
        """As `fitting_prompts`."""
        return fitting_prompts(self.session, requests, self._unknown)

    def token_ids(self, texts: Sequence[str]) -> Iterator[list[int]]:
        tokenizer = self.session.tokenizer
        if tokenizer is not None:
            yield from (tokenizer.encode(text, special=False) for text in texts)

    def costs(self, requests: Sequence[Request], tokens: int) -> Costs:
        return measured_costs(self.session, [ids for _, ids in self.prompts(requests)], tokens)

    def outputs(self, requests: Sequence[Request], max_new_tokens: int) -> Outputs:
        fitting = self.prompts(requests)
        found = [reference_of(request) for request, _ in fitting]
        references = [reference for reference in found if reference is not None]
        targets = references if len(references) == len(fitting) else None
        return Outputs(self.session, [ids for _, ids in fitting], targets, max_new_tokens)

    def check_speed(self) -> None:
        pass

    def speedups(
        self, requests: Sequence[Request], thresholds: Sequence[float], max_new_tokens: int, rounds: int
    ) -> dict[float, float]:
        prompts = [ids for _, ids in self.prompts(requests)]
        return measured_speedups(self.session, prompts, thresholds, max_new_tokens, rounds)


class CheckpointSource:
    """A checkpoint, its transformers model loaded when it is first needed."""

    def __init__(self, checkpoint: Checkpoint, options: CalibrateOptions) -> None:
        from freeexport.checkpoints.transformers_model import torch_device
        from graphs.families import describe

        torch_device(options.device)
        self._checkpoint, self._options = checkpoint, options
        self._description: Description = describe(checkpoint.config, checkpoint)
        self._exit_layer = checkpoint.exit_layer(len(self._description.decoder.layers), options.exit_layer)
        self._tracer: Any = None

    @property
    def facts(self) -> Facts:
        sha256, dtype = self._checkpoint.sha256, self._options.dtype or "float32"
        return Facts(
            self._checkpoint.name,
            sha256,
            sha256 if dtype == "float32" else f"{sha256} {dtype}",
            self._description.vocab_size,
            len(self._description.decoder.layers),
            self._exit_layer,
            self._options.confidence or "softmax",
            self._options.max_pending or 16,
            known_ends(self._checkpoint, self._description.vocab_size),
            path=self._checkpoint.name,
            trained=self._checkpoint.exit is not None,
        )

    @cached_property
    def _form(self) -> TextFormat:
        return text_format(self._checkpoint, self._description, 2048)

    def traces(self, requests: Sequence[Request], max_new_tokens: int) -> Iterator[Trace]:
        from freeexport.checkpoints.examples import encode

        form = self._form
        if not form.seq2seq:  # what is decoded shares the limit with the prompt
            form = replace(form, limit=max(1, form.limit - max_new_tokens))
        examples, left_out = encode([replace(request, target="") for request in requests], form, Path("the data"))
        if left_out is not None:
            click.echo(f"warning: {left_out}", err=True)
        check_unknown([example.prompt for example in examples], form.tokenizer.unk_token_id)
        size = self._options.batch_size
        for start in range(0, len(examples), size):
            yield from self._loaded().traces(examples[start : start + size], max_new_tokens)

    def token_ids(self, texts: Sequence[str]) -> Iterator[list[int]]:
        if texts:
            yield from self._form.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def costs(self, requests: Sequence[Request], tokens: int) -> Costs:
        from freeexport.costs.per_layer import analytic

        own = 0 if self._checkpoint.exit is None else self._checkpoint.exit.exit_layers
        return analytic(self._description, self._checkpoint).at(self._exit_layer, self.facts.layers, own)

    def outputs(self, requests: Sequence[Request], max_new_tokens: int) -> Outputs:
        raise OptionError("a metric compares what mode free writes, which needs a bundle: convert, then calibrate that")

    def check_speed(self) -> None:
        raise OptionError("--measure times engines, which a checkpoint has not: convert, then calibrate the bundle")

    def speedups(
        self, requests: Sequence[Request], thresholds: Sequence[float], max_new_tokens: int, rounds: int
    ) -> dict[float, float]:
        self.check_speed()
        return {}

    def _loaded(self) -> Any:
        if self._tracer is None:
            from freeexport.checkpoints.transformers_model import reference_model
            from freeexport.traces.from_checkpoint import CheckpointTracer

            options = self._options
            facts, model = self.facts, reference_model(self._checkpoint, options.device, options.dtype or "float32")
            self._tracer = CheckpointTracer(
                model, self._checkpoint, self._description, facts.exit_layer, facts.confidence
            )
        return self._tracer


def fitting_prompts(
    session: Session, requests: Sequence[Request], unknown: int | None
) -> list[tuple[Request, np.ndarray]]:
    """The requests that fit, with their token ids [n]; a warning for the others. `unknown`: the id of the tokenizer's
    unknown token. DataError where none fits, CalibrationError for data of another vocabulary."""
    manifest = session.manifest
    limit = manifest.encoder_capacity or session.capacity - 1
    fitting: list[tuple[Request, np.ndarray]] = []
    reasons: list[str] = []
    for request in requests:
        try:
            ids = encode_prompt(request.input, session.tokenizer, manifest.vocab_size, limit)
            fitting.append((request, ids))
        except PromptError as error:
            reasons.append(f"line {request.line_number}: {error}")
    if reasons and not fitting:
        raise DataError(f"none of the {len(requests)} inputs can be used; {reasons[0]}")
    if reasons:
        click.echo(f"warning: {len(reasons)} of {len(requests)} inputs are left out; the first, {reasons[0]}", err=True)
    check_unknown([ids for _, ids in fitting], unknown)
    return fitting


def reference_of(request: Request) -> Reference | None:
    """What the outputs of a line are compared with; OptionError where it cannot be read."""
    return Reference.of(request.target, request.references, f"line {request.line_number}")


def check_unknown(prompts: Iterable[np.ndarray], unknown: int | None) -> None:
    """Raises CalibrationError where the tokenizer knows too little of the text: it is data of another vocabulary."""
    ids = np.concatenate([np.asarray(prompt) for prompt in prompts])
    share = float(np.mean(ids == unknown)) if unknown is not None and len(ids) else 0.0
    if share > MOST_UNKNOWN:
        raise CalibrationError(
            f"{share:.0%} of the data's tokens are unknown to the model's tokenizer: these are data of another "
            "vocabulary; give inputs like those the model was trained on"
        )


def engines_hash(manifest: Manifest) -> str:
    """Of all files of a bundle that decide what its engines say."""
    files = {name: file.sha256 for name, file in manifest.files.items() if not is_calibration(name)}
    return hashlib.sha256(json.dumps([manifest.source_sha256, files], sort_keys=True).encode()).hexdigest()


def unknown_of_bundle(path: Path, listed: Container[str] = (TOKENIZER,)) -> int | None:
    """The id of the tokenizer's unknown token, where it has one."""
    file = path / TOKENIZER
    if TOKENIZER not in listed or not file.exists():
        return None
    model = read_object(file, "convert the checkpoint again").get("model")
    if not isinstance(model, dict):
        return None
    if isinstance(model.get("unk_id"), int):
        return int(model["unk_id"])
    vocabulary, token = model.get("vocab"), model.get("unk_token")
    return vocabulary.get(token) if isinstance(vocabulary, dict) and token is not None else None
