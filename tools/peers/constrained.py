"""Measures tokens/s with and without a JSON schema, in modes full and lossless, on the same lines.

    python -m tools.peers.constrained BUNDLE DATA --threads 1 --samples 50
    python -m tools.peers.constrained BUNDLE DATA \\
        --against genai-int4 --model model.gguf --save run.json

DATA has JSON lines with `input` and optionally `target`. All constrained outputs are parsed, and
the tokens of lossless are compared with those of full. Speeds exclude prompts and include forced
tokens. The share of the grammar refers to the same seconds. The exit code is 1 if an output is
invalid or a token differs.

--against also decodes the same lines with other libraries, with and without the schema, in the same
rounds. They use the checkpoint of --model, which may have other weights of the same sizes, so their
outputs may differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.costs.timing import interleave
from freeexport.system.load import load_note, other_load
from freeexport.system.machine import detect_machine
from freeexport.system.output import write_whole
from runtime import GenerationResult, Session
from tools.peers.catalog import PEERS, Source, peer_command, peer_model
from tools.peers.worker import Worker

TEXT = {"type": "string"}
# Schema of the records of tools/data/debian.py.
SCHEMA = {
    "type": "object",
    "properties": {
        **dict.fromkeys(("name", "version", "section", "homepage", "summary"), TEXT),
        "depends": {"type": "array", "items": TEXT},
    },
    "required": ["name", "version", "section", "homepage", "summary", "depends"],
}
# Settings of the bundle. Those in CONSTRAINED also have the schema.
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "full, schema": {"mode": "full"},
    "lossless": {"mode": "lossless"},
    "lossless, schema": {"mode": "lossless"},
}
CONSTRAINED = ("full, schema", "lossless, schema")
LIMIT = 600.0  # time limit of a peer's answer, in seconds


def decoding(result: GenerationResult) -> float:
    """Return the seconds of a request without those of its prompt."""
    return result.stats.seconds - result.stats.encode_seconds - result.stats.prefill_seconds


def valid(text: str, schema: dict[str, Any]) -> bool:
    """Return True if a text is JSON and, if it is an object, has the schema's required keys."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return not isinstance(value, dict) or set(schema.get("required", ())) <= value.keys()


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--schema",
    "file",
    type=click.Path(path_type=Path, exists=True),
    help="Of a package, unless given.",
)
@click.option("--threads", type=int, default=1)
@click.option(
    "--samples", type=click.IntRange(1), default=50, help="Use only the first N lines of DATA."
)
@click.option("--rounds", type=click.IntRange(1), default=2)
@click.option("--max-new-tokens", "tokens", type=int, default=300)
@click.option(
    "--against",
    multiple=True,
    type=click.Choice([name for name in PEERS if PEERS[name].decoder_only]),
)
@click.option("--model", default="", help="The checkpoint of --against.")
@click.option("--save", type=click.Path(path_type=Path), help="Write all figures as JSON.")
def main(
    bundle: Path,
    data: Path,
    file: Path | None,
    threads: int,
    samples: int,
    rounds: int,
    tokens: int,
    against: tuple[str, ...],
    model: str,
    save: Path | None,
) -> None:
    schema = SCHEMA if file is None else json.loads(file.read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[:samples]]
    with (
        Session(bundle, threads=threads, slots=1) as session,
        other_load() as load,
        ExitStack() as stack,
    ):
        workers = start_peers(stack, against, model, json.dumps(schema), threads)
        found, targets = measure(session, workers, lines, schema, rounds=rounds, tokens=tokens)
    processor = detect_machine().cpu
    click.echo(f"{processor}, {threads} threads, {len(lines)} lines, {rounds} rounds")
    click.echo(load_note(load.cores) or "no other process was busy")
    speeds = dict[str, float]()
    shares = dict[str, float]()
    failed = False
    for name in SETTINGS:
        speeds[name], shares[name], sound = show(name, found[name], targets, schema, speeds)
        failed |= name in CONSTRAINED and not sound
    for name in workers:
        speeds[name] = sum(count for count, _ in found[name]) / sum(took for _, took in found[name])
        own = name.removesuffix(", schema")
        click.echo(
            f"  {name:20} {speeds[name]:7.1f} tokens/s, "
            f"{speeds[name] / speeds[own]:.2f}x without the schema"
        )
    if save is not None:
        record = {
            "processor": processor,
            "threads": threads,
            "lines": len(lines),
            "rounds": rounds,
            "busy_cores": load.cores,
            "tokens_per_second": speeds,
            "grammar_share": shares,
        }
        write_whole(save, json.dumps(record, indent=2) + "\n")
    for name in ("", ", schema"):
        pairs = zip(found[f"full{name}"], found[f"lossless{name}"], strict=True)
        different = sum(full.token_ids != lossless.token_ids for full, lossless in pairs)
        click.echo(f"  lossless{name}: {different} of {len(targets)} outputs differ from full's")
        failed |= different > 0
    if failed:
        raise SystemExit(1)


def start_peers(
    stack: ExitStack, against: Sequence[str], model: str, schema: str, threads: int
) -> dict[str, Worker]:
    """Start a process of each peer without the schema, and one with it."""
    workers = dict[str, Worker]()
    for peer in map(PEERS.__getitem__, against):
        command = peer_command(peer)
        path = peer_model(peer, Source(model, open_checkpoint(model), False), command)
        for name, more in ((peer.name, {}), (f"{peer.name}, schema", {"schema": schema})):
            workers[name] = Worker(command, {})
            stack.callback(workers[name].close)
            options = {**peer.options, **more, "encoder_decoder": False}
            asked = {"op": "load", "model": str(path), "threads": threads, "cpus": []}
            workers[name].ask({**asked, "options": options}, LIMIT)
    return workers


def measure(
    session: Session,
    workers: Mapping[str, Worker],
    lines: Sequence[Mapping[str, Any]],
    schema: Mapping[str, Any],
    *,
    rounds: int,
    tokens: int,
) -> tuple[dict[str, list[Any]], list[str | None]]:
    """Decode all lines in every setting and by every peer, interleaved.

    Returns:
        Results by setting, numbers of tokens and seconds by peer, and the targets in their order.
    """
    lengths = list[int]()
    for line in lines if workers else ():
        written = session.generate(line["input"], max_new_tokens=tokens).token_ids
        lengths.append(max(2, len(written)))

    def decode(name: str, line: int) -> Any:
        given = lines[line]["input"]
        if name in SETTINGS:
            constraint = {"json_schema": schema} if name in CONSTRAINED else {}
            return session.generate(given, max_new_tokens=tokens, **SETTINGS[name], **constraint)
        # Without the schema, peers stop only at the length limit, so use our number of tokens.
        most = tokens if "schema" in name else lengths[line]
        prompt = session.encode(given).tolist()
        answer = workers[name].ask({"op": "generate", "prompt": prompt, "tokens": most}, LIMIT)
        return len(answer["times"]) - 1, answer["times"][-1] - answer["times"][0]

    names = [*SETTINGS, *workers]
    found: dict[str, list[Any]] = {name: [] for name in names}
    targets = list[str | None]()
    for turn in interleave(names, list(range(len(lines))), rounds, decode):
        targets.append(lines[turn.prompt].get("target"))
        for name, result in zip(names, turn.runs, strict=True):
            found[name].append(result)
    return found, targets


def show(
    name: str,
    results: Sequence[GenerationResult],
    targets: Sequence[str | None],
    schema: dict[str, Any],
    speeds: Mapping[str, float],
) -> tuple[float, float, bool]:
    """Print a line about a setting.

    Returns:
        Tokens per second, the grammar's share of the time, and True if all whole outputs are valid.
    """
    seconds = sum(map(decoding, results))
    written = sum(result.stats.candidates + result.stats.forced_tokens for result in results)
    forced = sum(result.stats.forced_tokens for result in results)
    grammar = sum(result.stats.grammar_seconds for result in results)
    right = sum(result.text == target for result, target in zip(results, targets, strict=True))
    whole = [result for result in results if result.finish_reason == "eos"]
    sound = sum(valid(result.text, schema) for result in whole)
    speed = written / seconds
    click.echo(
        f"  {name:16} {speed:7.1f} tokens/s, {speed / speeds.get('full', speed):.2f}x full; "
        f"{forced / written:.0%} forced; grammar {grammar / written * 1e6:.0f} us a token, "
        f"{grammar / seconds:.1%}; "
        f"{sound} of {len(whole)} whole outputs valid, {right} of {len(results)} as the target"
    )
    return speed, grammar / seconds, sound == len(whole)


if __name__ == "__main__":
    main()
