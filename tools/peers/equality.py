"""Count how often speculative decoding changes a decoder's greedy output.

    python -m tools.peers.equality BUNDLE --model path/to/checkpoint --save equality-peers.json

Peers draft from the prompt (prompt lookup) with their own options. Bundles decode in mode full,
then in mode lossless with drafts from the text. Every decoder repeats its greedy output, so that
nondeterminism is not counted as an effect of speculation. Only token ids are compared, so the
machine need not be idle. Run from the root.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from freeexport.evaluate.settings import EvaluateOptions, entries_of
from freeexport.system.environment import environment
from freeexport.system.output import check_writable, write_whole
from freeexport.system.page import print_page
from freeexport.system.progress import progress
from freeexport.system.sheet import Sheet, terminal
from freeexport.verification.equality import prompts_of
from runtime import Session
from runtime.bundle.bundle import Bundle
from tools.peers.catalog import find_source
from tools.peers.compare import Contender, contenders_of, decode
from tools.peers.worker import PeerError

PEERS = "llama-cpp", "openvino-int8"
# Tokens that peers draft at once, as in the documentation of llama-cpp-python and transformers.
LOOKUP = 10

Answers = list[tuple[int, ...]]


def differences(reference: Answers, answers: Answers) -> dict[str, Any]:
    """Count the answers and tokens that differ, and list the first difference of each answer.

    After the first difference the texts diverge, so its position is the meaningful figure.
    """
    pairs = list(zip(reference, answers, strict=True))
    unequal = [
        [place for place, two in enumerate(zip(*pair, strict=True)) if two[0] != two[1]]
        for pair in pairs
    ]
    firsts = [places[0] for places in unequal if places]
    return {
        "answers": len(pairs),
        "differing_answers": len(firsts),
        "tokens": sum(map(len, reference)),
        "differing_tokens": sum(map(len, unequal)),
        "first_differences": firsts,
    }


def peer_answers(
    contender: Contender, prompts: Sequence[list[int]], tokens: int, threads: int
) -> tuple[Answers, Any]:
    """Return a peer's answers and its versions.

    Raises:
        PeerError: If the peer cannot be loaded or fails.
    """
    worker, versions = contender.load(threads)
    with closing(worker), progress(f"decoding with {contender.name}", len(prompts)) as advance:
        answers = []
        for prompt in prompts:
            answers.append(decode(worker, prompt, tokens).token_ids)
            advance()
        return answers, versions


def row_of(
    name: str, precision: str, greedy: Callable[[], Answers], drafted: Callable[[], Answers]
) -> dict[str, Any]:
    reference = greedy()
    return {
        "name": name,
        "precision": precision,
        "greedy_again": differences(reference, greedy()),
        "with_drafts": differences(reference, drafted()),
    }


def our_row(
    bundle: Bundle, prompts: Sequence[list[int]], tokens: int, threads: int
) -> dict[str, Any]:
    """Compare the output of a bundle in mode full with lossless, with drafts from the text."""
    precision = bundle.manifest.precision
    with Session(bundle.path, threads=threads, slots=1) as session:

        def answers(**options: Any) -> Answers:
            given = {"max_new_tokens": tokens, "ignore_eos": True, **options}
            return [session.generate(prompt, **given).token_ids for prompt in prompts]

        return row_of(
            name=f"freeexport {precision}",
            precision=precision,
            greedy=partial(answers, mode="full"),
            drafted=partial(answers, mode="lossless", drafts="lookup"),
        )


def peer_row(
    peer: Contender, prompts: Sequence[list[int]], tokens: int, threads: int
) -> dict[str, Any]:
    """Compare the greedy output of a peer with its output with drafts from the prompt.

    Raises:
        PeerError: If the peer cannot be loaded or fails.
    """
    looks_up = replace(peer, options={**peer.options, "lookup": LOOKUP})
    versions: dict[str, str] = {}

    def answers(contender: Contender) -> Answers:
        found, known = peer_answers(contender, prompts, tokens, threads)
        versions.update(known)
        return found

    row = row_of(
        name=peer.name,
        precision=peer.precision,
        greedy=partial(answers, peer),
        drafted=partial(answers, looks_up),
    )
    return {**row, "versions": versions}


def differences_sheet(rows: Sequence[dict[str, Any]], prompts: int) -> Sheet:
    """Return the table of answers that differ."""
    kinds = ("greedy_again", "with_drafts")
    cells = tuple(
        (
            row["name"],
            row["precision"],
            *(f"{row[kind]['differing_answers']} of {prompts}" for kind in kinds),
        )
        for row in rows
    )
    columns = ("decoder", "precision", "greedy again", "with drafts")
    return Sheet("Answers that differ", columns, cells)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--against",
    multiple=True,
    default=PEERS,
    metavar="PEER",
    help="Peers that draft from the prompt.",
)
@click.option("--model", help="The checkpoint that the bundles came from, for peers.")
@click.option(
    "--prompts",
    "count",
    type=click.IntRange(1),
    default=30,
    help="Built-in prompts, evenly chosen.",
)
@click.option("--tokens", type=click.IntRange(2), default=128, help="Tokens of an answer.")
@click.option("--threads", type=click.IntRange(1), default=1)
@click.option("--save", type=click.Path(path_type=Path), help="Also write the counts as JSON.")
def main(
    bundles: tuple[Path, ...],
    against: tuple[str, ...],
    model: str | None,
    count: int,
    tokens: int,
    threads: int,
    save: Path | None,
) -> None:
    check_writable(save, "--save")
    entries = entries_of(EvaluateOptions(tuple((path, ("full",)) for path in bundles)))
    manifest = entries[0].bundle.manifest
    every = prompts_of(entries[0].bundle, None)
    prompts = [every[number * len(every) // count] for number in range(min(count, len(every)))]
    rows = [our_row(entry.bundle, prompts, tokens, threads) for entry in entries]
    source = None if model is None else find_source(manifest, model)
    found, failed = contenders_of(against if source else (), source, entries)
    for one in (one for one in found if one.setting is None):
        try:
            rows.append(peer_row(one, prompts, tokens, threads))
        except PeerError as error:
            failed[one.name] = str(error)
    report = {
        **environment(),
        "model": manifest.source,
        "prompts": len(prompts),
        "tokens": tokens,
        "threads": threads,
        "lookup": LOOKUP,
        "rows": rows,
        "failed": failed,
    }
    if save is not None:
        write_whole(save, json.dumps(report, indent=2) + "\n")
    print_page([terminal(differences_sheet(rows, len(prompts)))])
    click.echo("\n".join(f"{name}: not run: {reason}" for name, reason in failed.items()))


if __name__ == "__main__":
    main()
