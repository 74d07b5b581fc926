"""Traces from a bundle: its own engines decode, and both are asked at every token."""

from __future__ import annotations

import numpy as np

from freeexport.traces.trace import Trace
from runtime import Session


def trace_of(session: Session, line: int, prompt: np.ndarray, max_new_tokens: int) -> Trace:
    """Decode `prompt` int64 [n] as mode `full` does, at most `max_new_tokens`, until an end of sequence. Only an
    encoder-decoder's first token is part of the trace: a decoder-only model's comes from reading the prompt."""
    manifest = session.manifest
    start = np.array([manifest.decoder_start_token_id or 0]) if manifest.encoder_decoder else prompt
    predicted = int(not manifest.encoder_decoder)
    most = min(max_new_tokens, session.capacity - len(start) + 1) - predicted
    confidence: list[float] = []
    agrees: list[bool] = []
    nll: list[float] = []
    guesses: list[int] = []
    with session.decoder(prompt) as decoder:
        if predicted:
            token = decoder.prefill(start.astype(np.int64), head=False, exits=True).token
        else:
            decoder.begin(exits=True)
            token = int(start[0])
        ended = bool(predicted) and token in manifest.eos_token_ids
        while len(confidence) < most and not ended:
            guess = decoder.step(token, head=True)
            (deep,) = decoder.sync(1, drafts=[guess.token])
            confidence.append(guess.confidence or 0.0)
            agrees.append(guess.token == deep.token)
            nll.append(deep.nll or 0.0)
            guesses.append(guess.token)
            token = deep.token
            ended = token in manifest.eos_token_ids
    return Trace.of(line, confidence, agrees, nll, guesses)
