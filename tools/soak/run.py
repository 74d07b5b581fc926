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
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import click

from runtime import Session
from tools.soak.clients import Clients
from tools.soak.faults import Faults
from tools.soak.leftovers import left_over, resident
from tools.soak.requests import draw_asks

# Seconds after which a request that has not ended counts as lost.
LOST = 60.0
# Growth from half time to the end that is not a leak: a share, and bytes.
SHARE, ALLOWED = 0.03, 16e6
# Seconds below which memory still grows because slots, threads and calls are used for the first time.
SETTLED = 60.0


@dataclass
class Soaked:
    """`memory`: resident bytes at half time and at the end. `violations` is empty where all is well."""

    seconds: float
    done: Counter[str]
    refused: int
    tokens: int
    memory: list[int]
    violations: list[str] = field(default_factory=list)

    @property
    def leaked(self) -> int:
        """Bytes that are still resident at the end and were not at half time."""
        return self.memory[-1] - self.memory[0]


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
            memory = _watch(clients, seconds)
            stop.set()
            ended = time.monotonic()
            for thread in threads:
                thread.join(max(0.0, ended + LOST - time.monotonic()))
        found = Soaked(ended - began, clients.done, clients.refused, clients.tokens, memory, clients.violations)
        alive = sum(thread.is_alive() for thread in threads)
        found.violations += [f"{alive} clients wait for ever"] if alive else left_over(session)
    if found.seconds >= SETTLED and found.leaked > SHARE * found.memory[-1] + ALLOWED:
        found.violations.append(f"memory grew by {found.leaked / 1e6:.0f} MB")
    return found


def _watch(clients: Clients, seconds: float) -> list[int]:
    """Memory at half time and at the end, which comes early where something is wrong."""
    watched, waited = 0.0, dict[tuple[int, float], float]()
    memory = list[int]()
    while watched < seconds and not clients.violations:
        began = time.monotonic()
        time.sleep(seconds / 200)
        if not memory and watched >= seconds / 2:
            memory.append(resident())
        # Of a process that was itself kept from running, by whatever else this machine does, nobody is lost.
        step = min(time.monotonic() - began, 2 * seconds / 200 + 1)
        watched += step
        waited = {asked: waited.get(asked, 0.0) + step for asked in list(clients.busy_since.items())}
        lost = sum(already > LOST for already in waited.values())
        if lost:
            clients.violations.append(f"requests of {lost} clients have not ended after {LOST:.0f} s")
            faulthandler.dump_traceback()
    return [*memory, resident()]


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=300.0)
@click.option("--concurrent", type=click.IntRange(1), default=64, help="Clients, a thread each.")
@click.option("--slots", type=click.IntRange(1), default=8)
@click.option("--queue", type=click.IntRange(0), default=48, help="Too few, so some are refused.")
@click.option("--prefix-cache-mb", type=click.IntRange(0), default=0, help="Reuse prompts.")
@click.option("--asks", type=click.IntRange(1), default=150, help="Different requests.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Of each engine.")
@click.option("--seed", type=int, default=0)
def main(bundle: Path, **given: Any) -> None:
    found = soak(bundle, **given)
    click.echo(report(found))
    if found.violations:
        raise SystemExit(1)


def report(found: Soaked) -> str:
    total = found.done.total()
    before, after = found.memory[0] / 1e6, found.memory[-1] / 1e6
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(found.done.items()))
    lines = [
        f"{total} requests in {found.seconds:.0f} s ({kinds}), {found.refused} refused, {found.tokens} tokens",
        f"memory {before:.0f} MB at half time, {after:.0f} MB at the end: {after - before:+.1f} MB",
    ]
    kept = [f"VIOLATION {what}" for what in found.violations[:20]] or ["nothing lost, nothing mixed up, nothing left"]
    return "\n".join([*lines, *kept])


if __name__ == "__main__":
    main()
