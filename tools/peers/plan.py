"""The steps of the comparison: which decoders answer which requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from runtime.errors import OptionError
from tools.peers.measure import Cell
from tools.peers.models import CONFIGURATIONS, SMOLLM2

# Requests of a server.
SERVED = 1000
CONTEXTS = tuple(Cell(read, 33) for read in (1024, 1900))
# Prompts of the second take most decoders a minute, so they have a step of their own.
LONG = tuple(Cell(read, 33) for read in (1024, 8150))
ROWS = tuple(Cell(16, 64, rows=rows) for rows in (1, 2, 4, 8))
PROMPTS = tuple(Cell(read, 2) for read in (8, 16, 24, 40, 256, 1024))
LENGTHS = ((20, 1), (20, 64), (128, 64), (512, 1))
BEAMS = tuple(Cell(*length, beams=beams) for beams in (1, 4) for length in LENGTHS)
# Precisions of our bundles, and peers, of decoder-only models.
GROUPS: dict[str, dict[str, Any]] = {
    "fp32": {
        "precisions": ("fp32",),
        "peers": ("hf", "genai", "openvino", "ctranslate2", "llama-cpp-f32"),
    },
    "fp16": {
        "precisions": ("fp16",),
        "peers": ("openvino-fp16", "llama-cpp-f16"),
    },
    "int8": {
        "precisions": ("int8",),
        "peers": ("ctranslate2-int8", "openvino-int8", "llama-cpp-q8"),
    },
    "int4": {
        "precisions": ("int4", "mixed"),
        "peers": ("genai-int4", "openvino-int4", "llama-cpp"),
    },
}


@dataclass(frozen=True)
class PeerStep:
    """A part of the comparison, which is measured in one go.

    Attributes:
        name: Name of the step and its file.
        title: Heading in the documentation.
        precisions: Precisions of our bundles, each with further options of `convert`, if any.
        peers: Names of the other decoders.
        model: Name of the model.
        cells: Requests.
        figure: Figure of the table: of whole requests, of the first token, or of a token after it.
        kind: How it is measured.
        page: Page of the documentation: benchmarks or peers.
    """

    name: str
    title: str
    precisions: tuple[str, ...]
    peers: tuple[str, ...]
    model: str = SMOLLM2
    cells: tuple[Cell, ...] = ()
    figure: Literal["request", "first", "token"] = "request"
    kind: Literal["requests", "opening", "server", "fidelity", "equality", "schema"] = "requests"
    page: str = "benchmarks"


def _steps() -> Iterator[PeerStep]:
    for group, used in GROUPS.items():
        wide = () if group in ("fp32", "fp16") else (f"{group} --activations int16",)
        yield PeerStep(
            f"decode-{group}",
            f"SmolLM2-135M, {group}",
            precisions=(*used["precisions"], *wide),
            peers=used["peers"],
            cells=(Cell(0, 64),),
        )
    for group in ("int8", "int4"):
        common = GROUPS[group]
        title = f"Tokens behind long contexts, {group}"
        yield PeerStep(f"contexts-{group}", title, cells=CONTEXTS, figure="token", **common)
        yield PeerStep(
            *(f"long-{group}", f"Tokens behind very long contexts, {group}", (group,)),
            (f"openvino-{group}",),
            cells=LONG,
            figure="token",
        )
        title = f"Several rows at once, {group}"
        yield PeerStep(f"rows-{group}", title, cells=ROWS, figure="token", **common)
        title = f"First token of a new process, {group}"
        yield PeerStep(f"opening-{group}", title, figure="first", kind="opening", **common)
        title = f"Prompts, {group}"
        common = {**common, "page": "peers"}
        yield PeerStep(f"prompts-{group}", title, cells=PROMPTS, figure="first", **common)
    for model, size in zip(CONFIGURATIONS, ("Marian's size", "NLLB-600M's size"), strict=True):
        for group, peer in (("fp32", "ctranslate2"), ("int8", "ctranslate2-int8")):
            common = {"precisions": (group,), "peers": (peer,), "page": "peers"}
            yield PeerStep(
                f"{model}-{group}", f"{size}, {group}", model=model, cells=BEAMS, **common
            )
    yield PeerStep("server", f"After {SERVED:,} requests, int8", kind="server", **GROUPS["int8"])
    yield PeerStep(
        *("fidelity", "SmolLM2-135M, tokens that equal those of fp32"),
        tuple(precision for group in GROUPS.values() for precision in group["precisions"]),
        (
            "hf",
            "llama-cpp-f32",
            *(peer for group in ("fp16", "int8", "int4") for peer in GROUPS[group]["peers"]),
        ),
        kind="fidelity",
    )
    yield PeerStep(
        *("schema", "Output with a JSON schema, int4", ("int4",), ("genai-int4", "llama-cpp")),
        cells=(Cell(0, 96),),
        figure="token",
        kind="schema",
    )
    yield PeerStep(
        *("equality", "Equal tokens with drafts from the prompt"),
        *(("int8",), ("openvino-int8", "llama-cpp")),
        kind="equality",
        page="peers",
    )


STEPS = {step.name: step for step in _steps()}


def steps_of(text: str | None) -> list[PeerStep]:
    """Parse comma-separated names of steps, or their beginnings. Default: all.

    Raises:
        OptionError: If a name is no step's.
    """
    found = []
    for name in (text or ",".join(STEPS)).split(","):
        named = [one for one in STEPS if one == name or one.startswith(f"{name}-")]
        if not named:
            raise OptionError(f"--steps {name!r} is no step; choose from {', '.join(STEPS)}")
        found += named
    return [STEPS[name] for name in dict.fromkeys(found)]
