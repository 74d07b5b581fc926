"""Throughput and latency of a bundle at several requests in flight, and where mode free stops paying.

    python -m tools.speed.batches BUNDLE --data prompts.jsonl --threshold 0.8
    python -m tools.speed.batches BUNDLE --data prompts.jsonl --replay 0.8 --tokens 48

As one request ends, the next joins: a server under load, without its network. Every setting runs `--seconds` in each
of interleaved `--rounds`. Requests end where the model ends them, at --tokens at the latest; with replayed exits, which
say nothing of what a model has learned, ends are ignored and lengths drawn from --tokens/2 to --tokens. Greedy. Run
from the root on an idle machine.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from freeexport.benchmark.benchmark import bench_prompts
from freeexport.benchmark.rounds import SETTLE
from freeexport.measure.forced import THRESHOLD, ForcedExitSession, exit_trace
from freeexport.system.idle import is_idle, require_idle
from freeexport.system.machine import detect_machine
from freeexport.system.output_file import write_whole
from freeexport.system.progress import progress
from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.machine.machine import usable_cores
from tools.speed.batch_rows import MODES, Setting, rows_of, table
from tools.speed.closed_loop import ClosedLoop, Window


@dataclass(frozen=True)
class Load:
    """What the requests are, and how long each setting is watched; the options of that name."""

    prompts: Sequence[list[int]]
    threshold: float | None
    replay: str | None
    tokens: int
    seconds: float
    rounds: int


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="JSON lines with an `input`.  [default: sample texts]")
@click.option("--samples", type=click.IntRange(1), default=64, help="Prompts of --data.")
@click.option("--mode", "modes", type=click.Choice(MODES), multiple=True, default=("full", "free"))
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 2, 4, 8, 16))
@click.option("--threshold", type=float, help="Exit above this confidence.  [default: the bundle's]")
@click.option("--replay", help="Exits as drawn at this rate, or as in an output of generate.")
@click.option("--tokens", type=click.IntRange(2), default=128)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=4.0)
@click.option("--rounds", type=click.IntRange(1), default=3)
@click.option("--threads", type=click.IntRange(1), help="Of each engine.  [default: one per physical core]")
@click.option("--force", is_flag=True, help="Go on even if the machine is busy.")
@click.option("--save", type=click.Path(path_type=Path), help="Write the figures as JSON.")
def main(
    bundle: Path,
    data: Path | None,
    samples: int,
    modes: tuple[str, ...],
    batches: tuple[int, ...],
    threads: int | None,
    force: bool,
    save: Path | None,
    **given: Any,
) -> None:
    if given["replay"] is not None and ("lossless" in modes or given["threshold"] is not None):
        raise click.UsageError("--replay decides about exits: neither --threshold nor mode lossless goes with it")
    if save is not None and not save.parent.is_dir():
        raise click.UsageError(f"--save: there is no directory {save.parent}")
    settings = [Setting(mode, batch) for batch in sorted(set(batches)) for mode in dict.fromkeys(("full", *modes))]
    load = Load(bench_prompts(Bundle.open(bundle), data, samples), **given)
    idle = require_idle(force)
    with opened(bundle, load, max(batches), threads) as session:
        windows = measure(session, settings, load)
        about = describe(session, load)
    about["idle"] = idle and is_idle()
    rows = rows_of(windows)
    click.echo(table(about, rows))
    if save is not None:
        found = {"settings": about, "rows": [asdict(row) for row in rows]}
        write_whole(save, json.dumps(found, indent=2) + "\n")


def opened(bundle: Path, load: Load, slots: int, threads: int | None) -> Session:
    """With no more room than the requests need."""
    manifest = Bundle.open(bundle).manifest
    read = 1 if manifest.encoder_decoder else max(map(len, load.prompts))
    capacity = min(manifest.capacity, read + load.tokens)
    options: dict[str, Any] = {"threads": threads, "slots": slots, "capacity": capacity}
    if load.replay is None:
        return Session(bundle, **options)
    return ForcedExitSession(bundle, exit_trace(load.replay), onward=True, **options)


def measure(session: Session, settings: Sequence[Setting], load: Load) -> dict[Setting, list[Window]]:
    """A window for each round, after a short one to warm up."""
    found: dict[Setting, list[Window]] = defaultdict(list)
    with progress("measuring", (load.rounds + 1) * len(settings)) as advance:
        for turn in range(load.rounds + 1):
            # The order turns, so that none always follows the same other.
            first = turn * 3 % len(settings)
            for setting in (*settings[first:], *settings[:first]):
                time.sleep(SETTLE)
                loop = ClosedLoop(session, load.prompts, options_of(setting.mode, load), setting.batch)
                window = loop.run(load.seconds if turn else load.seconds / 4)
                if turn:
                    found[setting].append(window)
                advance()
    return found


def options_of(mode: str, load: Load) -> list[dict[str, Any]]:
    """Of each prompt: the same for all modes, but for the mode."""
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": load.tokens}
    if mode != "full":
        options["threshold"] = load.threshold if load.replay is None else THRESHOLD
    if load.replay is None:
        return [options] * len(load.prompts)
    lengths = np.random.default_rng(0).integers(load.tokens // 2, load.tokens + 1, len(load.prompts))
    return [{**options, "max_new_tokens": int(length), "ignore_eos": True} for length in lengths]


def describe(session: Session, load: Load) -> dict[str, Any]:
    """What the figures depend on."""
    manifest, machine = session.manifest, detect_machine()
    threshold = session.threshold if load.threshold is None else load.threshold
    return {
        "model": manifest.source,
        "exit_layer": f"{manifest.exit_layer} of {manifest.layers}",
        "precision": manifest.precision,
        "exits": f"above {threshold:g}" if load.replay is None else f"replayed at {load.replay}",
        "threads": session.threads,
        "of_cores": usable_cores(),
        "prompts": len(load.prompts),
        "tokens": load.tokens,
        "seconds": load.seconds,
        "rounds": load.rounds,
        "cpu": machine.cpu,
        "memory": machine.memory,
    }


if __name__ == "__main__":
    main()
