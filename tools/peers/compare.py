"""Compare the speed of a bundle with that of other decoders of the same checkpoint, interleaved in one run.

    python -m tools.peers.compare BUNDLE --against hf --against genai --model path/to/checkpoint
    python -m tools.peers.compare fp32 int8 int4 --against genai --against genai-int4 --save run.json

Each decoder loads in a process of its own, because thread pools of two libraries slow each other down within one; peers
have environments of their own, which are built in the user's cache. All decode the same prompts greedily to the same
number of tokens, on the same processors. --against names peers (tools/peers/catalog.py) or the checkpoint, which
transformers then runs in this environment. Run from the root on an idle machine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from freeexport.measure.bench import (
    MODES,
    BenchOptions,
    BenchSetting,
    Run,
    bench_prompts,
    bench_sheet,
    facts_lines,
    facts_of,
    labels,
    report,
    rows_of,
    settings_of,
    with_roofline,
)
from freeexport.measure.byte_model import bandwidth_of
from freeexport.measure.table import terminal
from freeexport.measure.timing import interleave, other_load
from freeexport.system.child import PACKAGES
from freeexport.system.output import check_writable, write_whole
from freeexport.system.page import print_page
from runtime.bundle.bundle import Bundle
from runtime.errors import FreeExportError, OptionError
from runtime.machine.machine import user_cache
from tools.peers.catalog import PEERS, Peer, find_peer
from tools.peers.environment import PeerError
from tools.peers.model import Source, installed, peer_command, peer_model
from tools.peers.worker import Worker

# Seconds for one answer: a compiling decoder takes minutes for its first prompt.
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


class Loaded:
    """A contender that is ready to decode. Raises PeerError where it cannot be had, or fails."""

    def __init__(self, contender: Contender, threads: int) -> None:
        self._worker = Worker(contender.command, variables(threads))
        request = {"op": "load", "model": contender.model, "threads": threads, "cpus": cpus_for(threads)}
        try:
            answer = self._worker.ask({**request, "options": contender.options}, LIMIT)
        except PeerError:
            self.close()
            raise
        self.versions: dict[str, str] = answer.get("versions", {})

    def run(self, prompt: Sequence[int], count: int) -> Run:
        answer = self._worker.ask({"op": "generate", "prompt": list(prompt), "tokens": count}, LIMIT)
        known = {name: answer[name] for name in ("exit_rate", "acceptance", "overhead", "predicted") if name in answer}
        sizes = {int(rows): passes for rows, passes in answer.get("sync_sizes", {}).items()}
        tokens, times = tuple(answer["tokens"]), tuple(answer["times"])
        return Run(tokens, times, answer["seconds"], sync_sizes=sizes, peak_bytes=answer["peak_bytes"], **known)

    def close(self) -> None:
        self._worker.close()


def cpus_for(threads: int) -> list[int]:
    """Processors that every contender is held to; none where there are not as many, or the system cannot."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return usable[:threads] if threads <= len(usable) else []


def variables(threads: int) -> dict[str, str]:
    # The packages may stand in a source tree that only this process's path knows.
    path = os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")]))
    return {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # Libraries that see a GPU would use it.
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHINDUCTOR_CACHE_DIR": str(user_cache("peers", "torchinductor")),
    }


OWN = [sys.executable, "-m", "tools.peers.server"]


def ours(setting: BenchSetting, bundle: Bundle) -> Contender:
    options = {**asdict(setting), "device": "cpu"}
    return Contender(setting.name, bundle.manifest.precision, OWN, str(bundle.path), options, setting)


def checkpoint(model: str) -> Contender:
    """transformers' generate in this environment, with the checkpoint that a bundle was made from."""
    return Contender(TRUTH, "fp32", OWN, model, {"checkpoint": True})


def peer_contender(peer: Peer, source: Source, exit_layer: int) -> Contender:
    """Build the peer's environment and its model, where they are not in the cache. Raises PeerError."""
    interpreter = installed(peer)
    options = {**peer.options, "encoder_decoder": source.encoder_decoder}
    if "early_exit" in options:
        options["early_exit"] = exit_layer
    model = str(peer_model(peer, source, interpreter))
    return Contender(peer.name, peer.precision, peer_command(peer, interpreter), model, options)


def contenders_of(
    against: Sequence[str], source: Source | None, bundles: Sequence[Bundle], options: BenchOptions
) -> tuple[list[Contender], dict[str, str]]:
    """List the others in the order given, then each bundle's settings; and why others cannot run."""
    found: list[Contender] = []
    failed: dict[str, str] = {}
    for name in against:
        peer = find_peer(name)
        if peer is None:
            found.append(checkpoint(name))
            continue
        if source is None:
            raise OptionError(
                f"--against {name} needs the checkpoint that the bundle came from ({bundles[0].manifest.source}); "
                "give it with --model"
            )
        try:
            found.append(peer_contender(peer, source, bundles[0].manifest.exit_layer))
        except PeerError as error:
            failed[name] = str(error)
    for number, (bundle, label) in enumerate(zip(bundles, labels(bundles), strict=True)):
        found += [ours(setting, bundle) for setting in settings_of(options, bundles, number, label)]
    return found, failed


def measure(
    contenders: Sequence[Contender], prompts: Sequence[Sequence[int]], options: BenchOptions, settle: float = SETTLE
) -> tuple[dict[str, list[list[Run]]], dict[str, dict[str, str]], dict[str, str]]:
    """Let every contender decode every prompt in each round, after one to warm up: runs by name, the versions that
    served them, and why others have none. Raises FreeExportError where one of ours fails."""
    running: dict[str, Loaded] = {}
    failed: dict[str, str] = {}

    def fail(contender: Contender, error: PeerError) -> None:
        if contender.setting is not None:
            raise FreeExportError(f"{contender.name}: {error}") from None
        failed[contender.name] = str(error)

    def decode(contender: Contender, block: Sequence[Sequence[int]]) -> list[Run]:
        if contender.name not in running or contender.name in failed:
            return []
        time.sleep(settle)
        try:
            return [running[contender.name].run(prompt, options.tokens) for prompt in block]
        except PeerError as error:
            fail(contender, error)
            return []

    with ExitStack() as stack:
        for contender in contenders:
            try:
                running[contender.name] = Loaded(contender, options.count)
                stack.callback(running[contender.name].close)
            except PeerError as error:
                fail(contender, error)
        turns = list(interleave(contenders, [prompts], options.rounds, decode))
    runs = {
        contender.name: [turn.runs[number] for turn in turns]
        for number, contender in enumerate(contenders)
        if contender.name not in failed
    }
    return runs, {name: loaded.versions for name, loaded in running.items()}, failed


def reference_tokens(
    runs: dict[str, list[list[Run]]], source: Source | None, prompts: Sequence[Sequence[int]], options: BenchOptions
) -> tuple[list[tuple[int, ...]] | None, str | None]:
    """Ask transformers in float32, whose tokens others are compared with; None where it cannot run here."""
    if TRUTH in runs:
        return [run.tokens for run in runs[TRUTH][0]], TRUTH
    if source is None:
        return None, None
    try:
        loaded = Loaded(checkpoint(source.model), options.count)
    except PeerError:
        return None, None
    try:
        return [loaded.run(prompt, options.tokens).tokens for prompt in prompts], TRUTH
    finally:
        loaded.close()


def compare(options: BenchOptions, against: Sequence[str], model: str | None) -> dict[str, Any]:
    """Measure, and return what JSON keeps, as `freeexport bench` does."""
    bundles = [Bundle.open(path) for path in options.bundles]
    named = model or next((name for name in against if find_peer(name) is None), None)
    source = Source.of(bundles[0].manifest, named)
    prompts = bench_prompts(bundles[0], options.data, options.samples)
    contenders, missing = contenders_of(against, source, bundles, options)
    bandwidth = bandwidth_of(options.count)
    with other_load() as load:
        runs, versions, failed = measure(contenders, prompts, options)
    tokens, truth = reference_tokens(runs, source, prompts, options)
    rows = rows_of(runs, {one.name: one.precision for one in contenders}, tokens, versions)
    by_name = {one.name: one.setting for one in contenders}
    context = round(fmean(map(len, prompts))), options.tokens / 2
    for number, row in enumerate(rows):
        setting = by_name[row.name]
        if setting is not None:
            rows[number] = with_roofline(row, bundles[setting.bundle], setting.mode, context, bandwidth)
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
