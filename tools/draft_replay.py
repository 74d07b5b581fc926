"""Replays recorded requests through the loop of mode lossless, with fixed costs of calls.

    python -m tools.draft_replay TRACES.jsonl --costs costs.json --save result.json

Engine calls are answered from the traces of tools.draft_traces and take the time measured by
tools.draft_cost, so the figures do not depend on the load of the machine. Only the setting `exit`
needs the `chains` of a trace. Run from the root of the repository.
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
from runtime.bundle.costs import MAX_PENDING, Costs
from runtime.decoding.acceptance import LearnedDrafts
from runtime.decoding.calls import NOTHING, Prediction, Waits
from runtime.decoding.decoder import Decoder
from runtime.decoding.draft_sources import TextSource
from runtime.decoding.drafts import Drafts
from runtime.decoding.loops import Policy, decode
from runtime.decoding.phrases import PhraseTable
from runtime.decoding.response import Response
from runtime.decoding.text_index import TextMemory
from runtime.result import Stats
from tools.data.splits import run_tool

WRONG = -1
VOCABULARY = 1 << 18
MEMORY = 32_000_000  # bytes, the default of sessions
SETTINGS = ("text", "memory", "exit")  # drafts from text alone, or also from one of the others


class Trace(NamedTuple):
    """A request: token ids, and drafts and confidences of the exit after each output token."""

    prompt: list[int]
    output: list[int]
    chains: list[list[tuple[int, float]]]


class ReplayedDecoder:
    """Answers calls from a trace, and adds their `costs` by tools.draft_cost to `now`, in ms."""

    only_sequence = True
    overlaps = False
    stacked = 0
    batch_size = 1

    def __init__(self, trace: Trace, costs: dict[str, Any]) -> None:
        self.now = 0.0
        self.stats = Stats()
        self.trace = trace
        self._costs = costs
        self._place = 0  # number of tokens that a deep pass has read
        self._exit_place = 0  # number of tokens that the exit has read
        self._stack: list[int] = []

    def stepping(self, tokens: Sequence[int], head: bool) -> Waits[Prediction]:
        drafted = len(self._stack)
        self._stack += tokens
        self._shallow(cost(self._costs["step"], len(tokens)))
        if not head:
            return NOTHING
        unread = self._place + len(self._stack) - self._exit_place
        self._exit_place += unread
        self._shallow(self._costs["exit_of_draft"] + (unread - 1) * self._costs["row_of_exit"])
        self.now += self._costs["python_of_draft"]
        chain = self.trace.chains[self._place]
        return Prediction(*(chain[drafted] if drafted < len(chain) else (WRONG, 0.0)))
        yield

    def syncing(self, heads: int, drafts: Sequence[int] = ()) -> Waits[list[Prediction]]:
        rows = len(self._stack)
        self.stats.count_pass(rows, cost(self._costs["pass"], rows))
        self.now += cost(self._costs["pass"], rows) + self._costs["python_of_token"]
        output = [*self.trace.output, WRONG]
        found = []
        right = True
        for place, token in enumerate(self._stack, self._place):
            right = right and place < len(output) - 1 and output[place] == token
            found.append(Prediction(output[place + 1] if right else WRONG))
        # The exit reads drafted tokens again, with the features of the deep pass.
        self._exit_place = min(self._exit_place, self._place + 1)
        self._place += rows
        self._stack = []
        return found[rows - heads :]
        yield

    def lengths(self) -> tuple[int, int]:
        return self._place, self._place

    def trim(self, length: int) -> None:
        self._place = length

    def _shallow(self, seconds: float) -> None:
        self.stats.shallow_seconds += seconds
        self.now += seconds


def cost(by_rows: dict[str, float], rows: int) -> float:
    """Return the cost of a call by its rows, between those measured."""
    return float(np.interp(rows, [*map(int, by_rows)], [*by_rows.values()]))


def replay_request(
    decoder: ReplayedDecoder,
    learned: LearnedDrafts,
    memory: TextMemory | None,
    phrases: Sequence[PhraseTable],
    exits: bool,
) -> None:
    """Replay the request of a decoder, after its first token."""
    trace = decoder.trace
    response = Response(np.array(trace.prompt, np.int64), len(trace.output))
    response.add(trace.output[0], False, None)

    class Timed(Drafts):
        clock = staticmethod(lambda: decoder.now)

    acceptance = learned.acceptance(0.0, False)
    texts = TextSource(acceptance, VOCABULARY, text=[trace.prompt], memory=memory, phrases=phrases)
    drafts = Timed(learned.costs, acceptance, [texts], exits)
    for _ in decode(cast(Decoder, decoder), response, drafts, Policy(max_pending=MAX_PENDING)):
        pass
    assert [token.id for token in response.tokens] == trace.output
    if memory is not None:
        memory.keep(None, trace.prompt, trace.output)


def compare_setting(
    traces: Sequence[Trace],
    costs: dict[str, Any],
    setting: str,
    phrases: Sequence[PhraseTable],
    shuffles: int,
    after: int,
) -> dict[str, Any]:
    """Return the figures of a setting, of the requests after the first `after` of each order."""
    step = costs["step"]["1"]
    token = step + costs["pass"]["1"] + costs["python_of_token"]
    base = Costs(step + costs["exit_of_draft"], step, {int(k): v for k, v in costs["pass"].items()})
    done = []
    for seed in range(shuffles):
        memory = TextMemory(VOCABULARY, MEMORY) if setting == "memory" else None
        learned = LearnedDrafts(CallCosts(base))
        for place, trace in enumerate(random.Random(seed).sample(list(traces), len(traces))):
            decoder = ReplayedDecoder(trace, costs)
            replay_request(decoder, learned, memory, phrases, exits=setting == "exit")
            if place >= after and len(trace.output) > 1:
                done.append((len(trace.output) - 1, decoder))
    tokens = sum(count for count, _ in done)
    return {
        "precision": costs["precision"],
        "setting": setting,
        "phrases": sum(len(table.entries) for table in phrases),
        "speed": round(token * tokens / sum(decoder.now for _, decoder in done), 4),
        "slowest_request": round(min(token * count / one.now for count, one in done), 4),
        "passes_per_token": round(sum(one.stats.sync_passes for _, one in done) / tokens, 4),
        "exits_per_token": round(sum(one.stats.exits for _, one in done) / tokens, 4),
    }


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("traces", type=click.Path(path_type=Path, exists=True))
@click.option("--costs", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--setting", "settings", multiple=True, type=click.Choice(SETTINGS))
@click.option(
    "--phrases",
    "table",
    type=click.Path(path_type=Path, exists=True),
    help="phrases.npy of a bundle, which every setting also drafts.",
)
@click.option("--shuffles", default=3, type=click.IntRange(1), help="Orders of the requests.")
@click.option("--after", default=0, help="Requests of each order that are not counted.")
@click.option("--save", type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    traces: Path,
    costs: Path,
    settings: Any,
    table: Path | None,
    shuffles: int,
    after: int,
    save: Path | None,
) -> None:
    lines = map(json.loads, traces.read_text(encoding="utf-8").splitlines())
    recorded = [Trace(line["prompt"], line["output"], line.get("chains", [])) for line in lines]
    phrases = [] if table is None else [PhraseTable(np.load(table))]
    rows = []
    for priced in json.loads(costs.read_text(encoding="utf-8"))["rows"]:
        for setting in settings or SETTINGS:
            rows.append(compare_setting(recorded, priced, setting, phrases, shuffles, after))
            click.echo(json.dumps(rows[-1]))
    if save is not None:
        chosen = "".join(f" --setting {setting}" for setting in settings)
        files = f"{traces.name} --costs {costs.name} --shuffles {shuffles} --after {after}"
        if table is not None:
            files += f" --phrases {table.parent.name}/{table.name}"
        command = f"python -m tools.draft_replay {files}{chosen}"
        content = {"command": command, "commit": environment()["commit"], "rows": rows}
        write_whole(save, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
