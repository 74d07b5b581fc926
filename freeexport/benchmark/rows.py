"""What a benchmark found, a row a contender."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

import numpy as np

from freeexport.benchmark.contenders import Contender, Run
from freeexport.benchmark.rounds import Measured

# Tokens of each prompt, by the model that is the truth.
Answers = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Row:
    """A contender's result.

    `tokens_per_second`: the median over rounds, over all prompts, from prompt to last token, and `spread`, largest less
    smallest as a share of it. `ratio`: its speed as a multiple of the first row's; None on a busy machine.
    `decode_per_second`: without prompts and first tokens. Milliseconds: until the first token (median over prompts),
    and between tokens (median and 95th percentile). `peak_bytes`: the most resident memory.
    `agreement`: the share of its tokens that equal the reference's at the same place, and `first_difference`, the first
    place where they do not, the median over prompts (None: all equal); both None without a reference.
    `passes`: deep passes a token; `exit_rate`, `acceptance` of drafts. `roofline`: the share of the memory bandwidth
    that its `token_bytes` come to. `predicted`: the ratio to mode full by the cost model.
    """

    name: str
    precision: str
    tokens_per_second: float
    spread: float
    ratio: float | None
    decode_per_second: float
    first_token_ms: float
    token_ms: float
    token_ms_95: float
    peak_bytes: int
    exit_rate: float = 0.0
    acceptance: float = 1.0
    passes: float = 1.0
    overhead_us: float | None = None
    agreement: float | None = None
    first_difference: float | None = None
    token_bytes: int | None = None
    roofline: float | None = None
    predicted: float | None = None
    versions: dict[str, str] = field(default_factory=dict)


def rows_of(contenders: Sequence[Contender], measured: Measured, answers: Answers | None, idle: bool) -> list[Row]:
    """A row for each that ran, in their order."""
    rows: list[Row] = []
    for contender in contenders:
        turns = measured.rounds.get(contender.name)
        if not turns:
            continue
        speed, spread = _speed(turns)
        ratio = speed / rows[0].tokens_per_second if rows else 1.0
        done = [run for turn in turns for run in turn]
        gaps = 1e3 * np.concatenate([np.diff(run.times) for run in done])
        agreement, difference = (None, None) if answers is None else _agreement(turns[0], answers)
        rows.append(
            Row(
                contender.name,
                contender.precision,
                speed,
                spread,
                ratio if idle else None,
                decode_per_second(turns),
                median(1e3 * run.times[0] for run in done),
                float(np.median(gaps)),
                float(np.percentile(gaps, 95)),
                max(run.peak_bytes for run in done),
                fmean(run.exit_rate for run in done),
                fmean(run.acceptance for run in done),
                _passes(done),
                _overhead(done),
                agreement,
                difference,
                versions=measured.versions[contender.name],
            )
        )
    return rows


def decode_per_second(turns: Sequence[Sequence[Run]]) -> float:
    """Tokens after the first of each prompt, per second of decoding them: the median over rounds."""
    return median(
        sum(len(run.times) - 1 for run in turn) / sum(run.times[-1] - run.times[0] for run in turn) for turn in turns
    )


def _speed(turns: Sequence[Sequence[Run]]) -> tuple[float, float]:
    speeds = [sum(len(run.tokens) for run in turn) / sum(run.seconds for run in turn) for turn in turns]
    middle = median(speeds)
    return middle, (max(speeds) - min(speeds)) / middle


def _passes(done: Sequence[Run]) -> float:
    """Deep passes for each token that could exit; 1 where nothing is known of them."""
    passes = sum(sum(run.sync_sizes.values()) for run in done)
    if not passes and not any(run.exit_rate for run in done):
        return 1.0
    return passes / sum(run.decided for run in done)


def _overhead(done: Sequence[Run]) -> float | None:
    """Microseconds a token outside the engines, where that is known."""
    known = [run for run in done if run.sync_sizes]
    return 1e6 * fmean(run.overhead / len(run.tokens) for run in known) if known else None


def _agreement(runs: Sequence[Run], answers: Answers) -> tuple[float, float | None]:
    same = [np.equal(run.tokens, answer) for run, answer in zip(runs, answers, strict=True)]
    places = [int(np.argmin(row)) for row in same if not row.all()]
    return float(np.concatenate(same).mean()), float(median(places)) if places else None
