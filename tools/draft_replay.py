"""Replays recorded requests through the loop of mode lossless, with fixed costs of calls.

    python -m tools.draft_replay TRACES.jsonl --costs costs.json --save result.json

Every engine call is answered from the traces of tools.draft_traces and takes the time measured by
tools.draft_cost, so the figures do not depend on the load of the machine. A trace is an object with
the token ids `prompt` and `output`. The setting `exit` also needs its `chains`. Run from the root
of the repository.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import click
import numpy as np

from freeexport.system.environment import environment
from freeexport.system.output import write_whole
from runtime.adaptation.call_costs import CallCosts
from runtime.bundle.costs import Costs
from runtime.decoding.calls import NOTHING, Prediction
from runtime.decoding.decoder import Decoder
from runtime.decoding.draft_acceptance import LearnedDrafts
from runtime.decoding.draft_memory import TextMemory
from runtime.decoding.draft_sources import DraftSources
from runtime.decoding.drafts import Drafts
from runtime.decoding.loops import lossless
from runtime.decoding.response import Response
from runtime.result import Stats
from tools.data.splits import run_tool

WRONG = -1
VOCABULARY = 1 << 18
MAX_PENDING = 16
MEMORY = 32_000_000  # bytes, the default of sessions
SETTINGS = {"text": (False, False), "text and memory": (True, False), "exit": (False, True)}


class Trace(NamedTuple):
    """A request: token ids, and drafts and confidences of the exit after each output token."""

    prompt: list[int]
    output: list[int]
    chains: list[list[tuple[int, float]]]


class Prices(NamedTuple):
    """Milliseconds of engine calls by number of rows, and of Python: tools.draft_cost's row."""

    step: dict[int, float]
    deep: dict[int, float]
    exit: float
    python: float
    draft_python: float

    @classmethod
    def of(cls, row: dict[str, Any]) -> Prices:
        step, deep = (
            {int(rows): seconds for rows, seconds in row[name].items()} for name in ("step", "pass")
        )
        return cls(step, deep, row["exit_of_draft"], row["python_of_token"], row["python_of_draft"])

    @property
    def costs(self) -> Costs:
        """The costs that a bundle converted on this machine records."""
        return Costs(self.step[1] + self.exit, self.step[1], self.deep)


class ReplayedDecoder:
    """Decoder that answers the calls of the loop from a trace, and advances `now` by their cost."""

    alone = True
    batch_size = 1

    def __init__(self, trace: Trace, prices: Prices) -> None:
        self.now = 0.0
        self.stats = Stats()
        self._trace = trace
        self._prices = prices
        self._place = 0  # of the newest final token that no deep pass has read
        self._stack: list[int] = []
        self._heads = 0

    def full_step(self, token: int) -> int:
        self.step(token, head=False)
        self.syncing(1)
        return self.deep_predictions()[0].token

    def step(self, token: int, head: bool) -> Prediction:
        drafted = len(self._stack)
        self._stack.append(token)
        self._shallow(self._prices.step[1])
        if not head:
            return NOTHING
        self._shallow(self._prices.exit)
        self.now += self._prices.draft_python
        chain = self._trace.chains[self._place]
        token, confidence = chain[drafted] if drafted < len(chain) else (WRONG, 0.0)
        return Prediction(token, confidence)

    def stepping_together(self, tokens: Sequence[int], head: bool = False) -> tuple[()]:
        self._stack += tokens
        self._shallow(priced(self._prices.step, len(tokens)))
        return ()

    def shallow_prediction(self) -> Prediction:
        return NOTHING

    def syncing(self, heads: int, drafts: Sequence[int] = ()) -> tuple[()]:
        self._heads = heads
        seconds = priced(self._prices.deep, len(self._stack))
        self.now += seconds + self._prices.python
        self.stats.count_pass(len(self._stack), seconds)
        return ()

    def deep_predictions(self) -> list[Prediction]:
        output = self._trace.output
        found = []
        right = True
        for row, token in enumerate(self._stack):
            place = self._place + row
            right = right and place < len(output) and output[place] == token
            found.append(
                Prediction(output[place + 1] if right and place + 1 < len(output) else WRONG)
            )
        self._place += len(self._stack)
        self._stack = []
        return found[len(found) - self._heads :]

    def lengths(self) -> tuple[int, int]:
        return self._place, self._place

    def trim(self, length: int) -> None:
        self._place = length

    def _shallow(self, seconds: float) -> None:
        self.stats.shallow_seconds += seconds
        self.now += seconds


def priced(costs: dict[int, float], rows: int) -> float:
    return float(np.interp(rows, list(costs), list(costs.values())))


def replay(
    trace: Trace, prices: Prices, learned: LearnedDrafts, memory: TextMemory | None, exits: bool
) -> tuple[float, Stats]:
    """Return the milliseconds of a request after its first token, and its statistics."""
    decoder = ReplayedDecoder(trace, prices)
    response = Response(np.array(trace.prompt, np.int64), len(trace.output))
    response.add(trace.output[0], False, None)

    class Timed(Drafts):
        clock = staticmethod(lambda: decoder.now)

    acceptance = learned.acceptance(0.0, False)
    drafts = Timed(
        learned.costs, acceptance, DraftSources(VOCABULARY, trace.prompt, memory=memory), exits
    )
    for _ in lossless(cast(Decoder, decoder), response, 0.0, MAX_PENDING, drafts):
        pass
    assert [token.id for token in response.tokens] == trace.output
    if memory is not None:
        memory.keep(None, trace.prompt, trace.output)
    return decoder.now, decoder.stats


def replay_stream(
    traces: Sequence[Trace], prices: Prices, setting: str, after: int
) -> dict[str, Any]:
    """Replay requests in order, and return the figures of those after the first `after`."""
    remembers, exits = SETTINGS[setting]
    memory = TextMemory(VOCABULARY, MEMORY) if remembers else None
    learned = LearnedDrafts(CallCosts(prices.costs))
    full = prices.step[1] + prices.deep[1] + prices.python
    done = [replay(trace, prices, learned, memory, exits) for trace in traces]
    counted = [*zip(traces, done, strict=True)][after:]
    tokens = sum(len(trace.output) - 1 for trace, _ in counted)
    times = [full * (len(trace.output) - 1) / now for trace, (now, _) in counted]
    return {
        "speeds": times,
        "ms": sum(now for _, (now, _) in counted) / tokens,
        "full_ms": full,
        "passes": sum(stats.sync_passes for _, (_, stats) in counted) / tokens,
        "exits": sum(stats.exits for _, (_, stats) in counted) / tokens,
    }


def compare(
    traces: Sequence[Trace], prices: Prices, settings: Sequence[str], shuffles: int, after: int
) -> list[dict[str, Any]]:
    """Return a row for each setting, of `shuffles` orders of the requests."""
    rows = []
    for setting in settings:
        streams = []
        for seed in range(shuffles):
            order = random.Random(seed).sample(list(traces), len(traces))
            streams.append(replay_stream(order, prices, setting, after))
        full = streams[0]["full_ms"]
        ms, passes, exits = (
            float(np.mean([stream[name] for stream in streams]))
            for name in ("ms", "passes", "exits")
        )
        rows.append(
            {
                "setting": setting,
                "speed": round(full / ms, 4),
                "speed_by_order": [round(full / stream["ms"], 4) for stream in streams],
                "slowest_request": round(min(min(stream["speeds"]) for stream in streams), 4),
                "passes_per_token": round(passes, 4),
                "exits_per_token": round(exits, 4),
            }
        )
    return rows


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("traces", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--costs", type=click.Path(path_type=Path, exists=True), required=True, help="By draft_cost."
)
@click.option("--settings", default=",".join(SETTINGS))
@click.option("--shuffles", default=3, type=click.IntRange(1))
@click.option("--after", default=0, help="Requests that are not counted.")
@click.option("--save", type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    traces: Path, costs: Path, settings: str, shuffles: int, after: int, save: Path | None
) -> None:
    recorded = [
        Trace(item["prompt"], item["output"], item.get("chains", []))
        for item in map(json.loads, traces.read_text(encoding="utf-8").splitlines())
    ]
    found = []
    for row in json.loads(costs.read_text(encoding="utf-8"))["rows"]:
        compared = compare(recorded, Prices.of(row), settings.split(","), shuffles, after)
        found += [{"precision": row["precision"], **one} for one in compared]
    for one in found:
        click.echo(json.dumps(one))
    if save is not None:
        command = f"python -m tools.draft_replay {traces.name} --costs {costs.name}"
        content = {
            "command": f"{command} --settings '{settings}' --shuffles {shuffles} --after {after}",
            "commit": environment()["commit"],
            "requests": len(recorded),
            "rows": found,
        }
        write_whole(save, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
