"""Measure how long a session takes to open, and what two processes on one bundle share.

    python -m tools.speed.start BUNDLE BUNDLE ... [--json FILE]

For each bundle: seconds that `Session(bundle)` takes in a new process, imports aside, everything in the page cache;
that as a multiple of reading the bundle's bytes; and of two processes that have both decoded, the memory that one has
to itself (private) and its proportional share (PSS). Run on an idle machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

from freeexport.system.idle import require_idle
from runtime import Bundle
from runtime.machine.machine import usable_cores

# Says seconds, is told to go on once all processes are open, then says megabytes.
PROBE = """
import json, sys, time
import numpy, onnxruntime, tokenizers
from runtime import Session

began = time.perf_counter()
session = Session(sys.argv[1], slots=1, threads=int(sys.argv[2]))
seconds = time.perf_counter() - began
for mode in ("full", "free"):
    session.generate([1, 2, 3, 4], mode=mode, threshold=0.5, max_new_tokens=16, ignore_eos=True)
print(json.dumps(seconds), flush=True)
sys.stdin.readline()
held = {}
for line in open("/proc/self/smaps_rollup"):
    name, _, value = line.partition(":")
    if value.endswith("kB\\n"):
        held[name] = int(value.split()[0]) / 1e3 * 1.024
print(json.dumps({"private": held["Private_Clean"] + held["Private_Dirty"], "pss": held["Pss"]}), flush=True)
sys.stdin.readline()
"""


@dataclass(frozen=True)
class Figures:
    """Seconds and megabytes."""

    bundle: str
    bundle_mb: float
    read: float
    start: float
    private: float
    pss: float

    def __str__(self) -> str:
        return (
            f"{self.bundle} ({self.bundle_mb:.0f} MB): read {self.read:.3f} s, start {self.start:.3f} s "
            f"({self.start / self.read:.1f}x); each of two processes: private {self.private:.0f} MB, "
            f"PSS {self.pss:.0f} MB"
        )


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--rounds", type=int, default=7)
@click.option("--threads", type=int, default=None, help="Of a session.  [default: one per core]")
@click.option("--json", "output", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True)
def main(bundles: tuple[Path, ...], rounds: int, threads: int | None, output: Path | None, force: bool) -> None:
    idle = require_idle(force)
    threads = threads or usable_cores()
    figures = []
    for path in bundles:
        figures.append(measure(path, rounds, threads))
        click.echo(f"{figures[-1]}" + ("" if idle else " (busy machine)"))
    if output is not None:
        output.write_text(json.dumps({"threads": threads, "rows": [asdict(item) for item in figures]}, indent=2))


def measure(path: Path, rounds: int, threads: int) -> Figures:
    """The medians of `rounds`."""
    read(path)
    held = processes_of(path, threads, 2)[0][1]
    return Figures(
        bundle=path.name,
        bundle_mb=sum(file.size for file in Bundle.open(path).manifest.files.values()) / 1e6,
        read=median(read(path) for _ in range(rounds)),
        start=median(processes_of(path, threads, 1)[0][0] for _ in range(rounds)),
        private=held["private"],
        pss=held["pss"],
    )


def read(directory: Path) -> float:
    """Seconds to read every file of a directory."""
    buffer = bytearray(1 << 22)
    began = time.perf_counter()
    for path in directory.iterdir():
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    return time.perf_counter() - began


def processes_of(path: Path, threads: int, count: int) -> list[tuple[float, dict[str, float]]]:
    """Seconds and megabytes of as many processes, opened one after the other and held together."""
    command = [sys.executable, "-c", PROBE, str(path), str(threads)]
    open_: list[subprocess.Popen[str]] = []
    try:
        seconds = []
        for _ in range(count):
            open_.append(subprocess.Popen(command, stdin=-1, stdout=-1, text=True))
            seconds.append(answer(open_[-1]))
        held = []
        for process in open_:
            held.append(answer(process, "held\n"))
        return list(zip(seconds, held, strict=True))
    finally:
        for process in open_:
            process.communicate("end\n")


def answer(process: subprocess.Popen[str], word: str = "") -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    if word:
        process.stdin.write(word)
        process.stdin.flush()
    return json.loads(process.stdout.readline())


if __name__ == "__main__":
    main()
