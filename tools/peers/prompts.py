"""Measure the time to the first token and the speed after it, for our decoder and others.

    python -m tools.peers.prompts BUNDLE --against openvino-int8 --model checkpoint --length 1024

Runs are interleaved. Prompts are random tokens, new in each round, so that no decoder finds a
prefix in a cache. All decoders read the same prompts and generate --tokens greedily. Decoders are
those of tools.peers.compare. Bundles run in mode full. Run from the project's root on an idle
machine.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click

from freeexport.costs.timing import spread
from freeexport.evaluate.records import Record
from freeexport.evaluate.settings import EvaluateOptions, entries_of
from freeexport.system.environment import about, environment
from freeexport.system.load import load_note, other_load
from freeexport.system.output import check_writable, write_whole
from freeexport.system.page import print_page
from freeexport.system.sheet import Sheet, terminal
from tools.peers.catalog import PEERS, find_source
from tools.peers.compare import Contender, contenders_of, decode
from tools.peers.worker import PeerError

SCHEMA = 1


def first_tokens(
    contenders: Sequence[Contender],
    lengths: Sequence[int],
    tokens: int,
    rounds: int,
    threads: int,
    vocabulary: int,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure each contender with prompts of each length.

    Returns one row per length and contender, and why other contenders have none. `ratio` is the
    median over rounds of the speed relative to the first row of the same length, up to the first
    token. `decode_ratio` is the same for the tokens after it. The first round of each length is not
    counted.
    """
    rng = random.Random(0)
    found = dict[tuple[int, str], list[Record]]()
    failed = dict[str, str]()
    with ExitStack() as stack:
        running = {}
        for one in contenders:
            if one.setting is None:
                one = replace(one, options={**one.options, "context": max(lengths) + tokens})
            try:
                running[one.name] = one.load(threads)
                stack.callback(running[one.name][0].close)
            except PeerError as error:
                failed[one.name] = str(error)
        for length in lengths:
            for turn in range(rounds + 1):
                prompt = [rng.randrange(vocabulary) for _ in range(length)]
                for name in [name for name in running if name not in failed]:
                    try:
                        record = decode(running[name][0], prompt, tokens, name, turn=turn)
                    except PeerError as error:
                        failed[name] = f"{length} tokens: {error}"
                        continue
                    if turn > 0:
                        found.setdefault((length, name), []).append(record)
    precisions = {one.name: one.precision for one in contenders}
    base = dict[int, list[Record]]()
    rows = []
    for (length, name), records in found.items():
        first = base.setdefault(length, records)
        row = {"length": length, "name": name, "precision": precisions[name]}
        rows.append({**row, "versions": running[name][1], **_figures(length, records, first)})
    return rows, failed


def _figures(length: int, records: Sequence[Record], first: Sequence[Record]) -> dict[str, float]:
    """Return the figures of a row, relative to the records of the first row in the same rounds."""
    seconds = [one.first_seconds for one in records]
    intervals = [one.decode_seconds / (one.tokens - 1) for one in records]
    pairs = list(zip(first, records, strict=False))
    return {
        "first_token_ms": 1e3 * median(seconds),
        "tokens_per_second": length / median(seconds),
        "spread": spread(seconds),
        "ratio": median(one.first_seconds / other.first_seconds for one, other in pairs),
        "decode_per_second": 1 / median(intervals),
        "decode_ratio": median(one.decode_seconds / other.decode_seconds for one, other in pairs),
    }


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--against", multiple=True, metavar="PEER", help=", ".join(PEERS))
@click.option("--model", help="Checkpoint of the bundle, for peers.")
@click.option(
    "--length",
    "lengths",
    multiple=True,
    type=click.IntRange(1),
    default=(128, 256, 1024),
    help="Prompt length, in tokens.",
)
@click.option("--tokens", type=click.IntRange(2), default=2, help="Tokens to generate.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Measured rounds.")
@click.option("--threads", type=click.IntRange(1), help="Threads per decoder.")
@click.option("--save", type=click.Path(path_type=Path), help="File for the figures, as JSON.")
def main(
    bundles: tuple[Path, ...],
    against: tuple[str, ...],
    model: str | None,
    lengths: tuple[int, ...],
    tokens: int,
    rounds: int,
    threads: int | None,
    save: Path | None,
) -> None:
    check_writable(save, "--save")
    options = EvaluateOptions(tuple((path, ("full",)) for path in bundles), threads=threads)
    entries = entries_of(options)
    manifest = entries[0].bundle.manifest
    source = None if model is None else find_source(manifest, model)
    contenders, missing = contenders_of(against, source, entries)
    with other_load() as load:
        rows, failed = first_tokens(
            contenders,
            lengths,
            tokens=tokens,
            rounds=rounds,
            threads=options.count,
            vocabulary=manifest.vocab_size,
        )
    made = environment()
    failed = {**missing, **failed}
    settings = {
        **made,
        "model": manifest.source,
        "threads": options.count,
        "tokens": tokens,
        "rounds": rounds,
        "busy": load.cores,
    }
    if save is not None:
        found = {"schema": SCHEMA, "settings": settings, "rows": rows, "failed": failed}
        write_whole(save, json.dumps(found, indent=2) + "\n")
    print_page([terminal(_sheet(f"Prompts of {manifest.source}", rows))])
    lines = [f"{name}: not run: {reason}" for name, reason in failed.items()]
    lines += [f"{name}: {value}" for name, value in about(made, options.count)]
    lines.append(load_note(load.cores))
    click.echo("\n".join(filter(None, lines)))


def _sheet(title: str, rows: Sequence[dict[str, Any]]) -> Sheet:
    cells = tuple(
        (
            str(row["length"]),
            row["name"],
            row["precision"],
            f"{row['first_token_ms']:.0f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['spread']:.2f}",
            f"{row['decode_per_second']:.0f}",
            f"{row['decode_ratio']:.2f}",
        )
        for row in rows
    )
    columns = (
        "prompt#",
        "decoder",
        "precision",
        "first token, ms#",
        "tokens/s#",
        "ratio#",
        "spread#",
        "decoding, tokens/s#",
        "ratio#",
    )
    return Sheet(title, columns, cells)


if __name__ == "__main__":
    main()
