"""Compares bundles with other decoders of the same checkpoints, interleaved in one run.

    python -m tools.peers install                           environments of the other decoders
    python -m tools.peers all --output DIR --prepare        convert models, measure nothing
    python -m tools.peers all --output DIR                  measure everything
    python -m tools.peers all --output DIR --steps decode,rows-int8 --against genai-int4
    python -m tools.peers pages                             write the pages from docs/benchmarks

Each decoder runs in its own process, because thread pools of two libraries slow each other down
within one. All decode the same prompts greedily to the same number of tokens, on the same
processors, our bundles in mode full. Measure on an idle machine. The same command continues an
interrupted run, and adds steps to a finished one.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from freeexport.system.output import write_whole
from freeexport.system.progress import duration
from runtime.machine.machine import usable_cores
from tools.data.splits import run_tool
from tools.pages import write_pages
from tools.peers import pages, speech
from tools.peers.catalog import PEERS, chosen
from tools.peers.catalog import install as install_peer
from tools.peers.models import MODELS, models_of
from tools.peers.plan import STEPS, steps_of
from tools.peers.run import Conditions, contenders, measure_step
from tools.peers.worker import PeerError
from tools.steps import Steps

OPTIONS = "run.json"
REPORT = "report.json"


@click.group(help=__doc__)
def main() -> None:
    pass


main.add_command(speech.main, "speech")


@main.command("install")
@click.argument("names", nargs=-1, metavar="[PEER]...", type=click.Choice(list(PEERS)))
def install_peers(names: tuple[str, ...]) -> None:
    """Build the environments of PEERs in the user's cache. Default: all.

    llama.cpp is compiled for this processor, which takes minutes on all cores.
    """
    failed = False
    for peer in {PEERS[name].library: PEERS[name] for name in names or PEERS}.values():
        try:
            install_peer(peer)
            click.echo(f"{peer.library}: installed")
        except PeerError as error:
            failed = True
            click.echo(f"{peer.library}: {error}")
    if failed:
        raise SystemExit(1)


@main.command("all", context_settings={"show_default": True})
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Models and steps.")
@click.option("--steps", help=f"Comma-separated names or their beginnings: {', '.join(STEPS)}.")
@click.option("--against", multiple=True, metavar="PEER", help="Default: those installed.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME=CHECKPOINT",
    help=f"Checkpoint in place of {', '.join(MODELS)}.",
)
@click.option("--rounds", type=click.IntRange(1), default=5, help="Measured rounds.")
@click.option("--threads", type=click.IntRange(1), help="Threads of each.  [default: all cores]")
@click.option("--prepare", is_flag=True, help="Convert models; measure nothing.")
@click.option("--trial", is_flag=True, help="Measure short requests. Pages refuse the result.")
def measure_all(
    output: Path,
    steps: str | None,
    against: tuple[str, ...],
    models: tuple[str, ...],
    rounds: int,
    threads: int | None,
    prepare: bool,
    trial: bool,
) -> None:
    """Measure every step that has no result below --output, and write report.json there."""
    wanted = steps_of(steps)
    conditions = Conditions(
        output=output.resolve(),
        models=models_of(models),
        left_out=chosen(against),
        rounds=rounds,
        threads=threads or usable_cores(),
        trial=trial,
    )
    options = {
        "against": sorted(against),
        "models": conditions.models,
        "rounds": rounds,
        "threads": conditions.threads,
        "trial": trial,
    }
    run = Steps(conditions.output, OPTIONS, options, lambda name: click.echo(f"{name} ..."))
    missing = [step for step in wanted if not run.finished(step.name)]
    for name, reason in conditions.left_out.items():
        click.echo(f"{name}: left out: {reason}")
    if prepare:
        run.begin()
        for step in missing:
            for name, reason in contenders(step, conditions)[1].items():
                click.echo(f"{step.name}, {name}: {reason}")
        return
    for step in missing:
        began = time.perf_counter()
        run.run(step.name, measure_step, step, conditions)
        click.echo(f"{step.name}: {duration(time.perf_counter() - began)}")
        found = {name: run.read(name) for name in STEPS if run.finished(name)}
        write_whole(output / REPORT, pages.report_text(found))
        for line in pages.section(found[step.name]):
            click.echo(line)


@main.command("pages")
@click.option("--check", is_flag=True, help="Write nothing; fail where a page differs.")
def make_pages(check: bool) -> None:
    """Write the pages of other decoders from docs/benchmarks/*.json."""
    write_pages(pages.pages(Path()), check, "python -m tools.peers pages")


if __name__ == "__main__":
    run_tool(main)
