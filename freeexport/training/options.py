"""Options of a training run, and checks of their combinations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from freeexport.checkpoints.exit_file import LossName, Tune
from freeexport.checkpoints.transformers_model import Dtype
from freeexport.task_metrics import check_name
from runtime.bundle.manifest import TrainedInput
from runtime.errors import OptionError, shown

if TYPE_CHECKING:
    import torch

# linear falls from the end of the warmup on, as transformers' default does. hold stays at the peak
# first, since agreement rises most while the rate falls. `fit` uses it.
Schedule = Literal["linear", "hold"]
# Losses of `--loss`.
BuiltInLoss = Literal["ce", "kd-dyn", "logit-kd", "deep-ce"]

# Losses for --tune exit. The others train layers, which it freezes.
EXIT_LOSSES: tuple[BuiltInLoss, ...] = ("ce", "logit-kd")
# Losses with a distillation term, and the default of its weight.
DISTILLING: tuple[BuiltInLoss, ...] = ("kd-dyn", "logit-kd")
DEFAULT_ALPHA = 0.5
DEFAULT_RATES: dict[Tune, float] = {"full": 1e-4, "lora": 1e-4, "exit": 1e-3}
RANDOM_WEIGHTS_RATE = 1e-3
DEFAULT_RANK = 16
DEFAULT_EPOCHS = 3.0
# Keeps the weights of the last step.
LAST = "last"
# What else than a metric of the outputs can select weights: the `loss` (lower is better) or a share
# (higher is better) of every evaluation, or LAST.
MEASURED = ("loss", "agreement", "oracle-exits", LAST)
# Options that may change on resume, since they do not affect the loss curve of the shared steps.
_FREE_ON_RESUME = ("time_limit", "patience", "resume", "overwrite", "threads")


class LogitsHead(Protocol):
    """The head that a model's exits share."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits [N, V] of states [N, d] before the final norm."""

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the final norm and dropout to states [N, d]."""

    def read(self, normed: torch.Tensor) -> torch.Tensor:
        """Compute logits [N, V] of the output of `normed`."""


class TrainedModule(Protocol):
    """The trained model with two exits, as a LayerLoss sees it."""

    @property
    def head(self) -> LogitsHead:
        """LogitsHead of both exits."""

    @property
    def exit_layer(self) -> int:
        """Number of layers before the exit."""

    @property
    def layers(self) -> int:
        """Number of all decoder layers."""


class LayerLoss(Protocol):
    """A loss that a caller of `train` gives as `TrainingOptions.loss`, in place of a name.

    It trains the model's layers, so it needs an exit without layers or a vocabulary of its own.
    """

    @property
    def name(self) -> LossName:
        """Name of the loss in exit.json."""

    def layers(self, exit_layer: int, layers: int) -> Iterable[int]:
        """Return the layers, from 1 to `layers`, whose hidden states the loss reads."""

    def total(
        self, module: TrainedModule, hidden: Mapping[int, torch.Tensor], targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of a batch, summed over its rows.

        Args:
            module: The trained module.
            hidden: States [N, d] before the final norm, of the layers in `layers`, the exit layer
                and the last layer.
            targets: Next tokens, int64 [N].
        """


@dataclass(frozen=True)
class TrainingOptions:
    """Options of `freeexport train`, which freeexport/commands/train.py describes.

    None selects a default that depends on other options. `loss` may also be a LayerLoss, and
    `max_new_tokens` limits the outputs of `self_distill`.

    Raises:
        OptionError: If a value is out of range or two options contradict each other.
    """

    data: Path
    exit_layer: int
    validation: Path | None = None
    max_tokens: int | None = None
    truncate: bool = False
    self_distill: Path | None = None
    max_new_tokens: int = 256
    loss: BuiltInLoss | LayerLoss = "logit-kd"
    loss_alpha: float | None = None
    tune: Tune = "full"
    rank: int | None = None
    exit_head_layers: int = 0
    exit_vocab: int | None = None
    exit_input: TrainedInput = "state"
    exit_from: str | None = None
    from_config: bool = False
    steps: int | None = None
    epochs: float | None = None
    time_limit: float | None = None
    batch_tokens: int = 4096
    accumulate: int = 1
    learning_rate: float | None = None
    schedule: Schedule = "linear"
    warmup: float = 0.05
    dropout: float | None = None
    seed: int = 0
    threads: int | None = None
    bf16: bool = False
    dtype: Dtype = "float32"
    gradient_checkpointing: bool = False
    evaluate_every: int | None = None
    select_by: str = "loss"
    patience: int = 5
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        literals = {"tune": Tune, "schedule": Schedule, "dtype": Dtype, "exit_input": TrainedInput}
        for name, known in literals.items():
            if (value := getattr(self, name)) not in get_args(known):
                flag = name.replace("_", "-")
                raise OptionError(
                    f"--{flag} {shown(value)} is unknown; choose {', '.join(get_args(known))}"
                )
        if isinstance(self.loss, str) and self.loss not in get_args(BuiltInLoss):
            raise OptionError(
                f"--loss {shown(self.loss)} is unknown; choose {', '.join(get_args(BuiltInLoss))}"
            )
        counts = (
            "steps",
            "batch_tokens",
            "accumulate",
            "max_tokens",
            "evaluate_every",
            "exit_vocab",
            "max_new_tokens",
        )
        for name in (*counts, "threads", "rank"):
            self._check(name, "at least 1", lambda value: value >= 1)
        for name in ("epochs", "time_limit", "learning_rate"):
            self._check(name, "a number above 0", lambda value: 0 < value < math.inf)
        for name in ("loss_alpha", "exit_head_layers", "patience"):
            self._check(name, "0 or more", lambda value: 0 <= value < math.inf)
        for name in ("dropout", "warmup"):
            self._check(name, "a number from 0 to below 1", lambda value: 0 <= value < 1)
        if self.select_by not in MEASURED:
            check_name(self.select_by)
        contradictions = {
            f"--loss-alpha is the weight of a distillation, and --loss {self.loss_name} has none; "
            f"leave it out, or choose {' or '.join(DISTILLING)}": self.loss_alpha is not None
            and self.loss not in DISTILLING,
            f"--rank is for --tune lora, not for --tune {self.tune}; leave it out": (
                self.rank is not None and self.tune != "lora"
            ),
            "--tune exit trains layers of the exit's own; give --exit-head-layers 1 or more, or "
            "train the model with --tune full or lora": self.tune == "exit"
            and self.exit_head_layers == 0,
            "--steps and --epochs contradict each other; choose one": None
            not in (self.steps, self.epochs),
            "--resume and --overwrite contradict each other; choose one": self.resume
            and self.overwrite,
            f"--loss {self.loss_name} trains layers, which --tune exit freezes; choose "
            f"{', '.join(EXIT_LOSSES)}": (self.tune == "exit" and self.loss not in EXIT_LOSSES),
            f"--select-by {self.select_by} measures the whole model, which --tune exit freezes; "
            f"choose {', '.join(MEASURED)}": self.tune == "exit" and self.select_by not in MEASURED,
            f"--loss {self.loss_name} is for an exit without --exit-head-layers and --exit-vocab; "
            "choose logit-kd or ce": (
                (self.loss == "deep-ce" or not isinstance(self.loss, str))
                and (self.exit_head_layers > 0 or self.exit_vocab is not None)
            ),
            f"--exit-input {self.exit_input} is for --tune exit, which leaves the model as it is, "
            f"not for --tune {self.tune}": (self.exit_input != "state" and self.tune != "exit"),
            "--self-distill needs trained weights, --from-config has none; choose one": (
                self.from_config and self.self_distill is not None
            ),
            "--self-distill generates outputs for whole inputs, --truncate cuts them; choose one": (
                self.truncate and self.self_distill is not None
            ),
            f"--tune {self.tune} needs trained weights, --from-config has none; use --tune full": (
                self.from_config and self.tune != "full"
            ),
        }
        for problem, found in contradictions.items():
            if found:
                raise OptionError(problem)

    def _check(self, name: str, wanted: str, holds: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise OptionError(f"--{name.replace('_', '-')} is {value}; give {wanted}")

    @property
    def loss_name(self) -> LossName:
        """Return the name of the loss in exit.json."""
        return self.loss if isinstance(self.loss, str) else self.loss.name

    @property
    def alpha(self) -> float:
        """Return the weight of the distillation."""
        return DEFAULT_ALPHA if self.loss_alpha is None else self.loss_alpha

    @property
    def lora_rank(self) -> int:
        """Return the rank of LoRA adapters."""
        return DEFAULT_RANK if self.rank is None else self.rank

    @property
    def rate(self) -> float:
        """Return the peak learning rate."""
        return self.learning_rate or (
            RANDOM_WEIGHTS_RATE if self.from_config else DEFAULT_RATES[self.tune]
        )

    @property
    def epoch_count(self) -> float | None:
        """Return the passes over the data. None if only the steps or the time limit end the run."""
        if self.steps is not None or (self.epochs is None and self.time_limit is not None):
            return None
        return self.epochs or DEFAULT_EPOCHS

    def recorded(self) -> dict[str, Any]:
        """Return the options that a resumed run must share with the original, as JSON values."""
        values = {key: value for key, value in asdict(self).items() if key not in _FREE_ON_RESUME}
        if not isinstance(values["loss"], str | dict):  # a loss that is not a dataclass
            values["loss"] = self.loss_name
        values["loss_alpha"] = self.alpha
        for name in ("data", "validation", "self_distill"):
            values[name] = None if values[name] is None else str(Path(values[name]).absolute())
        return values
