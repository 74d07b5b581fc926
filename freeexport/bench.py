"""`freeexport bench`: tokens per second of a bundle, beside transformers, in one interleaved run."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import click

from freeexport.contenders import Ours, Run, Transformers, Worker
from freeexport.idle import require_idle
from freeexport.jsonl import Request, read_requests
from freeexport.machine import detect_machine
from freeexport.parity import sample_ids
from freeexport.progress import progress
from runtime.bundle import Bundle
from runtime.errors import FreeExportError
from runtime.machine import usable_cores
from runtime.prompt import encode_prompt
from runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Row:
    """A contender's result: the median over rounds of its tokens per second over all prompts, its spread (largest
    less smallest, as a share of the median), its speed as a multiple of the first contender's, its exit rate, and the
    share of its drafts that were kept."""

    name: str
    tokens_per_second: float
    spread: float
    ratio: float
    exit_rate: float
    acceptance: float = 1.0


def bench(
    specs: Sequence[Ours | Transformers], prompts: Sequence[Sequence[int]], tokens: int, rounds: int
) -> list[Row]:
    """Every contender decodes every prompt, in turn, `rounds` times after one round to warm up."""
    runs: dict[str, list[list[Run]]] = defaultdict(list)
    with ExitStack() as stack, progress("measuring", (rounds + 1) * len(specs)) as advance:
        workers = [Worker(spec) for spec in specs]
        for worker in workers:
            stack.callback(worker.close)
        for turn in range(rounds + 1):
            for worker in workers:
                done = [worker.run(prompt, tokens) for prompt in (prompts if turn else prompts[:1])]
                if turn:
                    runs[worker.name].append(done)
                advance()
    return _rows(runs)


def _rows(runs: dict[str, list[list[Run]]]) -> list[Row]:
    rows: list[Row] = []
    for name, turns in runs.items():
        speeds = [sum(run.tokens for run in turn) / sum(run.seconds for run in turn) for turn in turns]
        speed = median(speeds)
        ratio = speed / rows[0].tokens_per_second if rows else 1.0
        done = [run for turn in turns for run in turn]
        exits, kept = (fmean(getattr(run, share) for run in done) for share in ("exit_rate", "acceptance"))
        rows.append(Row(name, speed, (max(speeds) - min(speeds)) / speed, ratio, exits, kept))
    return rows


def bench_prompts(bundle: Bundle, data: Path | None, limit: int) -> list[list[int]]:
    """The first prompts of a JSONL file, or the built-in sample texts, as token ids."""
    manifest = bundle.manifest
    longest = manifest.encoder_capacity or manifest.capacity // 2
    if data is None:
        return [ids[:longest] for ids in sample_ids(bundle)][:limit]
    tokenizer = Tokenizer.load(bundle.path)
    requests = [request for request in read_requests(data) if isinstance(request, Request)][:limit]
    if not requests:
        raise FreeExportError(f"{data} has no line that can be used; each needs an `input`")
    return [encode_prompt(r.input, tokenizer, manifest.vocab_size, longest).tolist() for r in requests]


def settings(bundle: Bundle, threads: int, tokens: int, prompts: int, rounds: int, idle: bool) -> dict[str, Any]:
    manifest = bundle.manifest
    machine = detect_machine()
    return {
        "model": manifest.source,
        "precision": manifest.precision,
        "exit_layer": f"{manifest.exit_layer} of {manifest.layers}",
        "threads": threads,
        "batch": 1,
        "prompts": prompts,
        "tokens": tokens,
        "rounds": rounds,
        "cpu": machine.cpu,
        "idle": idle,
        "versions": {name: manifest.versions.get(name) for name in ("onnxruntime", "transformers", "torch")},
    }


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'':32} {'tokens/s':>9} {'spread':>7} {'ratio':>7} {'exits':>6} {'kept':>5}"]
    lines += [
        f"{row.name:32} {row.tokens_per_second:9.1f} {row.spread:7.0%} {row.ratio:6.2f}x {row.exit_rate:6.0%} "
        f"{row.acceptance:5.0%}"
        for row in rows
    ]
    return "\n".join(lines)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="JSON lines with prompts.  [default: four sample texts]")
@click.option("--against", metavar="MODEL", help="Also run transformers with the checkpoint the bundle came from.")
@click.option("--threshold", type=float, multiple=True, help="Also run the modes at this threshold; several times.")
@click.option(
    "--mode",
    type=click.Choice(["free", "rollback", "lossless"]),
    multiple=True,
    default=["free"],
    show_default=True,
    help="Modes to run at the thresholds; several times.",
)
@click.option("--rollback-threshold", type=float, help="Nats, for mode rollback.  [default: the bundle's]")
@click.option("--early-exit-draft", is_flag=True, help="Also transformers drafting with the layers before the exit.")
@click.option("--tokens", type=click.IntRange(2), default=64, show_default=True, help="New tokens for each prompt.")
@click.option("--samples", type=click.IntRange(1), default=4, show_default=True, help="Prompts used.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="[default: one per physical core]")
@click.option("--force", is_flag=True, help="Print ratios even if the machine is busy.")
@click.option("--json", "as_json", is_flag=True)
def command(
    bundle: Path,
    data: Path | None,
    against: str | None,
    threshold: tuple[float, ...],
    mode: tuple[str, ...],
    rollback_threshold: float | None,
    early_exit_draft: bool,
    tokens: int,
    samples: int,
    rounds: int,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure BUNDLE: mode full, modes that exit at thresholds, and transformers, interleaved on an idle machine.

    Speed counts from prompt to last token. Each contender has a process of its own.

    \b
    Example:
      freeexport bench bundle --against path/to/checkpoint --threshold 0.8
      freeexport bench bundle --threshold 0.5 --threshold 0 --mode free --mode lossless
    """
    if early_exit_draft and not against:
        raise click.UsageError("--early-exit-draft goes with --against")
    opened = Bundle.open(bundle)
    prompts = bench_prompts(opened, data, samples)
    idle = require_idle(force)
    count = threads or usable_cores()
    specs: list[Ours | Transformers] = [Transformers(against, count)] if against else []
    if against and early_exit_draft:
        specs.append(Transformers(against, count, opened.manifest.exit_layer))
    specs.append(Ours(bundle, count, "full"))
    specs += [
        Ours(bundle, count, name, value, rollback_threshold if name == "rollback" else None)
        for value in threshold
        for name in mode
    ]
    rows = bench(specs, prompts, tokens, rounds)
    used = settings(opened, count, tokens, len(prompts), rounds, idle)
    if as_json:
        click.echo(json.dumps({"settings": used, "rows": [asdict(row) for row in rows]}))
        return
    click.echo(table(rows))
    click.echo(", ".join(f"{name} {value}" for name, value in used.items() if name != "versions"))
    click.echo(", ".join(f"{name} {value}" for name, value in used["versions"].items()))
