"""Measures word error rate and seconds of Whisper bundles, by mode and against faster-whisper.

    python -m tools.peers.speech test.jsonl --bundle int8=whisper-int8 \\
        --peer int8=ct2-model --packages DIR
    python -m tools.peers.speech test.jsonl --bundle exit=trained-int8 \\
        --modes full,lossless --rounds 3

The lines are those of tools/data/speech.py. A peer is a CTranslate2 model that the faster-whisper
in DIR (pip install --target DIR faster-whisper) decodes in a child process. Settings are the same
as for bundles: one thread, one beam, no timestamps, English, and no fallback temperatures. All
decoders take turns at each line, in rotating order. Words are compared without case and
punctuation. All tokens of lossless are compared with full.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import click
import jiwer
import numpy as np

from freeexport.calibrate.sources import fitting_prompts
from freeexport.calibrate.traces import Traces, trace_of
from freeexport.checkpoints.examples import read_examples
from freeexport.costs.replay import ReplaySession
from freeexport.system.machine import detect_machine
from runtime import Session
from runtime.audio import read_audio

WORKER = """
import json, sys
from time import perf_counter
import faster_whisper
from faster_whisper.audio import decode_audio
model = faster_whisper.WhisperModel(sys.argv[1], device="cpu", compute_type=sys.argv[2], \
cpu_threads=1, num_workers=1)
print("ready", flush=True)
for path in sys.stdin:
    sound = decode_audio(path.strip())
    began = perf_counter()
    found, _ = model.transcribe(sound, language="en", beam_size=1, best_of=1, temperature=0.0, \
without_timestamps=True,
                                condition_on_previous_text=False, compression_ratio_threshold=None,
                                log_prob_threshold=None, no_speech_threshold=None)
    text = "".join(segment.text for segment in found)
    print(json.dumps({"text": text, "seconds": perf_counter() - began}), flush=True)
"""
PLACES = (2, 9, 17, 33, 65)
OURS: dict[str, Any] = {"language": "en", "max_new_tokens": 224, "fallback_temperatures": ()}


class FasterWhisper:
    """faster-whisper in a child process.

    Args:
        model: CTranslate2 model.
        precision: Precision of the weights.
        packages: Directory of the installed faster-whisper.
    """

    def __init__(self, model: str, precision: str, packages: Path) -> None:
        variables = {
            **os.environ,
            "PYTHONPATH": str(packages),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        kind = {"fp32": "float32"}.get(precision, precision)
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, model, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
        )
        if self._read() != "ready":
            self.close()
            raise click.ClickException(f"faster-whisper does not start with {model}; see above")

    def run(self, path: Path) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._read())
        return answer

    def close(self) -> None:
        """End the process."""
        with self._process:
            self._process.terminate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def run(session: Session, mode: str, path: Path) -> dict[str, Any]:
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


def agreement(directory: str, data: Path, samples: int) -> dict[str, Any]:
    """Return the agreement of the exit with the deep decoder, by place and by confidence."""
    with ReplaySession(directory, threads=1) as session:
        prompts = fitting_prompts(session, read_examples(data, samples))
        most = OURS["max_new_tokens"]
        traces = Traces.joined(
            trace_of(session, one.line_number, prompt, most) for one, prompt in prompts
        )
    # The exit never predicts the first token.
    place = np.concatenate([np.arange(length) for length in traces.length]) + 2
    found: dict[str, Any] = {"tokens": traces.tokens, "agreement": round(traces.agreement, 4)}
    for low, high in zip(PLACES, [*PLACES[1:], 1 << 30], strict=True):
        among = (place >= low) & (place < high)
        if among.any():
            found[f"from {low}"] = {
                "tokens": int(among.sum()),
                "agreement": round(float(traces.agrees[among].mean()), 4),
            }
    for threshold in (0.5, 0.9):
        above = traces.above(threshold)
        right = float(traces.agrees[above].mean()) if above.any() else None
        found[f"above {threshold}"] = {
            "share": round(float(above.mean()), 4),
            "agreement": right and round(right, 4),
        }
    return found


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


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--bundle", "bundles", multiple=True, metavar="NAME=DIR", required=True)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="PRECISION=MODEL",
    help="A CTranslate2 model: int8 or fp32.",
)
@click.option("--packages", type=click.Path(path_type=Path), help="Where faster-whisper is.")
@click.option("--modes", default="full", help="Of the bundles, with commas between.")
@click.option(
    "--traces", is_flag=True, help="Of the bundles, also the agreement of exits by place."
)
@click.option("--rounds", default=1)
@click.option("--samples", default=1000)
@click.option("--output", type=click.Path(path_type=Path), help="JSON; what is there is added to.")
@click.option("--title", default="speech", help="The run's name in it.")
def main(
    data: Path,
    bundles: tuple[str, ...],
    peers: tuple[str, ...],
    packages: Path | None,
    modes: str,
    traces: bool,
    rounds: int,
    samples: int,
    output: Path | None,
    title: str,
) -> None:
    """Decode each line of DATA with all decoders, and print word error rates and speeds."""
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()][:samples]
    decoders: dict[str, Any] = {}
    with ExitStack() as stack:
        for given in bundles:
            name, _, directory = given.partition("=")
            session = stack.enter_context(Session(directory, threads=1, slots=1))
            for mode in modes.split(","):
                decoders[f"{name} {mode}"] = lambda path, session=session, mode=mode: run(
                    session, mode, path
                )
        for given in peers:
            precision, _, model = given.partition("=")
            peer = stack.enter_context(closing(FasterWhisper(model, precision, packages or Path())))
            decoders[f"{precision} faster-whisper"] = peer.run
        names = list(decoders)
        runs: dict[str, list[list[dict[str, Any]]]] = {name: [[] for _ in lines] for name in names}
        for turn in range(rounds):
            for place, line in enumerate(lines):
                shift = (turn + place) % len(names)
                for name in names[shift:] + names[:shift]:
                    runs[name][place].append(decoders[name](data.parent / line["audio"]))
    check_equality(runs)
    groups = table(runs, lines, names[0])
    made = {
        "machine": detect_machine().cpu,
        "clips": len(lines),
        "rounds": rounds,
        "groups": groups,
    }
    if traces:
        parts = (given.partition("=") for given in bundles)
        made["exit"] = {name: agreement(directory, data, samples) for name, _, directory in parts}
    text = json.dumps(made, indent=1)
    click.echo(text)
    if output is not None:
        known = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
        output.write_text(json.dumps({**known, title: made}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
