"""Compare the speed of a bundle with that of other decoders of the same checkpoint, interleaved in one run.

    python -m tools.peers.compare BUNDLE --against hf --against genai --model path/to/checkpoint
    python -m tools.peers.compare fp32 int8 int4 --against genai --against genai-int4 --save run.json

Each decoder loads in a process of its own, because thread pools of two libraries slow each other down within one; peers
have environments of their own, which are built in the user's cache. All decode the same prompts greedily to the same
number of tokens, on the same processors. --against names peers (tools/peers/catalog.py) or the checkpoint, which
transformers then runs in this environment: tokens are compared with its, or those of `hf`. Run from the root on an
idle machine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from freeexport.measure.bench import (
    MODES,
    BenchOptions,
    BenchSetting,
    Run,
    add_roofline,
    bench_prompts,
    bench_sheet,
    facts_lines,
    facts_of,
    report,
    rows_of,
    settings_of,
)
from freeexport.measure.costs import bandwidth_of
from freeexport.measure.table import terminal
from freeexport.measure.timing import interleave
from freeexport.system.child import PACKAGES
from freeexport.system.load import other_load
from freeexport.system.output import check_writable, write_whole
from freeexport.system.page import print_page
from runtime.bundle.bundle import Bundle
from runtime.errors import FreeExportError, OptionError
from tools.peers.catalog import OURS, PEERS, Source, find_peer, find_source, peer_command, peer_model
from tools.peers.worker import PeerError, Worker

# Seconds for one answer: a large model takes minutes to load.
LIMIT = 600.0
# Seconds between decoders: threads of some libraries spin on after their work.
SETTLE = 0.3
TRUTH = "transformers"


@dataclass(frozen=True)
class Contender:
    """A decoder by its `command`, and what to load; `setting` where it is ours: then its failure is an error."""

    name: str
    precision: str
    command: list[str]
    model: str
    options: dict[str, Any]
    setting: BenchSetting | None = None

    def load(self, threads: int) -> tuple[Worker, dict[str, str]]:
        """Start the process and load the model: the process, and versions of its libraries. Raises PeerError."""
        usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        variables = {
            # The packages may stand in a source tree that only this process's path knows.
            "PYTHONPATH": os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            # Libraries that see a GPU would use it.
            "CUDA_VISIBLE_DEVICES": "",
        }
        worker = Worker(self.command, variables)
        # All are held to the same processors, where there are as many.
        request = {"op": "load", "model": self.model, "threads": threads, "options": self.options}
        request["cpus"] = usable[:threads] if threads <= len(usable) else []
        try:
            return worker, worker.ask(request, LIMIT)["versions"]
        except PeerError:
            worker.close()
            raise


def decode(worker: Worker, prompt: Sequence[int], count: int) -> Run:
    answer = worker.ask({"op": "generate", "prompt": list(prompt), "tokens": count}, LIMIT)
    known = {name: answer[name] for name in ("exit_rate", "acceptance", "overhead", "predicted") if name in answer}
    sizes = {int(rows): passes for rows, passes in answer.get("sync_sizes", {}).items()}
    tokens, times = tuple(answer["tokens"]), tuple(answer["times"])
    return Run(tokens, times, answer["seconds"], sync_sizes=sizes, peak_bytes=answer["peak_bytes"], **known)


def contenders_of(
    against: Sequence[str], source: Source | None, bundles: Sequence[Bundle], options: BenchOptions
) -> tuple[list[Contender], dict[str, str]]:
    """List the others in the order given, then each bundle's settings; and why others cannot run.

    Builds environments and models of peers, where they are not in the cache.
    """
    found: list[Contender] = []
    failed: dict[str, str] = {}
    for name in against:
        peer = find_peer(name)
        if peer is None:
            found.append(Contender(TRUTH, "fp32", OURS, name, {"checkpoint": True}))
            continue
        if source is None:
            raise OptionError(
                f"--against {name} needs the checkpoint that the bundle came from ({bundles[0].manifest.source}); "
                "give it with --model"
            )
        given = {**peer.options, "encoder_decoder": source.encoder_decoder}
        if "early_exit" in given:
            given["early_exit"] = bundles[0].manifest.exit_layer
        try:
            command = peer_command(peer)
            model = str(peer_model(peer, source, command))
            found.append(Contender(peer.name, peer.precision, command, model, given))
        except PeerError as error:
            failed[name] = str(error)
    for one in settings_of(options, bundles):
        bundle = bundles[one.bundle]
        found.append(Contender(one.name, bundle.manifest.precision, OURS, str(bundle.path), asdict(one), one))
    return found, failed


def measure(
    contenders: Sequence[Contender], prompts: Sequence[Sequence[int]], options: BenchOptions, settle: float = SETTLE
) -> tuple[dict[str, list[list[Run]]], dict[str, dict[str, str]], dict[str, str]]:
    """Let every contender decode every prompt in each round, after one to warm up: runs by name, the versions that
    served them, and why others have none. Raises FreeExportError where one of ours fails."""
    running: dict[str, Worker] = {}
    versions: dict[str, dict[str, str]] = {}
    failed: dict[str, str] = {}

    def fail(contender: Contender, error: PeerError) -> None:
        if contender.setting is not None:
            raise FreeExportError(f"{contender.name}: {error}") from None
        failed[contender.name] = str(error)

    def run(contender: Contender, block: Sequence[Sequence[int]]) -> list[Run]:
        if contender.name in failed:
            return []
        time.sleep(settle)
        try:
            return [decode(running[contender.name], prompt, options.tokens) for prompt in block]
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
    names = {number: one.name for number, one in enumerate(contenders) if one.name not in failed}
    return {name: [turn.runs[number] for turn in turns] for number, name in names.items()}, versions, failed


def compare(options: BenchOptions, against: Sequence[str], model: str | None) -> dict[str, Any]:
    """Measure, and return what JSON keeps, as `freeexport bench` does."""
    bundles = [Bundle.open(path) for path in options.bundles]
    named = model or next((name for name in against if find_peer(name) is None), None)
    source = None if named is None else find_source(bundles[0].manifest, named)
    prompts = bench_prompts(bundles[0], options.data, options.samples)
    contenders, missing = contenders_of(against, source, bundles, options)
    bandwidth = bandwidth_of(options.count)
    with other_load() as load:
        runs, versions, failed = measure(contenders, prompts, options)
    # Tokens of transformers in fp32, which others are compared with.
    truth = next((name for name in (TRUTH, "hf") if name in runs), None)
    tokens = None if truth is None else [run.tokens for run in runs[truth][0]]
    rows = rows_of(runs, {one.name: one.precision for one in contenders}, tokens, versions)
    by_name = {one.name: one.setting for one in contenders}
    for row in rows:
        setting = by_name[row["name"]]
        if setting is not None:
            add_roofline(row, bundles[setting.bundle], setting.mode, prompts, options.tokens, bandwidth)
    facts = facts_of(bundles[0], options, len(prompts), truth, load.cores)
    real = [one.name for one in contenders if one.setting is None or one.setting.real]
    return report(rows, facts, bandwidth, real, {**missing, **failed})


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--against", multiple=True, metavar="PEER|MODEL", help=f"{', '.join(PEERS)}, or the checkpoint.")
@click.option("--model", help="The checkpoint that the bundle came from, for peers.")
@click.option("--data", type=click.Path(path_type=Path), help="JSON lines with prompts.  [default: four sample texts]")
@click.option("--samples", type=click.IntRange(1), default=BenchOptions.samples)
@click.option("--tokens", type=click.IntRange(2), default=BenchOptions.tokens)
@click.option("--mode", "modes", type=click.Choice(MODES), multiple=True)
@click.option("--threshold", "thresholds", type=float, multiple=True)
@click.option("--drafts", multiple=True)
@click.option("--replay", multiple=True)
@click.option("--rounds", type=click.IntRange(1), default=BenchOptions.rounds)
@click.option("--threads", type=click.IntRange(1))
@click.option("--save", type=click.Path(path_type=Path), help="Also write the figures as JSON.")
def main(against: tuple[str, ...], model: str | None, save: Path | None, **given: Any) -> None:
    if len(set(against)) < len(against):
        raise OptionError(f"--against names {max(against, key=against.count)} twice; name it once")
    check_writable(save, "--save")
    found = compare(BenchOptions(**given), against, model)
    if save is not None:
        write_whole(save, json.dumps(found, indent=2) + "\n")
    print_page([terminal(bench_sheet(found))])
    reasons = [f"{name}: not run: {reason}" for name, reason in found["failed"].items()]
    click.echo("\n".join([*reasons, *facts_lines(found), "", found["verdict"]]))


if __name__ == "__main__":
    main()
