"""`freeexport exit-vocab`: how many tokens, and which, the shallow head should know."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from freeexport.calibration.options import CalibrateOptions
from freeexport.commands.calibrate import cache_path, is_bundle, open_source
from freeexport.commands.verb_options import CONFIDENCES, MAX_NEW_TOKENS, SAMPLES
from freeexport.conversion.exit_vocabulary_file import ExitVocabularyFile
from freeexport.system.idle import cores_in_use
from freeexport.system.output_file import check_writable
from freeexport.system.page import print_page, table
from freeexport.traces.verdict import MACHINE_BUSY
from runtime.bundle.beta_mixture import NEVER_EXIT
from runtime.bundle.costs import TOLERATED
from runtime.bundle.manifest import ConfidenceMeasure
from runtime.errors import OptionError

if TYPE_CHECKING:
    from rich.table import Table

    from freeexport.calibration.source import Facts
    from freeexport.traces.trace import Traces
    from freeexport.tuning.vocabulary_gains import ExitGains, Gain

BUSY = (
    f"{MACHINE_BUSY}, and the best size depends on speed: run it again on an idle machine, or give --size; "
    "exits do not depend on it"
)
COLUMNS = ("tokens#", "covered#", "exits lost#", "exits#", "shallow step#", "predicted#", "")


def gains_of(
    model: str, data: Path, options: CalibrateOptions, output: Path, size: int | None, threshold: float | None,
    threads: int | None,
) -> tuple[Facts, Traces, ExitGains]:  # fmt: skip
    """Collect traces, as calibrate does and keeps them, and see what a head of fewer tokens would lose and win.

    Raises OptionError for a bundle that has an exit vocabulary, a size out of range, and a threshold that is unknown;
    what `calibrate_model` raises.
    """
    from freeexport.calibration.calibrate import check_enough, collect, read_data
    from freeexport.conversion.exit_vocabulary import check_size
    from freeexport.tuning.vocabulary_gains import exit_gains

    requests = read_data(data, options.samples)
    with open_source(model, options, threads) as source:
        facts = source.facts
        check_size(size, len(facts.ends), facts.vocab_size)
        if facts.exit_vocabulary is not None:
            raise OptionError(f"{model} has an exit vocabulary already; give a bundle without")
        kept = cache_path(model, None if is_bundle(model) else output)
        traces = collect(source, data, requests, kept, options.max_new_tokens)
        check_enough(traces, options)
        costs = source.costs(requests, traces.mean_length)
        targets = [request.target for request in requests if request.target]
        found = exit_gains(
            traces,
            _threshold(facts, traces, options) if threshold is None else threshold,
            costs,
            facts.max_pending,
            facts.vocab_size,
            facts.ends,
            source.token_ids(targets),
            () if size is None else (size,),
        )
        return facts, traces, found


def _threshold(facts: Facts, traces: Traces, options: CalibrateOptions) -> float:
    """That of a calibrated bundle; else the one that calibrate would choose."""
    from freeexport.calibration.choose import choose

    known = facts.threshold
    found = choose(traces, options, None).threshold if known >= NEVER_EXIT else known
    if found >= NEVER_EXIT:
        raise OptionError("calibrate would let no token exit, so no vocabulary pays; give a --threshold")
    return found


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
    samples: int,
    max_new_tokens: int,
    confidence: ConfidenceMeasure | None,
    exit_layer: int | None,
    max_pending: int | None,
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
    options = CalibrateOptions(
        samples=samples, max_new_tokens=max_new_tokens, confidence=confidence, exit_layer=exit_layer,
        max_pending=max_pending,
    )  # fmt: skip
    idle = not is_bundle(model) or cores_in_use() <= TOLERATED
    facts, traces, found = gains_of(model, data, options, output, size, threshold, threads)
    chosen = found.best if size is None else found.at(size)
    if chosen is not found.whole:
        _file(facts, traces, found, chosen).write(output)
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


def _file(facts: Facts, traces: Traces, found: ExitGains, chosen: Gain) -> ExitVocabularyFile:
    return ExitVocabularyFile(
        source_sha256=facts.source_sha256,
        vocab_size=facts.vocab_size,
        exit_layer=facts.exit_layer,
        threshold=found.threshold,
        predictions=traces.tokens,
        covered=chosen.covers,
        exits_lost=chosen.lost,
        tokens=tuple(sorted(map(int, found.ranked[: chosen.size]))),
    )
