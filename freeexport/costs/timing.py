"""Interleaved timing: settings decode the same prompts in turn.

A temporary slowdown of the machine then affects all settings alike.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Generic, TypeVar

import numpy as np

from freeexport.costs.intervals import speed_interval
from freeexport.system.load import other_load
from freeexport.system.progress import progress
from runtime.bundle.costs import TOLERATED
from runtime.bundle.manifest import DraftGain
from runtime.session import Session

# Limits of the measurement of an exit's gain: tokens of a request, rounds, and seconds.
GAIN_TOKENS = 64
GAIN_ROUNDS = 3
GAIN_SECONDS = 30.0

SettingT = TypeVar("SettingT")
PromptT = TypeVar("PromptT")
RunT = TypeVar("RunT")


@dataclass(frozen=True)
class Turn(Generic[RunT]):
    """One prompt in one round.

    Attributes:
        round: Number of the round, from 0.
        prompt: Number of the prompt, from 0.
        runs: One run per setting, in the order of the settings.
    """

    round: int
    prompt: int
    runs: list[RunT]


def interleave(
    settings: Sequence[SettingT],
    prompts: Sequence[PromptT],
    rounds: int,
    decode: Callable[[SettingT, PromptT], RunT],
    warm_up: int = 1,
    done: Callable[[int, int], bool] = lambda round, prompt: False,
    title: str = "measuring",
) -> Iterator[Turn[RunT]]:
    """Decode every prompt in every setting, and yield each prompt's runs when they are complete.

    The order of settings is drawn for one prompt and reversed for the next, with a fixed seed.
    Otherwise a setting that always follows another of the same bundle would find its weights in the
    processor's cache.

    Args:
        rounds: Repetitions of every prompt.
        decode: Decodes a prompt in a setting.
        warm_up: Prompts that every setting first decodes untimed, to bind buffers and fault pages.
        done: Returns True for the turns (round, prompt) of an interrupted run to skip.
    """
    turns = list(product(range(rounds), range(len(prompts))))
    left = [turn for turn in turns if not done(*turn)]
    with progress(
        title, len(turns) * len(settings), (len(turns) - len(left)) * len(settings)
    ) as advance:
        for prompt in prompts[: warm_up if left else 0]:
            for setting in settings:
                decode(setting, prompt)
        for turn, place in left:
            runs: dict[int, RunT] = {}
            pair, second = divmod(turn * len(prompts) + place, 2)
            order = np.random.default_rng(pair).permutation(len(settings)).tolist()
            for number in reversed(order) if second else order:
                runs[number] = decode(settings[number], prompts[place])
                advance()
            yield Turn(turn, place, [runs[number] for number in range(len(settings))])


def speeds_by_round(
    settings: Sequence[SettingT],
    prompts: Sequence[PromptT],
    rounds: int,
    decode: Callable[[SettingT, PromptT], tuple[int, float]],
) -> np.ndarray:
    """Measure tokens per second, float64 [rounds, settings].

    NaN without tokens. `decode` returns the number of tokens and the seconds.
    """
    done = np.zeros((rounds, len(settings), 2))
    for turn in interleave(settings, prompts, rounds, decode):
        done[turn.round] += turn.runs
    tokens = done[..., 0]
    seconds = done[..., 1]
    return np.divide(tokens, seconds, out=np.full_like(tokens, np.nan), where=tokens > 0)


def spread(values: Sequence[float]) -> float:
    """Return the range of values as a share of their median."""
    return (max(values) - min(values)) / median(values)


def exit_gain(bundle: Path, prompts: Sequence[np.ndarray]) -> DraftGain | None:
    """Measure mode lossless with the drafts of the exit, relative to drafts from text and phrases.

    Args:
        bundle: A bundle for a CPU with an exit.
        prompts: Token ids int64 [n] each, or recordings float32 [n] at 16 kHz. Prompts that do not
            fit the bundle are left out.

    Returns:
        None with fewer than two prompts, or if other processes kept the machine busy.
    """
    runs: dict[int, list[list[float]]] = defaultdict(list)
    with Session(bundle, slots=1, draft_memory_mb=0, prefix_cache_mb=0) as session:
        tokens = min(GAIN_TOKENS, session.capacity // 2)
        room = session.manifest.encoder_capacity or session.capacity - tokens
        speech = session.manifest.speech is not None
        fitting = [prompt for prompt in prompts if speech or len(prompt) <= room]
        if len(fitting) < 2:
            return None
        given: dict[str, Any] = {"mode": "lossless", "max_new_tokens": tokens}
        if speech:
            given["fallback_temperatures"] = ()
        settings = [given | {"drafts": drafts} for drafts in ("phrases", "auto")]

        def decode(setting: Mapping[str, Any], prompt: np.ndarray) -> float:
            began = time.monotonic()
            session.generate(prompt, **setting)
            return time.monotonic() - began

        with other_load() as load:
            end = time.monotonic() + GAIN_SECONDS
            for turn in interleave(settings, fitting, GAIN_ROUNDS, decode, title="measuring speed"):
                runs[turn.prompt].append(turn.runs)
                if time.monotonic() > end:  # prompts that were not reached are left out
                    break
    without, with_exit = np.array([np.median(rounds, axis=0) for rounds in runs.values()]).T
    low, high = speed_interval(with_exit, without)
    if load.cores > TOLERATED or low is None or high is None:
        return None
    return DraftGain(float(without.sum() / with_exit.sum()), low, high, len(without))
