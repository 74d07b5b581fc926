"""Lossless drafts from text against mode full, in turn on the same prompts: speed by task, every token compared.

    python -m tools.speed.drafts BUNDLE ... --data summarization/test.jsonl --threads 1 --threads 2

For a bundle with a chat template. Tasks:

editing      what mode full writes is the wanted text; predicted_output is that text with a share of its words changed
repeating    a description is to be written again
correcting   a description with spelling mistakes is to be written without them
table        JSON of a table in the prompt
summaries    one sentence about a description
writing      free text

`decode` counts from the first token on, `whole` with the prompt. Ratios are of sums over the prompts, the median of
--rounds rounds. Ends with 1 where a token differs. The machine should be idle.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from freeexport.checkpoints.examples import read_examples
from freeexport.system.idle import require_idle
from freeexport.system.machine import detect_machine
from runtime import Session
from runtime.adaptation.call_costs import CallCosts
from runtime.adaptation.draft_length import DraftLengths

SUBJECTS = (
    *("a lighthouse keeper", "photosynthesis", "life in a small town", "the history of bread", "learning the violin"),
    *("a robot that learns to paint", "a city without cars", "a journey by train through the mountains"),
)
NAMES = ("Ada", "Björn", "Chen", "Dolores", "Emeka", "Farah", "Greta", "Hiroshi")
CITIES = ("London", "Oslo", "Taipei", "Madrid", "Lagos", "Tehran", "Vienna", "Porto")
TASKS = ("editing", "repeating", "correcting", "table", "summaries", "writing")
# Words of a description that is to be repeated.
LEAST_WORDS, MOST_WORDS = 60, 110


def prompts_of(task: str, texts: list[str], count: int) -> Iterator[str]:
    source = random.Random(1)
    long = [text for text in texts if LEAST_WORDS <= len(text.split()) <= MOST_WORDS]
    for number in range(count):
        if task in ("writing", "editing"):
            yield f"Write about {SUBJECTS[number % len(SUBJECTS)]}."
        elif task == "table":
            yield table(source)
        elif task == "summaries":
            yield f"Summarize in one sentence:\n\n{texts[number]}"
        elif task == "repeating":
            yield f"Repeat this text exactly, word for word:\n\n{long[number]}"
        else:
            yield f"Correct the spelling mistakes in this text:\n\n{misspelled(long[number], source)}"


def table(source: random.Random) -> str:
    people = [
        {"name": name, "age": source.randint(20, 70), "city": source.choice(CITIES)} for name in source.sample(NAMES, 5)
    ]
    lines = "\n".join(" | ".join(map(str, person.values())) for person in people)
    example = json.dumps([people[0]], ensure_ascii=False)
    table = f"name | age | city\n{lines}"
    return f"Convert the table to a JSON list of objects.\n\n{table}\n\nBegin like this: {example[:-1]},"


def misspelled(text: str, source: random.Random) -> str:
    words = text.split()
    for place in source.sample(range(len(words)), len(words) // 10):
        word = words[place]
        if len(word) > 4:
            at = source.randrange(1, len(word) - 2)
            words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def edited(text: str, share: float, source: random.Random) -> str:
    words = text.split(" ")
    for place in source.sample(range(len(words)), round(share * len(words))):
        words[place] = source.choice(words)
    return " ".join(words)


def measure(session: Session, task: str, prompts: list[str], tokens: int, rounds: int, share: float) -> str:
    """A line of figures."""
    # What other tasks have taught of acceptance is forgotten, what calls cost is not.
    session.draft_lengths = DraftLengths(CallCosts(session.draft_lengths.costs.base))
    source, ratios = random.Random(2), {"decode": list[float](), "whole": list[float]()}
    chats = [[{"role": "user", "content": text}] for text in prompts]
    wanted = [session.generate(chat, mode="full", max_new_tokens=tokens) for chat in chats]
    expected = [edited(full.text, share, source) if task == "editing" else None for full in wanted]
    drafts: dict[str, np.ndarray] = {}
    for turn in range(rounds):
        spent = {"full": [0.0, 0.0], "lossless": [0.0, 0.0]}
        for chat, full, text in zip(chats, wanted, expected, strict=True):
            for mode in ("full", "lossless") if turn % 2 else ("lossless", "full"):
                given: Any = {"mode": mode, "predicted_output": text if mode == "lossless" else None}
                result = session.generate(chat, max_new_tokens=tokens, **given)
                if result.token_ids != full.token_ids:
                    raise SystemExit(f"error: {task}: tokens of {mode} differ from those of full: {chat}")
                stats = result.stats
                spent[mode][0] += stats.seconds - stats.encode_seconds - stats.prefill_seconds
                spent[mode][1] += stats.seconds
                for name, counts in stats.drafts.items():
                    drafts[name] = drafts.get(name, 0) + np.array([counts.drafts, counts.proposed, counts.accepted])
        for column, name in enumerate(ratios):
            ratios[name].append(spent["full"][column] / spent["lossless"][column])
    told = [f"{name} {a} of {p} accepted, {a / d:.1f} at a time" for name, (d, p, a) in drafts.items()]
    count = sum(len(full.token_ids) for full in wanted)
    low, high = min(ratios["decode"]), max(ratios["decode"])
    middle = f"decode {median(ratios['decode']):.2f}x [{low:.2f}, {high:.2f}], whole {median(ratios['whole']):.2f}x"
    return f"{task:10} {count:5} tokens  {middle}  {'; '.join(told)}"


# fmt: off
@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True), help="JSON lines: descriptions.")
@click.option("--task", "tasks", type=click.Choice(TASKS), multiple=True, default=TASKS)
@click.option("--threads", "counts", type=int, multiple=True, default=(1,))
@click.option("--samples", type=click.IntRange(1), default=8, help="Prompts of a task.")
@click.option("--max-new-tokens", "tokens", type=int, default=128)
@click.option("--share", type=float, default=0.1, help="Words changed in predicted_output.")
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--force", is_flag=True, help="On a busy machine too.")
def main(bundles: tuple[Path, ...], data: Path, tasks: tuple[str, ...], counts: tuple[int, ...], samples: int,
         tokens: int, share: float, rounds: int, force: bool) -> None:
    # fmt: on
    idle = require_idle(force)
    texts = [str(one.input).removeprefix("summarize: ") for one in read_examples(data, 40 * samples)]
    click.echo(f"{detect_machine().cpu}, {samples} prompts, {rounds} rounds{'' if idle else ', on a busy machine'}")
    for bundle in bundles:
        for threads in counts:
            with Session(bundle, threads=threads, slots=1) as session:
                click.echo(f"{bundle.name}, {session.manifest.precision}, {threads} threads")
                for task in tasks:
                    prompts = list(prompts_of(task, texts, samples))
                    click.echo(measure(session, task, prompts, tokens, rounds, share))


if __name__ == "__main__":
    main()
