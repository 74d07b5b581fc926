"""Train a small T5 from random weights to translate Debian's package descriptions and to exit early, and evaluate it.

    python -m tools.models.translation build/translation

English to German, 28,000 pairs; data needs apt and a network. A model of this size, trained for minutes of one core,
hardly translates (docs/results/translation.md). What stands in WORK already is not made again.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tools.data.g2p_tokenizer import EOS, PAD, UNKNOWN, Sizes, write_files
from tools.data.splits import run
from tools.models.recipe import convert, first_lines, python, train

SIZES = Sizes(d_model=192, d_ff=512, heads=4, layers=3, decoder_layers=6)
VOCABULARY = 4000  # tokens, of both languages together
EXIT_LAYER = 2
LONGEST, MOST = 128, 96  # tokens of a training pair; new tokens of an output
VALIDATION, CALIBRATION = 200, 100  # lines
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)


def build_tokenizer(texts: list[str]) -> Tokenizer:
    """A unigram vocabulary of the texts, spaces marked as in SentencePiece, EOS at the end."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = [PAD, EOS, UNKNOWN]
    trainer = trainers.UnigramTrainer(vocab_size=VOCABULARY, special_tokens=special, unk_token=UNKNOWN)
    tokenizer.train_from_iterator(texts, trainer)
    ending = (EOS, tokenizer.token_to_id(EOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[ending])
    return tokenizer


def write_start(directory: Path, data: Path) -> Path:
    """Configuration and tokenizer, which `train --from-config` begins with; returns `directory`."""
    if not directory.exists():
        lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
        directory.mkdir()
        write_files(directory, SIZES, build_tokenizer([line[name] for line in lines for name in ("input", "target")]))
    return directory


@click.command(context_settings={"show_default": True})
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.option("--minutes", type=float, default=25, help="Of training, on one core.")
@click.option("--samples", type=click.IntRange(10), default=50, help="Lines of the evaluation.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Of the evaluation.")
def command(work: Path, minutes: float, samples: int, threads: int) -> None:
    """Train into WORK/exit, convert it to WORK/fp32, and evaluate that into WORK/evaluation."""
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    data = work / "data"
    if not data.exists():
        python("tools.data.debian", "translation-de", data)
    start = write_start(work / "init", data / "train.jsonl")
    validation = first_lines(data / "validation.jsonl", VALIDATION, work / "validation.jsonl")
    given = ("--data", data / "train.jsonl", "--validation", validation, "--from-config", "--max-tokens", LONGEST)
    pace = ("--batch-tokens", 2048, "--learning-rate", 1e-3, "--schedule", "hold", "--warmup", 0.03)
    length = ("--time-limit", minutes, "--patience", 0, "--evaluate-every", 100)
    model = train(start, work / "exit", *given, "--exit-layer", EXIT_LAYER, "--loss", "logit-kd", *pace, *length)
    calibration = first_lines(data / "calibration.jsonl", CALIBRATION, work / "calibration.jsonl")
    bundle = convert(model, work / "fp32", calibration, MOST)
    pairs = [("--metric", name) for name in ("chrf", "bleu")] + [("--threshold", value) for value in THRESHOLDS]
    test = ("--data", data / "test.jsonl", "--samples", samples, "--max-new-tokens", MOST, "--threads", threads)
    methods = ("--methods", "full,static,free,lossless")
    named = (part for pair in pairs for part in pair)
    python("freeexport", "evaluate", bundle, *test, *methods, *named, "--output", work / "evaluation")


if __name__ == "__main__":
    run(command)
