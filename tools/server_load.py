"""Measures `freeexport serve` under load on loopback: throughput, and latency of clients.

    python -m tools.server_load BUNDLE --threads 2 --seconds 20
    python -m tools.server_load BUNDLE \\
        --against "llama-server -m FILE -t 2 -np 16 -c 16384 --port 8091"

For each number of clients it prints p50, p95 and p99 of the time to the first token and between
tokens. With --against, another server answers the same requests in turn with ours. Only one server
runs at a time. Clients share the cores with the server, and their use of cores is printed. Run on
an idle machine: the load average is printed. Every answer has --max-new-tokens tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np

from freeexport.system.machine import detect_machine
from freeexport.system.output import check_writable, write_whole
from runtime.errors import EngineError, one_line
from tools.data.splits import run_tool

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "A good way to learn a language is",
    "Rain fell on the",
)
CLIENTS = (1, 4, 16, 64)
START_SECONDS = 60  # time limit for the start of another server


@contextmanager
def served(bundle: Path, threads: int, slots: int) -> Iterator[str]:
    """Context manager: start our server in mode full, without prefix cache, and yield its URL."""
    command = [sys.executable, "-m", "freeexport", "serve", str(bundle), "--port", "0"]
    command += [
        "--threads",
        str(threads),
        "--slots",
        str(slots),
        "--mode",
        "full",
        "--prefix-cache-mb",
        "0",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = ""
        try:
            for line in process.stderr:
                if found := re.search(r"^serving .* on (http\S+)/v1", line):
                    break
            else:
                problem = line.strip() or "it ended without a message"
                raise EngineError(f"the server did not start: {problem}")
            yield found.group(1)
        finally:
            process.terminate()


async def stream(
    client: httpx.AsyncClient, prompt: str | Sequence[int], tokens: int
) -> list[float]:
    """Return the times of the request and of each chunk with text."""
    times = [time.perf_counter()]
    body = {
        "prompt": prompt,
        "max_tokens": tokens,
        "stream": True,
        "temperature": 0,
        "ignore_eos": True,
    }
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and '"finish_reason":null' in line:
                times.append(time.perf_counter())
    return times


async def load(url: str, clients: int, seconds: float, tokens: int) -> list[list[float]]:
    """Run clients in closed loops and return the times of each request, as `stream`."""
    until = time.perf_counter() + seconds
    done: list[list[float]] = []

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        for turn in itertools.count(number):
            done.append(await stream(client, PROMPTS[turn % len(PROMPTS)], tokens))
            if time.perf_counter() >= until:
                return

    # Use a new connection per request. A server may close a kept connection at the moment when a
    # request begins to use it.
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await asyncio.gather(*(ask(client, number) for number in range(clients)))
    return done


def gaps(done: Sequence[Sequence[float]]) -> list[float]:
    return [later - earlier for times in done for earlier, later in itertools.pairwise(times[1:])]


def format_percentiles(seconds: Sequence[float]) -> str:
    return " ".join(f"{1e3 * value:8.1f}" for value in np.percentile(seconds, (50, 95, 99)))


def url_of(command: str) -> str:
    """Return the URL of the server that a command with --port starts."""
    parts = shlex.split(command)
    if "--port" not in parts[:-1]:
        raise click.UsageError(f"--against {command!r} names no --port; add one that is free")
    return f"http://127.0.0.1:{parts[parts.index('--port') + 1]}"


@contextmanager
def other_server(command: str) -> Iterator[str]:
    """Context manager: start the server of a command with --port, and yield its URL."""
    parts = shlex.split(command)
    url = url_of(command)
    with subprocess.Popen(parts, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(10 * START_SECONDS):
                with suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                if process.poll() is not None:
                    raise EngineError(f"{parts[0]} ended with code {process.returncode}")
                time.sleep(0.1)
            else:
                raise EngineError(f"{parts[0]} does not answer at {url}/health")
            yield url
        finally:
            process.terminate()


def latency(url: str, clients: int, seconds: float, tokens: int, name: str) -> dict[str, Any]:
    """Measure throughput and latency for a number of clients. Prints and returns a row."""
    asyncio.run(load(url, 1, 1, tokens))  # warms up
    began = time.perf_counter()
    own = time.process_time()
    done = asyncio.run(load(url, clients, seconds, tokens))
    took = time.perf_counter() - began
    speed = tokens * len(done) / took
    share = (time.process_time() - own) / took
    first = [times[1] - times[0] for times in done if times[1:]]
    between = gaps(done)
    row = f"{clients:7} {len(done):9} {speed:9.1f}  {format_percentiles(first)}"
    click.echo(f"{row}    {format_percentiles(between)}    {share:4.2f}  {name}")
    report = {
        "first_token_ms": 1e3 * float(np.median(first)),
        "between_tokens_ms": 1e3 * float(np.median(between)),
    }
    return {
        "server": name,
        "clients": clients,
        "tokens_per_second": speed,
        "client_cores": share,
        **report,
    }


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--threads", type=click.IntRange(1), default=2)
@click.option("--slots", type=click.IntRange(1), default=16)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=20,
    help="For each number of clients.",
)
@click.option("--max-new-tokens", "tokens", type=click.IntRange(2), default=64)
@click.option("--rounds", type=click.IntRange(1), default=1)
@click.option(
    "--clients",
    type=click.IntRange(1),
    multiple=True,
    help="Numbers of clients.  [default: 1, 4, 16, 64]",
)
@click.option("--against", help="The command of another server, with its --port.")
@click.option("--save", type=click.Path(path_type=Path), help="Write what clients see as JSON.")
def main(
    bundle: Path,
    threads: int,
    slots: int,
    seconds: float,
    tokens: int,
    rounds: int,
    clients: tuple[int, ...],
    against: str | None,
    save: Path | None,
) -> None:
    """Measure the server of BUNDLE."""
    check_writable(save, "--save")
    if against is not None:
        url_of(against)
    click.echo(
        f"{detect_machine().cpu}, {threads} threads; load average before: {os.getloadavg()[0]:.1f}"
    )
    click.echo(
        "clients  requests  tokens/s  first token ms: p50, p95, p99    between tokens ms"
        "    client cores"
    )
    servers = {"ours": partial(served, bundle, threads, slots)}
    if against is not None:
        servers["theirs"] = partial(other_server, against)
    rows = []
    for number, turn in itertools.product(clients or CLIENTS, range(rounds)):
        for name in list(servers)[:: 1 if turn % 2 == 0 else -1]:
            with servers[name]() as url:
                try:
                    rows.append(latency(url, number, seconds, tokens, name))
                except httpx.HTTPError as error:
                    raise EngineError(f"{name} at {url} failed ({one_line(error)})") from None
    if save is not None:
        facts = {
            "processor": detect_machine().cpu,
            "threads": threads,
            "tokens": tokens,
            "against": against,
        }
        write_whole(save, json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    run_tool(main)
