"""Measures word error rate and seconds of Whisper bundles, by mode and against faster-whisper.

    python -m tools.peers speech test.jsonl --bundle int8=whisper-int8 --peer int8=ct2-model
    python -m tools.peers speech test.jsonl --bundle exit=trained-int8 --modes full,lossless

The lines are those of tools/data/speech.py. A peer is a CTranslate2 model that faster-whisper
decodes in a process of its own. Settings are the same as for bundles: one thread, one beam, no
timestamps, English, and no fallback temperatures. All decoders take turns at each line, in rotating
order. Words are compared without case and punctuation. All tokens of lossless are compared with
full.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Mapping
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

OURS: dict[str, Any] = {"language": "en", "max_new_tokens": 224, "fallback_temperatures": ()}


def run(session: Session, mode: Mode, path: Path) -> dict[str, Any]:
    """Transcribe a clip with a bundle. Seconds include the spectrogram."""
    samples = read_audio(path)
    began = time.perf_counter()
    result = session.generate(samples, mode=mode, **OURS)
    stats = result.stats
    return {
        "text": result.text,
        "seconds": time.perf_counter() - began,
        "encode": stats.encode_seconds,
        "decode": stats.seconds - stats.encode_seconds,
        "ids": result.token_ids,
        "tokens": stats.tokens,
    }


def words(text: str) -> str:
    return " ".join(re.sub(r"[^a-z0-9' ]", " ", text.lower().replace("-", " ")).split())


def ratio(pairs: list[list[tuple[dict[str, Any], dict[str, Any]]]], field: str) -> float:
    """Return the median ratio of a field of two runs, over rounds and then over lines."""
    return round(
        float(np.median([np.median([a[field] / b[field] for a, b in line]) for line in pairs])), 3
    )


def table(
    runs: dict[str, list[list[dict[str, Any]]]], lines: list[dict[str, Any]], first: str
) -> dict[str, Any]:
    """Return word error rates and median times by group of lines and by decoder.

    Args:
        runs: `runs[name][line][round]`.
        lines: Lines of the data.
        first: Decoder that speeds are relative to.
    """
    found: dict[str, Any] = {}
    groups = defaultdict(list)
    for place, line in enumerate(lines):
        for group in {line.get("length", "all"), line.get("voice", "all"), "all"}:
            groups[group].append(place)
    for group, places in sorted(groups.items()):
        texts = [words(lines[place]["target"]) for place in places]
        found[group] = {"clips": len(places)}
        for name, rounds in runs.items():
            clips = [rounds[place] for place in places]
            seconds = [np.median([one["seconds"] for one in clip]) for clip in clips]
            pairs = [list(zip(runs[first][place], rounds[place], strict=True)) for place in places]
            row = {
                "wer": round(jiwer.wer(texts, [words(clip[0]["text"]) for clip in clips]), 4),
                "seconds": round(float(np.median(seconds)), 4),
                f"times_as_fast_as_{first}": ratio(pairs, "seconds"),
            }
            if "encode" in clips[0][0]:
                if "decode" in runs[first][0][0]:
                    row[f"decoding_times_as_fast_as_{first}"] = ratio(pairs, "decode")
                shares = [
                    np.median([one["encode"] / one["seconds"] for one in clip]) for clip in clips
                ]
                row["encoder_share"] = round(float(np.median(shares)), 3)
                row["tokens"] = float(np.median([clip[0]["tokens"] for clip in clips]))
            found[group][name] = row
    return found


def check_equality(runs: Mapping[str, list[list[dict[str, Any]]]]) -> None:
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
        runs: dict[str, list[list[dict[str, Any]]]] = {name: [[] for _ in lines] for name in names}
        for turn in range(rounds):
            for place, line in enumerate(lines):
                shift = (turn + place) % len(names)
                for name in names[shift:] + names[:shift]:
                    runs[name][place].append(decoders[name](data.parent / line["audio"]))
    check_equality(runs)
    groups = table(runs, lines, names[0])
    text = json.dumps({**environment(), "rounds": rounds, "groups": groups}, indent=1)
    click.echo(text)
    if save is not None:
        write_whole(save, text + "\n")
