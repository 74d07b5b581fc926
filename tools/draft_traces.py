"""Records requests and the drafts of an exit, for tools.draft_replay.

    python -m tools.draft_traces BUNDLE PROMPTS.jsonl TRACES.jsonl

Decodes the `input` of each line in mode full. If the bundle has a trained exit, a chain of its
drafts is recorded after every token. Run from the root of the repository.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from freeexport.system.output import replacing
from runtime import Session
from runtime.decoding.decoder import Decoder
from tools.data.splits import run_tool

CHAIN = 15  # drafts after a token


def chain_of(decoder: Decoder, token: int) -> list[tuple[int, float]]:
    """Return the exit's drafts after a token, and their confidences. Leaves no rows behind."""
    length = decoder.lengths()[1]
    chain = []
    for _ in range(CHAIN):
        prediction = decoder.step(token, head=True)
        token = int(prediction.token)
        chain.append((token, round(float(prediction.confidence or 0.0), 5)))
    decoder.trim(length)
    return chain


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompts", type=click.Path(path_type=Path, exists=True))
@click.argument("traces", type=click.Path(path_type=Path))
@click.option("--samples", type=click.IntRange(1), help="First lines only.")
@click.option("--max-new-tokens", default=200, type=click.IntRange(2))
def main(
    bundle: Path, prompts: Path, traces: Path, samples: int | None, max_new_tokens: int
) -> None:
    lines = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    with (
        Session(bundle, slots=1, threads=1, draft_memory_mb=0, prefix_cache_mb=0) as session,
        session._scheduler.borrowed() as decoder,
        replacing(traces) as partial,
        partial.open("w", encoding="utf-8") as file,
    ):
        eos = session.manifest.eos_token_ids
        exits = bool(session.manifest.exit_trained)
        for line in lines[:samples]:
            prompt = session.encode(line["input"])
            decoder.reset()
            decoder.want_logits(False)
            output = [int(decoder.prefill(prompt, head=False, exits=exits).token)]
            chains = []
            while len(output) < max_new_tokens and output[-1] not in eos:
                if exits:
                    chains.append(chain_of(decoder, output[-1]))
                decoder.step(output[-1], head=False)
                output.append(int(decoder.sync()[0].token))
            trace = {"prompt": prompt.tolist(), "output": output, "chains": chains}
            file.write(json.dumps(trace) + "\n")


if __name__ == "__main__":
    run_tool(main)
