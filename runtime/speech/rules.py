"""Rules for the tokens of a Whisper transcript."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.bundle.manifest import Speech
from runtime.text.grammar import NEVER
from runtime.text.sampler import softmax


class Rules:
    """Rules for the tokens of a transcript, used in place of a grammar (runtime/text/grammar.py).

    An `output`, int64 [n], contains the generated tokens so far, including drafts. The rules apply
    to shallow and deep predictions alike.

    Args:
        speech: Special tokens of the model.
        eos: Tokens that end the output.
        timestamps: The output has timestamps.
        probe: Only the language token is wanted.

    Attributes:
        seconds: Not measured, always 0.
        by_scores: The most likely token may not be chosen, even if it is allowed.
        no_speech: Probability of no speech, set by a `probe`.
    """

    seconds = 0.0

    def __init__(
        self, speech: Speech, eos: Sequence[int], timestamps: bool, probe: bool = False
    ) -> None:
        self._speech = speech
        self._first = speech.no_timestamps + 1
        self.by_scores = timestamps or probe
        self._eos = frozenset(eos)
        self._timestamps = timestamps
        self._probe = probe
        self._suppressed = {
            *speech.suppressed,
            *speech.begin_suppressed,
            speech.no_speech,
            speech.no_timestamps,
        }
        self._later = self._suppressed - (set(speech.begin_suppressed) - set(speech.suppressed))
        self.no_speech: float | None = None

    def forced(self, output: np.ndarray) -> int | None:
        """Return None, as these rules never force a token."""
        return None

    def allows(self, output: np.ndarray, tokens: Sequence[int]) -> int:
        """Return how many of `tokens` may follow, one after the other."""
        written = output.tolist()
        for count, token in enumerate(tokens):
            if token in (self._later if written else self._suppressed):
                return count
            if self._timestamps and not any(
                low <= token < high for low, high in self._ranges(written)
            ):
                return count
            written.append(token)
        return len(tokens)

    def mask(self, scores: np.ndarray, output: np.ndarray) -> np.ndarray:
        """Return scores, float32 [V], with -inf for tokens that must not follow."""
        speech = self._speech
        if self._probe:
            self.no_speech = float(softmax(scores)[speech.no_speech])
            return _only(scores, list(speech.languages.values()) or list(self._eos)[:1])
        masked = scores.copy()
        masked[list(self._later if len(output) else self._suppressed)] = NEVER
        if not self._timestamps:
            return masked
        for low, high in self._ranges(output.tolist(), len(scores), inverted=True):
            masked[low:high] = NEVER
        # If all timestamps together are more likely than any text token, choose a timestamp.
        text = masked[: self._first].max()
        times = masked[self._first :]
        best = times.max(initial=NEVER)
        if best > NEVER and best + np.log(np.exp(times - best).sum()) > text:
            masked[: self._first] = NEVER
        return masked

    def _ranges(
        self, written: list[int], size: int = 0, inverted: bool = False
    ) -> list[tuple[int, int]]:
        """Return the ranges of ids that the rules for timestamps allow next.

        An output starts with a timestamp, timestamps come in pairs except before the end, and times
        never decrease. With `inverted`, returns the ids below `size` that are not allowed.
        """
        first = self._first
        end = min(self._eos)
        limit = 1 << 40
        if not written:
            allowed = [(first, first + self._speech.latest_first + 1)]
        else:
            times = [token for token in written if token >= first]
            last = written[-1] >= first
            pair = last and (len(written) < 2 or written[-2] >= first)
            # The second of a pair may be the same time.
            least = (times[-1] + (not last or pair)) if times else first
            text = (0, end)
            ends = (end, first)
            later = (least, limit)
            allowed = [text, ends] if pair else [ends, later] if last else [text, ends, later]
        if not inverted:
            return allowed
        forbidden = list[tuple[int, int]]()
        position = 0
        for low, high in allowed:
            forbidden.append((position, low))
            position = high
        return [*forbidden, (position, size)]


def _only(scores: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Return scores with -inf for all but these tokens."""
    masked = np.full_like(scores, NEVER)
    masked[tokens] = scores[tokens]
    return masked
