"""Prompts of a data file that fit a bundle, and their traces."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from freeexport.calibrate.traces import TraceCache, Traces, trace_of
from freeexport.checkpoints.examples import DataError
from freeexport.costs.replay import ReplaySession
from freeexport.system.jsonl import InputLine
from freeexport.system.progress import progress
from freeexport.task_metrics import Reference
from runtime import Session
from runtime.bundle.bundle import sha256_of
from runtime.bundle.calibration import is_calibration
from runtime.bundle.json_file import read_object
from runtime.bundle.manifest import Manifest
from runtime.errors import CalibrationError, OptionError, PromptError
from runtime.text.prompt import encode_prompt
from runtime.text.tokenizer import TOKENIZER

# Largest share of unknown tokens. Any text may contain a few unknown characters.
MOST_UNKNOWN = 0.2
FIRST = 3  # traces after which the remaining time is estimated


def collect(
    session: ReplaySession,
    data: Path,
    requests: Sequence[InputLine],
    cache: Path,
    most: int,
    estimate: Callable[[float, int], None] = lambda each, left: None,
) -> Traces:
    """Collect the traces of the requests that fit.

    Args:
        data: File of the requests.
        cache: File of known traces. New traces are added.
        most: Most tokens of a trace.
        estimate: Called after FIRST new traces, if more follow, with the seconds per trace and the
            number of remaining traces.
    """
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


def fitting_prompts(session: Session, requests: Sequence[InputLine]) -> list[tuple[InputLine, Any]]:
    """Return the requests that fit, each with its token ids [n] or its window of speech.

    Prints a warning if others are left out.

    Raises:
        DataError: If no request fits.
        CalibrationError: If the data need another vocabulary.
    """
    manifest = session.manifest
    limit = manifest.encoder_capacity or session.capacity - 1
    fitting: list[tuple[InputLine, Any]] = []
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
            f"warning: {len(reasons)} of {len(requests)} inputs are left out; "
            f"the first, {reasons[0]}",
            err=True,
        )
    if manifest.speech is None:
        listed = TOKENIZER in manifest.files
        check_unknown(
            [ids for _, ids in fitting], unknown_of_bundle(session.bundle.path) if listed else None
        )
    return fitting


def _prompt(session: Session, request: InputLine, limit: int) -> Any:
    if session.manifest.speech is None:
        return encode_prompt(request.text, session.tokenizer, session.manifest.vocab_size, limit)
    if not isinstance(request.input, Path):
        raise PromptError(
            "it has 'input', and the bundle reads speech; give 'audio', the path of a WAV file"
        )
    return session.listen(request.input, request.language or "en")


def reference_of(request: InputLine) -> Reference | None:
    """Return the references of a request. None if it has none.

    Raises:
        OptionError: If they cannot be read.
    """
    return Reference.of(request.target, request.references, f"line {request.line_number}")


def check_unknown(prompts: Iterable[np.ndarray], unknown: int | None) -> None:
    """Refuse prompts, token ids [n] each, of which too many tokens are the id `unknown`."""
    ids = np.concatenate([np.asarray(prompt) for prompt in prompts])
    share = float(np.mean(ids == unknown)) if unknown is not None and len(ids) else 0.0
    if share > MOST_UNKNOWN:
        raise CalibrationError(
            f"{share:.0%} of the data's tokens are unknown to the model's tokenizer: "
            "these are data of another vocabulary; "
            "give inputs like those the model was trained on"
        )


def unknown_of_bundle(path: Path) -> int | None:
    """Return the id of the tokenizer's unknown token. None if it has none."""
    if not (path / TOKENIZER).exists():
        return None
    model = read_object(path / TOKENIZER, "convert the checkpoint again").get("model")
    if not isinstance(model, dict):
        return None
    if isinstance(model.get("unk_id"), int):
        return int(model["unk_id"])
    vocabulary = model.get("vocab")
    token = model.get("unk_token")
    return vocabulary.get(token) if isinstance(vocabulary, dict) and token is not None else None


def engines_hash(manifest: Manifest) -> str:
    """Return a hash of a bundle's files, except calibrations, and of its source."""
    files = {name: file.sha256 for name, file in manifest.files.items() if not is_calibration(name)}
    return hashlib.sha256(
        json.dumps([manifest.source_sha256, files], sort_keys=True).encode()
    ).hexdigest()
