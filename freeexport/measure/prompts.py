"""The lines of a data file as prompts of a bundle, and what a bundle's outputs depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

import click
import numpy as np

from freeexport.checkpoints.examples import DataError
from freeexport.metrics import Reference
from freeexport.system.jsonl import Request
from runtime import Session
from runtime.bundle.calibration import is_calibration
from runtime.bundle.manifest import Manifest
from runtime.errors import CalibrationError, PromptError
from runtime.json_file import read_object
from runtime.text.prompt import encode_prompt
from runtime.text.tokenizer import TOKENIZER

# A few unknown characters are in any text; so many are text that the tokenizer was not made for.
MOST_UNKNOWN = 0.2


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


def engines_hash(manifest: Manifest) -> str:
    """A hash of all files of a bundle that decide what its engines predict."""
    files = {name: file.sha256 for name, file in manifest.files.items() if not is_calibration(name)}
    return hashlib.sha256(json.dumps([manifest.source_sha256, files], sort_keys=True).encode()).hexdigest()
