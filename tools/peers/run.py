"""Measures a step of the comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from freeexport.evaluate.speed import speed_prompts
from freeexport.system.environment import environment
from freeexport.system.load import other_load
from freeexport.verification.equality import prompt_ids
from runtime.bundle.bundle import Bundle
from runtime.errors import OptionError
from runtime.text.tokenizer import Tokenizer
from tools.peers.catalog import OURS, PEERS, VARIABLES, peer_model
from tools.peers.fidelity import chat_ids, equality, fidelity
from tools.peers.measure import (
    Answer,
    Cell,
    Contender,
    Decoders,
    opening,
    with_options,
)
from tools.peers.models import CONFIGURATIONS, bundle_of, checkpoint_of
from tools.peers.plan import SERVED, PeerStep
from tools.peers.server import server
from tools.peers.worker import PeerError

SAMPLE_TEXTS = 4
EQUALITY_PROMPTS = 30
FIDELITY_PROMPTS = 50
# Request of the steps that compare tokens.
COMPARED = Cell(0, 64)
# Prompts and output of the step schema.
JSON_PROMPT = 'Answer as JSON with keys "name" and "uses": {}.'
SUBJECTS = ("rain", "bread", "chess", "honey bees", "coffee", "glass")
TEXT = {"type": "string"}
JSON_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": TEXT, "uses": {"type": "array", "items": TEXT}},
    "required": ["name", "uses"],
}

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Conditions:
    """Options of a run that affect its results.

    Attributes:
        output: Directory of the run.
        models: Checkpoints that replace the models, by name.
        left_out: Why peers are not measured, by name.
        rounds: Measured rounds.
        threads: Threads of each decoder.
        trial: Measure few short requests, to try the command.
    """

    output: Path
    models: Mapping[str, str]
    left_out: Mapping[str, str]
    rounds: int
    threads: int
    trial: bool = False

    def short(self, cell: Cell) -> Cell:
        """Return a request of a step, a short one in a trial."""
        if not self.trial:
            return cell
        return replace(cell, read=min(cell.read, 32), written=min(cell.written, 8))


def contenders(step: PeerStep, conditions: Conditions) -> tuple[list[Contender], dict[str, str]]:
    """Return the decoders of a step, our bundles first, and why others have none.

    Converts missing bundles and models.
    """
    checkpoint = checkpoint_of(step.model, conditions.models, conditions.output)
    found = []
    failed = {}
    for precision in step.precisions:
        bundle = bundle_of(step.model, checkpoint, precision, conditions.output)
        name = f"freeexport {precision}"
        kind = precision.partition(" ")[0]
        found.append(Contender(name, kind, OURS, str(bundle.path), {}, bundle))
    for name in step.peers:
        peer = PEERS[name]
        try:
            if name in conditions.left_out:
                raise PeerError(conditions.left_out[name])
            path = str(peer_model(peer, checkpoint))
        except PeerError as error:
            failed[name] = str(error)
            continue
        options = {**peer.options, "encoder_decoder": step.model in CONFIGURATIONS}
        build = " ".join(VARIABLES.get(peer.library, {}).values())
        found.append(
            Contender(name, peer.precision, peer.command, path, options=options, build=build)
        )
    return found, failed


def measure_step(step: PeerStep, conditions: Conditions) -> dict[str, Any]:
    """Measure a step, and return its rows and conditions for JSON."""
    made = environment()
    found, failed = contenders(step, conditions)
    bundle = found[0].bundle
    assert bundle is not None
    timed = step.kind not in ("server", "fidelity", "equality")
    threads = conditions.threads
    tokens = conditions.short(COMPARED).written
    with other_load() as load:
        if step.kind == "opening":
            prompt = speed_prompts(bundle, None, 1)[0]
            rows, more = opening(found, prompt, conditions.rounds, threads)
        elif step.kind == "server":
            rows, more = server(found, 10 if conditions.trial else SERVED, threads)
        elif step.kind == "fidelity":
            prompts = chat_ids(bundle, 2 if conditions.trial else FIDELITY_PROMPTS)
            rows, more = fidelity(found, prompts, tokens, bundle.manifest.eos_token_ids)
        elif step.kind == "equality":
            every = prompt_ids(bundle, None)
            count = 2 if conditions.trial else EQUALITY_PROMPTS
            prompts = [every[number * len(every) // count] for number in range(count)]
            rows, more = equality(found, prompts, tokens, threads)
        else:
            rows, more = _requests(step, conditions, found, bundle)
    versions = made.pop("versions")
    flags = {}
    for row in rows:
        versions |= row.pop("versions", {})
        if row.get("flags"):
            flags[row["name"]] = row["flags"]
        row.pop("flags", None)
    return {
        **{name: getattr(step, name) for name in ("title", "page", "figure", "kind")},
        "model": bundle.manifest.source,
        "threads": 1 if step.kind == "fidelity" else threads,
        "rounds": conditions.rounds if timed else 1,
        "trial": conditions.trial,
        "busy": load.cores if timed else 0.0,
        **made,
        "versions": versions,
        "flags": flags,
        "rows": rows,
        "failed": {**failed, **more},
    }


def _requests(
    step: PeerStep,
    conditions: Conditions,
    found: Sequence[Contender],
    bundle: Bundle,
) -> tuple[Rows, dict[str, str]]:
    manifest = bundle.manifest
    texts = [[ids] for ids in speed_prompts(bundle, None, SAMPLE_TEXTS)]
    describe = None
    if step.kind == "schema":
        tokenizer = Tokenizer.load(bundle.path, manifest.files)
        if tokenizer is None:
            raise OptionError(f"{bundle.path} has no tokenizer, which the step schema needs")
        texts = [[tokenizer.encode(JSON_PROMPT.format(subject))] for subject in SUBJECTS]
        schema = json.dumps(JSON_SCHEMA)
        found = [
            one
            for plain in found
            for one in (
                plain,
                with_options(replace(plain, name=f"{plain.name}, schema"), schema=schema),
            )
        ]
        describe = partial(valid_share, tokenizer)
    end = manifest.eos_token_ids[0] if manifest.encoder_decoder else None
    cells = {
        cell: cell.blocks(texts, conditions.rounds, manifest.vocab_size, end)
        for cell in dict.fromkeys(map(conditions.short, step.cells))
    }
    options: dict[str, Any] = {"rows": max(cell.rows for cell in cells)}
    if not manifest.encoder_decoder:
        longest = max(len(ids) for blocks in cells.values() for (ids, *_) in blocks[-1])
        options["context"] = longest + max(cell.written for cell in cells)
    ready = [with_options(one, **options) for one in found]
    with Decoders(ready, conditions.threads) as decoders:
        rows = [
            row for cell, blocks in cells.items() for row in decoders.rows(cell, blocks, describe)
        ]
    return rows, decoders.failed


def valid_share(tokenizer: Tokenizer, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the share of complete outputs that fit JSON_SCHEMA."""
    texts = [tokenizer.decode(one["tokens"][0]) for one in answers if one.get("ended")]
    return {"valid": fmean(_valid(text) for text in texts)} if texts else {}


def _valid(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and set(JSON_SCHEMA["required"]) <= value.keys()
