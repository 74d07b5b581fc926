"""Bundles of one model, each in a process of its own, decoding the same prompt in turn: tokens/s and ratios.

    python -m tools.speed.compare_bundles BUNDLE BUNDLE ... --threads 1 --threads 2

The first bundle is what the others are compared with. Also says how long a token takes outside the engine calls. The
machine must be idle.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import click

from freeexport.system.idle import require_idle
from freeexport.system.machine import detect_machine
from runtime import Session

PROMPT = list(range(20, 52))
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "free, threshold 0": {"mode": "free", "threshold": 0.0},
    "lossless": {"mode": "lossless", "threshold": 0.5},
}


def serve(bundle: str, threads: int) -> None:
    """Answer each line of options on stdin with a line of figures."""
    with Session(bundle, threads=threads, slots=1) as session:
        session.settle()
        print("ready", flush=True)
        for line in sys.stdin:
            stats = (result := session.generate(PROMPT, ignore_eos=True, **json.loads(line))).stats
            engines = stats.encode_seconds + stats.prefill_seconds + stats.shallow_seconds + stats.deep_seconds
            count = len(result.token_ids)
            print(json.dumps([count / stats.seconds, 1e6 * (stats.seconds - engines) / count]), flush=True)


class Worker:
    def __init__(self, bundle: Path, threads: int) -> None:
        command = [
            sys.executable,
            "-m",
            "tools.speed.compare_bundles",
            "--serve",
            str(bundle),
            "--threads",
            str(threads),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"

    def ask(self, options: dict[str, Any]) -> tuple[float, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(options) + "\n")
        self._process.stdin.flush()
        speed, outside = json.loads(self._line())
        return speed, outside

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.communicate()


def compare(bundles: tuple[Path, ...], threads: int, tokens: int, rounds: int) -> None:
    workers = [Worker(bundle, threads) for bundle in bundles]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for turn in range(rounds + 1):
        for name, options in SETTINGS.items():
            for place, worker in enumerate(workers):
                figures = worker.ask({**options, "max_new_tokens": tokens})
                if turn:  # the first round warms up
                    found.setdefault((name, place), []).append(figures)
    for worker in workers:
        worker.close()
    for name in SETTINGS:
        base = median(speed for speed, _ in found[name, 0])
        for place, bundle in enumerate(bundles):
            speed, outside = (median(column) for column in zip(*found[name, place], strict=True))
            figures = f"{speed:7.1f} tokens/s {speed / base:5.2f}x {outside:6.1f} us outside"
            click.echo(f"{threads} threads  {name:18} {figures}  {bundle.name}")


@click.command(help=__doc__)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--threads", "counts", type=int, multiple=True, default=(1,), show_default=True)
@click.option("--max-new-tokens", "tokens", type=int, default=96, show_default=True)
@click.option("--rounds", type=int, default=5, show_default=True)
@click.option("--force", is_flag=True, help="On a busy machine too.")
@click.option("--serve", "serves", is_flag=True, hidden=True)
def main(
    bundles: tuple[Path, ...], counts: tuple[int, ...], tokens: int, rounds: int, force: bool, serves: bool
) -> None:
    if serves:
        serve(str(bundles[0]), counts[0])
        return
    require_idle(force)
    machine = detect_machine()
    click.echo(f"{machine.cpu} ({' '.join(machine.features)}), {tokens} tokens, medians of {rounds} rounds")
    for threads in counts:
        compare(bundles, threads, tokens, rounds)


if __name__ == "__main__":
    main()
