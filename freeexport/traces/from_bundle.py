"""Traces from a bundle: its own engines decode, and both are asked at every token."""

from __future__ import annotations

import numpy as np

from freeexport.traces.trace import Trace
from runtime import Session
from runtime.decoding.slot_call import finish


def trace_of(session: Session, line: int, prompt: np.ndarray, max_new_tokens: int) -> Trace:
    """Decode `prompt` int64 [n] as mode `full` does, at most `max_new_tokens`, until an end of sequence. With the
    session's option `first_exit` the first token is part of the trace."""
    manifest = session.manifest
    start = np.array([manifest.decoder_start_token_id or 0]) if manifest.encoder_decoder else prompt
    first_exit = session.options.first_exit
    most = min(max_new_tokens, session.capacity - len(start) + 1) - (not first_exit)
    confidence: list[float] = []
    agrees: list[bool] = []
    nll: list[float] = []
    guesses: list[int] = []
    with session.decoder(prompt) as decoder:
        first = finish(decoder.prefilling(start.astype(np.int64), head=False, exits=True, defer=first_exit))
        token = int(start[-1]) if first_exit else first.token
        ended = not first_exit and token in manifest.eos_token_ids
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
