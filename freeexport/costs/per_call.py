"""What every call of a bundle's engines costs, timed one by one, and in decoding: `freeexport bench --costs`."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from freeexport.costs.forced_exits import ForcedExitSession
from freeexport.costs.measured import TOKENS, costs_of, measured_costs
from freeexport.system.child import run_child
from freeexport.system.machine import detect_machine
from runtime.bundle.bundle import Bundle
from runtime.bundle.costs import Costs
from runtime.decoding.decoder import Decoder

MOST_ROWS = 32
# Valid positions at which calls are timed, and how often.
CONTEXT, ROUNDS = 128, 7


@dataclass(frozen=True)
class DeepCost:
    """Seconds of a deep pass over `rows` rows: without the head, with it for the last row, and for all."""

    rows: int
    bare: float
    last: float
    all: float


@dataclass(frozen=True)
class CostTable:
    """Seconds of one call after the other: a shallow step with and without its head, deep passes; and what the same
    cost in decoding, `decoding`, which predictions rest on."""

    shallow: float
    shallow_without_head: float
    deep: tuple[DeepCost, ...]
    decoding: Costs


def measure_table(session: ForcedExitSession, context: int = CONTEXT, rounds: int = ROUNDS) -> CostTable:
    """Time the calls of a session that nothing else uses, at `context` valid positions; medians of `rounds`. Deep
    passes over 1 to 32 rows, as far as the bundle has room for them."""
    manifest = session.manifest
    most = min(MOST_ROWS, manifest.max_pending)
    context = max(1, min(context, session.capacity - most - 1))
    prompt = np.random.default_rng(0).integers(0, manifest.vocab_size, context)
    shallow: dict[bool, list[float]] = defaultdict(list)
    deep: dict[tuple[int, int], list[float]] = defaultdict(list)
    with session.decoder() as decoder:
        decoder.prefill(prompt, head=False)
        for turn in range(rounds + 1):
            for rows in range(1, most + 1):
                for heads in sorted({0, 1, rows}):
                    stepped = _steps(decoder, rows)
                    seconds = _sync(decoder, heads)
                    decoder.trim(context)
                    if turn:  # the first turn binds and warms up
                        deep[rows, heads].append(seconds)
                        for head, taken in stepped.items():
                            shallow[head].append(taken)
    passes = tuple(
        DeepCost(rows, *(median(deep[rows, heads]) for heads in (0, 1, rows))) for rows in range(1, most + 1)
    )
    prompts = [prompt[: max(1, context - TOKENS // 2)]]
    decoding = measured_costs(session, prompts, TOKENS, rounds)
    return CostTable(median(shallow[True]), median(shallow[False]), passes, decoding)


def measure_in_child(bundle: Path, threads: int, rounds: int) -> CostTable:
    """The same in a process of its own, of which nothing is left."""
    found = json.loads(run_child("freeexport.costs.per_call", str(bundle), str(threads), str(rounds)))
    deep = tuple(DeepCost(**cost) for cost in found["deep"])
    return CostTable(**{**found, "deep": deep, "decoding": costs_of(found["decoding"])})


def figures(bundle: Bundle, costs: CostTable, threads: int, rounds: int, idle: bool) -> dict[str, Any]:
    """As JSON: the settings, and milliseconds."""
    manifest = bundle.manifest
    most = manifest.max_pending
    per_call = [
        {"rows": cost.rows, "bare_ms": 1e3 * cost.bare, "last_ms": 1e3 * cost.last, "all_ms": 1e3 * cost.all}
        for cost in costs.deep
    ]
    return {
        "settings": {
            "model": manifest.source,
            "precision": manifest.precision,
            "exit_layer": f"{manifest.exit_layer} of {manifest.layers}",
            "threads": threads,
            "context": CONTEXT,
            "rounds": rounds,
            "cpu": detect_machine().cpu,
            "idle": idle,
        },
        "shallow_ms": 1e3 * costs.shallow,
        "shallow_without_head_ms": 1e3 * costs.shallow_without_head,
        "overhead_us": 1e6 * costs.decoding.outside.full,
        "deep": per_call,
        "decoding": asdict(costs.decoding),
        "predicted": {
            "exit_rate": costs.decoding.break_even(most),
            **{f"speedup_at_{percent}": costs.decoding.speedup(percent / 100, most) for percent in (50, 80, 90)},
        },
    }


def table(found: Mapping[str, Any]) -> str:
    """What `figures` gave, for people."""
    head = found["shallow_ms"] - found["shallow_without_head_ms"]
    predicted = found["predicted"]
    lines = [
        f"shallow step {found['shallow_ms']:.2f} ms, of which the head {head:.2f} ms; "
        f"outside the engines {found['overhead_us']:.0f} us a token",
        f"{'deep pass over':>15} {'no head':>9} {'last row':>9} {'all rows':>9} {'a row':>8}   ms",
    ]
    lines += [
        f"{cost['rows']:15} {cost['bare_ms']:9.2f} {cost['last_ms']:9.2f} {cost['all_ms']:9.2f} "
        f"{cost['last_ms'] / cost['rows']:8.2f}"
        for cost in found["deep"]
    ]
    rate = predicted["exit_rate"]
    pays = "exits never pay" if rate is None else f"exits pay from {rate:.1%} on"
    rates = ", ".join(f"at {percent} % {predicted[f'speedup_at_{percent}']:.2f}x" for percent in (50, 80, 90))
    lines.append(f"predicted: {pays}; {rates} of mode full")
    lines.append(", ".join(f"{name} {value}" for name, value in found["settings"].items()))
    return "\n".join(lines)


def _steps(decoder: Decoder, rows: int) -> dict[bool, float]:
    """Shallow steps until `rows` are stacked; seconds of one with and of one without the head, as far as both ran."""
    taken = {}
    for token in range(rows):
        head, before = token % 2 == 1, decoder.stats.shallow_seconds
        decoder.step(token, head)
        taken[head] = decoder.stats.shallow_seconds - before
    return taken


def _sync(decoder: Decoder, heads: int) -> float:
    before = decoder.stats.deep_seconds
    decoder.sync(heads)
    return decoder.stats.deep_seconds - before


def main(arguments: Sequence[str]) -> None:
    """Print the table of the bundle named first, on as many threads and rounds as said then, as JSON."""
    bundle, threads, rounds = arguments
    with ForcedExitSession(Path(bundle), slots=1, threads=int(threads)) as session:
        print(json.dumps(asdict(measure_table(session, rounds=int(rounds)))))


if __name__ == "__main__":
    main(sys.argv[1:])
