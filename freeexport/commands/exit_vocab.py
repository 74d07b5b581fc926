"""`freeexport exit-vocab`: how many tokens, and which, the shallow head should know."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from freeexport.calibration.open_source import is_bundle
from freeexport.calibration.options import CalibrateOptions
from freeexport.checkpoints.transformers_model import Dtype
from freeexport.commands.verb_options import CONFIDENCES, DEVICE, MAX_NEW_TOKENS, SAMPLES
from freeexport.system.idle import cores_in_use
from freeexport.system.output_file import check_writable
from freeexport.system.page import print_page, table
from freeexport.traces.verdict import MACHINE_BUSY
from freeexport.tuning.exit_vocabulary import gains_of, vocabulary_file
from runtime.bundle.costs import TOLERATED
from runtime.bundle.manifest import ConfidenceMeasure

if TYPE_CHECKING:
    from rich.table import Table

    from freeexport.tuning.vocabulary_gains import ExitGains, Gain

BUSY = (
    f"{MACHINE_BUSY}, and the best size depends on speed: run it again on an idle machine, or give --size; "
    "exits do not depend on it"
)
COLUMNS = ("tokens#", "covered#", "exits lost#", "exits#", "shallow step#", "predicted#", "")


def page(found: ExitGains, chosen: Gain, idle: bool = True) -> Table:
    unit = "ms" if chosen.costs.measured else "MB"
    rows = [
        (
            "all" if gain is found.whole else str(gain.size),
            f"{gain.covers:.2%}",
            f"{gain.lost:.2%}",
            f"{gain.replayed.exit_rate:.1%}",
            f"{gain.costs.shallow * (1e3 if gain.costs.measured else 1e-6):.3g} {unit}" if idle else "",
            f"{gain.speedup:.2f}x" if idle else "",
            "chosen" if gain is chosen else "",
        )
        for gain in found.gains
    ]
    return table(f"Exit vocabularies at threshold {found.threshold:.4g}", COLUMNS, rows)


def advice(found: ExitGains, chosen: Gain, output: Path, idle: bool = True) -> str:
    """One sentence: what to do, and what it gives."""
    whole = found.whole
    if not idle:
        return f"{chosen.size} of {whole.size} tokens: {chosen.lost:.1%} of the exits lost; speed {MACHINE_BUSY}"
    if chosen is whole:
        return f"keep the whole vocabulary: no smaller one is predicted to be faster than {whole.speedup:.2f}x"
    return (
        f"{chosen.size} of {whole.size} tokens: {chosen.lost:.1%} of the exits lost, predicted {chosen.speedup:.2f}x "
        f"instead of {whole.speedup:.2f}x; convert with --exit-vocab {output}, then calibrate that bundle"
    )


@click.command()
@click.argument("model")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSONL with 'input' (and 'target').")
@click.option("--output", type=click.Path(path_type=Path), default=Path("exit-vocab.json"), show_default=True,
              help="For convert --exit-vocab.")  # fmt: skip
@click.option(
    "--size", type=click.IntRange(2), help="Tokens of the shallow head.  [default: the most that is as fast as any]"
)
@click.option("--threshold", type=click.FloatRange(0, 1),
              help="A token exits above this confidence.  [default: the calibrated one]")  # fmt: skip
@click.option("--samples", type=click.IntRange(2), default=CalibrateOptions.samples, show_default=True,
              help=SAMPLES)  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(2), default=CalibrateOptions.max_new_tokens, show_default=True,
              help=MAX_NEW_TOKENS)  # fmt: skip
@click.option("--confidence", type=click.Choice(get_args(ConfidenceMeasure)),
              help=f"Checkpoints. {CONFIDENCES}  [default: softmax]")  # fmt: skip
@click.option("--exit-layer", type=int, help="Checkpoints: exit after this layer.  [default: as trained, exit.json]")
@click.option(
    "--max-pending", type=click.IntRange(1), help="Checkpoints: maximum tokens in a sync pass.  [default: 16]"
)
@click.option(
    "--dtype", type=click.Choice(get_args(Dtype)), help="Checkpoints: type of the weights in torch.  [default: float32]"
)
@click.option("--device", default=CalibrateOptions.device, show_default=True, help=DEVICE)
@click.option("--threads", type=click.IntRange(1), help="Bundles: CPU threads.  [default: one per physical core]")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def command(
    model: str,
    data: Path,
    output: Path,
    size: int | None,
    threshold: float | None,
    threads: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Choose the tokens of the shallow head of MODEL, a bundle or a checkpoint.

    A smaller head makes a shallow step faster, but a token outside of it never exits. The tokens are ranked by how
    often they exit; lost exits are counted on sequences that the ranking did not use.

    \b
    Example:
      freeexport exit-vocab bundle --data calibration.jsonl
      freeexport convert path/to/checkpoint smaller --exit-vocab exit-vocab.json
    """
    check_writable(output, "--output")
    options = CalibrateOptions(**given)
    idle = not is_bundle(model) or cores_in_use() <= TOLERATED
    facts, traces, found = gains_of(model, data, options, output, size, threshold, threads)
    chosen = found.best if size is None else found.at(size)
    if chosen is not found.whole:
        vocabulary_file(facts, traces, found, chosen).write(output)
    if as_json:
        click.echo(json.dumps({"threshold": found.threshold, "chosen": chosen.size, "gains": _rows(found.gains)}))
    else:
        print_page([page(found, chosen, idle)])
        click.echo(advice(found, chosen, output, idle))
    if not idle:
        click.echo(f"warning: {BUSY}", err=True)


def _rows(gains: Iterable[Gain]) -> list[dict[str, float]]:
    return [
        {
            "tokens": gain.size,
            "covered": gain.covers,
            "exits_lost": gain.lost,
            "exit_rate": gain.replayed.exit_rate,
            "shallow": gain.costs.shallow,
            "predicted_speedup": gain.speedup,
        }
        for gain in gains
    ]
