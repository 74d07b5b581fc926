"""A peer for tests: it writes the tokens that follow the last one; some tokens make it misbehave."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from tools.peers.decoders import Emit, Loaded, serve

DIES, HANGS, FAILS, SHORT = 101, 102, 103, 104


def convert(source: str, out: str, options: dict[str, Any]) -> None:
    if options.get("unconvertible"):
        raise ValueError("no such layer")
    (Path(out) / "model").write_text(source)


def load(path: str, threads: int, options: dict[str, Any]) -> Loaded:
    print("a library that prints on stdout")

    def generate(prompts: list[list[int]], count: int, beams: int, emit: Emit) -> None:
        for row, prompt in enumerate(prompts):
            write(row, prompt[-1], count, emit)

    def write(row: int, last: int, count: int, emit: Emit) -> None:
        if last == DIES:
            print("the last words", file=sys.stderr, flush=True)
            os._exit(3)
        if last == HANGS:
            time.sleep(60)
        if last == FAILS:
            raise ValueError("cannot\nread this")
        for token in range(last + 1, last + 1 + count - (last == SHORT)):
            time.sleep(0.001)
            emit(row, token)

    return generate, {"versions": {"fake": "1.0"}, "flags": f"threads={threads}"}


if __name__ == "__main__":
    serve(load, convert)
