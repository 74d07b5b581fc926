"""`freeexport serve` under load, on loopback: latency as clients see it, and what the server costs.

    python -m tools.server_load BUNDLE --threads 2 --seconds 20

Prints tokens/s of one client beside those of Session.stream in this process, in turn; for each number of clients p50,
p95 and p99 of the time to the first token and between tokens; and the same between tokens of eight streams while a
long prompt arrives. Clients share the cores with the server. The machine should be idle: its load is printed.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import click
import httpx
import numpy as np

from runtime import Bundle, EngineError, Session

PROMPTS = ("Once upon a time", "The capital of France is", "A good way to learn a language is", "Rain fell on the")
CLIENTS = (1, 4, 16, 64)
STREAMS, LONG_PROMPT = 8, 1500


@contextmanager
def served(bundle: Path, threads: int, slots: int) -> Iterator[str]:
    """The address of a server in a process of its own, in mode full and without reuse."""
    command = [sys.executable, "-m", "freeexport", "serve", str(bundle), "--port", "0"]
    command += ["--threads", str(threads), "--slots", str(slots), "--mode", "full", "--prefix-cache-mb", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"^serving .* on (http\S+)/v1", line):
                    break
            else:
                raise EngineError(f"the server did not start: {line.strip()}")
            yield found.group(1)
        finally:
            process.terminate()


async def stream(client: httpx.AsyncClient, prompt: str | Sequence[int], tokens: int) -> list[float]:
    """The times of the request and of each chunk with text."""
    times = [time.perf_counter()]
    body = {"prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and '"finish_reason":null' in line:
                times.append(time.perf_counter())
    return times


async def load(url: str, clients: int, seconds: float, tokens: int) -> list[list[float]]:
    """Requests of so many clients, each of which asks again as soon as it is answered."""
    until = time.perf_counter() + seconds
    done: list[list[float]] = []

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        for turn in itertools.count(number):
            done.append(await stream(client, PROMPTS[turn % len(PROMPTS)], tokens))
            if time.perf_counter() >= until:
                return

    # A connection for each request: a server may close one that was kept just when a request begins to use it.
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await asyncio.gather(*(ask(client, number) for number in range(clients)))
    return done


async def beside_long_prompt(url: str, tokens: int, arrives: bool) -> list[float]:
    """Gaps of eight streams, in the middle of which a long prompt arrives."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        streams = [asyncio.ensure_future(stream(client, PROMPTS[n % len(PROMPTS)], tokens)) for n in range(STREAMS)]
        await asyncio.sleep(1)
        if arrives:
            await stream(client, [20 + number % 200 for number in range(LONG_PROMPT)], 1)
        return gaps(await asyncio.gather(*streams))


def gaps(done: Sequence[Sequence[float]]) -> list[float]:
    return [later - earlier for times in done for earlier, later in itertools.pairwise(times[1:])]


def percentiles(seconds: Sequence[float]) -> str:
    return " ".join(f"{1e3 * value:8.1f}" for value in np.percentile(seconds, (50, 95, 99)))


def print_cost(url: str, bundle: Path, threads: int, rounds: int, tokens: int) -> None:
    """Tokens/s of the same request at the server and at a session here, in turn."""
    speeds: list[tuple[float, float]] = []

    async def ask() -> int:
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            return len(await stream(client, PROMPTS[0], tokens)) - 1

    with Session(bundle, threads=threads, slots=1) as session:
        for turn in range(rounds + 1):
            began = time.perf_counter()
            chunks = sum(bool(token.text) for token in session.stream(PROMPTS[0], mode="full", max_new_tokens=tokens))
            between = time.perf_counter()
            assert asyncio.run(ask()) == chunks
            if turn:  # the first warms up
                speeds.append((chunks / (between - began), chunks / (time.perf_counter() - between)))
    ratios = [there / here for here, there in speeds]
    here, there = map(median, zip(*speeds, strict=True))
    click.echo(f"one client: session {here:.1f} tokens/s, server {there:.1f}, ratio {median(ratios):.3f}")
    click.echo(f"  ratios of {rounds} rounds: {min(ratios):.3f} to {max(ratios):.3f}")


def print_latency(url: str, seconds: float, tokens: int) -> None:
    asyncio.run(load(url, 1, 1, tokens))  # warms up
    click.echo("clients  requests  tokens/s  first token ms: p50, p95, p99    between tokens ms: the same")
    for clients in CLIENTS:
        began = time.perf_counter()
        done = asyncio.run(load(url, clients, seconds, tokens))
        speed = sum(len(times) - 1 for times in done) / (time.perf_counter() - began)
        first = percentiles([times[1] - times[0] for times in done if times[1:]])
        click.echo(f"{clients:7} {len(done):9} {speed:9.1f}  {first}    {percentiles(gaps(done))}")


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--threads", type=int, default=2)
@click.option("--slots", type=int, default=16)
@click.option("--seconds", type=float, default=20, help="For each number of clients.")
@click.option("--max-new-tokens", "tokens", type=int, default=64)
@click.option("--rounds", type=int, default=9)
def main(bundle: Path, threads: int, slots: int, seconds: float, tokens: int, rounds: int) -> None:
    """Measure the server of BUNDLE."""
    click.echo(f"load average before: {os.getloadavg()[0]:.1f}")
    with served(bundle, threads, slots) as url:
        print_cost(url, bundle, threads, rounds, tokens)
        print_latency(url, seconds, tokens)
        if Bundle.open(bundle).manifest.capacity <= LONG_PROMPT:
            click.echo(f"no prompt of {LONG_PROMPT} tokens: they do not fit this bundle")
            return
        for arrives in (False, True):
            between = asyncio.run(beside_long_prompt(url, 4 * tokens, arrives))
            what = f"beside a prompt of {LONG_PROMPT} tokens" if arrives else "alone"
            click.echo(
                f"{STREAMS} streams {what}, between tokens ms: {percentiles(between)}, at most {max(between):.3f} s"
            )


if __name__ == "__main__":
    main()
