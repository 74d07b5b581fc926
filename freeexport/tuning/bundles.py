"""Bundles that are tuned together: one checkpoint with its exit at different layers, and what each promises."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freeexport.calibration.choose import held_out_of
from freeexport.calibration.source import BundleSource
from freeexport.costs.forced_exits import ForcedExitSession
from freeexport.system.jsonl import Request
from freeexport.traces.trace import Traces
from runtime import Bundle
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import Manifest
from runtime.errors import OptionError

# Fewer sequences held out say nothing about quality.
LEAST_HELD_OUT = 10
# Where checkpoints differ, as those of two exits trained on one model do, so many outputs must be the same.
COMPARED = 8
# What bundles of one model have in common.
_SHARED = ("family", "layers", "hidden_size", "heads", "vocab_size", "precision", "decoder_start_token_id")


@dataclass(frozen=True)
class Entry:
    """A bundle with traces of the lines that the choice is made by, and its costs here."""

    source: BundleSource
    traces: Traces
    costs: Costs

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def manifest(self) -> Manifest:
        return self.source.session.manifest


@contextmanager
def opened(paths: Sequence[Path], threads: int | None, device: str = "cpu") -> Iterator[list[BundleSource]]:
    """All at once, as they are timed in turn. Raises OptionError where they are not of one model."""
    places = [os.path.realpath(path) for path in paths]
    if len(set(places)) < len(places):
        raise OptionError(f"{max(paths, key=lambda path: places.count(os.path.realpath(path)))} is given twice")
    manifests = [Bundle.open(path).manifest for path in paths]
    for path, manifest in zip(paths[1:], manifests[1:], strict=True):
        _check_alike(paths[0], manifests[0], path, manifest)
    with ExitStack() as stack:
        sessions = [
            stack.enter_context(ForcedExitSession(path, slots=1, threads=threads, device=device)) for path in paths
        ]
        yield [BundleSource(path, session) for path, session in zip(paths, sessions, strict=True)]


def split(sources: Sequence[BundleSource], requests: Sequence[Request]) -> tuple[list[Request], list[Request]]:
    """The lines that fit all bundles: those to choose by, and those held out. Raises OptionError for too few."""
    fitting = list(requests)
    for source in sources:
        fitting = [request for request, _ in source.prompts(fitting)]
    held_out = held_out_of(len(fitting))
    if held_out.sum() < LEAST_HELD_OUT:
        raise OptionError(
            f"the data give {len(fitting)} inputs, of which {held_out.sum()} would be held out; give "
            f"{3 * LEAST_HELD_OUT} or more (--samples, or more lines)"
        )
    chosen_by = [request for request, held in zip(fitting, held_out, strict=True) if not held]
    return chosen_by, [request for request, held in zip(fitting, held_out, strict=True) if held]


def check_same_model(sources: Sequence[BundleSource], requests: Sequence[Request], max_new_tokens: int) -> None:
    """Raises OptionError where the whole models write different texts. One checkpoint's need not be asked."""
    if len({source.facts.source_sha256 for source in sources}) == 1:
        return
    texts = [_written(source, requests[:COMPARED], max_new_tokens) for source in sources]
    for source, others in zip(sources[1:], texts[1:], strict=True):
        if others != texts[0]:
            raise OptionError(
                f"{source.path} and {sources[0].path} are of different checkpoints: their full models do not write the "
                "same; give bundles of one model, with its exit at different layers"
            )


def _check_alike(first: Path, one: Manifest, second: Path, other: Manifest) -> None:
    for name in _SHARED:
        values: list[Any] = [getattr(manifest, name) for manifest in (one, other)]
        if values[0] != values[1]:
            what = "precisions" if name == "precision" else "checkpoints"
            raise OptionError(
                f"{second} and {first} are of different {what} ({name} {values[1]} and {values[0]}); give bundles of "
                "one model, with its exit at different layers"
            )
    tokenizers = [manifest.files.get("tokenizer.json") for manifest in (one, other)]
    if tokenizers[0] != tokenizers[1]:
        raise OptionError(f"{second} and {first} have different tokenizers; give bundles of one model")


def _written(source: BundleSource, requests: Sequence[Request], max_new_tokens: int) -> list[tuple[int, ...]]:
    return [
        source.session.generate(ids, mode="full", max_new_tokens=max_new_tokens).token_ids
        for _, ids in source.prompts(requests)
    ]
