"""Sources of traces: bundles, which decode with their engines, or a checkpoint, with transformers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from freeexport.checkpoints.examples import DataError, TextFormat, known_ends, text_format
from freeexport.measure.costs import measured_costs
from freeexport.measure.traces import ReplaySession, TraceCache, Traces, trace_of
from freeexport.metrics import Reference
from freeexport.system.jsonl import Request
from freeexport.system.progress import progress
from runtime import Bundle, Session
from runtime.bundle.bundle import sha256_of
from runtime.bundle.calibration import is_calibration
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import MANIFEST, ConfidenceMeasure, Manifest
from runtime.errors import CalibrationError, OptionError, PromptError
from runtime.json_file import read_object
from runtime.text.prompt import encode_prompt
from runtime.text.tokenizer import TOKENIZER

if TYPE_CHECKING:
    from freeexport.checkpoints.checkpoint import Checkpoint

BATCH = 8  # lines that a checkpoint decodes at once
MAX_PENDING = 16  # of a checkpoint: convert's default
# Where checkpoints differ, as those of two exits trained on one model do, so many outputs must be the same.
COMPARED = 8
# A few unknown characters are in any text; so many are text that the tokenizer was not made for.
MOST_UNKNOWN = 0.2
# What bundles of one model have in common.
_SHARED = ("family", "layers", "hidden_size", "heads", "vocab_size", "precision", "decoder_start_token_id")


@dataclass(frozen=True)
class Facts:
    """The model that a calibration belongs to. `hash` is of all that traces depend on; `ends` are the tokens that end a
    sequence. `path` is how commands name the model; `trained`: for this exit, None where that is not known."""

    path: str
    source_sha256: str
    hash: str
    vocab_size: int
    layers: int
    exit_layer: int
    confidence: ConfidenceMeasure
    max_pending: int
    ends: tuple[int, ...]
    trained: bool | None = None


class BundleSource:
    """A bundle and an open session of it."""

    def __init__(self, path: Path, session: ReplaySession) -> None:
        self.path, self.session, manifest = path, session, session.manifest
        self.facts = Facts(
            str(path),
            manifest.source_sha256,
            engines_hash(manifest),
            manifest.vocab_size,
            manifest.layers,
            manifest.exit_layer,
            manifest.confidence,
            manifest.max_pending,
            manifest.eos_token_ids,
            manifest.exit_trained,
        )

    def prompts(self, requests: Sequence[Request]) -> list[tuple[Request, np.ndarray]]:
        return fitting_prompts(self.session, requests)

    def traces(self, requests: Sequence[Request], max_new_tokens: int) -> Iterator[Traces]:
        """The traces of the requests that fit, one each, in order."""
        for request, prompt in self.prompts(requests):
            yield trace_of(self.session, request.line_number, prompt, max_new_tokens)

    def costs(self, requests: Sequence[Request], tokens: int) -> Costs:
        """The costs of decoding requests like these, `tokens` each."""
        return measured_costs(self.session, [ids for _, ids in self.prompts(requests)], tokens)


class CheckpointSource:
    """A checkpoint, its transformers model loaded when it is first needed."""

    def __init__(self, checkpoint: Checkpoint, exit_layer: int | None, device: str) -> None:
        from freeexport.checkpoints.transformers_model import torch_device
        from graphs.families import describe

        torch_device(device)
        self._checkpoint, self._device = checkpoint, device
        self._description = describe(checkpoint.config, checkpoint)
        layers, vocabulary = len(self._description.decoder.layers), self._description.vocab_size
        self.facts = Facts(
            checkpoint.name,
            checkpoint.sha256,
            checkpoint.sha256,
            vocabulary,
            layers,
            checkpoint.exit_layer(layers, exit_layer),
            "softmax",
            MAX_PENDING,
            known_ends(checkpoint, vocabulary),
            checkpoint.exit is not None,
        )

    @cached_property
    def _form(self) -> TextFormat:
        return text_format(self._checkpoint, self._description, 2048)

    @cached_property
    def _reader(self) -> Any:
        from freeexport.checkpoints.transformers_model import reference_model
        from freeexport.measure.layers import LayerReader

        model = reference_model(self._checkpoint, self._device, "float32")
        return LayerReader(model, self._checkpoint, self._description, self.facts.exit_layer)

    def traces(self, requests: Sequence[Request], max_new_tokens: int) -> Iterator[Traces]:
        """The traces of the requests that fit, one each, in order."""
        from freeexport.measure.layers import encoded

        examples = encoded(requests, self._form, Path("the data"), max_new_tokens)
        check_unknown([example.prompt for example in examples], self._form.tokenizer.unk_token_id)
        for start in range(0, len(examples), BATCH):
            batch = examples[start : start + BATCH]
            outputs = self._reader.greedy_outputs(batch, max_new_tokens, BATCH, lambda n=1: None)
            (traces,), _ = self._reader.traces(outputs, [self.facts.exit_layer])
            yield from (traces.part(np.arange(len(batch)) == place) for place in range(len(batch)))

    def token_ids(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Texts without special tokens."""
        if texts:
            yield from self._form.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def costs(self, requests: Sequence[Request], tokens: int) -> Costs:
        """The costs of a token, in bytes of weights."""
        from graphs.step_costs import analytic

        steps, facts = analytic(self._description, self._checkpoint), self.facts
        if (found := self._checkpoint.exit) is None:
            return steps.at(facts.exit_layer, facts.layers)
        share = found.head_share(self._description.vocab_size)
        return steps.at(facts.exit_layer, facts.layers, found.exit_layers, share, found.inputs)


Source = BundleSource | CheckpointSource


@contextmanager
def open_sources(
    models: Sequence[str], exit_layer: int | None, device: str, threads: int | None
) -> Iterator[list[BundleSource] | list[CheckpointSource]]:
    """One checkpoint, or bundles of one model, which are timed in turn and so opened together. Raises OptionError for
    options that they do not have, and where they do not go together."""
    if not is_bundle(models[0]) and len(models) == 1:
        from freeexport.checkpoints.checkpoint import open_checkpoint

        yield [CheckpointSource(open_checkpoint(models[0]), exit_layer, device)]
        return
    if exit_layer is not None:
        raise OptionError("--exit-layer is for checkpoints; a bundle has its own, fixed at convert")
    paths = [Path(model) for model in models]
    _check_alike(paths, [Bundle.open(path).manifest for path in paths])
    options: dict[str, Any] = {"threads": threads, "device": device}
    with ExitStack() as stack:
        yield [BundleSource(path, stack.enter_context(ReplaySession(path, **options))) for path in paths]


def is_bundle(model: str) -> bool:
    return (Path(model) / MANIFEST).is_file()


def _check_alike(paths: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    places = [os.path.realpath(path) for path in paths]
    if len(set(places)) < len(places):
        raise OptionError(f"{max(paths, key=lambda path: places.count(os.path.realpath(path)))} is given twice")
    remedy = "give bundles of one model, with its exit at different layers"
    for path, other in zip(paths[1:], manifests[1:], strict=True):
        for name in _SHARED:
            values: list[Any] = [getattr(manifest, name) for manifest in (other, manifests[0])]
            if values[0] != values[1]:
                what = "precisions" if name == "precision" else "checkpoints"
                shown = f"{name} {values[0]} and {values[1]}"
                raise OptionError(f"{path} and {paths[0]} are of different {what} ({shown}); {remedy}")
        if other.files.get(TOKENIZER) != manifests[0].files.get(TOKENIZER):
            raise OptionError(f"{path} and {paths[0]} have different tokenizers; {remedy}")


def check_same_model(sources: Sequence[BundleSource], requests: Sequence[Request], max_new_tokens: int) -> None:
    """Raises OptionError where the whole models write different texts. One checkpoint's need not be asked."""
    if len({source.facts.source_sha256 for source in sources}) == 1:
        return

    def written(source: BundleSource) -> list[tuple[int, ...]]:
        given: dict[str, Any] = {"mode": "full", "max_new_tokens": max_new_tokens}
        return [source.session.generate(ids, **given).token_ids for _, ids in source.prompts(requests[:COMPARED])]

    first = written(sources[0])
    for source in sources[1:]:
        if written(source) != first:
            raise OptionError(
                f"{source.path} and {sources[0].path} are of different checkpoints: their full models do not write the "
                "same; give bundles of one model, with its exit at different layers"
            )


def collect(source: Source, data: Path, requests: Sequence[Request], cache: Path, max_new_tokens: int) -> Traces:
    """Traces of the requests: those in the file `cache` are taken from there, the others are added to it."""
    facts = source.facts
    depends = {"model": facts.hash, "data": sha256_of(data), "exit_layer": facts.exit_layer}
    known = TraceCache(cache, {**depends, "confidence": facts.confidence, "max_new_tokens": max_new_tokens})
    missing = [request for request in requests if known.get(request.line_number) is None]
    if missing:
        with progress("decoding", len(requests), len(requests) - len(missing)) as advance:
            for trace in source.traces(missing, max_new_tokens):
                known.add(trace)
                advance()
    found = [known.get(request.line_number) for request in requests]
    return Traces.joined([trace for trace in found if trace is not None])


def fitting_prompts(session: Session, requests: Sequence[Request]) -> list[tuple[Request, np.ndarray]]:
    """The requests that fit, with their token ids [n]; a warning for the others. DataError where none fits,
    CalibrationError for data of another vocabulary, OptionError for a bundle of speech."""
    manifest = session.manifest
    if manifest.speech is not None:
        raise OptionError(
            "the bundle reads speech, which calibration and measurements do not support yet; leave it out"
        )
    limit = manifest.encoder_capacity or session.capacity - 1
    fitting: list[tuple[Request, np.ndarray]] = []
    reasons: list[str] = []
    for request in requests:
        try:
            fitting.append((request, encode_prompt(request.input, session.tokenizer, manifest.vocab_size, limit)))
        except PromptError as error:
            reasons.append(f"line {request.line_number}: {error}")
    if reasons and not fitting:
        raise DataError(f"none of the {len(requests)} inputs can be used; {reasons[0]}")
    if reasons:
        click.echo(f"warning: {len(reasons)} of {len(requests)} inputs are left out; the first, {reasons[0]}", err=True)
    listed = TOKENIZER in manifest.files
    check_unknown([ids for _, ids in fitting], unknown_of_bundle(session.bundle.path) if listed else None)
    return fitting


def reference_of(request: Request) -> Reference | None:
    """The references of a line; OptionError where it cannot be read."""
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


def unknown_of_bundle(path: Path) -> int | None:
    """The id of the tokenizer's unknown token, where it has one."""
    if not (path / TOKENIZER).exists():
        return None
    model = read_object(path / TOKENIZER, "convert the checkpoint again").get("model")
    if not isinstance(model, dict):
        return None
    if isinstance(model.get("unk_id"), int):
        return int(model["unk_id"])
    vocabulary, token = model.get("vocab"), model.get("unk_token")
    return vocabulary.get(token) if isinstance(vocabulary, dict) and token is not None else None


def engines_hash(manifest: Manifest) -> str:
    """A hash of all files of a bundle that decide what its engines predict."""
    files = {name: file.sha256 for name, file in manifest.files.items() if not is_calibration(name)}
    return hashlib.sha256(json.dumps([manifest.source_sha256, files], sort_keys=True).encode()).hexdigest()
