"""Compares greedy tokens: those of decoders with those of the checkpoint in fp32 (`fidelity`), and
those of a decoder with and without drafts from the prompt (`equality`).

Only token ids are compared, so the machine need not be idle.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from freeexport.system.progress import progress
from runtime.bundle.bundle import Bundle
from runtime.errors import OptionError
from runtime.text.prompt import encode_prompt
from runtime.text.tokenizer import Tokenizer
from tools.peers.measure import Contender, Decoders, with_options
from tools.quality import chat_prompts

RESAMPLES = 2000
# Tokens that peers draft at once, as in the documentation of llama-cpp-python.
LOOKUP = 10
Outputs = Sequence[Sequence[int]]


def chat_ids(bundle: Bundle, count: int) -> list[list[int]]:
    """Return the token ids of the first of tools/chat_prompts.jsonl, as chats if there is a
    template.

    Raises:
        OptionError: If the bundle has no tokenizer.
    """
    manifest = bundle.manifest
    tokenizer = Tokenizer.load(bundle.path, manifest.files)
    if tokenizer is None:
        raise OptionError(f"{bundle.path} has no tokenizer, which the step fidelity needs")
    limit = manifest.encoder_capacity or manifest.capacity
    chats = tokenizer.chat_template is not None
    return [
        encode_prompt(
            messages if chats else messages[0]["content"], tokenizer, manifest.vocab_size, limit
        ).tolist()
        for messages in chat_prompts(count)
    ]


def agreement(outputs: Outputs, reference: Outputs, ends: Collection[int]) -> dict[str, Any]:
    """Compare outputs with those of the reference, up to the end of each of its answers.

    Args:
        outputs: Token ids by prompt.
        reference: Token ids of the reference, as many.
        ends: Token ids that end an answer.

    Returns:
        - `same`: Share of positions with the reference's token. `same_low` and `same_high` are a
          95 % interval of a bootstrap over prompts.
        - `next`: Share of tokens that equal the reference's if all before them do.
    """
    pairs = []
    for ours, truth in zip(outputs, reference, strict=True):
        length = next((place + 1 for place, one in enumerate(truth) if one in ends), len(truth))
        pairs.append(np.equal(ours[:length], truth[:length]))
    equal = np.array([pair.sum() for pair in pairs])
    lengths = np.array([len(pair) for pair in pairs])
    draws = np.random.default_rng(0).integers(0, len(pairs), (RESAMPLES, len(pairs)))
    low, high = np.quantile(equal[draws].sum(1) / lengths[draws].sum(1), (0.025, 0.975))
    # Tokens before the first difference of each answer, and answers with one.
    before = [len(pair) if pair.all() else int(pair.argmin()) for pair in pairs]
    differing = sum(not pair.all() for pair in pairs)
    return {
        "same": float(equal.sum() / lengths.sum()),
        "same_low": float(low),
        "same_high": float(high),
        "next": sum(before) / (sum(before) + differing),
    }


def fidelity(
    contenders: Sequence[Contender],
    prompts: Sequence[list[int]],
    tokens: int,
    ends: Collection[int],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Compare the tokens of all decoders with those of the first, our bundle in fp32.

    All run at the same time, with one thread each.

    Returns a row for each, and why others have none.

    Raises:
        FreeExportError: If one of our own decoders fails.
    """
    failed: dict[str, str] = {}
    facts: dict[str, dict[str, Any]] = {}

    def outputs_of(contender: Contender) -> Outputs:
        with Decoders([contender], 1) as running:
            answers = running.answers(contender.name, [[prompt] for prompt in prompts], tokens)
            failed.update(running.failed)
            facts.update(running.facts)
        advance()
        return [answer["tokens"][0] for answer in answers or []]

    with (
        progress("comparing tokens", len(contenders)) as advance,
        ThreadPoolExecutor(len(contenders)) as pool,
    ):
        found = list(pool.map(outputs_of, contenders))
    rows = [
        {
            "name": one.name,
            "precision": one.precision,
            "written": tokens,
            **agreement(outputs, found[0], ends),
            **facts[one.name],
        }
        for one, outputs in zip(contenders, found, strict=True)
        if one.name not in failed
    ]
    return rows, failed


def equality(
    contenders: Sequence[Contender], prompts: Sequence[list[int]], tokens: int, threads: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Count outputs that change with drafts. Returns a row a decoder, and why others have none.

    Every decoder repeats its greedy output, so that nondeterminism is not counted as an effect of
    drafts. Our bundles decode in mode full, then in mode lossless with drafts from the text.
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


def differences(reference: Outputs, outputs: Outputs) -> dict[str, int]:
    """Count the outputs that differ."""
    differing = sum(one != other for one, other in zip(reference, outputs, strict=True))
    return {"outputs": len(reference), "differing_outputs": differing}
