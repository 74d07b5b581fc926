"""Counts how often drafts from the prompt (prompt lookup) change a decoder's greedy output.

Every decoder repeats its greedy output, so that nondeterminism is not counted as an effect of
drafts. Only token ids are compared, so the machine need not be idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tools.peers.measure import Contender, Decoders, with_options

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
    failed: dict[str, str] = {}
    for one in contenders:
        found = []
        for variant in (one, one, with_options(one, lookup=LOOKUP)):
            with Decoders([variant], threads) as running:
                answers = running.answers(one.name, [[prompt] for prompt in prompts], tokens)
                found.append([answer["tokens"][0] for answer in answers or []])
                failed.update(running.failed)
        if one.name in failed:
            continue
        greedy, again, drafted = found
        row = {
            "name": one.name,
            "precision": one.precision,
            "greedy_again": differences(greedy, again),
            "with_drafts": differences(greedy, drafted),
            **running.facts[one.name],
        }
        rows.append(row)
    return rows, failed
