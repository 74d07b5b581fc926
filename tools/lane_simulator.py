"""What overlapping the shallow and the deep lane would gain, for given costs: a discrete-event simulation.

    python tools/lane_simulator.py --shallow 4.0 --deep 1=18,4=21,8=25 --exits 0.8 --right 0.6
    python tools/lane_simulator.py --shallow 0.4 --deep 1=0.7,8=0.9 --exits 0.8 --sequences 4 --timeline

Mode free, decoded as `runtime` does (docs/decoding.md, Overlap). Each lane runs one call at a time, first come first
served. While both run, a call takes `slowdown` times as long: lanes that share cores or bandwidth; 1 where they do not.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import click
import numpy as np

LaneName: TypeAlias = Literal["shallow", "deep"]


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a shallow step, and of deep passes by rows (between those given by interpolation)."""

    shallow: float
    deep: dict[int, float]

    def deep_pass(self, rows: int) -> float:
        return float(np.interp(rows, list(self.deep), list(self.deep.values())))


class TokenTrace(NamedTuple):
    """`exits`: the shallow decoder is sure of the token. `right`: its guess is the deep token."""

    exits: bool
    right: bool


@dataclass(frozen=True)
class Setting:
    """How lanes are used. `overlap` False: a call begins when the one before it has ended, as without lanes."""

    overlap: bool = True
    max_pending: int = 16
    sync_every: int = 4
    slowdown: dict[LaneName, float] = field(default_factory=lambda: {"shallow": 1.0, "deep": 1.0})


@dataclass(eq=False)
class Job:
    """A call: milliseconds alone, and when it began and ended."""

    lane: LaneName
    sequence: int
    rows: int
    work: float
    began: float = -1.0
    ended: float = -1.0

    @property
    def done(self) -> bool:
        return self.ended >= 0


class Submit(NamedTuple):
    job: Job


class Wait(NamedTuple):
    job: Job


Process: TypeAlias = Generator[Submit | Wait, None, None]


def simulate(traces: Sequence[Sequence[TokenTrace]], costs: Costs, setting: Setting) -> list[Job]:
    """Decode a sequence for each trace, all begun at once. The calls, in the order in which they ended."""
    processes = [_sequence(number, trace, costs, setting) for number, trace in enumerate(traces)]
    queues: dict[str, deque[Job]] = {"shallow": deque(), "deep": deque()}
    waiting: dict[int, Job | None] = dict.fromkeys(range(len(processes)))
    ready, finished, clock = deque(range(len(processes))), list[Job](), 0.0
    while True:
        while ready:
            _resume(ready.popleft(), processes, queues, waiting, setting)
        running = [queue[0] for queue in queues.values() if queue]
        if not running:
            return finished
        for job in running:
            job.began = clock if job.began < 0 else job.began
        pace = {job: setting.slowdown[job.lane] if len(running) > 1 else 1.0 for job in running}
        span = min(job.work * pace[job] for job in running)
        clock += span
        for job in running:
            job.work -= span / pace[job]
            if job.work <= 1e-9:
                job.ended = clock
                finished.append(queues[_queue_of(job, setting)].popleft())
                ready.extend(number for number, awaited in waiting.items() if awaited is job)


def _resume(
    number: int,
    processes: list[Process],
    queues: dict[str, deque[Job]],
    waiting: dict[int, Job | None],
    setting: Setting,
) -> None:
    """Let a sequence go on until it waits for a call that is not done, or ends."""
    waiting[number] = None
    for request in processes[number]:
        if isinstance(request, Submit):
            queues[_queue_of(request.job, setting)].append(request.job)
        elif not request.job.done:
            waiting[number] = request.job
            return


def _queue_of(job: Job, setting: Setting) -> LaneName:
    return job.lane if setting.overlap else "shallow"


def _sequence(number: int, trace: Sequence[TokenTrace], costs: Costs, setting: Setting) -> Process:
    """One sequence, as runtime/decode.py and runtime/decoder.py decode it."""
    stacked, started, ahead = 0, 0, 0
    background: Job | None = None
    for position, token in enumerate(trace):
        if ahead:
            ahead -= 1
        else:
            step = Job("shallow", number, 1, costs.shallow)
            yield Submit(step)
            yield Wait(step)
        stacked += 1
        if token.exits and stacked < setting.max_pending:
            free = background is None or background.done
            if setting.overlap and setting.sync_every and free and stacked - started >= setting.sync_every:
                background = Job("deep", number, stacked - started, costs.deep_pass(stacked - started))
                started = stacked
                yield Submit(background)
            continue
        if background is not None:
            yield Wait(background)
        sync = Job("deep", number, stacked - started, costs.deep_pass(stacked - started))
        yield Submit(sync)
        taken = 0
        while setting.overlap and not sync.done and _may_run_ahead(trace, position, taken, setting):
            step = Job("shallow", number, 1, costs.shallow)
            yield Submit(step)
            yield Wait(step)
            taken += 1
        yield Wait(sync)
        ahead = taken if token.right else 0
        stacked = started = 0
        background = None


def _may_run_ahead(trace: Sequence[TokenTrace], position: int, taken: int, setting: Setting) -> bool:
    """A step on the guess for this token, then on as long as the guesses are sure. Behind a wrong guess other tokens
    would follow than the trace has: it serves as well."""
    inside = position + taken + 1 < len(trace) and taken < setting.max_pending
    return inside and (taken == 0 or trace[position + taken].exits)


def random_trace(tokens: int, exits: float, right: float, seed: int = 0) -> list[TokenTrace]:
    """Tokens that exit with probability `exits`, and guesses of the others that are right with probability `right`."""
    chance = random.Random(seed)
    return [TokenTrace(chance.random() < exits, chance.random() < right) for _ in range(tokens)]


def milliseconds(jobs: Sequence[Job]) -> float:
    return max((job.ended for job in jobs), default=0.0)


def timeline(jobs: Sequence[Job], width: int = 100) -> str:
    """A line a lane; a letter a sequence, upper case for the deep lane's passes."""
    scale = width / milliseconds(jobs)
    lines = []
    for lane in ("shallow", "deep"):
        cells = ["."] * width
        for job in jobs:
            if job.lane == lane:
                letter = chr(ord("a") + job.sequence % 26)
                for cell in range(
                    int(job.began * scale), min(width, max(int(job.began * scale) + 1, int(job.ended * scale)))
                ):
                    cells[cell] = letter.upper() if lane == "deep" else letter
        lines.append(f"{lane:8}{''.join(cells)}")
    return "\n".join(lines)


def _table(context: click.Context, parameter: click.Parameter, given: str) -> dict[int, float]:
    try:
        pairs = (item.split("=") for item in given.split(","))
        table = {int(rows): float(cost) for rows, cost in sorted(pairs, key=lambda pair: int(pair[0]))}
    except ValueError:
        table = {}
    if not table or min(table) < 1 or min(table.values()) <= 0:
        raise click.BadParameter(f"{given!r} is not like 1=18,4=21,8=25", context, parameter)
    return table


@click.command(help=__doc__)
@click.option("--shallow", type=click.FloatRange(0, min_open=True), required=True, help="Milliseconds of a step.")
@click.option("--deep", callback=_table, required=True, help="Milliseconds of a pass by rows, as 1=18,4=21,8=25.")
@click.option("--exits", type=click.FloatRange(0, 1), default=0.8, show_default=True, help="Share of sure tokens.")
@click.option(
    "--right", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Of the others, right guesses."
)
@click.option("--slowdown", type=click.FloatRange(1), default=1.0, show_default=True, help="Of both lanes at once.")
@click.option("--sequences", type=click.IntRange(1), default=1, show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=1000, show_default=True)
@click.option("--max-pending", type=click.IntRange(1), default=16, show_default=True)
@click.option("--sync-every", type=click.IntRange(0), default=4, show_default=True)
@click.option("--timeline", "show", is_flag=True, help="Draw the first 12 tokens.")
def main(
    shallow: float,
    deep: dict[int, float],
    exits: float,
    right: float,
    slowdown: float,
    sequences: int,
    tokens: int,
    max_pending: int,
    sync_every: int,
    show: bool,
) -> None:
    costs = Costs(shallow, deep)
    traces = [random_trace(tokens, exits, right, seed) for seed in range(sequences)]
    times = {}
    for overlap in (False, True):
        setting = Setting(overlap, max_pending, sync_every, {"shallow": slowdown, "deep": slowdown})
        jobs = simulate(traces, costs, setting)
        times[overlap] = milliseconds(jobs)
        busy = sum(job.ended - job.began for job in jobs if job.lane == "deep") / times[overlap]
        click.echo(
            f"{'overlapped' if overlap else 'in turn':12}{1e3 * tokens * sequences / times[overlap]:9.1f} tokens/s, "
            f"deep lane busy {busy:.0%}"
        )
        if show:
            click.echo(timeline(simulate([trace[:12] for trace in traces], costs, setting)))
    click.echo(f"overlap gains {times[False] / times[True]:.2f}x")


if __name__ == "__main__":
    main()
