"""Memory of processes that answer many requests. It times nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import numpy as np
import psutil

from freeexport.system.progress import progress
from tools.peers.decoders import memory
from tools.peers.measure import MEMORY, Contender, Decoders
from tools.server_load import served

WRITTEN = 2
SLOTS = 4


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
    failed = {}
    with progress(f"{count} requests to each", len(contenders)) as advance:
        with served(ours.bundle.path, threads, SLOTS) as url, httpx.Client(timeout=600) as client:
            process = next(one for one in psutil.Process().children() if "serve" in one.cmdline())
            given = {"max_tokens": WRITTEN, "temperature": 0, "ignore_eos": True}
            found = []
            for prompt in prompts:
                body = {"prompt": prompt, **given}
                client.post(f"{url}/v1/completions", json=body).raise_for_status()
                found.append(memory(process.pid))
        rows = [_row(f"{ours.name} serve", ours.precision, found)]
        advance()
        for one in peers:
            with Decoders([one], threads) as running:
                answers = running.answers(one.name, [[prompt] for prompt in prompts], WRITTEN)
                if answers is not None:
                    row = _row(one.name, one.precision, answers)
                    rows.append({**row, **running.facts[one.name]})
                failed.update(running.failed)
            advance()
    return rows, failed


def _row(name: str, precision: str, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a decoder's row: its memory after the first answer and after the last."""
    return {
        "name": name,
        "precision": precision,
        **{field: answers[0][field] for field in MEMORY},
        **{f"{field}_after": answers[-1][field] for field in MEMORY},
    }
