"""`freeexport serve` under load, on loopback: latency as clients see it, and what the server costs.

    python -m tools.serving.server_load BUNDLE --threads 2 --seconds 20

Prints tokens/s of one client beside those of Session.stream in this process, in turn; then, for each number of clients,
p50, p95 and p99 of the time to the first token and between tokens; then the time between the tokens of eight streams
while a long prompt arrives. Clients share the cores with the server. The machine must be idle.

`--against llama-server` has llama.cpp's server answer the same load, in turn: SmolLM2 in q8_0, greedy, as many threads
and slots. Neither keeps prompts (python -m pip install cmake; it is compiled once, which takes ten minutes).
"""

from __future__ import annotations

import asyncio
import itertools
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click
import httpx
import numpy as np

from freeexport.system.idle import require_idle
from runtime import Bundle, EngineError, Session
from tools.serving.llama_server import llama_served

PROMPTS = ("Once upon a time", "The capital of France is", "A good way to learn a language is", "Rain fell on the")
STREAMS, LONG_PROMPT = 8, 1500


@dataclass(frozen=True)
class Target:
    """A server under load. `more`: fields of its own for each request."""

    name: str
    url: str
    more: dict[str, Any] = field(default_factory=dict)


@contextmanager
def served(bundle: Path, threads: int, slots: int) -> Iterator[str]:
    """The address of a server in a process of its own, in mode full and without reuse."""
    arguments = [str(bundle), "--threads", str(threads), "--slots", str(slots)]
    with serving([*arguments, "--mode", "full", "--prefix-cache-mb", "0"]) as url:
        yield url


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[str]:
    """The address of `freeexport serve` with these arguments, in a process of its own."""
    command = [sys.executable, "-m", "freeexport", "serve", *arguments, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"^serving .* on (\S+)/v1", line):
                    break
            else:
                raise EngineError(f"the server did not start: {line.strip()}")
            yield found.group(1)
        finally:
            process.terminate()


async def stream(
    client: httpx.AsyncClient, prompt: str | Sequence[int], tokens: int, more: dict[str, Any] | None = None
) -> list[float]:
    """When it was asked for, and when each chunk with text came."""
    times = [time.perf_counter()]
    body = {"prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0, **(more or {})}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and '"finish_reason":null' in line:
                times.append(time.perf_counter())
    return times


async def load(
    url: str, clients: int, seconds: float, tokens: int, more: dict[str, Any] | None = None
) -> list[list[float]]:
    """Requests of so many clients, each of which asks again as soon as it is answered."""
    until = time.perf_counter() + seconds
    done: list[list[float]] = []

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        for turn in itertools.count(number):
            done.append(await stream(client, PROMPTS[turn % len(PROMPTS)], tokens, more))
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


def cost(url: str, bundle: Path, threads: int, rounds: int, tokens: int) -> None:
    """Tokens/s of the same request at the server and at a session here, in turn."""
    speeds: dict[str, list[float]] = {"session": [], "server": []}

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
                speeds["session"].append(chunks / (between - began))
                speeds["server"].append(chunks / (time.perf_counter() - between))
    ratios = [b / a for a, b in zip(speeds["session"], speeds["server"], strict=True)]
    here, there = (median(values) for values in speeds.values())
    click.echo(f"one client: session {here:.1f} tokens/s, server {there:.1f}, ratio {median(ratios):.3f}")
    click.echo(f"  ratios of {rounds} rounds: {min(ratios):.3f} to {max(ratios):.3f}")


def compare(targets: Sequence[Target], turns: int, seconds: float, tokens: int) -> None:
    """The same load at each server, in turn."""
    for target in targets:
        asyncio.run(load(target.url, 1, 1, tokens, target.more))  # warms up
    click.echo(
        "clients  server         requests  tokens/s  first token ms: p50, p95, p99    between tokens ms: the same"
    )
    for clients in (1, 4, 16, 64):
        done: dict[str, list[list[float]]] = {target.name: [] for target in targets}
        spent = dict.fromkeys(done, 0.0)
        for turn in range(turns):
            for target in targets if turn % 2 == 0 else targets[::-1]:
                began = time.perf_counter()
                done[target.name] += asyncio.run(load(target.url, clients, seconds, tokens, target.more))
                spent[target.name] += time.perf_counter() - began
        for name, asked in done.items():
            first = percentiles([times[1] - times[0] for times in asked if times[1:]])
            speed = sum(len(times) - 1 for times in asked) / spent[name]
            click.echo(f"{clients:7}  {name:12} {len(asked):10} {speed:9.1f}  {first}    {percentiles(gaps(asked))}")


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--threads", type=int, default=2)
@click.option("--slots", type=int, default=16)
@click.option("--seconds", type=float, default=20, help="For each number of clients.")
@click.option("--max-new-tokens", "tokens", type=int, default=64)
@click.option("--rounds", type=int, default=9)
@click.option("--against", type=click.Choice(["llama-server"]), help="A server that answers the same load, in turn.")
@click.option("--turns", type=int, default=1, help="Of each server, for each number of clients.")
@click.option("--force", is_flag=True, help="On a busy machine too.")
def main(
    bundle: Path, threads: int, slots: int, seconds: float, tokens: int, rounds: int, against: str | None, turns: int,
    force: bool,
) -> None:  # fmt: skip
    """Measure the server of BUNDLE."""
    if not require_idle(force):
        click.echo("note: the machine is busy, so these figures are not to be trusted")
    with ExitStack() as servers:
        url = servers.enter_context(served(bundle, threads, slots))
        targets = [Target("freeexport", url)]
        if against:
            other = servers.enter_context(llama_served(threads, slots))
            targets.append(Target(against, other, {"cache_prompt": False}))
        cost(url, bundle, threads, rounds, tokens)
        compare(targets, turns, seconds, tokens)
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
