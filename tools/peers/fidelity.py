"""Compares the greedy tokens of decoders with those of the checkpoint in fp32.

Only token ids are compared, so the machine need not be idle.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import numpy as np

from freeexport.system.progress import progress
from runtime.bundle.bundle import Bundle
from runtime.errors import OptionError
from runtime.text.prompt import encode_prompt
from runtime.text.tokenizer import Tokenizer
from tools.peers.measure import Contender, Decoders
from tools.quality import chat_prompts

RESAMPLES = 2000
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
        - `differs`: Median position of the first difference over all prompts, counted from 0. None
          if at least half of the outputs have no difference.
        - `equal_outputs`: Number of outputs without a difference, of `outputs`.
    """
    pairs = []
    for ours, truth in zip(outputs, reference, strict=True):
        length = next((place + 1 for place, one in enumerate(truth) if one in ends), len(truth))
        pairs.append(np.equal(ours[:length], truth[:length]))
    equal = np.array([pair.sum() for pair in pairs])
    lengths = np.array([len(pair) for pair in pairs])
    draws = np.random.default_rng(0).integers(0, len(pairs), (RESAMPLES, len(pairs)))
    low, high = np.quantile(equal[draws].sum(1) / lengths[draws].sum(1), (0.025, 0.975))
    firsts = [float("inf") if pair.all() else float(pair.argmin()) for pair in pairs]
    differing = int(np.isfinite(firsts).sum())
    before = int(np.minimum(firsts, lengths).sum())
    middle = median(firsts)
    return {
        "same": float(equal.sum() / lengths.sum()),
        "same_low": float(low),
        "same_high": float(high),
        "next": before / (before + differing),
        "differs": middle if np.isfinite(middle) else None,
        "equal_outputs": len(pairs) - differing,
        "outputs": len(pairs),
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
