"""Time prompts up to their first token and what follows, ours beside other decoders, interleaved in one run.

    python -m tools.peers.prompts BUNDLE --against openvino-int8 --model path/to/checkpoint --length 1024

Prompts are random tokens, new ones in each round, so that no decoder finds their beginning in a cache; all read the
same, then write --tokens greedily. Decoders are those of tools.peers.compare; bundles run in mode full. Run from the
root on an idle machine.
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

from freeexport.measure.bench import BenchOptions
from freeexport.measure.table import Sheet, about, environment, terminal
from freeexport.measure.timing import spread
from freeexport.system.load import load_note, other_load
from freeexport.system.output import check_writable, write_whole
from freeexport.system.page import print_page
from runtime.bundle.bundle import Bundle
from tools.peers.catalog import PEERS, find_source
from tools.peers.compare import Contender, contenders_of, decode
from tools.peers.worker import PeerError

SCHEMA = 1


def first_tokens(
    contenders: Sequence[Contender], lengths: Sequence[int], tokens: int, rounds: int, threads: int, vocabulary: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure a row for each length and contender, by length, and why others have none. `ratio`: to the speed of the
    length's first row, the median over rounds, `decode_ratio` the same of the tokens behind the first. The first round
    of each length is not counted."""
    rng, times, failed = random.Random(0), dict[tuple[int, str], list[tuple[float, float]]](), dict[str, str]()
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
                        known = decode(running[name][0], prompt, tokens).times
                    except PeerError as error:
                        failed[name] = f"{length} tokens: {error}"
                        continue
                    if turn > 0:
                        each = (known[-1] - known[0]) / (tokens - 1)
                        times.setdefault((length, name), []).append((known[0], each))
    precisions, base, rows = {one.name: one.precision for one in contenders}, dict[int, list[tuple[float, float]]](), []
    for (length, name), values in times.items():
        firsts, each = ([value[i] for value in values] for i in range(2))
        ratios = [median(one[i] / other[i] for one, other in zip(base.setdefault(length, values), values, strict=False))
                  for i in range(2)]  # fmt: skip
        found = {"length": length, "name": name, "precision": precisions[name], "versions": running[name][1]}
        found |= {"first_token_ms": 1e3 * median(firsts), "tokens_per_second": length / median(firsts)}
        found |= {"spread": spread(firsts), "ratio": ratios[0]}
        rows.append({**found, "decode_per_second": 1 / median(each), "decode_ratio": ratios[1]})
    return rows, failed


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--against", multiple=True, metavar="PEER", help=", ".join(PEERS))
@click.option("--model", help="The checkpoint that the bundle came from, for peers.")
@click.option("--length", "lengths", multiple=True, type=click.IntRange(1), default=(128, 256, 1024))
@click.option("--tokens", type=click.IntRange(2), default=2)
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--threads", type=click.IntRange(1))
@click.option("--save", type=click.Path(path_type=Path), help="Also write the figures as JSON.")
def main(bundles: tuple[Path, ...], against: tuple[str, ...], model: str | None, lengths: tuple[int, ...], tokens: int,
         rounds: int, threads: int | None, save: Path | None) -> None:  # fmt: skip
    check_writable(save, "--save")
    options = BenchOptions(bundles, modes=(), threads=threads)
    opened = [Bundle.open(path) for path in bundles]
    manifest = opened[0].manifest
    source = None if model is None else find_source(manifest, model)
    contenders, missing = contenders_of(against, source, opened, options)
    with other_load() as load:
        rows, failed = first_tokens(contenders, lengths, tokens, rounds, options.count, manifest.vocab_size)
    made, failed = environment(), {**missing, **failed}
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
    cells = tuple(
        (f"{row['length']}", row["name"], row["precision"], f"{row['first_token_ms']:.0f}",
         f"{row['tokens_per_second']:.0f}", f"{row['ratio']:.2f}", f"{row['spread']:.2f}",
         f"{row['decode_per_second']:.0f}", f"{row['decode_ratio']:.2f}")
        for row in rows
    )  # fmt: skip
    columns = (
        *("prompt#", "decoder", "precision", "first token, ms#", "tokens/s#", "ratio#", "spread#"),
        *("decoding, tokens/s#", "ratio#"),
    )
    print_page([terminal(Sheet(f"Prompts of {manifest.source}", columns, cells))])
    lines = [f"{name}: not run: {reason}" for name, reason in failed.items()]
    lines += [f"{name}: {value}" for name, value in about(made, options.count)] + [load_note(load.cores)]
    click.echo("\n".join(filter(None, lines)))


if __name__ == "__main__":
    main()
