"""Measures the effect of a precision on answers.

    python -m tools.quality FP32 BUNDLE ... --output quality.json

Compares bundles of one chat model with its fp32 bundle on prompts of ten kinds: counts equal greedy
answers, computes the mean log-likelihood of each answer's tokens under the fp32 model, and compares
next tokens after each prefix of the fp32 answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from freeexport.system.environment import environment
from freeexport.system.output import check_writable, write_whole
from runtime import Bundle, GenerationResult, Session
from runtime.errors import OptionError
from tools.data.splits import run_tool

PROMPTS = Path(__file__).with_name("chat_prompts.jsonl")
Tokens = Sequence[int]


@dataclass
class LogitsRecorder:
    """Logits processor that records statistics of each generated token.

    Attributes:
        tokens: Tokens to generate. Default: the most likely ones.
        best: Most likely token at each position.
        nats: Log-likelihood of each generated token, in nats.
    """

    tokens: Tokens | None = None
    best: list[int] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)

    def __call__(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        row = scores[0].astype(np.float64)
        best = int(row.argmax())
        target = best if self.tokens is None else self.tokens[len(self.best)]
        self.best.append(best)
        self.nats.append(float(row[target] - row[best] - np.log(np.exp(row - row[best]).sum())))
        if self.tokens is None:
            return scores
        forced = np.full_like(scores, -np.inf)
        forced[0, target] = 0
        return forced


def chat_prompts(count: int) -> list[list[dict[str, str]]]:
    """Return the first `count` prompts, at most 200. Their kinds alternate."""
    lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()[:count]]
    return [[{"role": "user", "content": line["input"]}] for line in lines]


def decode_prompts(
    session: Session,
    prompts: Sequence[Any],
    slots: int,
    options: Sequence[dict[str, Any]],
    **common: Any,
) -> list[GenerationResult]:
    """Decode prompts in mode full in `slots` parallel requests, with options of each."""
    with ThreadPoolExecutor(slots) as pool:
        return list(
            pool.map(
                lambda prompt, own: session.generate(prompt, mode="full", **common, **own),
                prompts,
                options,
            )
        )


def force(
    session: Session, prompts: Sequence[Any], answers: Sequence[Tokens], slots: int
) -> list[LogitsRecorder]:
    """Generate given answers, and return the statistics of their tokens."""
    watches = [LogitsRecorder(answer) for answer in answers]
    options = [
        {"logits_processor": watch, "max_new_tokens": len(watch.tokens or ())} for watch in watches
    ]
    decode_prompts(session, prompts, slots, options, ignore_eos=True)
    return watches


def quality_rows(
    paths: Sequence[Path], samples: int, tokens: int, slots: int, threads: int
) -> list[dict[str, Any]]:
    """Compute a row for each bundle. The first bundle is in fp32.

    - `activations`: Type of activations in products, if it is not int8.
    - `same_answers`: Number of answers that equal the fp32 answer.
    - `likelihood`: Mean log-likelihood of the answers' tokens under the fp32 model, in nats.
    - `agreement`: Share of next tokens that equal fp32's after the same prefix of the fp32 answer.
    """
    prompts = chat_prompts(samples)
    rows = list[dict[str, Any]]()
    answers = list[list[Tokens]]()
    reference = list[LogitsRecorder]()
    for path in paths:
        with Session(path, threads=threads, slots=slots, prefix_cache_mb=0) as session:
            watches = [LogitsRecorder() for _ in prompts]
            options = [{"logits_processor": watch} for watch in watches]
            given = decode_prompts(session, prompts, slots, options, max_new_tokens=tokens)
            answers.append([result.token_ids for result in given])
            # The fp32 model has already processed its own answers.
            read = force(session, prompts, answers[0], slots) if reference else watches
            manifest = session.manifest
        reference = reference or read
        equal = [
            np.equal(ours.best, theirs.best) for ours, theirs in zip(read, reference, strict=True)
        ]
        same = [ours == theirs for ours, theirs in zip(answers[-1], answers[0], strict=True)]
        rows.append(
            {
                "precision": manifest.precision,
                "activations": manifest.activations,
                "same_answers": sum(same),
                "agreement": float(np.concatenate(equal).mean()),
            }
        )
    with Session(paths[0], threads=threads, slots=slots, prefix_cache_mb=0) as session:
        for row, each in zip(rows, answers, strict=True):
            others = [n for n, answer in enumerate(each) if answer != answers[0][n]]
            forced = force(session, [prompts[n] for n in others], [each[n] for n in others], slots)
            scored = {**dict(enumerate(reference)), **dict(zip(others, forced, strict=True))}
            row["likelihood"] = float(
                np.mean([nats for one in scored.values() for nats in one.nats])
            )
    return rows


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--samples", type=click.IntRange(1, 200), default=200, help="Prompts.")
@click.option("--tokens", type=click.IntRange(1), default=48, help="Length limit of an answer.")
@click.option("--slots", type=click.IntRange(1), default=8, help="Prompts decoded at once.")
@click.option("--threads", type=click.IntRange(1), default=1)
@click.option("--output", type=click.Path(path_type=Path), help="Write JSON here.")
def main(
    bundles: tuple[Path, ...],
    samples: int,
    tokens: int,
    slots: int,
    threads: int,
    output: Path | None,
) -> None:
    check_writable(output, "--output")
    manifests = [Bundle.open(path).manifest for path in bundles]
    if manifests[0].precision != "fp32":
        raise OptionError(
            f"{bundles[0]} is in {manifests[0].precision}; name the fp32 bundle first"
        )
    for path, manifest in zip(bundles, manifests, strict=True):
        if manifest.source_sha256 != manifests[0].source_sha256:
            raise OptionError(f"{path} is not of the checkpoint of {bundles[0]}; name one model's")
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
            "model": manifests[0].source,
            "prompts": samples,
            "tokens": tokens,
        }
        content = {**facts, "environment": environment(), "rows": rows}
        write_whole(output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
