"""Prompts that a chat model writes itself, for training an exit on ordinary conversations.

A chat model that reads its own template up to the place of the user's text continues with a user's
text (Magpie, arXiv 2406.08464). Its answers to these prompts are what `train --self-distill` learns
from. With more than one turn, the model also answers and writes the user's next text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from freeexport.checkpoints.examples import DataError
from freeexport.system.jsonl import append_lines, whole_lines
from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.text.tokenizer import Tokenizer
from tools.data.splits import json_lines, run_tool

# Rendered in place of the user's text, to find where that text begins.
PLACE = "freeexport-place-of-the-text"
SLOTS = 16
# Shorter texts are greetings, which ask for nothing.
MIN_CHARACTERS = 16
MAX_PROMPT_TOKENS = 120
MAX_ANSWER_TOKENS = 128

Message = dict[str, str]


def text_before_user(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """Render a conversation up to where the next text of the user begins."""
    rendered = tokenizer.render_chat([*messages, {"role": "user", "content": PLACE}])
    before, found, _ = rendered.partition(PLACE)
    if not found:
        raise DataError("the chat template alters the user's text; use another model")
    return before


def write_conversation(
    session: Session, tokenizer: Tokenizer, seed: int, turns: int
) -> list[list[Message]]:
    """Let the model write both sides of a conversation.

    Args:
        session: Session of a chat model.
        seed: Seed of the user's texts, sampled at temperature 1 and top_p 0.95. Answers are greedy.
        turns: Most texts of the user.

    Returns:
        A prompt for each turn: the messages up to that text of the user. A text that is too short
        or was cut at MAX_PROMPT_TOKENS ends the conversation and is left out.
    """
    messages: list[Message] = []
    prompts: list[list[Message]] = []
    for turn in range(turns):
        written = session.generate(
            tokenizer.encode(text_before_user(tokenizer, messages), special=False),
            max_new_tokens=MAX_PROMPT_TOKENS,
            mode="full",
            do_sample=True,
            temperature=1.0,
            top_p=0.95,
            seed=seed,
        )
        text = written.text.strip()
        if not written.complete or len(text) < MIN_CHARACTERS:
            break
        messages.append({"role": "user", "content": text})
        prompts.append(list(messages))
        if turn + 1 == turns:
            break
        answer = session.generate(messages, max_new_tokens=MAX_ANSWER_TOKENS, mode="full")
        if not answer.complete:
            break  # a user does not reply to half an answer
        messages.append({"role": "assistant", "content": answer.text})
    return prompts


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--conversations", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--first-seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--turns", type=click.IntRange(1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Default: all cores.")
def command(
    bundle: Path, out: Path, conversations: int, first_seed: int, turns: int, threads: int | None
) -> None:
    """Append the prompts that the chat model in BUNDLE writes to the JSONL file OUT.

    Each conversation has a seed of its own, from --first-seed on. Seeds that are in OUT already
    are skipped, so an interrupted run continues.
    """
    if Bundle.open(bundle).manifest.encoder_decoder:
        raise DataError(f"{bundle} is an encoder-decoder; name a bundle of a chat model")
    tokenizer = Tokenizer.load(bundle)
    if tokenizer is None:
        raise DataError(f"{bundle} has no tokenizer; name a bundle of a chat model")
    text_before_user(tokenizer, [])  # refuse an unfit template before any work
    whole_lines(out)  # removes the partial line of a run that was killed
    written = list(json_lines(out)) if out.exists() else []
    if not all({"seed", "input"} <= line.keys() for line in written):
        raise DataError(f"{out} has lines without 'seed' and 'input'; choose another file")
    done = {line["seed"] for line in written}
    seen = {json.dumps(line["input"]) for line in written}

    with Session(bundle, threads=threads, slots=SLOTS) as session:

        def write(seed: int) -> list[dict[str, Any]]:
            prompts = write_conversation(session, tokenizer, seed, turns)
            return [{"seed": seed, "input": prompt} for prompt in prompts]

        seeds = range(first_seed, first_seed + conversations)
        left = [seed for seed in seeds if seed not in done]
        with (
            ThreadPoolExecutor(SLOTS) as pool,
            click.progressbar(
                pool.map(write, left), length=len(left), label="conversations"
            ) as finished,
        ):
            for lines in finished:
                new = [line for line in lines if json.dumps(line["input"]) not in seen]
                seen.update(json.dumps(line["input"]) for line in new)
                append_lines(out, new)
    click.echo(f"{out}: {len(seen)} prompts")


if __name__ == "__main__":
    run_tool(command)
