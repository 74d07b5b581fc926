"""Compare greedy decoding of a bundle with transformers' `generate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np
import torch

from runtime import Session
from runtime.speech.windows import SpeechPrompt

# If the two best logits are closer than this, rounding decides. Calls with k rows and single steps
# round differently.
TIE = 1e-4
# Options that disable what a checkpoint may recommend beyond greedy decoding.
PLAIN = {
    **{
        "min_new_tokens": None,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
    },
    "repetition_penalty": 1.0,
}


@dataclass(frozen=True)
class Comparison:
    """Greedy decoding of one prompt.

    Attributes:
        prompt: Number of the prompt.
        tokens: Number of tokens compared.
        first_difference: Position of the first different id. None if all are equal.
        gap: Distance of the reference's two best logits there.
    """

    prompt: int
    tokens: int
    first_difference: int | None = None
    gap: float | None = None

    def passed(self, tie: float | None) -> bool:
        """Return True if the ids are equal up to a tie.

        If `tie` is None, no equality is required.
        """
        return (
            tie is None
            or self.first_difference is None
            or (self.gap is not None and self.gap < tie)
        )


def compare_greedy(
    session: Session,
    model: Any,
    prompts: Sequence[Sequence[int] | SpeechPrompt],
    new_tokens: int,
    seconds: Callable[[], float] = lambda: math.inf,
) -> Iterator[Comparison]:
    """Compare mode `full` of a session with transformers' `generate`.

    Both stop at the bundle's end-of-sequence ids.

    Args:
        prompts: Token ids, or windows of speech.
        seconds: Returns the time left for the reference. If it runs out, only the tokens generated
            by then are compared.
    """
    ends = session.manifest.eos_token_ids
    room = session.capacity - (0 if session.manifest.encoder_decoder else max(map(len, prompts)))
    count = max(1, min(new_tokens, room))
    for number, prompt in enumerate(prompts):
        request: Any = prompt if isinstance(prompt, SpeechPrompt) else list(prompt)
        ours = session.generate(request, mode="full", max_new_tokens=count).token_ids
        max_seconds = max(1.0, seconds())
        theirs, gaps = reference_ids(model, request, count, eos=ends, seconds=max_seconds)
        if max_seconds < math.inf and theirs and theirs[-1] not in ends:
            ours = ours[: len(theirs)]
        differing = (
            index for index, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b
        )
        first = next(differing, None if len(ours) == len(theirs) else min(len(ours), len(theirs)))
        yield Comparison(
            number,
            len(ours),
            first,
            gaps[first] if first is not None and first < len(gaps) else None,
        )


def reference_ids(
    model: Any,
    prompt: list[int] | SpeechPrompt,
    count: int,
    eos: Sequence[int],
    seconds: float = math.inf,
) -> tuple[list[int], list[float]]:
    """Return greedy ids of `generate`, and the distance of the two best logits at each.

    Whisper's `generate` applies its own token rules, so windows of speech are decoded step by step.
    """
    if isinstance(prompt, SpeechPrompt):
        return _window_ids(model, prompt, count, eos=eos, seconds=seconds)
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        max_time=seconds if seconds < math.inf else None,
        **PLAIN,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(eos) or None,
        # T5's cache fails if the decoder is deeper than the encoder.
        use_cache=not model.config.is_encoder_decoder,
        output_logits=True,
        return_dict_in_generate=True,
    )
    start = 1 if model.config.is_encoder_decoder else len(prompt)
    best = [np.sort(logits[0].float().numpy())[-2:] for logits in out.logits]
    return out.sequences[0, start:].tolist(), [float(first - second) for second, first in best]


@torch.no_grad()
def _window_ids(
    model: Any, prompt: SpeechPrompt, count: int, eos: Sequence[int], seconds: float
) -> tuple[list[int], list[float]]:
    encoded = model.get_encoder()(torch.from_numpy(prompt.sound.features))
    ids = list(prompt.prefix)
    gaps = list[float]()
    until = monotonic() + seconds
    while len(gaps) < count and (not gaps or (ids[-1] not in eos and monotonic() < until)):
        read = torch.tensor([ids])
        logits = model(encoder_outputs=encoded, decoder_input_ids=read, use_cache=False).logits[
            0, -1
        ]
        (best, second), tokens = torch.topk(logits.float(), 2)
        ids.append(int(tokens[0]))
        gaps.append(float(best - second))
    return ids[len(prompt) :], gaps
