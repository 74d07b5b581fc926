"""`freeexport tune` and `exit-vocab`: exit layer, threshold and max_pending, or the tokens of the shallow head."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from freeexport.calibration.open_source import is_bundle
from freeexport.calibration.options import CalibrateOptions
from freeexport.checkpoints.transformers_model import Dtype
from freeexport.commands.verb_options import CONFIDENCES, DEVICE, MAX_NEW_TOKENS, METRICS, SAMPLES, MetricName
from freeexport.system.idle import cores_in_use
from freeexport.system.output_file import check_writable, write_whole
from freeexport.system.page import print_page, table
from freeexport.traces.verdict import MACHINE_BUSY
from freeexport.tuning.options import TuneOptions
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


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSONL with 'input' (and 'target').")
@click.option("--target-quality", "quality", type=float, default=TuneOptions.quality,
              help="The share of the full model's metric to keep.")  # fmt: skip
@click.option("--metric", type=MetricName(), default=TuneOptions.metric, help=f"Compares outputs. {METRICS}")
@click.option("--samples", type=click.IntRange(1), default=TuneOptions.samples,
              help=f"{SAMPLES} Every third is held out.")  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(2), default=TuneOptions.max_new_tokens, help=MAX_NEW_TOKENS)
@click.option("--candidates", type=click.IntRange(1), default=TuneOptions.candidates,
              help="Maximum choices to decode on the held-out lines, and to time.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=TuneOptions.rounds,
              help="Interleaved rounds; the median counts.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: one per physical core]")
@click.option("--device", default=TuneOptions.device, help=DEVICE)
@click.option("--write", is_flag=True, help="Store the choice in its bundle, as calibrate does.")
@click.option("--force", is_flag=True, help="Run on a busy machine too, where speeds mean little.")
@click.option("--save", type=click.Path(path_type=Path), help="Write the result to this file as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    bundles: tuple[Path, ...], data: Path, write: bool, save: Path | None, as_json: bool, **options: Any
) -> None:
    """Choose the fastest bundle, threshold and max_pending that keep the quality, among BUNDLES of one model with exits
    after different layers. One bundle is enough.

    Speed and agreement of every choice are predicted from one run over two thirds of the lines. Choices near the wanted
    quality are decoded there, and the best few on the other lines, interleaved with mode full and timed.

    \b
    Example:
      freeexport tune exit-4 exit-6 exit-8 --data calibration.jsonl --target-quality 0.99 --metric rouge-l
      freeexport tune bundle --data calibration.jsonl --metric per --write
    """
    from freeexport.conversion.recalibrate import update_bundle
    from freeexport.tuning.report import advice, as_dict, notes, tables
    from freeexport.tuning.tune import tune

    check_writable(save, "--save")
    tuned = tune(bundles, data, TuneOptions(**options))
    chosen = tuned.chosen_bundle if write else None
    if chosen is not None and tuned.calibrated is not None:
        update_bundle(chosen, tuned.calibrated.calibration)
    found = as_dict(tuned, written=chosen is not None)
    if save is not None:
        write_whole(save, json.dumps(found, indent=2) + "\n")
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    print_page(tables(tuned))
    for note in notes(tuned):
        click.echo(f"note: {note}")
    click.echo(advice(tuned))
    if write:
        click.echo("nothing was written" if chosen is None else f"written into {chosen}")


@click.command()
@click.argument("model")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSONL with 'input' (and 'target').")
@click.option("--text", type=click.Path(path_type=Path),
              help="JSONL whose 'target's rank the tokens that do not exit in --data; it may be much longer, as it is "
              "not decoded.  [default: --data]")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), default=Path("exit-vocab.json"),
              help="For convert --exit-vocab.")  # fmt: skip
@click.option(
    "--size", type=click.IntRange(2), help="Tokens of the shallow head.  [default: the most that is as fast as any]"
)
@click.option("--threshold", type=click.FloatRange(0, 1),
              help="A token exits above this confidence.  [default: the calibrated one]")  # fmt: skip
@click.option("--samples", type=click.IntRange(2), default=CalibrateOptions.samples, help=SAMPLES)
@click.option("--max-new-tokens", type=click.IntRange(2), default=CalibrateOptions.max_new_tokens, help=MAX_NEW_TOKENS)
@click.option("--confidence", type=click.Choice(get_args(ConfidenceMeasure)),
              help=f"Checkpoints. {CONFIDENCES}  [default: softmax]")  # fmt: skip
@click.option("--exit-layer", type=int, help="Checkpoints: exit after this layer.  [default: as trained, exit.json]")
@click.option(
    "--max-pending", type=click.IntRange(1), help="Checkpoints: maximum tokens in a sync pass.  [default: 16]"
)
@click.option(
    "--dtype", type=click.Choice(get_args(Dtype)), help="Checkpoints: type of the weights in torch.  [default: float32]"
)
@click.option("--device", default=CalibrateOptions.device, help=DEVICE)
@click.option("--threads", type=click.IntRange(1), help="Bundles: CPU threads.  [default: one per physical core]")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def exit_vocab_command(
    model: str,
    data: Path,
    text: Path | None,
    output: Path,
    size: int | None,
    threshold: float | None,
    threads: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Choose the tokens of the shallow head of MODEL, a bundle or a checkpoint.

    A smaller head makes a shallow step faster, but a token outside of it never exits. The tokens are ranked by how
    often they exit, then by text to expect; lost exits are counted on sequences that the ranking did not use.

    \b
    Example:
      freeexport exit-vocab bundle --data calibration.jsonl
      freeexport exit-vocab bundle --data calibration.jsonl --text train.jsonl --size 8192
      freeexport convert path/to/checkpoint smaller --exit-vocab exit-vocab.json
    """
    from freeexport.tuning.exit_vocabulary import gains_of, vocabulary_file

    check_writable(output, "--output")
    options = CalibrateOptions(**given)
    idle = not is_bundle(model) or cores_in_use() <= TOLERATED
    facts, traces, found = gains_of(model, data, options, output, size, threshold, threads, text)
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
