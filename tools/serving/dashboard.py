"""The dashboard in docs/grafana.json, asked of a real Prometheus that scrapes a server under a light load.

    python -m tools.serving.dashboard --prometheus /usr/bin/prometheus

Starts `freeexport serve` with BUNDLE, or with the demo's model, and a Prometheus (of https://prometheus.io, or Debian's
package `prometheus`, which need not be installed: `dpkg -x` unpacks it). Has clients ask for a few minutes, evaluates
every expression of the dashboard as Grafana would, and draws the panels into docs/grafana.png. An expression that is an
error, or has no series or no number, is an error of this script.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import httpx

from freeexport.checkpoints.examples import read_examples
from freeexport.demo.g2p import phrases_file
from runtime import FreeExportError
from tools.serving.llama_server import free_port
from tools.serving.panels import (
    Answers,
    DashboardError,
    Panel,
    Series,
    all_of,
    draw,
    milliseconds,
    rate_interval,
    read_panels,
    read_variables,
    series_of,
    with_values,
)
from tools.serving.server_load import PROMPTS, serving

DOCS = Path(__file__).resolve().parents[2] / "docs"
# Clients in each part of the time, of which the last is as quiet as the first; seconds a client rests between requests.
CLIENTS, REST = (2, 6, 12, 2), 0.4
MODES = ("free", "free", "rollback", "lossless")
# One request of so many is wrong, for there are answers other than 200.
WRONG = 20
SLOTS = 4


@contextmanager
def prometheus(program: str, server: str, scrape: float) -> Iterator[str]:
    """The address of a Prometheus that reads the metrics of `server`."""
    port = free_port()
    with TemporaryDirectory() as work:
        job = {"job_name": "freeexport", "static_configs": [{"targets": [httpx.URL(server).netloc.decode()]}]}
        config = Path(work, "prometheus.yml")  # JSON is YAML
        config.write_text(json.dumps({"global": {"scrape_interval": milliseconds(scrape)}, "scrape_configs": [job]}))
        command = [program, f"--config.file={config}", f"--storage.tsdb.path={work}/data"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
        with (
            Path(work, "log").open("w+") as log,
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log) as process,
        ):
            try:
                url = f"http://127.0.0.1:{port}"
                while not _ready(url):
                    if process.poll() is not None:
                        last = (Path(log.name).read_text().strip() or "no word").splitlines()[-1]
                        raise DashboardError(f"{program} ended with {process.returncode}: {last[:300]}")
                    time.sleep(0.2)
                yield url
            finally:
                process.terminate()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


async def light_load(url: str, seconds: float, prompts: Sequence[str], tokens: int) -> int:
    """Clients that rest between requests, more of them in the middle: how many requests were answered."""
    draw, answered, modes = random.Random(0), 0, list[str]()

    async def ask(client: httpx.AsyncClient, until: float) -> None:
        nonlocal answered
        while time.perf_counter() < until:
            await asyncio.sleep(draw.expovariate(1 / REST))
            wrong = draw.randrange(WRONG) == 0
            body = {"prompt": draw.choice(prompts), "free": {"mode": draw.choice(modes)}, "stream": draw.random() < 0.5}
            body["max_tokens"] = -1 if wrong else draw.randrange(tokens // 4, tokens)
            answer = await client.post("/v1/completions", json=body)
            if answer.status_code != (400 if wrong else 200):
                raise DashboardError(f"the server answered {answer.status_code}: {answer.text[:300]}")
            answered += 1

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for mode in MODES:  # rollback needs a calibrated bundle
            first = {"prompt": prompts[0], "max_tokens": 1, "free": {"mode": mode}}
            if (await client.post("/v1/completions", json=first)).status_code == 200:
                modes.append(mode)
        for clients in CLIENTS:
            until = time.perf_counter() + seconds / len(CLIENTS)
            await asyncio.gather(*(ask(client, until) for _ in range(clients)))
    return answered


def evaluate(panels: Sequence[Panel], url: str, values: dict[str, str], times: dict[str, Any]) -> Answers:
    """`times`: start, end and step, as /api/v1/query_range takes them. Raises DashboardError that names every
    expression that gives nothing."""
    answers: dict[str, list[Series]] = {}
    wrong = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for panel in panels:
            answers[panel.title] = []
            for target in panel.targets:
                try:
                    query = with_values(target.expression, values)
                    answer = client.get("/api/v1/query_range", params={"query": query, **times}).json()
                    answers[panel.title] += series_of(target, answer)
                except DashboardError as error:
                    wrong.append(f"panel {panel.title!r}, {target.name}: {error}; {target.expression}")
    if wrong:
        raise DashboardError("\n".join(wrong))
    return answers


def variables(dashboard: Path, url: str) -> dict[str, str]:
    """The values of the dashboard's own variables, all of each chosen."""
    values = {}
    for name, metric, label in read_variables(dashboard):
        found = httpx.get(f"{url}/api/v1/label/{label}/values", params={"match[]": metric}).json()["data"]
        if not found:
            raise DashboardError(f"the variable {name} has no value: no {metric} with a label {label}")
        values[name] = all_of(found)
    return values


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path, exists=True), required=False)
@click.option("--prometheus", "program", default="prometheus", help="The program; a name is looked for on PATH.")
@click.option("--dashboard", type=click.Path(path_type=Path, exists=True), default=DOCS / "grafana.json")
@click.option("--output", type=click.Path(path_type=Path), default=DOCS / "grafana.png")
@click.option("--seconds", type=click.FloatRange(4), default=180, help="How long clients ask.")
@click.option("--scrape", type=click.FloatRange(0.1), default=1.0, help="Seconds between two scrapes.")
@click.option("--max-new-tokens", "tokens", type=click.IntRange(8), default=64)
def main(
    bundle: Path | None, program: str, dashboard: Path, output: Path, seconds: float, scrape: float, tokens: int
) -> None:
    """Check the expressions of --dashboard and draw its panels, with BUNDLE or the demo's model."""
    found = shutil.which(program)
    if found is None:
        raise click.ClickException(f"{program} is not there; give --prometheus the path of Prometheus's program")
    prompts = PROMPTS if bundle else tuple(example.input for example in read_examples(phrases_file(), 40))
    try:
        panels = read_panels(dashboard)
        served = [str(bundle) if bundle else "--demo", "--slots", str(SLOTS), "--threads", "1"]
        with serving(served) as server, prometheus(found, server, scrape) as url:
            began = time.time()
            answered = asyncio.run(light_load(server, seconds, prompts, tokens))
            time.sleep(2 * scrape)
            step = max(scrape, seconds / 200)
            values = {**variables(dashboard, url), "__rate_interval": rate_interval(scrape, step)}
            answers = evaluate(panels, url, values, {"start": began, "end": time.time(), "step": step})
    except (DashboardError, FreeExportError) as error:
        raise click.ClickException(str(error)) from None
    draw(panels, answers, output)
    expressions, series = sum(len(panel.targets) for panel in panels), sum(map(len, answers.values()))
    click.echo(f"{answered} requests; {expressions} expressions gave {series} series; {len(panels)} panels in {output}")


if __name__ == "__main__":
    main()
