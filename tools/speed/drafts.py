"""Compares lossless drafts from text with mode full, in turn on the same prompts.

    python -m tools.speed.drafts BUNDLE ... --threads 1 --rounds 16

For bundles of a chat model. Prompts named "repeat" ask for a text in the prompt, "write" for free
text. Each round is a request in mode full, one in lossless and another in full. `fresh` rounds
start without the statistics of earlier requests, `next` rounds with them. Ratios compare the
seconds of decoding without prompts. All are shown, sorted, because a median hides the worst. Tokens
are compared.

The exit code is 1 if a token differs. With --require it is also 1 if the worst ratio of a repeated
text is below 1.6, or if the mean ratio of any prompt is below 0.97.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import click

from freeexport.system.machine import detect_machine
from runtime import Session

CODE = """for i in range(10):
    if i % 2 == 0:
        print(i, "is even")
    else:
        print(i, "is odd")
    if i == 5:
        print("half way")
print("done")"""
SENTENCE = "The quick brown fox jumps over the lazy dog near the river bank at dawn."
LONG = (
    "The library opens at nine in the morning and closes at six in the evening, except on Sundays, "
    "when it is closed all day long."
)
SUBJECTS = (
    *("a lighthouse keeper", "photosynthesis", "life in a small town"),
    *("the history of bread", "a city without cars"),
)
PROMPTS = {
    **{
        f"repeat {name}": f"Repeat this text exactly, twice:\n\n{text}"
        for name, text in {"sentence": SENTENCE, "long": LONG, "code": CODE}.items()
    },
    **{f"write {subject}": f"Write about {subject}." for subject in SUBJECTS},
}
# Limits of --require.
WORST_REPEATED = 1.6
MEAN_WRITTEN = 0.97


def chat(prompt: str) -> list[dict[str, str]] | str:
    return [{"role": "user", "content": prompt}]


def measured(
    session: Session, prompt: str, tokens: int, rounds: int, fresh: bool
) -> tuple[list[float], str]:
    """Return the sorted speeds relative to mode full, and a text about tokens and drafts.

    Args:
        session: Session of the bundle.
        prompt: Prompt of the user.
        tokens: Most tokens to generate.
        rounds: Number of rounds.
        fresh: Forget draft statistics before each round.

    Raises:
        ClickException: If tokens differ.
    """
    ratios = list[float]()
    proposed = 0
    accepted = 0
    last = 0
    for _ in range(rounds):
        if fresh:
            session.forget_drafts()
        seconds = []
        answers = []
        for mode in ("full", "lossless", "full"):
            options: dict[str, Any] = {"drafts": "lookup"} if mode == "lossless" else {}
            found = session.generate(chat(prompt), mode=mode, max_new_tokens=tokens, **options)
            seconds.append(
                found.stats.seconds - found.stats.encode_seconds - found.stats.prefill_seconds
            )
            answers.append(found.token_ids)
            proposed += sum(counts.proposed for counts in found.stats.drafts.values())
            accepted += sum(counts.accepted for counts in found.stats.drafts.values())
        if len(set(answers)) > 1:
            raise click.ClickException(f"tokens of lossless differ from those of full: {prompt!r}")
        ratios.append((seconds[0] + seconds[2]) / 2 / max(seconds[1], 1e-9))
        last = len(answers[1])
    return sorted(ratios), f"{last} tokens, {accepted} of {proposed} drafted accepted"


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--threads", type=int, default=1)
@click.option("--max-new-tokens", "tokens", type=int, default=128)
@click.option(
    "--rounds", type=click.IntRange(1), default=16, help="Of each prompt, fresh and then next ones."
)
@click.option(
    "--prompt",
    "chosen",
    multiple=True,
    help="Names that begin so, as 'repeat code'. May be repeated.",
)
@click.option("--require", is_flag=True, help="Fail where drafts do not pay as they should.")
def main(
    bundles: tuple[Path, ...],
    threads: int,
    tokens: int,
    rounds: int,
    chosen: tuple[str, ...],
    require: bool,
) -> None:
    click.echo(f"{detect_machine().cpu}, {threads} threads, {rounds} rounds")
    failed = False
    for bundle in bundles:
        with Session(bundle, threads=threads, slots=1, draft_memory_mb=0) as session:
            click.echo(f"{bundle.name}, {session.manifest.precision}")
            for name, fresh in product(
                (name for name in PROMPTS if name.startswith(chosen or ("",))), (True, False)
            ):
                ratios, told = measured(session, PROMPTS[name], tokens, rounds, fresh)
                listed = " ".join(f"{ratio:.2f}" for ratio in ratios)
                click.echo(
                    f"  {name}, {'fresh' if fresh else 'next'}: "
                    f"worst {ratios[0]:.2f} [{listed}] {told}"
                )
                # The mean of repeated texts is checked too, because a model may write freely.
                mean = sum(ratios) / len(ratios)
                failed |= mean < MEAN_WRITTEN or (
                    name.startswith("repeat") and ratios[0] < WORST_REPEATED
                )
    if require and failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
