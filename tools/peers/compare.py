"""Compare the speed of a bundle with other decoders of the same checkpoint, interleaved in one run.

    python -m tools.peers.compare BUNDLE --against hf --against genai --model path/to/checkpoint
    python -m tools.peers.compare fp32 int8 --against genai --against genai-int4 --save run.json

Each decoder runs in its own process, because thread pools of two libraries slow each other down
within one. Peers have their own environments in the user's cache. All decoders decode the same
prompts greedily to the same number of tokens, on the same processors.

--against names peers (tools/peers/catalog.py), or the checkpoint, which transformers then runs in
this environment. Tokens are compared with those of the checkpoint, or of `hf`. Run from the
project's root on an idle machine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from freeexport.costs.bytes import Calls
from freeexport.costs.measured import bandwidth_of
from freeexport.costs.timing import interleave
from freeexport.evaluate.measure import timing_of
from freeexport.evaluate.records import Record
from freeexport.evaluate.settings import (
    METHODS,
    SPEED_DEFAULTS,
    Entry,
    EvaluateOptions,
    Setting,
    bundle_and_methods,
    entries_of,
    methods_of,
)
from freeexport.evaluate.speed import add_rooflines, check_comparable, speed_prompts
from freeexport.evaluate.speed_rows import (
    row_names,
    speed_facts,
    speed_lines,
    speed_report,
    speed_rows,
    speed_sheet,
)
from freeexport.system.child import PACKAGES
from freeexport.system.load import other_load
from freeexport.system.output import check_writable, write_whole
from freeexport.system.page import print_page
from freeexport.system.sheet import terminal
from runtime.errors import FreeExportError, OptionError
from tools.peers.catalog import (
    OURS,
    PEERS,
    Source,
    find_peer,
    find_source,
    peer_command,
    peer_model,
)
from tools.peers.worker import PeerError, Worker

# Time limit for one answer, in seconds. A large model takes minutes to load.
LIMIT = 600.0
# Pause between decoders, in seconds. Threads of some libraries keep spinning after their work.
SETTLE = 0.3
TRUTH = "transformers"


@dataclass(frozen=True)
class Contender:
    """A decoder in the comparison.

    Attributes:
        name: Name in the table.
        precision: Precision shown in the table.
        command: Command of its process.
        model: Path that it loads.
        options: Options for loading.
        setting: Setting of a bundle. None for peers, whose failures are reported in the table.
    """

    name: str
    precision: str
    command: list[str]
    model: str
    options: dict[str, Any]
    setting: Setting | None = None

    def load(self, threads: int) -> tuple[Worker, dict[str, str]]:
        """Start the process and load the model. Returns the process and the versions of its
        libraries.

        Raises:
            PeerError: If it fails.
        """
        usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        variables = {
            # The packages may be in a source tree that is only on this process's path.
            "PYTHONPATH": os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            # Hide GPUs, which libraries would use.
            "CUDA_VISIBLE_DEVICES": "",
        }
        worker = Worker(self.command, variables)
        # All use the same processors, if there are enough.
        request = {"op": "load", "model": self.model, "threads": threads, "options": self.options}
        request["cpus"] = usable[:threads] if threads <= len(usable) else []
        try:
            return worker, worker.ask(request, LIMIT)["versions"]
        except PeerError:
            worker.close()
            raise


def decode(
    worker: Worker, prompt: Sequence[int], count: int, name: str = "", line: int = 1, turn: int = 0
) -> Record:
    """Let a decoder's process decode a prompt, and return its record.

    Args:
        worker: The process.
        prompt: Token ids.
        count: Tokens to generate.
        name: Name of the decoder.
        line: Number of the prompt, from 1.
        turn: Number of the round, from 0.
    """
    answer = worker.ask({"op": "generate", "prompt": list(prompt), "tokens": count}, LIMIT)
    optional = ("acceptance", "overhead")
    return Record(
        *("", name, line, turn),
        tokens=len(answer["tokens"]),
        token_ids=tuple(answer["tokens"]),
        exited=tuple(answer.get("exited", ())),
        calls=Calls.read(answer["calls"]) if "calls" in answer else None,
        peak_bytes=answer["peak_bytes"],
        busy=0.0,
        **timing_of(answer["times"], answer["seconds"]),
        **{field: answer[field] for field in optional if field in answer},
    )


def contenders_of(
    against: Sequence[str], source: Source | None, entries: Sequence[Entry]
) -> tuple[list[Contender], dict[str, str]]:
    """Return the contenders, and why others cannot run.

    Peers come first, in the order given, then each bundle's settings. Builds missing environments
    and models of peers.

    Raises:
        OptionError: If a peer needs the checkpoint, and it is not given.
    """
    found: list[Contender] = []
    failed: dict[str, str] = {}
    manifest = entries[0].bundle.manifest
    for name in against:
        peer = find_peer(name)
        if peer is None:
            found.append(Contender(TRUTH, "fp32", OURS, name, {"checkpoint": True}))
            continue
        if source is None:
            raise OptionError(
                f"--against {name} needs the checkpoint that the bundle came from "
                f"({manifest.source}); give it with --model"
            )
        given = {**peer.options, "encoder_decoder": source.encoder_decoder}
        if "early_exit" in given:
            given["early_exit"] = manifest.exit_layer
        try:
            command = peer_command(peer)
            model = str(peer_model(peer, source, command))
            found.append(Contender(peer.name, peer.precision, command, model, given))
        except PeerError as error:
            failed[name] = str(error)
    names = row_names(entries)
    for entry in entries:
        for setting in entry.settings:
            contender = Contender(
                names[entry.name, setting.name],
                entry.bundle.manifest.precision,
                command=OURS,
                model=str(entry.bundle.path),
                options=asdict(setting),
                setting=setting,
            )
            found.append(contender)
    return found, failed


def measure(
    contenders: Sequence[Contender],
    prompts: Sequence[Sequence[int]],
    options: EvaluateOptions,
    settle: float = SETTLE,
) -> tuple[dict[str, dict[int, list[Record]]], dict[str, dict[str, str]], dict[str, str]]:
    """Let every contender decode every prompt in each round, after one round to warm up.

    Returns records by name and line, library versions by name, and why others have none.

    Raises:
        FreeExportError: If one of our own decoders fails.
    """
    running: dict[str, Worker] = {}
    versions: dict[str, dict[str, str]] = {}
    failed: dict[str, str] = {}
    most = options.max_new_tokens

    def fail(contender: Contender, error: PeerError) -> None:
        if contender.setting is not None:
            raise FreeExportError(f"{contender.name}: {error}") from None
        failed[contender.name] = str(error)

    def run(contender: Contender, block: Sequence[Sequence[int]]) -> list[Record]:
        name = contender.name
        if name in failed:
            return []
        time.sleep(settle)
        try:
            return [
                decode(running[name], prompt, most, name, line)
                for line, prompt in enumerate(block, 1)
            ]
        except PeerError as error:
            fail(contender, error)
            return []

    with ExitStack() as stack:
        for one in contenders:
            try:
                running[one.name], versions[one.name] = one.load(options.count)
                stack.callback(running[one.name].close)
            except PeerError as error:
                fail(one, error)
        turns = list(interleave(contenders, [prompts], options.rounds, run))
    found: dict[str, dict[int, list[Record]]] = {}
    for number, one in enumerate(contenders):
        if one.name not in failed:
            lines = found.setdefault(one.name, {})
            for turn in turns:
                for record in turn.runs[number]:
                    lines.setdefault(record.line, []).append(replace(record, round=turn.round))
    return found, versions, failed


def compare(options: EvaluateOptions, against: Sequence[str], model: str | None) -> dict[str, Any]:
    """Run the comparison, and return a report of speed, as `freeexport evaluate --json`."""
    entries = entries_of(options)
    check_comparable([entry.bundle for entry in entries])
    first = entries[0].bundle
    named = model or next((name for name in against if find_peer(name) is None), None)
    source = None if named is None else find_source(first.manifest, named)
    prompts = speed_prompts(first, options.data, options.samples)
    contenders, missing = contenders_of(against, source, entries)
    bandwidth = bandwidth_of(options.count)
    with other_load() as load:
        found, versions, failed = measure(contenders, prompts, options)
    # Reference tokens: those of transformers in fp32.
    truth = next((name for name in (TRUTH, "hf") if name in found), None)
    rows = speed_rows(found, {one.name: one.precision for one in contenders}, truth, versions)
    add_rooflines(rows, entries, found, bandwidth)
    facts = speed_facts(
        first.manifest,
        threads=options.count,
        device=options.device,
        prompts=len(prompts),
        tokens=options.max_new_tokens,
        rounds=options.rounds,
        reference=truth,
        busy=load.cores,
    )
    usable = [
        one.name for one in contenders if one.setting is None or one.setting.method != "static"
    ]
    return speed_report(rows, facts, bandwidth, usable, {**missing, **failed})


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE[=METHODS]...")
@click.option(
    "--against",
    multiple=True,
    metavar="PEER|MODEL",
    help=f"{', '.join(PEERS)}, or the checkpoint.",
)
@click.option("--model", help="Checkpoint of the bundle, for peers.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="JSON lines with prompts.  [default: four sample texts]",
)
@click.option("--samples", type=click.IntRange(1), default=SPEED_DEFAULTS["samples"])
@click.option(
    "--tokens", "max_new_tokens", type=click.IntRange(2), default=SPEED_DEFAULTS["max_new_tokens"]
)
@click.option("--methods", default="full", help=f"Of {', '.join(METHODS)}.")
@click.option("--threshold", "thresholds", type=float, multiple=True)
@click.option("--rounds", type=click.IntRange(1), default=SPEED_DEFAULTS["rounds"])
@click.option("--threads", type=click.IntRange(1))
@click.option("--save", type=click.Path(path_type=Path), help="File for the figures, as JSON.")
def main(
    bundles: tuple[str, ...],
    against: tuple[str, ...],
    model: str | None,
    methods: str,
    save: Path | None,
    **given: Any,
) -> None:
    if len(set(against)) < len(against):
        raise OptionError(f"--against names {max(against, key=against.count)} twice; name it once")
    check_writable(save, "--save")
    chosen = tuple(bundle_and_methods(text, methods_of(methods)) for text in bundles)
    found = compare(EvaluateOptions(chosen, **given), against, model)
    if save is not None:
        write_whole(save, json.dumps(found, indent=2) + "\n")
    print_page([terminal(speed_sheet(found))])
    reasons = [f"{name}: not run: {reason}" for name, reason in found["failed"].items()]
    click.echo("\n".join([*reasons, *speed_lines(found), "", found["verdict"]]))


if __name__ == "__main__":
    main()
