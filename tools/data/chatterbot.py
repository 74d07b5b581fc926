"""Questions and answers from chatterbot-corpus: small talk and trivia, very small.

    pip install chatterbot-corpus
    python -m tools.data.chatterbot data/chatterbot

A line is {"input": "answer: What is AI?", "target": ...}: the first two turns of each conversation. A question with
several answers is in one split with all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from tools.data.splits import DataError, Example, by_split, limited, normalised, report, run, write_data_set


def examples(files: Iterable[Any]) -> Iterator[Example]:
    """An example a conversation of the parsed files, each pair once."""
    seen = set()
    for file in files:
        for turns in file["conversations"]:
            question, answer = (" ".join(str(turn).split()) for turn in (*turns[:2], *[""] * (2 - len(turns))))
            key = re.sub(r"[^\w ]", "", normalised(question)).strip()
            if key and answer and (key, normalised(answer)) not in seen:
                seen.add((key, normalised(answer)))
                yield Example(f"answer: {question}", answer, (key,))


def corpus(language: str) -> list[Any]:
    """The parsed files of a language. Raises DataError when the corpus is not installed or lacks the language."""
    import yaml

    package = find_spec("chatterbot_corpus")
    if package is None or package.origin is None:
        raise DataError("the corpus is not installed; run: pip install chatterbot-corpus")
    data = Path(package.origin).parent / "data"
    if not (data / language).is_dir():
        known = ", ".join(sorted(path.name for path in data.iterdir() if path.is_dir()))
        raise DataError(f"the corpus has no {language!r}; it has {known}")
    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((data / language).glob("*.yml"))]


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--language", default="english", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the order; the splits do not depend on it.")
@click.option("--overwrite", is_flag=True, help="Replace a data set at OUT.")
def command(out: Path, language: str, seed: int, overwrite: bool) -> None:
    """Write questions and answers to the directory OUT, in four splits.

    \b
    Example:
      python -m tools.data.chatterbot data/chatterbot
    """
    splits = by_split(examples(corpus(language)), lambda example: example.keys[0])
    about = {
        "task": "question answering",
        "source": f"package chatterbot-corpus, {language}",
        "licence": "BSD (as the package states)",
        "seed": seed,
    }
    report(out, write_data_set(out, limited(splits, None, None, seed), about, overwrite))


if __name__ == "__main__":
    run(command)
