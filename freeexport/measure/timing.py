"""Timing: settings decode the same prompts in turn, so that what slows the machine down for a while slows them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Generic, TypeVar

import numpy as np

from freeexport.system.progress import progress

SettingT = TypeVar("SettingT")
PromptT = TypeVar("PromptT")
RunT = TypeVar("RunT")


@dataclass(frozen=True)
class Turn(Generic[RunT]):
    """One prompt of one round: `runs` in the order of the settings."""

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
    """Decode every prompt in every setting, `rounds` times, and yield each prompt's runs as soon as they are complete.

    Their order is drawn for one prompt, the same in every run, and reversed for the next: none always follows the same
    other, as one that follows a setting of its own bundle finds weights in the cache. Before, every setting decodes
    `warm_up` prompts untimed, which binds buffers and faults pages. `done(round, prompt)` names turns of an interrupted
    run that are not repeated.
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


def speeds(
    settings: Sequence[SettingT],
    prompts: Sequence[PromptT],
    rounds: int,
    decode: Callable[[SettingT, PromptT], tuple[int, float]],
    warm_up: int = 1,
) -> np.ndarray:
    """Measure tokens a second, float64 [rounds, settings]; `decode` gives tokens and seconds. NaN: no tokens."""
    done = np.zeros((rounds, len(settings), 2))
    for turn in interleave(settings, prompts, rounds, decode, warm_up):
        done[turn.round] += turn.runs
    tokens, seconds = done[..., 0], done[..., 1]
    return np.divide(tokens, seconds, out=np.full_like(tokens, np.nan), where=tokens > 0)


def spread(values: Sequence[float]) -> float:
    """The largest less the smallest, as a share of the median."""
    return (max(values) - min(values)) / median(values)
