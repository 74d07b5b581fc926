"""The steps of the comparison: which decoders answer which requests, and how each is measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from freeexport.costs.measured import bandwidth_of
from freeexport.evaluate.speed import speed_prompts
from freeexport.system.environment import environment
from freeexport.system.load import other_load
from freeexport.verification.equality import prompt_ids
from runtime.bundle.bundle import Bundle
from runtime.errors import OptionError
from runtime.text.tokenizer import Tokenizer
from tools.peers.catalog import OURS, PEERS, VARIABLES, peer_model
from tools.peers.equality import equality
from tools.peers.measure import (
    Answer,
    Cell,
    Contender,
    Decoders,
    opening,
    reference_answers,
    with_options,
)
from tools.peers.models import SIZES, SMOLLM2, bundle_of, checkpoint_of
from tools.peers.server import server
from tools.peers.worker import PeerError

SCHEMA = 2
REFERENCE = "hf"
SAMPLE_TEXTS = 4
# Requests of a server, and prompts whose tokens are compared with and without drafts.
SERVED = 1000
EQUALITY_PROMPTS = 30
# Rough seconds for reading and writing a token with a slow peer, for estimates.
COSTS = {SMOLLM2: (1 / 300, 1 / 50), "marian": (1 / 2000, 1 / 60), "m2m_100": (1 / 200, 1 / 12)}
LOADING = 8.0

# Prompts and output of the step schema.
JSON_PROMPT = 'Answer as JSON with keys "name" and "uses": {}.'
SUBJECTS = ("rain", "bread", "chess", "honey bees", "coffee", "glass")
TEXT = {"type": "string"}
JSON_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": TEXT, "uses": {"type": "array", "items": TEXT}},
    "required": ["name", "uses"],
}

Kind = Literal["requests", "opening", "server", "equality", "schema"]
# The figure that a table shows: of whole requests, of the first token, or of a token after it.
Shown = Literal["request", "first", "token"]


@dataclass(frozen=True)
class Step:
    """A part of the comparison, which is measured in one go.

    Attributes:
        name: Name of the step and its file.
        title: Heading in the documentation.
        page: Page of the documentation: benchmarks or peers.
        model: Name of the model.
        precisions: Precisions of our bundles.
        peers: Names of the other decoders.
        figure: Figure of the table.
        cells: Requests.
        kind: How it is measured.
    """

    name: str
    title: str
    page: str
    model: str
    precisions: tuple[str, ...]
    peers: tuple[str, ...]
    figure: Shown
    cells: tuple[Cell, ...] = ()
    kind: Kind = "requests"

    def seconds(self, rounds: int) -> float:
        """Rough duration with all peers, without conversions."""
        read, written = COSTS[self.model]
        decoders = len(self.precisions) + len(self.peers)
        slower = 2 if self.precisions == ("fp32",) else 1
        once = sum(
            0.3 + slower * SAMPLE_TEXTS ** (not cell.read) * cell.rows**0.5 * cell.beams**0.5
            * (cell.read * read + cell.written * written)
            for cell in self.cells
        )  # fmt: skip
        other = {
            "opening": LOADING * (rounds + 1),
            "server": SERVED * 0.2,
            "equality": 3 * EQUALITY_PROMPTS,
        }
        return decoders * other.get(self.kind, LOADING + (rounds + 1) * once)


def _steps() -> list[Step]:
    groups: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "fp32": (("fp32",), ("hf", "genai", "openvino", "ctranslate2", "llama-cpp-f32")),
        "int8": (("int8",), ("ctranslate2-int8", "openvino-int8", "llama-cpp-q8")),
        "int4": (("int4", "mixed"), ("genai-int4", "openvino-int4", "llama-cpp")),
    }
    kinds: list[tuple[str, str, str, Shown, tuple[Cell, ...], Kind]] = [
        ("decode", "SmolLM2-135M", "benchmarks", "request", (Cell(0, 64),), "requests"),
        (
            *("contexts", "Tokens behind long contexts", "benchmarks", "token"),
            *(tuple(Cell(read, 33) for read in (1024, 1900, 8150)), "requests"),
        ),
        (
            *("rows", "Several rows at once", "benchmarks", "token"),
            *(tuple(Cell(16, 64, rows=rows) for rows in (1, 2, 4, 8)), "requests"),
        ),
        ("opening", "First token of a new process", "benchmarks", "first", (), "opening"),
        (
            *("prompts", "Prompts", "peers", "first"),
            *(tuple(Cell(read, 2) for read in (8, 16, 24, 40, 256, 1024)), "requests"),
        ),
    ]
    found = [
        Step(
            f"{kind}-{group}",
            f"{title}, {' and '.join(precisions)}",
            page,
            SMOLLM2,
            precisions,
            peers,
            figure=figure,
            cells=cells,
            kind=measured,
        )
        for kind, title, page, figure, cells, measured in kinds
        for group, (precisions, peers) in groups.items()
        if group != "fp32" or kind == "decode"
    ]
    lengths = ((20, 1), (20, 64), (128, 64), (512, 1))
    found += [
        Step(
            f"{model}-{precision}",
            f"{title}, {precision}",
            "peers",
            model,
            (precision,),
            ("ctranslate2" if precision == "fp32" else "ctranslate2-int8",),
            figure="request",
            cells=tuple(Cell(*length, beams=beams) for beams in (1, 4) for length in lengths),
        )
        for model, title in zip(SIZES, ("Marian's size", "NLLB-600M's size"), strict=True)
        for precision in ("fp32", "int8")
    ]
    title = f"After {SERVED:,} requests, int8"
    bundles, peers = groups["int8"]
    found.append(
        Step("server", title, "benchmarks", SMOLLM2, bundles, peers, "request", kind="server")
    )
    bundles, peers = ("int4",), ("genai-int4", "llama-cpp")
    cells = (Cell(0, 96),)
    title = "Output with a JSON schema, int4"
    found.append(
        Step("schema", title, "benchmarks", SMOLLM2, bundles, peers, "token", cells, "schema")
    )
    title = "Equal tokens with drafts from the prompt"
    peers = ("llama-cpp", "openvino-int8")
    found.append(
        Step("equality", title, "peers", SMOLLM2, ("int8",), peers, "request", kind="equality")
    )
    return found


STEPS = {step.name: step for step in _steps()}


def steps_of(text: str | None) -> list[Step]:
    """Parse comma-separated names of steps, or their beginnings. Default: all.

    Raises:
        OptionError: If a name is no step's.
    """
    if text is None:
        return list(STEPS.values())
    for name in text.split(","):
        if not any(step == name or step.startswith(f"{name}-") for step in STEPS):
            raise OptionError(f"--steps {name!r} is no step; choose from {', '.join(STEPS)}")
    names = text.split(",")
    return [
        step
        for name, step in STEPS.items()
        if any(name == one or name.startswith(f"{one}-") for one in names)
    ]


@dataclass(frozen=True)
class Conditions:
    """What the results of a run depend on.

    Attributes:
        output: Directory of the run.
        models: Checkpoints that replace the models, by name.
        left_out: Why peers are not measured, by name.
        rounds: Measured rounds.
        threads: Threads of each decoder.
        trial: Measure short requests, to try the command.
    """

    output: Path
    models: Mapping[str, str]
    left_out: Mapping[str, str]
    rounds: int
    threads: int
    trial: bool = False

    def cells(self, step: Step) -> tuple[Cell, ...]:
        """Return the requests of a step, short ones in a trial."""
        if not self.trial:
            return step.cells
        short = (
            replace(one, read=min(one.read, 32), written=min(one.written, 8)) for one in step.cells
        )
        return tuple(dict.fromkeys(short))


def contenders(
    step: Step, conditions: Conditions
) -> tuple[list[Contender], dict[str, str], Contender | None]:
    """Return the decoders of a step, our bundles first. Converts missing bundles and models.

    Returns:
        The decoders, why others cannot run, and the reference for tokens, if it can run.
    """
    checkpoint = checkpoint_of(step.model, conditions.models, conditions.output)
    found = []
    for precision in step.precisions:
        bundle = bundle_of(step.model, checkpoint, precision, conditions.output)
        found.append(Contender("freeexport", precision, OURS, str(bundle.path), {}, bundle))
    failed = {}
    reference = None
    for name in dict.fromkeys((*step.peers, REFERENCE)):
        peer = PEERS[name]
        if name in conditions.left_out:
            failed[name] = conditions.left_out[name]
            continue
        try:
            path = str(peer_model(peer, checkpoint))
        except PeerError as error:
            failed[name] = str(error)
            continue
        options = {**peer.options, "encoder_decoder": step.model in SIZES}
        built = " ".join(VARIABLES.get(peer.library, {}).values())
        one = Contender(name, peer.precision, peer.command, path, options, build=built)
        if name in step.peers:
            found.append(one)
        if name == REFERENCE:
            reference = one
    several = len(step.precisions) > 1
    return (
        [
            replace(one, name=f"{one.name} {one.precision}") if several and one.bundle else one
            for one in found
        ],
        failed,
        reference,
    )


def measure_step(step: Step, conditions: Conditions) -> dict[str, Any]:
    """Measure a step, and return its rows and conditions for JSON."""
    found, failed, reference = contenders(step, conditions)
    bundle = found[0].bundle
    assert bundle is not None
    threads = conditions.threads
    bandwidth = bandwidth_of(threads)
    tokens = 8 if conditions.trial else 64
    with other_load() as load:
        if step.kind in ("requests", "schema"):
            rows, more = _requests(step, conditions, found, reference, bundle, bandwidth)
        elif step.kind == "opening":
            prompt = speed_prompts(bundle, None, 1)[0]
            rows, more = opening(found, prompt, conditions.rounds, threads)
        elif step.kind == "server":
            count = 10 if conditions.trial else SERVED
            rows, more = server(found, count, threads)
        else:
            every = prompt_ids(bundle, None)
            count = 2 if conditions.trial else EQUALITY_PROMPTS
            prompts = [every[number * len(every) // count] for number in range(count)]
            rows, more = equality(found, prompts, tokens, threads)
    return {
        "title": step.title,
        "page": step.page,
        "figure": step.figure,
        "kind": step.kind,
        "model": bundle.manifest.source,
        "threads": threads,
        "rounds": conditions.rounds,
        "trial": conditions.trial,
        "busy": load.cores,
        "bandwidth": bandwidth,
        **environment(),
        "rows": rows,
        "failed": {**failed, **more},
    }


def _requests(
    step: Step,
    conditions: Conditions,
    found: Sequence[Contender],
    reference: Contender | None,
    bundle: Bundle,
    bandwidth: float,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    manifest = bundle.manifest
    texts = [[ids] for ids in speed_prompts(bundle, None, SAMPLE_TEXTS)]
    describe = None
    if step.kind == "schema":
        tokenizer = Tokenizer.load(bundle.path, manifest.files)
        if tokenizer is None:
            raise OptionError(f"{bundle.path} has no tokenizer, which the step schema needs")
        texts = [[tokenizer.encode(JSON_PROMPT.format(subject))] for subject in SUBJECTS]
        schema = {"schema": json.dumps(JSON_SCHEMA)}
        found = [
            one
            for plain in found
            for one in (plain, with_options(replace(plain, name=f"{plain.name}, schema"), **schema))
        ]
        reference = None
        describe = partial(grammar_fields, tokenizer)
    end = manifest.eos_token_ids[0] if manifest.encoder_decoder else None
    cells = {
        cell: cell.blocks(texts, conditions.rounds, manifest.vocab_size, end)
        for cell in conditions.cells(step)
    }
    options: dict[str, Any] = {"rows": max(cell.rows for cell in cells)}
    if not manifest.encoder_decoder:
        longest = max(len(ids) for blocks in cells.values() for (ids, *_) in blocks[-1])
        options["context"] = longest + max(cell.written for cell in cells)
    failed = {}
    truth = {}
    if reference is not None:
        try:
            truth = reference_answers(reference, cells, conditions.threads)
        except PeerError as error:
            failed[reference.name] = f"no tokens to compare with: {error}"
    ready = [with_options(one, **options) for one in found]
    with Decoders(ready, conditions.threads) as decoders:
        rows = [
            row
            for cell, blocks in cells.items()
            for row in decoders.rows(cell, blocks, truth.get(cell), bandwidth, describe)
        ]
    return rows, {**failed, **decoders.failed}


def grammar_fields(tokenizer: Tokenizer, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the share of complete outputs that fit JSON_SCHEMA, and the grammar's cost in ours."""
    found: dict[str, Any] = {}
    texts = [tokenizer.decode(one["tokens"][0]) for one in answers if one.get("ended")]
    if texts:
        found["valid"] = fmean(_valid(text) for text in texts)
    if all("forced" in one for one in answers):
        count = sum(len(one["tokens"][0]) for one in answers)
        found["forced"] = sum(one["forced"] for one in answers) / count
        spent = sum(one["last"] - one["first"] for one in answers)
        found["grammar"] = sum(one["grammar"] for one in answers) / spent
    return found


def _valid(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and set(JSON_SCHEMA["required"]) <= value.keys()
