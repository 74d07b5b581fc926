"""Counts how often drafts from the prompt (prompt lookup) change a decoder's greedy output.

Every decoder repeats its greedy output, so that nondeterminism is not counted as an effect of
drafts. Only token ids are compared, so the machine need not be idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

from freeexport.system.progress import progress
from tools.peers.measure import Contender, ask, with_options
from tools.peers.worker import PeerError

# Tokens that peers draft at once, as in the documentation of llama-cpp-python.
LOOKUP = 10
Outputs = Sequence[Sequence[int]]


def differences(reference: Outputs, outputs: Outputs) -> dict[str, Any]:
    """Count the outputs and tokens that differ, and list the first difference of each output.

    After the first difference the texts diverge, so its position is the meaningful figure.
    """
    pairs = list(zip(reference, outputs, strict=True))
    unequal = [
        [place for place, two in enumerate(zip(*pair, strict=True)) if two[0] != two[1]]
        for pair in pairs
    ]
    firsts = [places[0] for places in unequal if places]
    return {
        "outputs": len(pairs),
        "differing_outputs": len(firsts),
        "tokens": sum(map(len, reference)),
        "differing_tokens": sum(map(len, unequal)),
        "first_differences": firsts,
    }


def equality(
    contenders: Sequence[Contender], prompts: Sequence[list[int]], tokens: int, threads: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Compare outputs with and without drafts. Returns a row a decoder, and why others have none.

    Our bundles decode in mode full, then in mode lossless with drafts from the text.
    """
    rows = []
    failed = {}
    for one in contenders:
        facts: dict[str, Any] = {}

        def outputs(contender: Contender, facts: dict[str, Any] = facts) -> Outputs:
            worker, loaded = contender.load(threads)
            facts.update(loaded)
            with (
                closing(worker),
                progress(f"decoding with {contender.name}", len(prompts)) as advance,
            ):
                found = []
                for prompt in prompts:
                    found.append(ask(worker, [prompt], tokens)["tokens"][0])
                    advance()
                return found

        try:
            greedy = outputs(one)
            again = outputs(one)
            drafted = outputs(with_options(one, lookup=LOOKUP))
        except PeerError as error:
            failed[one.name] = str(error)
            continue
        row = {
            "name": one.name,
            "precision": one.precision,
            "greedy_again": differences(greedy, again),
            "with_drafts": differences(greedy, drafted),
            **facts,
        }
        rows.append(row)
    return rows, failed
