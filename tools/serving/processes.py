"""How throughput and memory grow with processes: the same load on one process and on several, on one bundle.

    python -m tools.serving.processes BUNDLE --layout 1x1 --layout 1x2 --layout 2x1 --in-flight 1 --in-flight 4

A layout is processes x threads. Every process keeps `--in-flight` requests of 64 tokens going; layouts take turns.
Private memory is what no other process maps; shared memory counts once, in the total. The machine must be idle.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click
import psutil

from freeexport.system.idle import require_idle
from runtime import EngineError, Session
from tools.speed.closed_loop import ClosedLoop

PROMPT, TOKENS = "A good way to learn a language is", 64


def work(bundle: Path, threads: int, in_flight: int) -> None:
    """A process: measures for as many seconds as each line on standard input says, and writes tokens/s."""
    with Session(bundle, threads=threads, slots=in_flight) as session:
        prompt = session.encode(PROMPT).tolist()
        options = {"mode": "full", "max_new_tokens": TOKENS}
        print("ready", flush=True)
        for line in sys.stdin:
            window = ClosedLoop(session, [prompt], [options], in_flight).run(float(line))
            print(json.dumps(window.tokens_per_second), flush=True)


@contextmanager
def worker(bundle: Path, threads: int, in_flight: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", __spec__.name, str(bundle), "--worker", f"{threads}x{in_flight}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            if answer(process) != "ready":
                raise EngineError(f"a process with {threads} threads did not start; see its error above")
            yield process
        finally:
            process.terminate()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def throughput(processes: Sequence[subprocess.Popen[str]], seconds: float) -> float:
    """Tokens/s of all of them together, at once."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{seconds}\n")
        process.stdin.flush()
    return sum(float(answer(process)) for process in processes)


def memory(processes: Sequence[subprocess.Popen[str]]) -> tuple[float, float]:
    """MB that one process has for itself, and that all have together."""
    held = [psutil.Process(process.pid).memory_full_info() for process in processes]
    return max(each.uss for each in held) / 1e6, sum(each.pss for each in held) / 1e6


def measure(bundle: Path, layouts: Sequence[tuple[int, int]], in_flight: int, rounds: int, seconds: float) -> None:
    speeds: dict[tuple[int, int], list[float]] = {layout: [] for layout in layouts}
    sizes: dict[tuple[int, int], tuple[float, float]] = {}
    for _ in range(rounds):
        for count, threads in layouts:
            with ExitStack() as stack:
                running = [stack.enter_context(worker(bundle, threads, in_flight)) for _ in range(count)]
                throughput(running, 1)  # warms up
                speeds[count, threads].append(throughput(running, seconds))
                sizes[count, threads] = memory(running)
    for (count, threads), found in speeds.items():
        private, together = sizes[count, threads]
        click.echo(
            f"| {count} | {threads} | {count * in_flight} | {median(found):.0f} | "
            f"{min(found):.0f} to {max(found):.0f} | "
            f"{private:.0f} | {together:.0f} |"
        )


class Layout(click.ParamType):
    name = "PROCESSESxTHREADS"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        first, _, second = str(value).partition("x")
        if not (first.isdigit() and second.isdigit() and int(first) and int(second)):
            self.fail(f"{value!r} is no layout; give two numbers, as 2x1", param, ctx)
        return int(first), int(second)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--layout", "layouts", type=Layout(), multiple=True, default=("1x1", "1x2", "2x1"), show_default=True)
@click.option("--in-flight", type=click.IntRange(1), multiple=True, default=(1, 4, 8), help="Requests of a process.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seconds", type=float, default=10, show_default=True)
@click.option("--force", is_flag=True, help="On a busy machine too.")
@click.option("--worker", "own", type=Layout(), hidden=True)
def main(
    bundle: Path, layouts: Sequence[tuple[int, int]], in_flight: Sequence[int], rounds: int, seconds: float,
    force: bool, own: tuple[int, int] | None,
) -> None:  # fmt: skip
    """Measure processes on BUNDLE; prints rows of a table."""
    if own is not None:
        work(bundle, *own)
        return
    if not require_idle(force):
        click.echo("note: the machine is busy, so these figures are not to be trusted")
    click.echo("| processes | threads each | in flight | tokens/s | of all rounds | MB private | MB together |")
    click.echo("|---|---|---|---|---|---|---|")
    for count in in_flight:
        measure(bundle, layouts, count, rounds, seconds)


if __name__ == "__main__":
    main()
