"""Time the engines of several bundles of one model, in turn and in one run: what does each precision gain?

    python tools/speed/precision.py BUNDLE BUNDLE ...            milliseconds a call and tokens/s, as a table
    python tools/speed/precision.py BUNDLE ... --json FILE       the same figures, and the settings, as JSON

Needs bundles of one checkpoint with one exit layer, converted at different precisions or exit vocabularies. Exits are
drawn, not decided: an untrained exit has the same costs as a trained one at the same exit rate.
"""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter

import click
import numpy as np

from freeexport.system.idle import require_idle
from freeexport.system.machine import detect_machine
from runtime import Session
from runtime.decoding.decoder import Decoder
from runtime.errors import OptionError

SIZES = (1, 2, 4, 8, 16)
EXIT_RATES = (0.8, 0.9)
MOST_ROWS = 16
Times = dict[str, list[float]]


@click.command(help=__doc__)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--context", default=128, show_default=True, help="Valid positions at the start of each measurement.")
@click.option("--tokens", default=64, show_default=True, help="Tokens of each decoding run.")
@click.option("--rounds", default=15, show_default=True)
@click.option("--threads", type=int, help="[default: one for each physical core]")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write the figures here, too.")
@click.option("--force", is_flag=True, help="Measure on a busy machine.")
def main(
    bundles: tuple[Path, ...], context: int, tokens: int, rounds: int, threads: int | None, report: Path | None,
    force: bool,
) -> None:  # fmt: skip
    idle = require_idle(force)
    names = [str(path) for path in bundles]
    with ExitStack() as stack:
        sessions = {str(path): stack.enter_context(Session(path, slots=1, threads=threads)) for path in bundles}
        _check_same_model(sessions)
        for session in sessions.values():
            session.settle()
        decoders = {name: stack.enter_context(session.decoder()) for name, session in sessions.items()}
        vocabulary = next(iter(sessions.values())).manifest.vocab_size
        text = np.random.default_rng(0).integers(3, vocabulary, context + tokens)
        times: dict[str, Times] = {name: defaultdict(list) for name in names}
        for name, decoder in decoders.items():
            began = perf_counter()
            decoder.prefill(text[:context], head=True)
            times[name][f"prefill {context}"].append(perf_counter() - began)
        for turn in range(rounds + 1):
            # The order turns, so that none always follows the same other.
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                found = _round(decoders[name], text[context:], context)
                for what, seconds in found.items() if turn else ():  # the first turn binds and warms up
                    times[name][what].append(seconds)
        settings = _settings(sessions, context, tokens, rounds, idle)
    _print(times, settings)
    if report is not None:
        figures = {name: {what: _spread(values) for what, values in rows.items()} for name, rows in times.items()}
        report.write_text(json.dumps({"settings": settings, "seconds": figures}, indent=2) + "\n", encoding="utf-8")


def _round(decoder: Decoder, text: np.ndarray, context: int) -> dict[str, float]:
    """Seconds of each kind of call, and seconds a token of mode full and of runs with drawn exits."""
    found = {}
    for head in (True, False):
        before = decoder.stats.shallow_seconds
        decoder.step(int(text[0]), head=head)
        found["shallow" if head else "shallow, no head"] = decoder.stats.shallow_seconds - before
        decoder.trim(context)
    for rows in (size for size in SIZES if size <= MOST_ROWS and size <= len(text)):
        for token in text[:rows]:
            decoder.step(int(token), head=False)
        before = decoder.stats.deep_seconds
        decoder.sync()
        found[f"deep {rows}"] = decoder.stats.deep_seconds - before
        decoder.trim(context)
    found["full"] = _decode(decoder, text, np.zeros(len(text), bool), head=False)
    decoder.trim(context)
    for rate in EXIT_RATES:
        exits = np.random.default_rng(1).random(len(text)) < rate
        found[f"free {rate:.0%}"] = _decode(decoder, text, exits, head=True)
        decoder.trim(context)
    return found


def _decode(decoder: Decoder, text: np.ndarray, exits: np.ndarray, head: bool) -> float:
    """Seconds a token, the sync pass of the last ones included."""
    began = perf_counter()
    for token, exited in zip(text, exits, strict=True):
        decoder.step(int(token), head=head)
        if not exited or decoder.stacked == MOST_ROWS:
            decoder.sync()
    if decoder.stacked:
        decoder.sync()
    return (perf_counter() - began) / len(text)


def _check_same_model(sessions: dict[str, Session]) -> None:
    models = {(session.manifest.source_sha256, session.manifest.exit_layer) for session in sessions.values()}
    if len(models) > 1:
        raise OptionError("the bundles are of different checkpoints or exit layers; convert one checkpoint")


def _settings(sessions: dict[str, Session], context: int, tokens: int, rounds: int, idle: bool) -> dict[str, object]:
    machine = asdict(detect_machine())
    names = ("cpu", "features", "cores", "affinity", "usable_cores")
    bundles = {
        name: {
            "precision": session.manifest.precision,
            "exit_vocabulary": session.manifest.exit_vocabulary and session.manifest.exit_vocabulary.size,
            "weight_bytes": session.manifest.weight_bytes,
            "threads": session.threads,
        }
        for name, session in sessions.items()
    }
    return {
        **{name: machine[name] for name in names},
        "onnxruntime": version("onnxruntime"),
        "context": context,
        "tokens": tokens,
        "rounds": rounds,
        "idle": idle,
        "bundles": bundles,
    }


def _spread(values: list[float]) -> dict[str, float]:
    low, high = np.percentile(values, [25, 75])
    return {"median": median(values), "low": float(low), "high": float(high)}


def _print(times: dict[str, Times], settings: dict[str, object]) -> None:
    click.echo("  ".join(f"{name}={value}" for name, value in settings.items() if name != "bundles"))
    for number, (name, facts) in enumerate(settings["bundles"].items(), start=1):  # type: ignore[attr-defined]
        click.echo(f"{number}: {name}  " + "  ".join(f"{key}={value}" for key, value in facts.items()))
    click.echo("".ljust(18) + "".join(f"{number:>22}" for number in range(1, len(times) + 1)))
    for what in next(iter(times.values())):
        decoding = what.startswith(("full", "free"))
        cells = []
        for rows in times.values():
            spread = _spread(rows[what])
            shown = [1 / spread[part] if decoding else 1e3 * spread[part] for part in ("median", "low", "high")]
            cells.append(f"{shown[0]:8.2f} ({min(shown[1:]):.2f}-{max(shown[1:]):.2f})")
        unit = "tok/s" if decoding else "ms"
        click.echo(f"{what:12}{unit:>6}" + "".join(f"{cell:>22}" for cell in cells))
    click.echo("median (quartiles)" + ("" if settings["idle"] else "; BUSY MACHINE: these figures mean nothing"))


if __name__ == "__main__":
    main()
