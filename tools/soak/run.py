"""Many clients at one session for minutes: nothing may be lost or mixed up, and nothing may grow.

    python -m tools.soak.run BUNDLE --seconds 300

The clients ask for random prompts, lengths, modes and samplings; they cancel, set deadlines, stop reading, raise in
callbacks, and engine calls fail. Every result must be the one that the request gives alone, or its beginning where it
was cut short. At the end nothing may be left in the session, and in a minute or more memory must not have grown:
resident memory at half time and at the end, each after the allocator gave back what was free. Ends with 1 where it is
not so.
"""

from __future__ import annotations

import faulthandler
import gc
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import click

from runtime import Session
from tools.soak.clients import Clients
from tools.soak.faults import Faults
from tools.soak.process_memory import Held, held, held_trimmed
from tools.soak.requests import draw_asks

# Seconds after which a request that has not ended counts as lost.
LOST = 60.0
# Growth from half time to the end that is not a leak: a share, and bytes.
SHARE, ALLOWED = 0.03, 16e6
# What is told of that is measured in bytes.
GROWS = ("resident", "given")
# Seconds below which memory still grows because slots, threads and calls are used for the first time.
SETTLED = 60.0


@dataclass
class Soaked:
    """`memory`: at the start and about every 200th part of the time; `trimmed`: at half time and at the end, after what
    was free has been given back. `violations` is empty where all is well.
    """

    seconds: float
    done: Counter[str]
    refused: int
    tokens: int
    memory: list[Held]
    trimmed: list[Held]
    violations: list[str] = field(default_factory=list)

    def growth(self, of: str) -> float:
        """What an attribute of `memory` grew by, from the median of the second quarter to that of the last."""
        values = [getattr(one, of) for one in self.memory]
        quarter = max(1, len(values) // 4)
        return median(values[-quarter:]) - median(values[quarter : 2 * quarter] or values)

    @property
    def leaked(self) -> int:
        """Bytes that are still resident at the end and were not at half time, where nothing that is free is kept."""
        return self.trimmed[-1].resident - self.trimmed[0].resident if self.trimmed else 0


def soak(
    bundle: Path, seconds: float, concurrent: int, slots: int, queue: int, asks: int, seed: int, **options: Any
) -> Soaked:
    """Run it. `options` are those of the session."""
    with Session(bundle, slots=1, **{**options, "overlap": False, "prefix_cache_mb": 0}) as session:
        drawn = draw_asks(session, asks, Random(seed))
    with Session(bundle, slots=slots, queue=queue, **options) as session:
        faults, stop = Faults(seed), threading.Event()
        clients = Clients(session, drawn, faults)
        threads = [
            threading.Thread(target=clients.run, args=(number, stop, seed), daemon=True) for number in range(concurrent)
        ]
        with faults.injected():
            began = time.monotonic()
            for thread in threads:
                thread.start()
            memory, trimmed = _watch(clients, seconds)
            stop.set()
            ended = time.monotonic()
            for thread in threads:
                thread.join(max(0.0, ended + LOST - time.monotonic()))
        found = Soaked(
            ended - began, clients.done, clients.refused, clients.tokens, memory, trimmed, clients.violations
        )
        alive = sum(thread.is_alive() for thread in threads)
        found.violations += [f"{alive} clients wait for ever"] if alive else left_over(session)
    if found.seconds >= SETTLED and found.leaked > SHARE * found.memory[-1].resident + ALLOWED:
        found.violations.append(f"memory grew by {found.leaked / 1e6:.0f} MB")
    return found


def _watch(clients: Clients, seconds: float) -> tuple[list[Held], list[Held]]:
    """Memory over the time, which ends early where something is wrong; and trimmed, at half time and at the end."""
    watched, waited = 0.0, dict[tuple[int, float], float]()
    memory, trimmed = [held()], list[Held]()
    while watched < seconds and not clients.violations:
        began = time.monotonic()
        time.sleep(seconds / 200)
        memory.append(held())
        if not trimmed and watched >= seconds / 2:
            trimmed.append(held_trimmed())
        # Of a process that was itself kept from running, by whatever else this machine does, nobody is lost.
        step = min(time.monotonic() - began, 2 * seconds / 200 + 1)
        watched += step
        waited = {asked: waited.get(asked, 0.0) + step for asked in list(clients.busy_since.items())}
        lost = sum(already > LOST for already in waited.values())
        if lost:
            clients.violations.append(f"requests of {lost} clients have not ended after {LOST:.0f} s")
            faulthandler.dump_traceback()
    return memory, [*trimmed, held_trimmed()]


def left_over(session: Session) -> list[str]:
    """What a session holds that nobody asks any more."""
    gc.collect()  # streams that were forgotten
    session._scheduler.drain()
    scheduler = session._scheduler
    lanes = scheduler._free[0].lanes if scheduler._free else ()
    facts = [
        (scheduler.empty, "requests are left"),
        (sorted(decoder.slot for decoder in scheduler._free) == list(range(session.options.slots)), "slots are lost"),
        (not any(lane.cache.lengths.any() for lane in lanes), "the KV cache is not empty"),
        (not scheduler._cross._placed, "prompts are left for cross-attention"),
        (not scheduler._wheel.followers, "threads are left asleep"),
    ]
    return [what for holds, what in facts if not holds]


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=300.0, show_default=True)
@click.option("--concurrent", type=click.IntRange(1), default=64, show_default=True, help="Clients, a thread each.")
@click.option("--slots", type=click.IntRange(1), default=8, show_default=True)
@click.option("--queue", type=click.IntRange(0), default=48, show_default=True, help="Too few, so some are refused.")
@click.option("--prefix-cache-mb", type=click.IntRange(0), default=0, show_default=True, help="Reuse prompts.")
@click.option("--asks", type=click.IntRange(1), default=150, show_default=True, help="Different requests.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of each engine.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(bundle: Path, **given: Any) -> None:
    found = soak(bundle, **given)
    click.echo(report(found))
    if found.violations:
        raise SystemExit(1)


def report(found: Soaked) -> str:
    total = found.done.total()
    now, resident, given = (value / 1e6 for value in (found.memory[-1].resident, *map(found.growth, GROWS)))
    before, after = found.trimmed[0].resident / 1e6, found.trimmed[-1].resident / 1e6
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(found.done.items()))
    lines = [
        f"{total} requests in {found.seconds:.0f} s ({kinds}), {found.refused} refused, {found.tokens} tokens",
        f"memory {now:.0f} MB, from the second quarter to the last {resident:+.1f} MB, of which given out by malloc "
        f"{given:+.1f} MB; Python's blocks {found.growth('blocks'):+.0f} of {found.memory[-1].blocks}",
        f"without what is free {before:.0f} MB at half time, {after:.0f} MB at the end: {after - before:+.1f} MB",
    ]
    kept = [f"VIOLATION {what}" for what in found.violations[:20]] or ["nothing lost, nothing mixed up, nothing left"]
    return "\n".join([*lines, *kept])


if __name__ == "__main__":
    main()
