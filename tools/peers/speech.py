"""Measures word error rate and seconds of Whisper bundles, by mode and against faster-whisper.

    python -m tools.peers speech test.jsonl --bundle int8=whisper-int8 --peer int8=ct2-model
    python -m tools.peers speech test.jsonl --bundle exit=trained-int8 --modes full,lossless

A line of the data has `audio`, a path relative to the file, and `target`, its text. A peer is a
CTranslate2 model that faster-whisper decodes in a process of its own. Settings are the same as for
bundles: one thread, one beam, no timestamps, English, and no fallback temperatures. All decoders
take turns at each line, in rotating order. Words are compared without case and punctuation. All
tokens of lossless are compared with full.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import jiwer
import numpy as np

from freeexport.system.environment import environment
from freeexport.system.output import check_writable, write_whole
from runtime import Session
from runtime.options.generation_options import Mode
from runtime.speech.audio import read_audio
from tools.peers.catalog import PEERS, chosen
from tools.peers.measure import Contender, ask

Run = Mapping[str, Any]
OURS: dict[str, Any] = {"language": "en", "max_new_tokens": 224, "fallback_temperatures": ()}


def run(session: Session, mode: Mode, path: Path) -> Run:
    """Transcribe a clip with a bundle. Seconds include the spectrogram."""
    samples = read_audio(path)
    began = time.perf_counter()
    result = session.generate(samples, mode=mode, **OURS)
    seconds = time.perf_counter() - began
    return {"text": result.text, "seconds": seconds, "ids": result.token_ids}


def words(text: str) -> str:
    return " ".join(re.sub(r"[^a-z0-9' ]", " ", text.lower().replace("-", " ")).split())


def figures(
    runs: Mapping[str, Sequence[Sequence[Run]]], targets: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return word error rate, median seconds, and speed relative to the first, by decoder.

    Args:
        runs: `runs[name][line][round]`.
        targets: Text of each line.
    """
    texts = [words(target) for target in targets]
    base = next(iter(runs.values()))
    found = {}
    for name, clips in runs.items():
        # Medians over the rounds of a clip, and then over clips.
        seconds = [np.median([one["seconds"] for one in clip]) for clip in clips]
        speeds = [
            np.median([a["seconds"] / b["seconds"] for a, b in zip(ours, clip, strict=True)])
            for ours, clip in zip(base, clips, strict=True)
        ]
        found[name] = {
            "wer": round(jiwer.wer(texts, [words(clip[0]["text"]) for clip in clips]), 4),
            "seconds": round(float(np.median(seconds)), 4),
            "speed": round(float(np.median(speeds)), 3),
        }
    return found


def check_equality(runs: Mapping[str, Sequence[Sequence[Run]]]) -> None:
    """Check that lossless generates the tokens of full.

    Raises:
        ClickException: If outputs of a bundle differ.
    """
    for name in runs:
        full = name.rpartition(" ")[0] + " full"
        if not name.endswith(" lossless") or full not in runs:
            continue
        pairs = zip(runs[name], runs[full], strict=True)
        different = sum(
            a["ids"] != b["ids"] for one, other in pairs for a, b in zip(one, other, strict=True)
        )
        if different:
            raise click.ClickException(f"{different} outputs of {name} have other tokens than full")


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--bundle", "bundles", multiple=True, metavar="NAME=DIR", required=True)
@click.option("--peer", "models", multiple=True, metavar="int8|fp32=CT2_MODEL")
@click.option("--modes", default="full", help="Of the bundles, with commas between.")
@click.option("--rounds", default=1)
@click.option("--samples", default=1000, help="Use only the first N lines of DATA.")
@click.option("--save", type=click.Path(path_type=Path), help="File for the figures, as JSON.")
def main(
    data: Path,
    bundles: tuple[str, ...],
    models: tuple[str, ...],
    modes: str,
    rounds: int,
    samples: int,
    save: Path | None,
) -> None:
    check_writable(save, "--save")
    if models:
        chosen(["faster-whisper"])
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()][:samples]
    decoders: dict[str, Any] = {}
    with ExitStack() as stack:
        for given in bundles:
            name, _, directory = given.partition("=")
            session = stack.enter_context(Session(directory, threads=1, slots=1, draft_memory_mb=0))
            for mode in modes.split(","):
                decoders[f"{name} {mode}"] = lambda path, session=session, mode=mode: run(
                    session, mode, path
                )
        for given in models:
            precision, _, model = given.partition("=")
            name = f"{precision} faster-whisper"
            options = {"compute_type": precision.replace("fp32", "float32")}
            command = PEERS["faster-whisper"].command
            worker, _ = Contender(name, precision, command, model, options).load(1)
            stack.callback(worker.close)
            decoders[name] = lambda path, worker=worker: ask(worker, [str(path)], 0)
        names = list(decoders)
        runs: dict[str, list[list[Run]]] = {name: [[] for _ in lines] for name in names}
        for turn in range(rounds):
            for place, line in enumerate(lines):
                shift = (turn + place) % len(names)
                for name in names[shift:] + names[:shift]:
                    runs[name][place].append(decoders[name](data.parent / line["audio"]))
    check_equality(runs)
    rows = figures(runs, [line["target"] for line in lines])
    content = {**environment(), "rounds": rounds, "clips": len(lines), "rows": rows}
    text = json.dumps(content, indent=1)
    click.echo(text)
    if save is not None:
        write_whole(save, text + "\n")
