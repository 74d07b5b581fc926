"""`freeexport bench`: measure the speed of bundles in several modes, interleaved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click

from freeexport.commands.verb_options import DEVICE, SAMPLES, THREADS, SectionedCommand, section
from freeexport.measure.bench import (
    MODES,
    BenchOptions,
    bench_sheet,
    benchmark,
    facts_lines,
    narrow,
)
from freeexport.measure.table import as_csv, markdown, terminal
from freeexport.system.output import check_writable, write_whole
from freeexport.system.page import print_page
from runtime.errors import OptionError
from runtime.options import Drafts

_PICTURES = (".png", ".svg")
_KINDS = (".json", ".csv", ".md", *_PICTURES)


@click.command(cls=SectionedCommand)
@click.argument(
    "bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE..."
)
@section("Prompts")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="JSONL file with an 'input' on each line.  [default: four sample texts]",
)
@click.option("--samples", type=click.IntRange(1), default=BenchOptions.samples, help=SAMPLES)
@click.option(
    "--max-new-tokens",
    "tokens",
    type=click.IntRange(2),
    default=BenchOptions.tokens,
    help="Number of tokens to generate per prompt. End-of-sequence tokens are ignored.",
)
@section("What is compared with mode full")
@click.option(
    "--mode",
    "modes",
    type=click.Choice(MODES),
    multiple=True,
    default=BenchOptions.modes,
    help=(
        "Mode to compare with full. free and rollback run at each threshold. lossless runs at "
        "the given thresholds, or else without one. shallow runs only the shallow decoder. May "
        "be repeated."
    ),
)
@click.option(
    "--threshold",
    "thresholds",
    type=float,
    multiple=True,
    help=(
        "Confidence above which a token exits. May be repeated.  [default: the "
        "calibrated one, if any]"
    ),
)
@click.option(
    "--drafts",
    type=click.Choice(get_args(Drafts)),
    multiple=True,
    help=(
        "Also run lossless with these drafts: of the exit, of repeated text (lookup), of both "
        "(auto), or none. May be repeated."
    ),
)
@section("Machine")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=BenchOptions.rounds,
    help="Number of interleaved rounds. The median is reported.",
)
@click.option("--device", default=BenchOptions.device, help=DEVICE)
@click.option("--threads", type=click.IntRange(1), help=THREADS)
@section("Results")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help=(
        "Also write the results to this file, in the format of its suffix: .json, .csv, .md, "
        ".png or .svg. May be repeated."
    ),
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def command(output: tuple[Path, ...], as_json: bool, **given: Any) -> None:
    """Measure the speed of BUNDLEs in mode full, and in modes that exit early or draft.

    All BUNDLEs must come from one checkpoint. All modes decode the same prompts greedily, to the
    same number of tokens and on the same number of threads, in interleaved rounds. Speed is
    measured from the prompt to the last token. Figures measured on a busy machine are marked.

    \b
    Example:
      freeexport bench bundle
      freeexport bench fp32 int8 --threshold 0.5 --threshold 0 --mode free --mode lossless
      freeexport bench bundle --drafts exit --drafts lookup --output run.json --output run.png
    """
    options = BenchOptions(**given)
    for path in output:
        if path.suffix not in _KINDS:
            raise OptionError(f"--output {path}: end its name in one of {', '.join(_KINDS)}")
        check_writable(path, "--output")
        if path.suffix in _PICTURES:
            import matplotlib  # noqa: F401
    result = benchmark(options)
    for path in output:
        _write(result, path)
    if as_json:
        click.echo(json.dumps(result))
        return
    shown = narrow(bench_sheet(result))
    print_page([terminal(shown)])
    for text in (*facts_lines(result, shown), "", result["verdict"]):
        click.echo(text)


def _write(result: Mapping[str, Any], path: Path) -> None:
    if path.suffix in _PICTURES:
        from freeexport.measure.plot import bench_speeds
        from freeexport.system.page import save_figure

        used = result["settings"]
        title = f"{used['model']}, {used['threads']} threads, batch {used['batch']}, {used['cpu']}"
        save_figure(bench_speeds(title, result["rows"]), path)
        return
    lines = "\n".join(f"- {text}" for text in facts_lines(result) if text)
    texts = {
        ".json": lambda: json.dumps(result, indent=2) + "\n",
        ".csv": lambda: as_csv(result["rows"]),
        ".md": lambda: f"**{result['verdict']}.**\n\n{markdown(bench_sheet(result))}\n\n{lines}\n",
    }
    write_whole(path, texts[path.suffix]())
