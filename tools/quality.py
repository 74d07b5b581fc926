"""Measures the effect of a precision on answers.

    python -m tools.quality precisions FP32 BUNDLE ... --output quality.json
    python -m tools.quality file FILE.gguf BUNDLE ... --data text.jsonl --output file.json

`precisions` compares bundles of one chat model with its fp32 bundle on prompts of ten kinds. It
counts equal greedy answers, computes the mean log-likelihood of each answer's tokens under the fp32
model, and compares next tokens after each prefix of the fp32 answer.

`file` compares bundles with the GGUF file that they were converted from: sizes, weight formats, and
predictions relative to those of the dequantized weights.
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

from freeexport.system.environment import environment
from runtime import Bundle, GenerationResult, Session

PROMPTS = Path(__file__).with_name("chat_prompts.jsonl")
Tokens = Sequence[int]


@dataclass
class LogitsRecorder:
    """Logits processor that records statistics of each generated token.

    Attributes:
        tokens: Tokens to generate. Default: the most likely ones.
        best: Most likely token at each position.
        nats: Log-likelihood of each generated token, in nats.
        gaps: Difference of the two largest logits at each position.
    """

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
    """Return the first `count` prompts with their kinds, at most 200. Kinds alternate."""
    lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()[:count]]
    return [(line["kind"], [{"role": "user", "content": line["input"]}]) for line in lines]


def first_different_token(ours: Tokens, theirs: Tokens) -> int | None:
    """Return the first place where tokens differ or one answer ends. None if all are equal."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    shorter = min(len(ours), len(theirs))
    place = next((place for place, (mine, other) in pairs if mine != other), shorter)
    return None if place == len(ours) == len(theirs) else place


def decode_prompts(
    session: Session,
    prompts: Sequence[Any],
    at_once: int,
    options: Sequence[dict[str, Any]],
    **common: Any,
) -> list[GenerationResult]:
    """Decode prompts in at most `at_once` parallel requests, with options of each and `common`."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(
            pool.map(
                lambda prompt, own: session.generate(prompt, **common, **own), prompts, options
            )
        )


def force(
    session: Session, prompts: Sequence[Any], answers: Sequence[Tokens], at_once: int
) -> list[LogitsRecorder]:
    """Generate given answers, and return the statistics of their tokens."""
    watches = [LogitsRecorder(answer) for answer in answers]
    options = [
        {"logits_processor": watch, "max_new_tokens": len(watch.tokens or ())} for watch in watches
    ]
    decode_prompts(session, prompts, at_once, options, mode="full", ignore_eos=True)
    return watches


def quality_rows(
    paths: Sequence[Path], samples: int, tokens: int, slots: int, threads: int
) -> list[dict[str, Any]]:
    """Compute a row for each bundle. The first bundle is in fp32.

    - `activations`: Type of activations in products, if it is not int8.
    - `same_answers`: Number of answers that equal the fp32 answer.
    - `likelihood`: Mean log-likelihood of the answers' tokens under the fp32 model, in nats.
    - `agreement`: Share of next tokens that equal fp32's after the same prefix of the fp32 answer.
    - `gap`: Median difference of the fp32 model's two largest logits where answers first differ.
    - `gap_everywhere`: The same at all tokens.
    - `same_by_kind`: `same_answers` by kind of prompt.
    """
    kinds, prompts = zip(*chat_prompts(samples), strict=True)
    rows = list[dict[str, Any]]()
    answers = list[list[Tokens]]()
    wanted = list[LogitsRecorder]()
    for path in paths:
        with Session(path, threads=threads, slots=slots, prefix_cache_mb=0) as session:
            watches = [LogitsRecorder() for _ in prompts]
            options = [{"logits_processor": watch} for watch in watches]
            given = decode_prompts(
                session, prompts, slots, options, mode="full", max_new_tokens=tokens
            )
            answers.append([result.token_ids for result in given])
            # The fp32 model has already processed its own answers.
            read = force(session, prompts, answers[0], slots) if wanted else watches
            manifest = session.manifest
        wanted = wanted or read
        chosen = [
            np.equal(ours.best, theirs.best) for ours, theirs in zip(read, wanted, strict=True)
        ]
        places = [
            first_different_token(ours, theirs)
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
                "precision": manifest.precision,
                "activations": manifest.activations,
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
    with Session(paths[0], threads=threads, slots=slots, prefix_cache_mb=0) as session:
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
    """Compare BUNDLES with the first one, which is in fp32."""
    rows = quality_rows(bundles, samples, tokens, slots, threads)
    click.echo(
        "| precision | same answers | log-likelihood a token | same next token |\n|---|---|---|---|"
    )
    for row in rows:
        figures = (
            f"{row['same_answers']} of {samples} | {row['likelihood']:.3f} | {row['agreement']:.1%}"
        )
        wide = f", activations in {row['activations']}" if row["activations"] else ""
        click.echo(f"| {row['precision']}{wide} | {figures} |")
    if output is not None:
        facts = {
            "model": Bundle.open(bundles[0]).manifest.source,
            "prompts": samples,
            "tokens": tokens,
        }
        content = {**facts, "environment": environment(), "rows": rows}
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
    """Compare BUNDLES with the GGUF file MODEL that they were converted from."""
    from freeexport.checkpoints.checkpoint import open_checkpoint
    from freeexport.checkpoints.transformers_model import reference_model
    from freeexport.verification.divergence import predictions_on, quality_of

    reference = reference_model(open_checkpoint(str(model)))
    size = model.stat().st_size
    rows = list[dict[str, Any]]()
    click.echo(
        "| bundle | MB | of the file | divergence, nats | same best token | nats a token |\n"
        "|---|---|---|---|---|---|"
    )
    for path in bundles:
        bundle = Bundle.open(path)
        manifest = bundle.manifest
        quality = quality_of(predictions_on(bundle, reference, data), manifest.precision)
        whole = sum(file.size for file in manifest.files.values())
        kept: dict[str, Any] = manifest.weight_formats
        if manifest.quantization is not None:
            kept = {one.engine: one.kinds or one.kept for one in manifest.quantization.engines}
        row = {
            "bundle": path.name,
            "bytes": whole,
            "of_file": round(whole / size, 4),
            "kept": kept,
            **{
                name: getattr(quality, name)
                for name in ("tokens", "divergence", "agreement", "reference_nll", "nll")
            },
        }
        rows.append(row)
        figures = (
            f"{quality.divergence:.4f} | {quality.agreement:.1%} | "
            f"{quality.nll - quality.reference_nll:+.4f}"
        )
        click.echo(f"| {path.name} | {whole / 1e6:.0f} | {whole / size:.3f} | {figures} |")
    if output is not None:
        content = {
            "model": model.name,
            "file_bytes": size,
            "environment": environment(),
            "rows": rows,
        }
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
