"""What a user decides about a training run, and which choices go together."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from freeexport.checkpoints.exit_file import LossName, Tune
from freeexport.checkpoints.transformers_model import Dtype
from freeexport.metrics import check_name
from runtime.errors import OptionError

Schedule = Literal["linear", "cosine", "constant", "hold", "inverse-sqrt"]

# Losses for --tune exit: the others train layers, which it freezes.
EXIT_LOSSES: tuple[LossName, ...] = ("ce", "logit-kd")
DEFAULT_RATES: dict[Tune, float] = {"full": 1e-4, "lora": 1e-4, "exit": 1e-3}
RANDOM_WEIGHTS_RATE = 1e-3
DEFAULT_EPOCHS = 3.0
# What every evaluation measures and a run may be selected by: `loss`, which is to be low, and shares.
MEASURED = ("loss", "agreement", "exits")
DEFAULT_ADAPTER_RANK = 64
# May differ between a run and its continuation without changing the loss curve of the steps they share.
_FREE_ON_RESUME = ("time_limit", "patience", "resume", "overwrite")


@dataclass(frozen=True)
class LoraOptions:
    """Rank, numerator of the scale, and names of the linear layers ("all-linear": every one but the head)."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("all-linear",)
    dropout: float = 0.0


# `paper-t5-3b`: the LoRA setting of FREE's T5-3B.
LORA_PRESETS: dict[str, LoraOptions] = {"paper-t5-3b": LoraOptions(rank=64, alpha=128.0)}


@dataclass(frozen=True)
class TrainingOptions:
    """One run of `freeexport train`. None stands for a default that depends on other options.

    `time_limit` is in minutes; `batch_tokens` counts padded tokens, prompt and target, and replaces `batch_size`
    (examples); both are of one device and one micro-batch. `validation_share` is used without a validation file.
    `select_by`: one of MEASURED, or a metric of the outputs for the first `select_samples` validation examples.
    `truncate`: long inputs are cut (TextFormat), not left out. `label_smoothing`: of the cross-entropies, in training.
    Raises OptionError for values out of range and for choices that contradict each other.
    """

    data: Path
    exit_layer: int
    validation: Path | None = None
    validation_share: float = 0.02
    loss: LossName = "logit-kd"
    loss_alpha: float = 0.5
    tune: Tune = "full"
    lora: LoraOptions = LoraOptions()
    adapter_rank: int = DEFAULT_ADAPTER_RANK
    exit_layers: int = 0
    from_config: bool = False
    steps: int | None = None
    epochs: float | None = None
    time_limit: float | None = None
    batch_size: int = 32
    batch_tokens: int | None = None
    accumulate: int = 1
    learning_rate: float | None = None
    schedule: Schedule = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    dropout: float | None = None
    train_on_input: bool = False
    bf16: bool = False
    dtype: Dtype = "float32"
    gradient_checkpointing: bool = False
    max_tokens: int | None = None
    truncate: bool = False
    label_smoothing: float = 0.0
    evaluate_every: int | None = None
    select_by: str = "loss"
    select_samples: int = 64
    log_every: int = 10
    patience: int = 5
    seed: int = 0
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        _choice("loss", self.loss, get_args(LossName))
        _choice("tune", self.tune, get_args(Tune))
        _choice("schedule", self.schedule, get_args(Schedule))
        for name in (
            "batch_size",
            "accumulate",
            "evaluate_every",
            "log_every",
            "steps",
            "batch_tokens",
            "max_tokens",
            "select_samples",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{_flag(name)} is {value}; give at least 1")
        for name in ("epochs", "time_limit", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise OptionError(f"{_flag(name)} is {value}; give a number above 0")
        for name in ("loss_alpha", "warmup", "weight_decay", "adapter_rank", "exit_layers", "patience"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{_flag(name)} is {getattr(self, name)}; give 0 or more")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise OptionError(f"--dropout is {self.dropout}; give a number from 0 to below 1")
        if not 0 <= self.label_smoothing < 1:
            raise OptionError(f"--label-smoothing is {self.label_smoothing}; give a number from 0 to below 1")
        if not 0 < self.validation_share < 1:
            raise OptionError(f"--validation-share is {self.validation_share}; give a number between 0 and 1")
        if self.lora.rank < 1 or not 0 < self.lora.alpha < math.inf:
            raise OptionError(f"LoRA rank {self.lora.rank} and alpha {self.lora.alpha} must be above 0 and finite")
        if not 0 <= self.lora.dropout < 1:
            raise OptionError(f"--lora-dropout is {self.lora.dropout}; give a number from 0 to below 1")
        if self.select_by not in MEASURED:
            check_name(self.select_by)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise OptionError("--steps and --epochs contradict each other; choose one")
        if self.tune == "exit" and self.loss not in EXIT_LOSSES:
            raise OptionError(
                f"--loss {self.loss} trains layers, which --tune exit freezes; choose {', '.join(EXIT_LOSSES)}"
            )
        if self.tune == "exit" and self.label_smoothing:
            raise OptionError("--label-smoothing is for --tune full and lora; the exit learns what the model predicts")
        if self.tune == "exit" and self.select_by not in MEASURED:
            raise OptionError(
                f"--select-by {self.select_by} measures the whole model, which --tune exit freezes; choose "
                f"{', '.join(MEASURED)}"
            )
        if self.exit_layers and self.loss == "weighted-ce":
            raise OptionError("--loss weighted-ce is for an exit without layers of its own; choose logit-kd or ce")
        if self.from_config and self.tune != "full":
            raise OptionError(f"--tune {self.tune} needs trained weights, --from-config has none; use --tune full")
        if self.resume and self.overwrite:
            raise OptionError("--resume and --overwrite contradict each other; choose one")

    @property
    def rate(self) -> float:
        """Peak learning rate."""
        return self.learning_rate or (RANDOM_WEIGHTS_RATE if self.from_config else DEFAULT_RATES[self.tune])

    @property
    def epoch_count(self) -> float | None:
        """Passes over the data; None where steps or the time limit alone end the run."""
        if self.steps is not None or (self.epochs is None and self.time_limit is not None):
            return None
        return self.epochs or DEFAULT_EPOCHS

    def recorded(self) -> dict[str, Any]:
        """What a continued run must share with the run that it continues, as JSON values."""
        values = {key: value for key, value in asdict(self).items() if key not in _FREE_ON_RESUME}
        for name in ("data", "validation"):
            values[name] = None if values[name] is None else str(Path(values[name]).absolute())
        values["lora"]["targets"] = list(values["lora"]["targets"])
        return values


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"--{name} {value!r} is unknown; choose {', '.join(known)}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
