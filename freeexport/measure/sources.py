"""Sources of traces: bundles, which decode with their engines, or a checkpoint, with transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click
import numpy as np

from freeexport.checkpoints.examples import TextFormat, known_ends, text_format
from freeexport.measure.costs import measured_costs
from freeexport.measure.forced import ForcedExitSession
from freeexport.measure.prompts import check_unknown, engines_hash, fitting_prompts, reference_of, unknown_of_bundle
from freeexport.measure.threshold import ratio_bound
from freeexport.measure.traces import TraceCache, TraceKey, Traces, trace_of
from freeexport.metrics import Metric, Reference, metric_of, scores
from freeexport.system.jsonl import Request
from freeexport.system.progress import progress
from runtime import Bundle, Session
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import sha256_of
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import MANIFEST, ConfidenceMeasure, ExitVocabulary, Manifest
from runtime.errors import OptionError

if TYPE_CHECKING:
    from freeexport.checkpoints.checkpoint import Checkpoint
    from graphs.description import Description

BATCH = 8  # lines that a checkpoint decodes at once
MAX_PENDING = 16  # of a checkpoint: convert's default
# Where checkpoints differ, as those of two exits trained on one model do, so many outputs must be the same.
COMPARED = 8
# What bundles of one model have in common.
_SHARED = ("family", "layers", "hidden_size", "heads", "vocab_size", "precision", "decoder_start_token_id")


@dataclass(frozen=True)
class Facts:
    """The model that a calibration belongs to. `hash` is of all that traces depend on; `ends` are the tokens that end a
    sequence; `threshold` is 1.0 where not calibrated. `path` is how commands name the model; `trained`: for this exit,
    None where that is not known."""

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
    threshold: float = NEVER_EXIT
    exit_vocabulary: ExitVocabulary | None = None


class Source(Protocol):
    @property
    def facts(self) -> Facts: ...

    def traces(self, requests: Sequence[Request], max_new_tokens: int) -> Iterator[Traces]:
        """The traces of the requests that fit, one each, in order."""
        ...

    def token_ids(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Texts without special tokens; nothing where there is no tokenizer."""
        ...

    def costs(self, requests: Sequence[Request], tokens: int) -> Costs:
        """The costs of decoding requests like these, `tokens` each."""
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
            str(self.path),
            manifest.source_sha256,
            engines_hash(manifest),
            manifest.vocab_size,
            manifest.layers,
            manifest.exit_layer,
            manifest.confidence,
            manifest.max_pending,
            manifest.eos_token_ids,
            manifest.exit_trained,
            manifest.threshold,
            manifest.exit_vocabulary,
        )

    def prompts(self, requests: Sequence[Request]) -> list[tuple[Request, np.ndarray]]:
        return fitting_prompts(self.session, requests, self._unknown)

    def traces(self, requests: Sequence[Request], max_new_tokens: int) -> Iterator[Traces]:
        for request, prompt in self.prompts(requests):
            yield trace_of(self.session, request.line_number, prompt, max_new_tokens)

    def token_ids(self, texts: Sequence[str]) -> Iterator[list[int]]:
        tokenizer = self.session.tokenizer
        if tokenizer is not None:
            yield from (tokenizer.encode(text, special=False) for text in texts)

    def costs(self, requests: Sequence[Request], tokens: int) -> Costs:
        return measured_costs(self.session, [ids for _, ids in self.prompts(requests)], tokens)


class CheckpointSource:
    """A checkpoint, its transformers model loaded when it is first needed."""

    def __init__(self, checkpoint: Checkpoint, exit_layer: int | None, device: str) -> None:
        from freeexport.checkpoints.transformers_model import torch_device
        from graphs.families import describe

        torch_device(device)
        self._checkpoint, self._device = checkpoint, device
        self._description: Description = describe(checkpoint.config, checkpoint)
        self._exit_layer = checkpoint.exit_layer(len(self._description.decoder.layers), exit_layer)

    @property
    def facts(self) -> Facts:
        checkpoint, vocabulary = self._checkpoint, self._description.vocab_size
        return Facts(
            checkpoint.name,
            checkpoint.sha256,
            checkpoint.sha256,
            vocabulary,
            len(self._description.decoder.layers),
            self._exit_layer,
            "softmax",
            MAX_PENDING,
            known_ends(checkpoint, vocabulary),
            checkpoint.exit is not None,
            exit_vocabulary=None if checkpoint.exit is None else checkpoint.exit.vocabulary,
        )

    @cached_property
    def _form(self) -> TextFormat:
        return text_format(self._checkpoint, self._description, 2048)

    @cached_property
    def _reader(self) -> Any:
        from freeexport.checkpoints.transformers_model import reference_model
        from freeexport.measure.layers import LayerReader

        model = reference_model(self._checkpoint, self._device, "float32")
        return LayerReader(model, self._checkpoint, self._description, self._exit_layer)

    def traces(self, requests: Sequence[Request], max_new_tokens: int) -> Iterator[Traces]:
        from freeexport.checkpoints.examples import encode

        form = self._form
        if not form.seq2seq:  # what is decoded shares the limit with the prompt
            form = replace(form, limit=max(1, form.limit - max_new_tokens))
        examples, left_out = encode([replace(request, target="") for request in requests], form, Path("the data"))
        if left_out is not None:
            click.echo(f"warning: {left_out}", err=True)
        check_unknown([example.prompt for example in examples], form.tokenizer.unk_token_id)
        for start in range(0, len(examples), BATCH):
            yield from self._reader.traces(examples[start : start + BATCH], max_new_tokens, "softmax")

    def token_ids(self, texts: Sequence[str]) -> Iterator[list[int]]:
        if texts:
            yield from self._form.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def costs(self, requests: Sequence[Request], tokens: int) -> Costs:
        from graphs.step_costs import analytic

        own, share = 0, 1.0
        if (found := self._checkpoint.exit) is not None:
            own, share = found.exit_layers, found.head_share(self._description.vocab_size)
        return analytic(self._description, self._checkpoint).at(self._exit_layer, self.facts.layers, own, share)


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
    with ExitStack() as stack:
        yield [
            BundleSource(
                path, stack.enter_context(ForcedExitSession(path, slots=1, threads=threads, device=device))
            )
            for path in paths
        ]  # fmt: skip


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
        if other.files.get("tokenizer.json") != manifests[0].files.get("tokenizer.json"):
            raise OptionError(f"{path} and {paths[0]} have different tokenizers; {remedy}")


def check_same_model(sources: Sequence[BundleSource], requests: Sequence[Request], max_new_tokens: int) -> None:
    """Raises OptionError where the whole models write different texts. One checkpoint's need not be asked."""
    if len({source.facts.source_sha256 for source in sources}) == 1:
        return
    texts = [
        [source.session.generate(ids, mode="full", max_new_tokens=max_new_tokens).token_ids for _, ids in prompts]
        for source in sources
        for prompts in [source.prompts(requests[:COMPARED])]
    ]
    for source, others in zip(sources[1:], texts[1:], strict=True):
        if others != texts[0]:
            raise OptionError(
                f"{source.path} and {sources[0].path} are of different checkpoints: their full models do not write the "
                "same; give bundles of one model, with its exit at different layers"
            )


def collect(source: Source, data: Path, requests: Sequence[Request], cache: Path, max_new_tokens: int) -> Traces:
    """Traces of the requests: those in the file `cache` are taken from there, the others are added to it."""
    facts = source.facts
    key = TraceKey(facts.hash, sha256_of(data), facts.exit_layer, facts.confidence, max_new_tokens)
    known = TraceCache(cache, key)
    missing = [request for request in requests if known.get(request.line_number) is None]
    if missing:
        with progress("decoding", len(requests), len(requests) - len(missing)) as advance:
            for trace in source.traces(missing, max_new_tokens):
                known.add(trace)
                advance()
    found = [known.get(request.line_number) for request in requests]
    return Traces.joined([trace for trace in found if trace is not None])


class DecodedOutputs:
    """Texts that a bundle writes for prompts int64 [n] each, with the whole model and in mode free: exits change what
    follows, so they are decoded, every threshold once. `targets` are the references of a text's quality, or None for
    the full model's own outputs."""

    def __init__(
        self, session: Session, prompts: Sequence[np.ndarray], targets: Sequence[Reference] | None, max_new_tokens: int
    ) -> None:
        self._session, self._prompts, self._targets = session, list(prompts), targets
        self._most = max_new_tokens
        self._free: dict[float, list[str]] = {}

    @classmethod
    def of(cls, source: BundleSource, requests: Sequence[Request], max_new_tokens: int) -> DecodedOutputs:
        fitting = source.prompts(requests)
        found = [reference_of(request) for request, _ in fitting]
        references = [reference for reference in found if reference is not None]
        targets = references if len(references) == len(fitting) else None
        return cls(source.session, [ids for _, ids in fitting], targets, max_new_tokens)

    def __len__(self) -> int:
        return len(self._prompts)

    @cached_property
    def full(self) -> list[str]:
        return self._decoded("full", mode="full")

    def free(self, threshold: float) -> list[str]:
        if threshold not in self._free:
            self._free[threshold] = self._decoded(f"threshold {threshold:.4g}", mode="free", threshold=threshold)
        return self._free[threshold]

    def against_full(self, metric: str, threshold: float) -> np.ndarray:
        return scores(metric, self.free(threshold), [Reference((text,)) for text in self.full])

    def kept(self, metric: str, threshold: float, part: np.ndarray | None = None) -> float:
        chosen = np.ones(len(self), np.bool_) if part is None else part
        if not chosen.any():
            return 0.0
        measure, free, full = self._tables(metric, threshold, chosen)
        whole = measure.of(full)
        return measure.of(free) / whole if whole else 0.0

    def surely_kept(self, metric: str, threshold: float, part: np.ndarray, delta: float) -> float:
        measure, free, full = self._tables(metric, threshold, part)
        nothing = measure.table([""] * int(part.sum()), self._references(part)).mean(axis=0)
        return ratio_bound(free, full, nothing, measure.value, delta)

    def _tables(self, metric: str, threshold: float, part: np.ndarray) -> tuple[Metric, np.ndarray, np.ndarray]:
        measure, references = metric_of(metric), self._references(part)
        free, full = (
            measure.table([text for text, used in zip(texts, part, strict=True) if used], references)
            for texts in (self.free(threshold), self.full)
        )
        return measure, free, full

    def _references(self, part: np.ndarray) -> list[Reference]:
        every = self._targets or [Reference((text,)) for text in self.full]
        return [reference for reference, used in zip(every, part, strict=True) if used]

    def _decoded(self, title: str, **options: Any) -> list[str]:
        texts = []
        with progress(f"decoding, {title}", len(self)) as advance:
            for prompt in self._prompts:
                texts.append(self._session.generate(prompt, max_new_tokens=self._most, **options).text)
                advance()
        return texts
