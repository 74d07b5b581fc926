"""Waiting times of a server from a queueing model, and as measured: how many requests a machine takes.

    python -m tools.serving.queueing BUNDLE --threads 2 --slots 4 --seconds 120

A server with k requests in flight ends X(k) of them a second; X is measured with k clients that ask without pause, and
is constant beyond the slots. With requests that arrive at random (Poisson), the number in the system is then a birth
and death process. The machine must be idle.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import httpx
import numpy as np

from freeexport.system.idle import require_idle
from tools.serving.server_load import PROMPTS, served, stream

# Share of what a machine takes that is planned for: beyond, waits were 2 to 3 times the model's (docs/scale.md).
PLANNED = 0.5
# Tokens of a request, each as likely as the others.
LENGTHS = (16, 32, 64, 128)
# The number in the system that the model goes up to.
MOST = 4000


@dataclass(frozen=True)
class Forecast:
    """Seconds a request waits for a slot, at the 95th percentile too, and is there in all; share of those that wait."""

    wait: float
    wait95: float
    latency: float
    waiting: float


def forecast(rates: Sequence[float], arrivals: float, variation: float) -> Forecast:
    """`rates[k - 1]`: requests/s that end with k in flight; the last is that of full slots. `arrivals` requests/s.
    `variation`: standard deviation of the work of a request over its mean; the wait of exponential work, where that is
    1, is scaled by (1 + variation²) / 2, as in M/G/1. Raises ValueError where the queue grows without end."""
    slots, most = len(rates), rates[-1]
    if arrivals >= most:
        raise ValueError(f"{arrivals:.2f} requests/s arrive, and at most {most:.2f} end")
    steps = np.array([0.0] + [math.log(arrivals / rates[min(k, slots) - 1]) for k in range(1, MOST)]).cumsum()
    shares = np.exp(steps - steps.max())
    shares /= shares.sum()
    count = np.arange(MOST)
    full, scale = shares[slots:].sum(), (1 + variation**2) / 2
    wait = scale * float(((count - slots).clip(0) * shares).sum()) / arrivals
    # Of those that wait, the wait is exponential.
    wait95 = scale * max(0.0, math.log(max(full, 1e-300) / 0.05)) / (most - arrivals)
    return Forecast(wait, wait95, wait + float((count.clip(0, slots) * shares).sum()) / arrivals, float(full))


def lengths(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


async def closed(url: str, clients: int, seconds: float) -> float:
    """X(clients): requests/s that end."""
    began, ended = time.perf_counter(), list[float]()

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        draw = lengths(number)
        while time.perf_counter() < began + seconds:
            await stream(client, PROMPTS[number % len(PROMPTS)], int(draw.choice(LENGTHS)))
            ended.append(time.perf_counter())

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        await asyncio.gather(*(ask(client, number) for number in range(clients)))
    # While all ask: the last requests of others end beside fewer.
    return sum(time <= began + seconds for time in ended) / seconds


async def opened(url: str, arrivals: float, seconds: float, seed: int) -> list[list[float]]:
    """Times of requests that arrive at random."""
    draw = lengths(seed)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        asked, until = list[asyncio.Task[list[float]]](), time.perf_counter() + seconds
        while time.perf_counter() < until:
            prompt, tokens = PROMPTS[len(asked) % len(PROMPTS)], int(draw.choice(LENGTHS))
            asked.append(asyncio.ensure_future(stream(client, prompt, tokens)))
            await asyncio.sleep(draw.exponential(1 / arrivals))
        return await asyncio.gather(*asked)


def report(url: str, rates: Sequence[float], loads: Sequence[float], seconds: float) -> None:
    """A row for each load, a share of the most that the server takes."""
    variation = float(np.std(LENGTHS) / np.mean(LENGTHS))
    click.echo("| load | requests/s | latency s: model, measured | first token s, 95 %: model, measured |")
    click.echo("|---|---|---|---|")
    alone = None
    for load in loads:
        arrivals = load * rates[-1]
        done = [times for times in asyncio.run(opened(url, arrivals, seconds, 1)) if times[1:]]
        first = np.array([times[1] - times[0] for times in done])
        alone = float(np.median(first)) if alone is None else alone  # where hardly any waits: reading the prompt
        found = forecast(rates, arrivals, variation)
        click.echo(
            f"| {load:.2f} | {arrivals:.2f} | {found.latency:.2f}, {np.mean([t[-1] - t[0] for t in done]):.2f} | "
            f"{found.wait95 + alone:.2f}, {np.percentile(first, 95):.2f} |"
        )


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--slots", type=click.IntRange(1), default=4, show_default=True)
@click.option("--load", "loads", type=click.FloatRange(0, 0.99, min_open=True), multiple=True, show_default=True,
              default=(0.2, 0.5, 0.7, 0.85), help="Share of the most that the server takes.")  # fmt: skip
@click.option("--seconds", type=float, default=120, show_default=True, help="For each load.")
@click.option("--day", type=float, default=1e6, show_default=True, help="Requests a day to find machines for.")
@click.option("--peak", type=float, default=2, show_default=True, help="The busiest hour over the mean.")
@click.option("--force", is_flag=True, help="On a busy machine too.")
def main(
    bundle: Path, threads: int, slots: int, loads: Sequence[float], seconds: float, day: float, peak: float, force: bool
) -> None:
    """Compare the queueing model of BUNDLE's server with measurements."""
    if not require_idle(force):
        click.echo("note: the machine is busy, so these figures are not to be trusted")
    with served(bundle, threads, slots) as url:
        asyncio.run(closed(url, slots, 2))  # warms up
        rates = [asyncio.run(closed(url, count, seconds / 4)) for count in range(1, slots + 1)]
        if not min(rates):
            wrong = f"no request ended in {seconds / 4:g} s with {rates.index(0) + 1} in flight"
            raise click.ClickException(f"{wrong}; give more --seconds than {seconds:g}")
        click.echo(f"requests/s that end with 1 to {slots} in flight: {', '.join(f'{rate:.2f}' for rate in rates)}")
        report(url, rates, loads, seconds)
    arrivals = day / 86400 * peak
    machines = math.ceil(arrivals / (PLANNED * rates[-1]))
    what = f"{machines} machines at {PLANNED} of what they take"
    click.echo(f"{day:,.0f} requests a day, {arrivals:.1f}/s at the peak: {what}")


if __name__ == "__main__":
    main()
