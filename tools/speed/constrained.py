"""Measures tokens/s with and without a JSON schema, in modes full and lossless, on the same lines.

    python -m tools.speed.constrained BUNDLE DATA --threads 1 --samples 50
    python -m tools.speed.constrained BUNDLE DATA \\
        --against genai-int4 --model model.gguf --save run.json

DATA has JSON lines with `input` and optionally `target`. All constrained outputs are parsed, and
the tokens of lossless are compared with those of full. Speeds exclude prompts and include forced
tokens. The share of the grammar refers to the same seconds. The exit code is 1 if an output is
invalid or a token differs. With --require it is also 1 if the best speed with the schema is below
1.3 times that of full without it, or if the grammar takes more than 5 % of full.

--against also decodes the same lines with other libraries, with and without the schema, in the same
rounds. They use the checkpoint of --model, which may have other weights of the same sizes, so their
outputs may differ.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.measure.timing import interleave
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
# Limits of --require: least speed with the schema relative to full, largest share of the grammar.
WORTH = 1.3
SHARE = 0.05
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
@click.option("--require", is_flag=True, help="Fail where constraints do not pay as they should.")
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
    require: bool,
) -> None:
    schema = SCHEMA if file is None else json.loads(file.read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[:samples]]
    constrained: dict[str, Any] = {"json_schema": schema}
    settings = {
        "full": {"mode": "full"},
        "full, schema": {"mode": "full", **constrained},
        "lossless": {"mode": "lossless"},
        "lossless, schema": {"mode": "lossless", **constrained},
    }
    found: dict[str, list[GenerationResult]] = {name: [] for name in settings}
    targets = list[str | None]()
    workers = dict[str, Worker]()
    peers: dict[str, list[tuple[int, float]]] = {}
    with (
        Session(bundle, threads=threads, slots=1, draft_memory_mb=0) as session,
        other_load() as load,
        ExitStack() as stack,
    ):
        for peer in map(PEERS.__getitem__, against):
            command = peer_command(peer)
            path = peer_model(peer, Source(model, open_checkpoint(model), False), command)
            for name, more in (
                (peer.name, {}),
                (f"{peer.name}, schema", {"schema": json.dumps(schema)}),
            ):
                workers[name] = Worker(command, {})
                peers[name] = []
                stack.callback(workers[name].close)
                options = {**peer.options, **more, "encoder_decoder": False}
                asked = {
                    "op": "load",
                    "model": str(path),
                    "threads": threads,
                    "cpus": [],
                    "options": options,
                }
                workers[name].ask(asked, LIMIT)

        def decode(name: str, line: int) -> Any:
            if name not in workers:
                return session.generate(
                    lines[line]["input"], max_new_tokens=tokens, **settings[name]
                )
            # Without the schema, peers stop only at the length limit, so use our number of tokens.
            most = tokens if "schema" in name else lengths[line]
            prompt = session.encode(lines[line]["input"]).tolist()
            answer = workers[name].ask({"op": "generate", "prompt": prompt, "tokens": most}, LIMIT)
            return len(answer["times"]) - 1, answer["times"][-1] - answer["times"][0]

        lengths = list[int]()
        for line in lines if workers else ():
            lengths.append(
                max(2, len(session.generate(line["input"], max_new_tokens=tokens).token_ids))
            )
        for turn in interleave([*settings, *workers], list(range(len(lines))), rounds, decode):
            targets.append(lines[turn.prompt].get("target"))
            for name, result in zip((*settings, *workers), turn.runs, strict=True):
                (found if name in found else peers)[name].append(result)
    click.echo(f"{detect_machine().cpu}, {threads} threads, {len(lines)} lines, {rounds} rounds")
    click.echo(load_note(load.cores) or "no other process was busy")
    speeds = dict[str, float]()
    shares = dict[str, float]()
    failed = False
    for name, results in found.items():
        seconds = sum(map(decoding, results))
        written = sum(result.stats.candidates + result.stats.forced_tokens for result in results)
        forced = sum(result.stats.forced_tokens for result in results)
        grammar = sum(result.stats.grammar_seconds for result in results)
        right = sum(result.text == target for result, target in zip(results, targets, strict=True))
        whole = [result for result in results if result.finish_reason == "eos"]
        sound = sum(valid(result.text, schema) for result in whole)
        speeds[name] = written / seconds
        shares[name] = grammar / seconds
        click.echo(
            f"  {name:16} {speeds[name]:7.1f} tokens/s, {speeds[name] / speeds['full']:.2f}x full; "
            f"{forced / written:.0%} forced; grammar {grammar / written * 1e6:.0f} us a token, "
            f"{shares[name]:.1%}; "
            f"{sound} of {len(whole)} whole outputs valid, {right} of {len(results)} as the target"
        )
        failed |= "schema" in name and sound < len(whole)
    for name, runs in peers.items():
        speeds[name] = sum(count for count, _ in runs) / sum(seconds for _, seconds in runs)
        own = name.removesuffix(", schema")
        click.echo(
            f"  {name:20} {speeds[name]:7.1f} tokens/s, "
            f"{speeds[name] / speeds[own]:.2f}x without the schema"
        )
    if save is not None:
        facts = {
            "processor": detect_machine().cpu,
            "threads": threads,
            "lines": len(lines),
            "rounds": rounds,
        }
        record = {
            **facts,
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
    pays = max(speeds["full, schema"], speeds["lossless, schema"]) >= WORTH * speeds["full"]
    if failed or (require and not (pays and shares["full, schema"] <= SHARE)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
