"""Memory and speed of processes that answer many requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
import psutil

from freeexport.system.progress import progress
from tools.peers.decoders import memory
from tools.peers.measure import MEMORY, Contender, Decoders, summary
from tools.server_load import served

WRITTEN = 8
# Requests whose time is reported, the last ones.
LAST = 100
SLOTS = 4

# Seconds of a request, and the memory of the process after it.
Sample = tuple[float, dict[str, int]]
Respond = Callable[[list[int]], Sample]


def server(
    contenders: Sequence[Contender], count: int, threads: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Let a server of our bundle, and a process of each peer, answer many short requests in a row.

    Returns a row for each, and why others have none.
    """
    ours, *peers = contenders
    assert ours.bundle is not None
    vocabulary = ours.bundle.manifest.vocab_size
    draw = np.random.default_rng(0)
    prompts = [
        draw.integers(vocabulary // 4, vocabulary, draw.integers(8, 64)).tolist()
        for _ in range(count)
    ]
    with served(ours.bundle.path, threads, SLOTS) as url, httpx.Client(timeout=600) as client:
        process = next(one for one in psutil.Process().children() if "serve" in one.cmdline())

        def respond(prompt: list[int]) -> Sample:
            began = time.perf_counter()
            body = {"prompt": prompt, "max_tokens": WRITTEN, "temperature": 0, "ignore_eos": True}
            client.post(f"{url}/v1/completions", json=body).raise_for_status()
            return time.perf_counter() - began, memory(process.pid)

        rows = [_row(f"{ours.name} serve", ours.precision, respond, prompts)]
    failed = {}
    for one in peers:
        with Decoders([one], threads) as running:

            def answer(prompt: list[int], running: Any = running, name: str = one.name) -> Sample:
                (found,) = running.answers(name, [[prompt]], WRITTEN)
                return found["seconds"], {name: found[name] for name in MEMORY}

            if one.name in running.facts:
                row = _row(one.name, one.precision, answer, prompts)
                rows.append({**row, **running.facts[one.name]})
            failed.update(running.failed)
    base = rows[0]["request"]
    for row in rows:
        row["request"] = summary(row["request"], base)
    return rows, failed


def _row(
    name: str, precision: str, respond: Respond, prompts: Sequence[list[int]]
) -> dict[str, Any]:
    found = []
    with progress(f"{len(prompts)} requests to {name}", len(prompts)) as advance:
        for prompt in prompts:
            found.append(respond(prompt))
            advance()
    return {
        "name": name,
        "precision": precision,
        "request": [seconds for seconds, _ in found[-LAST:]],
        **found[0][1],
        **{f"{name}_after": count for name, count in found[-1][1].items()},
    }
