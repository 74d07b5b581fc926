"""`--tune exit`: the exit's own parameters are trained on the predictions of the frozen model, which runs once over
the data and is kept on disk as states and best tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.checkpoints.exit_file import EXIT_WEIGHTS, LossName
from freeexport.system.progress import progress
from freeexport.training import losses
from freeexport.training.batches import Collator, LengthBatches
from freeexport.training.exit_modules import Exit, KnownTokens, write_exit
from freeexport.training.exit_start import begin_other, first_exit
from freeexport.training.options import TrainingOptions
from freeexport.training.shallow_deep import IGNORED, Metrics, ShallowDeep, SharedHead, exits_of, named_measures
from freeexport.training.tuning import (
    Trainable,
    collator,
    copy_tokenizer,
    first_known,
    link_or_copy,
    token_counts,
    trainable_model,
)
from graphs.description import Description
from runtime.errors import OptionError

BEST = 32  # tokens of the teacher that are kept, or classes of an exit vocabulary
_LOGIT_ROWS = 512  # whose logits are in memory at a time
_OF_ROWS: dict[str, type] = {
    "best": np.int64,
    "chances": np.float32,
    "predicted": np.int64,
    "deep_losses": np.float32,
}
_OTHERS = 2048  # tokens beside those in question that a step's softmax is estimated from


@dataclass(frozen=True)
class Teacher:
    """T positions of all examples end to end, R of which predict. `states` float16 [T, d] over their `scales` float32
    [T], `labels` int32 [T] (-100 where nothing is predicted); `best` int32 [R, 32], tokens or classes of an exit
    vocabulary, and their `chances` float16 [R, 32] (logarithms); `predicted` int32 [R], the best token, and
    `deep_losses` float32 [R] (nats of the label); `rows` and `starts` [examples + 1] are where examples begin among R
    and T."""

    states: np.ndarray
    scales: np.ndarray
    labels: np.ndarray
    best: np.ndarray
    chances: np.ndarray
    predicted: np.ndarray
    deep_losses: np.ndarray
    rows: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`states` float32 [n, d] and `labels` [n] of an example, and what is kept of its rows [r, ...]."""
        places = slice(self.starts[index], self.starts[index + 1])
        rows = slice(self.rows[index], self.rows[index + 1])
        states = self.states[places].astype(np.float32) * self.scales[places][:, None]
        of_rows = {name: getattr(self, name)[rows] for name in _OF_ROWS}
        return {"states": states, "labels": self.labels[places], **of_rows}

    @property
    def lengths(self) -> list[int]:
        """Positions of each example."""
        lengths: list[int] = np.diff(self.starts).tolist()
        return lengths


def collate_teacher(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """`states` float32 [B, n, d] and `labels` int64 [B, n], padded on the right; and of the rows that have a label, in
    their order, `best` int64 [R, 32], `chances` float32 [R, 32], `predicted` int64 [R], `deep_losses` float32 [R]."""
    longest = max(len(one["labels"]) for one in examples)
    states = torch.zeros(len(examples), longest, examples[0]["states"].shape[1])
    labels = torch.full((len(examples), longest), IGNORED)
    for row, one in enumerate(examples):
        states[row, : len(one["labels"])] = torch.from_numpy(one["states"])
        labels[row, : len(one["labels"])] = torch.from_numpy(one["labels"].astype(np.int64))
    ends = {
        name: torch.from_numpy(np.concatenate([one[name] for one in examples]).astype(kind))
        for name, kind in _OF_ROWS.items()
    }
    return {"states": states, "labels": labels, **ends}


def cached_teacher(
    directory: Path,
    name: str,
    model: ShallowDeep,
    examples: Sequence[Example],
    collate: Collator,
    options: TrainingOptions,
    known: KnownTokens | None,
) -> Teacher:
    """Open the teacher in `directory`, computed and written there first where there is none; `model` is run on the
    device where it stands. An exit of layers needs the states of all positions, an adapter those with a label."""
    parts = [directory / f"{name}.{field.name}.npy" for field in fields(Teacher)]
    if not all(part.exists() for part in parts):
        directory.mkdir(parents=True, exist_ok=True)
        _compute(directory, name, model, examples, collate, options, known)
    return Teacher(*(np.load(part, mmap_mode="r") for part in parts))


@torch.no_grad()
def _compute(
    directory: Path,
    name: str,
    model: ShallowDeep,
    examples: Sequence[Example],
    collate: Collator,
    options: TrainingOptions,
    known: KnownTokens | None,
) -> None:
    everywhere = options.exit_layers > 0
    labels = [collate([example])["labels"] for example in examples]
    counts = [int((one != IGNORED).sum()) for one in labels]
    rows = np.concatenate([[0], np.cumsum(counts)])
    starts = np.concatenate([[0], np.cumsum([one.numel() for one in labels])]) if everywhere else rows
    width = int(cast(torch.Tensor, model.head.norm.weight).shape[0])
    best = min(BEST, len(cast(torch.Tensor, model.head.linear.weight)) if known is None else len(known) + 1)
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {
        "states": (np.float16, (int(starts[-1]), width)),
        "scales": (np.float32, (int(starts[-1]),)),
        "labels": (np.int32, (int(starts[-1]),)),
        "best": (np.int32, (int(rows[-1]), best)),
        "chances": (np.float16, (int(rows[-1]), best)),
        "predicted": (np.int32, (int(rows[-1]),)),
        "deep_losses": (np.float32, (int(rows[-1]),)),
    }
    arrays = {
        part: np.lib.format.open_memmap(directory / f"{name}.{part}.npy", mode="w+", dtype=dtype, shape=shape)
        for part, (dtype, shape) in shapes.items()
    }
    lengths = token_counts(examples)
    model.eval()
    batches = LengthBatches(lengths, max(4096, max(lengths)), seed=0)
    with progress(f"teacher of {name}, batches", len(batches)) as advance:
        for batch in batches:
            inputs = {key: one.to(model.device) for key, one in collate([examples[i] for i in batch]).items()}
            for part, values in _batch(model, inputs, everywhere, options.bf16, best, known).items():
                begins = starts if part in ("states", "scales", "labels") else rows
                arrays[part][np.concatenate([np.arange(begins[i], begins[i + 1]) for i in batch])] = values
            advance()
    for array in arrays.values():
        array.flush()
    np.save(directory / f"{name}.rows.npy", rows)
    # Last: where it is, the others are complete.
    np.save(directory / f"{name}.starts.npy", starts)


def _batch(
    model: ShallowDeep,
    inputs: dict[str, torch.Tensor],
    everywhere: bool,
    bf16: bool,
    best: int,
    known: KnownTokens | None,
) -> dict[str, np.ndarray]:
    """The arrays of a teacher for one batch, end to end."""
    kept = inputs["attention_mask"] > 0 if everywhere else inputs["labels"] != IGNORED
    labels = inputs["labels"][kept]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        hidden = model.hidden_states(**{**inputs, "labels": torch.where(kept, 0, IGNORED)})
    states = hidden[model.exit_layer].float()
    scales = states.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    parts = []
    for piece in (labels != IGNORED).nonzero()[:, 0].split(_LOGIT_ROWS):
        # In float32: the best two of logits in bfloat16 are often equal.
        chances = model.head(hidden[model.layers][piece].float()).float().log_softmax(-1)
        top = (chances if known is None else known.folded(chances)).topk(best, dim=-1)
        nats = -chances.gather(1, labels[piece, None])[:, 0]
        parts.append((top.indices, top.values, chances.argmax(-1), nats))
    found = {"states": states / scales[:, None], "scales": scales, "labels": labels}
    found |= dict(zip(_OF_ROWS, (torch.cat(part) for part in zip(*parts, strict=True)), strict=True))
    return {name: value.cpu().numpy() for name, value in found.items()}


class FrozenExit(nn.Module):
    """An exit over a teacher's states, with the frozen head of its model."""

    accepts_loss_kwargs = True
    _keys_to_ignore_on_save: tuple[str, ...] | None = None
    _rows: torch.Tensor  # [n, d] of the known tokens

    def __init__(
        self,
        own: Exit,
        head: SharedHead,
        layers: tuple[int, int],
        loss: LossName,
        alpha: float,
        seq2seq: bool = False,
        known: KnownTokens | None = None,
    ) -> None:
        """`layers` are the exit layer and the last one. `known`: the tokens that the exit knows, None for all."""
        super().__init__()
        self.seq2seq = seq2seq
        self.exit, self.known = own, known
        self.head = head.requires_grad_(False)
        rows = None if known is None else head.rows(known.vocabulary).detach()
        self.register_buffer("_rows", rows, persistent=False)
        self.exit_layer, self.layers = layers
        self.loss_name, self.alpha = loss, alpha

    def forward(
        self,
        states: torch.Tensor,
        labels: torch.Tensor,
        best: torch.Tensor,
        chances: torch.Tensor,
        predicted: torch.Tensor,
        deep_losses: torch.Tensor,
    ) -> Metrics:
        """Take what `collate_teacher` gives."""
        wanted = labels != IGNORED
        labels, known = labels[wanted], self.known
        classes = labels if known is None else known.classes(labels)
        student = self.exit.norm(self.exit(states)[wanted]) * self.head.scale  # [R, d]
        # In float32: logits in bfloat16 are off by a twentieth.
        with torch.autocast(states.device.type, enabled=False):
            if self.training:
                return {"loss": self._loss(student, classes, best, chances, deep_losses)}
            logits = self.head.linear(student) if known is None else known.logits(student, self._rows)
            nats = {self.exit_layer: losses.cross_entropy(logits, classes), self.layers: deep_losses.sum()}
            tokens = None if known is None else known.vocabulary
            return named_measures(nats, labels, exits_of(logits, tokens), predicted)

    def _loss(
        self,
        student: torch.Tensor,
        classes: torch.Tensor,
        best: torch.Tensor,
        chances: torch.Tensor,
        deep_losses: torch.Tensor,
    ) -> torch.Tensor:
        found, places = self._log_chances(student, torch.cat([classes[:, None], best], dim=1))
        found = found.gather(1, places)  # [R, 1 + 32]
        # The deep one is a constant, so that losses compare with other modes.
        loss = losses.by_depth({self.exit_layer: -found[:, 0].sum(), self.layers: deep_losses.sum()})
        if self.loss_name == "logit-kd":
            loss = loss + self.alpha * losses.best_distillation(chances, found[:, 1:])
        return loss

    def _log_chances(self, student: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logarithms of probabilities [R, n] of n tokens, and where those of `tokens` [R, m] stand among them; classes,
        where there is an exit vocabulary.

        The head's product with a large vocabulary is most of a step. All tokens that some row needs are taken, and
        of the others a sample, which stands for all of them.
        """
        if self.known is not None:
            return self.known.logits(student, self._rows).log_softmax(-1), tokens
        weight = cast(torch.Tensor, self.head.linear.weight)
        size = len(weight)
        needed = tokens.unique()
        if len(needed) + _OTHERS >= size:
            return (student @ weight.T).log_softmax(-1), tokens
        place = torch.full((size,), -1, device=tokens.device)
        place[needed] = torch.arange(len(needed), device=tokens.device)
        others = torch.randint(size, (_OTHERS,), device=tokens.device)
        others = others[place[others] < 0]
        logits = student @ weight[torch.cat([needed, others])].T
        more = torch.zeros(logits.shape[1], device=logits.device)
        more[len(needed) :] = torch.log(torch.tensor((size - len(needed)) / max(1, len(others))))
        return (logits + more).log_softmax(-1), place[tokens]


def tune_exit(
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    training: Sequence[Example],
    validation: Sequence[Example],
    tokens: np.ndarray | None,
    cache: Path,
) -> Trainable:
    """Train an exit on a frozen model, which runs once over the data; the directory `cache` takes 2 d bytes a position
    (a trained one for an adapter, any for layers) and 200 a trained one. `tokens`: the exit's vocabulary, None for all.
    Raises OptionError for a LoRA adapter.

    Of several processes, the first must be through before the others call this: they find the cache filled.
    """
    if checkpoint.adapter is not None:
        raise OptionError(
            f"{checkpoint.name} is a LoRA adapter; --tune exit needs its weights merged into a checkpoint"
        )
    model, collate = trainable_model(checkpoint, options).requires_grad_(False), collator(checkpoint)
    whole = ShallowDeep(model, description, options.exit_layer, "ce")
    if torch.cuda.is_available():
        whole.to("cuda")
    own = first_exit(model, checkpoint, description, options, training, collate)
    known, begun = first_known(checkpoint, description, tokens)
    if known is not None:
        known.to(whole.device)
    teachers = [
        cached_teacher(cache, name, whole, examples, collate, options, known)
        for name, examples in (("training", training), ("validation", validation))
    ]
    whole.to("cpu")
    if known is not None:
        known.to("cpu")
    torch.manual_seed(options.seed)
    # The norm and the head alone, so that the layers' memory goes back.
    head = SharedHead(whole.head.norm, whole.head.linear, description.decoder.head.scale)
    layers = whole.exit_layer, whole.layers
    module = FrozenExit(own, head, layers, options.loss, options.loss_alpha, whole.seq2seq, known)
    if known is not None and not begun:
        batches = (collate_teacher([teachers[0][place]]) for place in range(len(teachers[0])))
        begin_other(known, head, (own.norm(own(one["states"])[one["labels"] != IGNORED]) for one in batches))

    def write(directory: Path) -> None:
        write_exit(own, known, directory)
        _link_base(checkpoint, directory)

    lengths = teachers[0].lengths, teachers[1].lengths
    return Trainable(module, teachers[0], teachers[1], lengths, collate_teacher, write, own)


def _link_base(checkpoint: Checkpoint, directory: Path) -> None:
    """Put the base's weights, configuration and tokenizer there, unchanged."""
    for path in sorted({file.path for file in checkpoint.files if file.path.name != EXIT_WEIGHTS}):
        link_or_copy(path, directory / path.name)
    if checkpoint.path.is_file():
        return
    for index in checkpoint.path.glob("*.index.json"):
        link_or_copy(index, directory / index.name)
    link_or_copy(checkpoint.path / "config.json", directory / "config.json")
    copy_tokenizer(checkpoint, directory)
