"""Lines of data for a bundle: prompts that fit, and the traces that its engines decode."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from freeexport.checkpoints.examples import DataError
from freeexport.measure.traces import ReplaySession, TraceCache, Traces, trace_of
from freeexport.metrics import Reference
from freeexport.system.jsonl import Request
from freeexport.system.progress import progress
from runtime import Session
from runtime.bundle.bundle import sha256_of
from runtime.bundle.calibration import is_calibration
from runtime.bundle.manifest import Manifest
from runtime.errors import CalibrationError, OptionError, PromptError
from runtime.json_file import read_object
from runtime.text.prompt import encode_prompt
from runtime.text.tokenizer import TOKENIZER

# A few unknown characters are in any text; so many are text that the tokenizer was not made for.
MOST_UNKNOWN = 0.2
FIRST = 3  # traces, by which the time of all is estimated


def collect(
    session: ReplaySession,
    data: Path,
    requests: Sequence[Request],
    cache: Path,
    most: int,
    estimate: Callable[[float, int], None] = lambda each, left: None,
) -> Traces:
    """Traces of the requests that fit, of at most `most` tokens: those in the file `cache` are taken from there, the
    others are added to it. After FIRST of more `estimate` gets the seconds of one, and how many are left."""
    manifest = session.manifest
    depends = {
        "model": engines_hash(manifest),
        "data": sha256_of(data),
        "exit_layer": manifest.exit_layer,
    }
    known = TraceCache(
        cache, {**depends, "confidence": manifest.confidence, "max_new_tokens": most}
    )
    missing = [request for request in requests if known.get(request.line_number) is None]
    if missing:
        fitting = fitting_prompts(session, missing)
        began = time.monotonic()
        with progress("decoding", len(requests), len(requests) - len(missing)) as advance:
            for done, (request, prompt) in enumerate(fitting, 1):
                known.add(trace_of(session, request.line_number, prompt, most))
                advance()
                if done == FIRST < len(fitting):
                    estimate((time.monotonic() - began) / done, len(fitting) - done)
    found = [known.get(request.line_number) for request in requests]
    return Traces.joined([trace for trace in found if trace is not None])


def fitting_prompts(session: Session, requests: Sequence[Request]) -> list[tuple[Request, Any]]:
    """The requests that fit, with their token ids [n] or their window of sound; a warning for the others. DataError
    where none fits, CalibrationError for data of another vocabulary."""
    manifest = session.manifest
    limit = manifest.encoder_capacity or session.capacity - 1
    fitting: list[tuple[Request, Any]] = []
    reasons: list[str] = []
    for request in requests:
        try:
            fitting.append((request, _prompt(session, request, limit)))
        except (PromptError, OptionError) as error:
            reasons.append(f"line {request.line_number}: {error}")
    if reasons and not fitting:
        raise DataError(f"none of the {len(requests)} inputs can be used; {reasons[0]}")
    if reasons:
        click.echo(
            f"warning: {len(reasons)} of {len(requests)} inputs are left out; the first, {reasons[0]}",
            err=True,
        )
    if manifest.speech is None:
        listed = TOKENIZER in manifest.files
        check_unknown(
            [ids for _, ids in fitting], unknown_of_bundle(session.bundle.path) if listed else None
        )
    return fitting


def _prompt(session: Session, request: Request, limit: int) -> Any:
    if session.manifest.speech is None:
        return encode_prompt(request.text, session.tokenizer, session.manifest.vocab_size, limit)
    if not isinstance(request.input, Path):
        raise PromptError(
            "it has 'input', and the bundle reads speech; give 'audio', the path of a WAV file"
        )
    return session.listen(request.input, request.language or "en")


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
    return hashlib.sha256(
        json.dumps([manifest.source_sha256, files], sort_keys=True).encode()
    ).hexdigest()
