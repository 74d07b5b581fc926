"""Measures what a precision costs in answers.

    python -m tools.quality precisions FP32 BUNDLE ... --output quality.json
    python -m tools.quality file FILE.gguf BUNDLE ... --data text.jsonl --output file.json

`precisions` compares bundles of one chat model with its fp32 bundle on prompts of ten kinds: how many greedy answers
are the same, what the fp32 model thinks of an answer (mean log-likelihood of its tokens), and how often both choose the
same next token where both have read the fp32 answer so far. `file` compares bundles with the GGUF file that they were
made from: their sizes, the formats of their weights, and their predictions with those of its dequantized weights.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from runtime import Bundle, GenerationResult, Session
from runtime.machine.machine import host

PROMPTS = Path(__file__).with_name("chat_prompts.jsonl")
Tokens = Sequence[int]


@dataclass
class Watch:
    """A logits processor that keeps what the model would choose, how likely each token of the answer was in nats, and
    how far apart the two best logits were. With `tokens` the request generates these."""

    tokens: Tokens | None = None
    best: list[int] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def __call__(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        row = scores[0].astype(np.float64)
        second, first = np.partition(row, -2)[-2:]
        target = int(row.argmax()) if self.tokens is None else self.tokens[len(self.best)]
        self.best.append(int(row.argmax()))
        self.nats.append(float(row[target] - first - np.log(np.exp(row - first).sum())))
        self.gaps.append(float(first - second))
        if self.tokens is None:
            return scores
        forced = np.full_like(scores, -np.inf)
        forced[0, target] = 0
        return forced


def chat_prompts(count: int) -> list[tuple[str, list[dict[str, str]]]]:
    """The first `count` prompts with their kinds, which take turns: 200 at most."""
    lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()[:count]]
    return [(line["kind"], [{"role": "user", "content": line["input"]}]) for line in lines]


def first_difference(ours: Tokens, theirs: Tokens) -> int | None:
    """The first place where token ids differ, or one of them has ended; None where they are the same."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    shorter = min(len(ours), len(theirs))
    place = next((place for place, (mine, other) in pairs if mine != other), shorter)
    return None if place == len(ours) == len(theirs) else place


def decode(
    session: Session,
    prompts: Sequence[Any],
    at_once: int,
    options: Sequence[dict[str, Any]],
    **common: Any,
) -> list[GenerationResult]:
    """Results in order, so many at once; `options` of each prompt beside the common ones."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(
            pool.map(
                lambda prompt, own: session.generate(prompt, **common, **own), prompts, options
            )
        )


def force(
    session: Session, prompts: Sequence[Any], answers: Sequence[Tokens], at_once: int
) -> list[Watch]:
    """Watches of requests that generate these answers."""
    watches = [Watch(answer) for answer in answers]
    options = [
        {"logits_processor": watch, "max_new_tokens": len(watch.tokens or ())} for watch in watches
    ]
    decode(session, prompts, at_once, options, mode="full", ignore_eos=True)
    return watches


def compare(
    paths: Sequence[Path], samples: int, tokens: int, slots: int, threads: int
) -> list[dict[str, Any]]:
    """A row for each bundle, of which the first is the fp32 one.

    `likelihood`: nats a token of its answers by the fp32 model; `agreement`: the share of next tokens that both choose
    after the fp32 answer so far; `gap`: the median distance of the fp32 model's two best logits where answers first
    differ, `gap_everywhere` at all tokens.
    """
    kinds, prompts = zip(*chat_prompts(samples), strict=True)
    rows, answers, wanted = list[dict[str, Any]](), list[list[Tokens]](), list[Watch]()
    for path in paths:
        with Session(path, threads=threads, slots=slots) as session:
            watches = [Watch() for _ in prompts]
            options = [{"logits_processor": watch} for watch in watches]
            given = decode(session, prompts, slots, options, mode="full", max_new_tokens=tokens)
            answers.append([result.token_ids for result in given])
            # The fp32 model has read its own answers as it gave them.
            read = force(session, prompts, answers[0], slots) if wanted else watches
            precision = session.manifest.precision
        wanted = wanted or read
        chosen = [
            np.equal(ours.best, theirs.best) for ours, theirs in zip(read, wanted, strict=True)
        ]
        places = [
            first_difference(ours, theirs)
            for ours, theirs in zip(answers[-1], answers[0], strict=True)
        ]
        pairs = [
            (one.gaps, place)
            for one, place in zip(wanted, places, strict=True)
            if place is not None
        ]
        gaps = [own[min(place, len(own) - 1)] for own, place in pairs]
        rows.append(
            {
                "precision": precision,
                "same_answers": places.count(None),
                "likelihood": 0.0,
                "agreement": float(np.concatenate(chosen).mean()),
                "gap": float(np.median(gaps)) if gaps else None,
                "gap_everywhere": float(np.median([gap for one in wanted for gap in one.gaps])),
                "same_by_kind": Counter(
                    kind for kind, place in zip(kinds, places, strict=True) if place is None
                ),
            }
        )
    with Session(paths[0], threads=threads, slots=slots) as session:
        for row, each in zip(rows, answers, strict=True):
            others = [n for n, answer in enumerate(each) if answer != answers[0][n]]
            forced = force(session, [prompts[n] for n in others], [each[n] for n in others], slots)
            scored = {**dict(enumerate(wanted)), **dict(zip(others, forced, strict=True))}
            row["likelihood"] = float(
                np.mean([nats for one in scored.values() for nats in one.nats])
            )
    return rows


@click.group(help=__doc__, context_settings={"show_default": True})
def main() -> None:
    pass


@main.command()
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--samples", type=click.IntRange(1, 200), default=200, help="Prompts.")
@click.option("--tokens", type=click.IntRange(1), default=48, help="Tokens of an answer at most.")
@click.option("--slots", type=click.IntRange(1), default=8, help="Prompts decoded at once.")
@click.option("--threads", type=click.IntRange(1), default=1)
@click.option("--output", type=click.Path(path_type=Path), help="Write JSON here.")
def precisions(
    bundles: tuple[Path, ...],
    samples: int,
    tokens: int,
    slots: int,
    threads: int,
    output: Path | None,
) -> None:
    """Compare BUNDLES with the first of them, which is in fp32."""
    rows = compare(bundles, samples, tokens, slots, threads)
    click.echo(
        "| precision | same answers | log-likelihood a token | same next token |\n|---|---|---|---|"
    )
    for row in rows:
        figures = (
            f"{row['same_answers']} of {samples} | {row['likelihood']:.3f} | {row['agreement']:.1%}"
        )
        click.echo(f"| {row['precision']} | {figures} |")
    if output is not None:
        facts = {
            "model": Bundle.open(bundles[0]).manifest.source,
            "prompts": samples,
            "tokens": tokens,
        }
        content = {**facts, "processor": host(threads).processor, "rows": rows}
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@main.command("file")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="JSON lines, read teacher-forced.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Write JSON here.")
def of_file(model: Path, bundles: tuple[Path, ...], data: Path, output: Path | None) -> None:
    """Compare BUNDLES with the GGUF file MODEL that they were made from."""
    from freeexport.checkpoints.checkpoint import open_checkpoint
    from freeexport.checkpoints.transformers_model import reference_model
    from freeexport.verification.reference import predictions_on, quality_of

    reference, size, rows = (
        reference_model(open_checkpoint(str(model))),
        model.stat().st_size,
        list[dict[str, Any]](),
    )
    click.echo(
        "| bundle | MB | of the file | divergence, nats | same best token | nats a token |\n|---|---|---|---|---|---|"
    )
    for path in bundles:
        bundle = Bundle.open(path)
        manifest = bundle.manifest
        quality = quality_of(predictions_on(bundle, reference, data), manifest.precision)
        whole = sum(file.size for file in manifest.files.values())
        engines = () if manifest.quantization is None else manifest.quantization.engines
        row = {
            "bundle": path.name,
            "bytes": whole,
            "of_file": round(whole / size, 4),
            "kept": {one.engine: one.kinds or one.kept for one in engines},
            **{
                name: getattr(quality, name)
                for name in ("tokens", "divergence", "agreement", "reference_nll", "nll")
            },
        }
        rows.append(row)
        figures = f"{quality.divergence:.4f} | {quality.agreement:.1%} | {quality.nll - quality.reference_nll:+.4f}"
        click.echo(f"| {path.name} | {whole / 1e6:.0f} | {whole / size:.3f} | {figures} |")
    if output is not None:
        content = {
            "model": model.name,
            "file_bytes": size,
            "processor": host(1).processor,
            "rows": rows,
        }
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
