"""Greedy token ids of a bundle against those of transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime import Session

# Where the two best logits are closer than this, rounding decides, and k rows and single steps round differently.
TIE = 1e-4
NEW_TOKENS = 64


@dataclass(frozen=True)
class Comparison:
    """One prompt. `first_difference` is None where all ids are equal; `gap` is the reference's there."""

    prompt: int
    tokens: int
    first_difference: int | None = None
    gap: float | None = None

    def passed(self, tie: float | None) -> bool:
        """Whether the ids are equal up to a tie; None for `tie` expects no equality."""
        return tie is None or self.first_difference is None or (self.gap is not None and self.gap < tie)


def compare(
    session: Session, model: Any, prompts: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS
) -> list[Comparison]:
    """Mode `full` of the session against `generate`, end-of-sequence ids as the bundle has them."""
    room = session.capacity - (0 if session.manifest.encoder_decoder else max(map(len, prompts)))
    count = max(1, min(new_tokens, room))
    return [_compare(session, model, number, list(prompt), count) for number, prompt in enumerate(prompts)]


def _compare(session: Session, model: Any, number: int, prompt: list[int], count: int) -> Comparison:
    ours = session.generate(prompt, mode="full", max_new_tokens=count).token_ids
    theirs, gaps = reference_ids(model, prompt, count, session.manifest.eos_token_ids)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return Comparison(number, len(ours), index, gaps[index])
    if len(ours) != len(theirs):
        return Comparison(number, len(ours), min(len(ours), len(theirs)), None)
    return Comparison(number, len(ours))


def reference_ids(model: Any, prompt: list[int], count: int, eos: Sequence[int]) -> tuple[list[int], list[float]]:
    """Greedy ids of `generate`, and the distance of the two best logits at each."""
    import torch

    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=0,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(eos) or None,
        # T5's cache fails where the decoder is deeper than the encoder.
        use_cache=not model.config.is_encoder_decoder,
        output_logits=True,
        return_dict_in_generate=True,
    )
    start = 1 if model.config.is_encoder_decoder else len(prompt)
    gaps = []
    for logits in out.logits:
        best = np.sort(logits[0].float().numpy())[-2:]
        gaps.append(float(best[1] - best[0]))
    return out.sequences[0, start:].tolist(), gaps
