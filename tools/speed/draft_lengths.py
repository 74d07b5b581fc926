"""What lossless drafts gain on this machine: as long as the pace decides, and at fixed lengths.

    python -m tools.speed.draft_lengths BUNDLE --rate 0 --rate 0.5 --rate 0.8 --length 1 --length 2 --length 4
    python -m tools.speed.draft_lengths BUNDLE --threshold 0.5 --tokens 32

All in one process, in turn, prompt by prompt, against mode full in the same turn: ratios hold where the machine's speed
drifts; medians over requests, and quartiles. `--rate` replays drafts of which that share is right, `--threshold` lets
the model draft. Besides what a session that has learned does there is what each gains as the first of a session,
and mode full again, which shows how far a ratio is to be trusted. Run on an idle machine, from the root.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from unittest import mock

import click
import numpy as np

from freeexport.benchmark.benchmark import bench_prompts
from freeexport.costs.forced_drafts import ForcedDraftSession
from freeexport.system.idle import require_idle
from freeexport.system.output_file import check_writable, write_whole
from runtime.adaptation.draft_length import DraftLength
from runtime.bundle.bundle import Bundle
from runtime.result import Stats

# Replayed drafts are surer than any of these; each kind of request has one to itself, and so a pace.
REPLAYED = 0.5
APART = 1e-6


@dataclass(frozen=True)
class Kind:
    """Requests that are compared: `rate` of right drafts where they are replayed, else the model drafts above
    `threshold`. `length`: fixed, or None as the pace decides; `first`: of a session that has learned nothing."""

    name: str
    threshold: float = 1.0
    rate: float | None = None
    length: int | None = None
    first: bool = False
    mode: str = "lossless"


@dataclass
class Seen:
    """Of a kind: the seconds of each request, round by round, and what became of the drafts."""

    seconds: list[float]
    tokens: int = 0
    exits: int = 0
    rejected: int = 0

    def add(self, seconds: float, stats: Stats) -> None:
        self.seconds.append(seconds)
        self.tokens += stats.tokens - 1
        self.exits += stats.exits
        self.rejected += stats.rejected


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="JSON lines with prompts.  [default: four sample texts]")
@click.option("--rate", type=click.FloatRange(0, 1), multiple=True, help="Share of right drafts; several times.")
@click.option("--threshold", type=click.FloatRange(0, 1), multiple=True, help="The model drafts; several times.")
@click.option("--length", type=click.IntRange(1), multiple=True, help="Also drafts of this length; several times.")
@click.option("--tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option("--samples", type=click.IntRange(1), default=2, show_default=True, help="Prompts used.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--warm", type=click.IntRange(1), default=2, show_default=True, help="Rounds before, for the pace too.")
@click.option("--threads", type=click.IntRange(1), help="[default: one per physical core]")
@click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures as JSON, too.")
@click.option("--force", is_flag=True, help="Go on even if the machine is busy.")
def main(
    bundle: Path,
    data: Path | None,
    rate: tuple[float, ...],
    threshold: tuple[float, ...],
    length: tuple[int, ...],
    tokens: int,
    samples: int,
    rounds: int,
    warm: int,
    threads: int | None,
    save: Path | None,
    force: bool,
) -> None:
    check_writable(save, "--save")
    idle = require_idle(force)
    prompts = bench_prompts(Bundle.open(bundle), data, samples)
    kinds = kinds_of(rate, threshold, length)
    with ForcedDraftSession(bundle, threads=threads) as session:
        session.settle()
        seen = measure(session, prompts, kinds, tokens, rounds, warm)
        costs = session.draft_costs
        used = f"{session.threads} threads, {len(prompts)} prompts of {tokens} tokens, {rounds} rounds"
    found = {kind.name: figures_of(seen[kinds[0]].seconds, seen[kind]) for kind in kinds}
    click.echo(f"{bundle.name}: {used}" + ("" if idle else " (busy machine)"))
    for name, figures in found.items():
        click.echo(
            f"{name:32} {figures['ratio']:.3f}x ({figures['low']:.2f} to {figures['high']:.2f}), "
            f"drafted {figures['drafted']:.0%} of the tokens, kept {figures['kept']:.0%}"
        )
    passes = range(1, max((1, *length)) + 2)
    click.echo(
        f"learned: a step {1e3 * costs.step(False):.2f} ms, with head {1e3 * costs.step(True):.2f}; deep passes over "
        + ", ".join(f"{rows}: {1e3 * costs.deep_pass(rows):.2f}" for rows in passes)
    )
    if save is not None:
        write_whole(save, json.dumps({"bundle": bundle.name, "settings": used, "idle": idle, "kinds": found}) + "\n")


def kinds_of(rates: Sequence[float], thresholds: Sequence[float], lengths: Sequence[int]) -> list[Kind]:
    """Mode full first, and again."""
    drafting = [(f"{rate:.0%} right", REPLAYED, rate) for rate in rates]
    drafting += [(f"threshold {threshold:g}", threshold, None) for threshold in thresholds]
    kinds = [Kind("full", mode="full"), Kind("full again", mode="full")]
    for name, threshold, rate in drafting:
        here = [Kind(name, rate=rate), Kind(f"{name}, first request", rate=rate, first=True)]
        here += [Kind(f"{name}, {length} drafted", rate=rate, length=length) for length in lengths]
        kinds += [_apart(kind, threshold, len(kinds) + number) for number, kind in enumerate(here)]
    return kinds


def measure(
    session: ForcedDraftSession,
    prompts: Sequence[Sequence[int]],
    kinds: Sequence[Kind],
    tokens: int,
    rounds: int,
    warm: int,
) -> dict[Kind, Seen]:
    """Every kind on every prompt in turn, each round beginning with another kind. Tokens that differ from those of full
    in full precision are an error of the runtime's, not of this tool's."""
    asked = {"max_new_tokens": tokens, "ignore_eos": True}
    answers = [session.generate(list(prompt), mode="full", **asked).token_ids for prompt in prompts]
    seen = {kind: Seen([]) for kind in kinds}
    for turn in range(-warm, rounds):
        for number, prompt in enumerate(prompts):
            begin = (turn * len(prompts) + number) % len(kinds)
            for kind in (*kinds[begin:], *kinds[:begin]):
                with _as_asked(session, kind, answers[number]):
                    began = perf_counter()
                    threshold = None if kind.mode == "full" else kind.threshold
                    done = session.generate(list(prompt), mode=kind.mode, threshold=threshold, **asked)
                    seconds = perf_counter() - began
                if turn >= 0:
                    seen[kind].add(seconds, done.stats)
    return seen


@contextmanager
def _as_asked(session: ForcedDraftSession, kind: Kind, answer: Sequence[int]) -> Iterator[None]:
    with ExitStack() as stack:
        if kind.first:
            stack.enter_context(session.beginning())
        if kind.length is not None:
            fixed = kind.length
            stack.enter_context(mock.patch.object(DraftLength, "plan", lambda pace, most: (min(most, fixed), False)))
        stack.enter_context(nullcontext() if kind.rate is None else session.drafting(answer, kind.rate))
        yield


def _apart(kind: Kind, threshold: float, number: int) -> Kind:
    return Kind(**{**vars(kind), "threshold": float(np.clip(threshold + number * APART, 0, 1))})


def figures_of(full: Sequence[float], seen: Seen) -> dict[str, float]:
    """`ratio`: the median over requests of the speed as a multiple of mode full's in the same round; `low`, `high`: its
    quartiles. The share of tokens that were `drafted`, and of drafts that were `kept`."""
    low, ratio, high = np.quantile(np.array(full) / np.array(seen.seconds), (0.25, 0.5, 0.75)).tolist()
    tried = seen.exits + seen.rejected
    return {
        "ratio": ratio,
        "low": low,
        "high": high,
        "drafted": seen.exits / seen.tokens,
        "kept": seen.exits / tried if tried else 1.0,
    }


if __name__ == "__main__":
    main()
