"""Whether overlapped lanes pay for a bundle on this machine, and whether the simulation says so too.

    python -m tools.overlap BUNDLE --threshold 0.5

Decodes one prompt in mode free with lanes in turn and overlapped, interleaved; then simulates both from the measured
costs, how much the lanes slow each other down, and the exits of the run. Run on an idle machine, from the root.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from statistics import median

import click
import numpy as np

from freeexport.decode_costs import measured_costs
from freeexport.idle import require_idle
from freeexport.lane_costs import measured_overlap
from freeexport.replay import ReplaySession
from runtime import Session, decode
from runtime.continuation import Continuation
from runtime.work import alone
from tools.lane_simulator import Costs, Setting, TokenTrace, milliseconds, simulate


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--threshold", type=float, required=True)
@click.option("--tokens", type=click.IntRange(8), default=96, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--sync-every", type=click.IntRange(0), default=4, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Of each engine.  [default: one per physical core]")
@click.option("--force", is_flag=True, help="Go on even if the machine is busy.")
def main(
    bundle: Path, threshold: float, tokens: int, rounds: int, sync_every: int, threads: int | None, force: bool
) -> None:
    require_idle(force)
    times: dict[bool, list[float]] = {False: [], True: []}
    with ExitStack() as stack:
        in_turn = stack.enter_context(ReplaySession(bundle, slots=2, threads=threads))
        overlapped = stack.enter_context(Session(bundle, slots=2, threads=threads, overlap=True))
        overlapped.settle()
        sessions: dict[bool, Session] = {False: in_turn, True: overlapped}
        for turn in range(rounds + 1):
            for overlap, session in sessions.items():
                seconds = decode_once(session, threshold, tokens, sync_every)
                if turn:  # the first turn binds and warms up
                    times[overlap].append(1e3 * seconds)
        trace = trace_of(sessions[False], threshold, tokens)
        costs = measured_costs(in_turn, [np.array(prompt_of(in_turn))], tokens)
        slower = measured_overlap(in_turn, tokens)
    simulated = Costs(1e3 * costs.shallow, {rows: 1e3 * cost for rows, cost in costs.deep.items()})
    exits = sum(token.exits for token in trace) / len(trace)
    click.echo(
        f"threshold {threshold}: {exits:.0%} exits; both at once: a step takes {slower.slower_shallow:.2f}x, a pass "
        f"{slower.slower_deep:.2f}x, {slower.gain:.2f}x the work of both in turn"
    )
    for overlap in (False, True):
        slowdown = {"shallow": slower.slower_shallow, "deep": slower.slower_deep}
        setting = Setting(overlap, sessions[overlap].manifest.max_pending, sync_every, slowdown)  # type: ignore[arg-type]
        said, took = milliseconds(simulate([trace], simulated, setting)), median(times[overlap])
        click.echo(
            f"{'overlapped' if overlap else 'in turn':10} {1e3 * (tokens - 1) / took:8.1f} tokens/s measured, "
            f"{1e3 * (tokens - 1) / said:8.1f} simulated ({said / took - 1:+.0%})"
        )
    click.echo(f"overlap gains {median(times[False]) / median(times[True]):.2f}x")


def decode_once(session: Session, threshold: float, tokens: int, sync_every: int) -> float:
    """Seconds of decoding after the first token."""
    stats = session.generate(
        prompt_of(session), threshold=threshold, max_new_tokens=tokens, sync_every=sync_every, ignore_eos=True
    ).stats
    return stats.seconds - stats.prefill_seconds - stats.encode_seconds


def trace_of(session: Session, threshold: float, tokens: int) -> list[TokenTrace]:
    """What each token after the first did, from the labels of sync passes; the stack that is left over exits."""
    labels: list[tuple[float, bool]] = []
    prompt, manifest = np.array(prompt_of(session)), session.manifest
    with session.decoder() as decoder:
        if manifest.encoder_decoder:
            raise click.UsageError("this measurement is for decoder-only bundles")
        output = Continuation(prompt, tokens)
        first = decoder.prefill(prompt, head=True)
        loop = alone(decode.free(decoder, first, output, threshold, manifest.max_pending, observe=labels.extend))
        steps = list(islice(loop, tokens))[1:]
    known = [agrees for _, agrees in labels] + [True] * len(steps)
    return [TokenTrace(step.exited, agrees) for step, agrees in zip(steps, known, strict=False)]


def prompt_of(session: Session) -> list[int]:
    return np.random.default_rng(1).integers(5, session.manifest.vocab_size, 24).tolist()


if __name__ == "__main__":
    main()
