"""Times whole requests in several settings, and measures what an exit adds to drafts from text."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from freeexport.costs.intervals import Interval, speed_interval
from freeexport.costs.timing import interleave
from freeexport.system.load import other_load
from runtime.bundle.costs import TOLERATED
from runtime.bundle.manifest import DraftGain
from runtime.session import Session

# Limits of the measurement of a gain: tokens of a request, rounds, and seconds.
TOKENS = 64
ROUNDS = 3
SECONDS = 30.0


@dataclass(frozen=True)
class RequestTimes:
    """Times of the same requests in several settings.

    Attributes:
        seconds: Median over the rounds, float64 [prompts, settings].
        tokens: Number of tokens of all prompts.
        cores: Cores that other processes used meanwhile.
    """

    seconds: np.ndarray
    tokens: int
    cores: float

    def speed(self, setting: int, reference: int) -> float:
        """Return the speed of a setting over all prompts, as a multiple of another's."""
        total = self.seconds.sum(axis=0)
        return float(total[reference] / total[setting])

    def interval(self, setting: int, reference: int) -> Interval:
        """Return the 95 % interval of `speed`."""
        return speed_interval(self.seconds[:, setting], self.seconds[:, reference])


def timed_requests(
    session: Session,
    settings: Sequence[Mapping[str, Any]],
    prompts: Sequence[np.ndarray],
    rounds: int,
    limit: float,
) -> RequestTimes:
    """Decode each prompt in each setting in turn.

    Args:
        session: A session without other requests.
        settings: Options of requests, which all generate the same tokens.
        prompts: Token ids int64 [n] each, or recordings float32 [n] at 16 kHz.
        rounds: Most repetitions of each request.
        limit: Seconds after which no further prompt is decoded. Prompts that were not reached are
            left out.
    """
    runs: dict[tuple[int, int], list[float]] = defaultdict(list)
    tokens = dict[int, int]()

    def decode(setting: Mapping[str, Any], prompt: np.ndarray) -> tuple[float, int]:
        began = time.monotonic()
        result = session.generate(prompt, **setting)
        return time.monotonic() - began, len(result.token_ids)

    with other_load() as load:
        end = time.monotonic() + limit
        for turn in interleave(settings, prompts, rounds, decode, title="measuring speed"):
            for number, (seconds, count) in enumerate(turn.runs):
                runs[turn.prompt, number].append(seconds)
                tokens[turn.prompt] = count
            if time.monotonic() > end:
                break
    medians = [
        [np.median(runs[prompt, number]) for number in range(len(settings))]
        for prompt in sorted(tokens)
    ]
    return RequestTimes(np.array(medians), sum(tokens.values()), load.cores)


def exit_gain(bundle: Path, prompts: Sequence[np.ndarray]) -> DraftGain | None:
    """Measure mode lossless with the drafts of the exit, relative to drafts from text and phrases.

    Args:
        bundle: A bundle for a CPU with an exit.
        prompts: Token ids int64 [n] each, or recordings float32 [n] at 16 kHz. Prompts that do not
            fit the bundle are left out.

    Returns:
        None with fewer than two prompts, or if other processes kept the machine busy.
    """
    with Session(bundle, slots=1, draft_memory_mb=0, prefix_cache_mb=0) as session:
        tokens = min(TOKENS, session.capacity // 2)
        room = session.manifest.encoder_capacity or session.capacity - tokens
        speech = session.manifest.speech is not None
        fitting = [prompt for prompt in prompts if speech or len(prompt) <= room]
        if len(fitting) < 2:
            return None
        given: dict[str, Any] = {"mode": "lossless", "max_new_tokens": tokens}
        if speech:
            given["fallback_temperatures"] = ()
        settings = [given | {"drafts": drafts} for drafts in ("phrases", "auto")]
        times = timed_requests(session, settings, fitting, rounds=ROUNDS, limit=SECONDS)
    low, high = times.interval(1, 0)
    if times.cores > TOLERATED or low is None or high is None:
        return None
    return DraftGain(times.speed(1, 0), low, high, len(times.seconds))
