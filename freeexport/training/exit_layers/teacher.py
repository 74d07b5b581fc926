"""What a frozen model predicts over whole sequences, computed once and kept on disk: states after the exit layer at
every position, and its best tokens where one is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from freeexport.checkpoints.examples import Example
from freeexport.system.progress import progress
from freeexport.training.batches import Collator, LengthBatches
from freeexport.training.shallow_deep import IGNORED, ShallowDeep

BEST = 32  # tokens of the teacher that are kept
_LOGIT_ROWS = 512  # whose logits are in memory at a time
_PARTS = ("states", "scales", "labels", "best", "chances", "deep_losses", "rows", "starts")


@dataclass(frozen=True)
class Teacher:
    """T positions of all examples end to end, R of which predict. `states` float16 [T, d] over their `scales` float32
    [T], `labels` int32 [T] (-100 where nothing is predicted); `best` int32 [R, 32] and their `chances` float16
    [R, 32] (logarithms), `deep_losses` float32 [R] (nats of the label); `rows` and `starts` [examples + 1] are where
    examples begin among R and T."""

    states: np.ndarray
    scales: np.ndarray
    labels: np.ndarray
    best: np.ndarray
    chances: np.ndarray
    deep_losses: np.ndarray
    rows: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`states` float32 [n, d] and `labels` [n] of an example, and `best`, `chances`, `deep_losses` [r, ...]."""
        places = slice(self.starts[index], self.starts[index + 1])
        rows = slice(self.rows[index], self.rows[index + 1])
        return {
            "states": self.states[places].astype(np.float32) * self.scales[places][:, None],
            "labels": self.labels[places],
            "best": self.best[rows],
            "chances": self.chances[rows],
            "deep_losses": self.deep_losses[rows],
        }

    @property
    def lengths(self) -> list[int]:
        """Positions of each example."""
        lengths: list[int] = np.diff(self.starts).tolist()
        return lengths


def collate_sequences(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """`states` float32 [B, n, d] and `labels` int64 [B, n], padded on the right; `best` int64 [R, 32], `chances`
    float32 [R, 32] and `deep_losses` float32 [R] of the rows that have a label, in their order."""
    longest = max(len(one["labels"]) for one in examples)
    states = torch.zeros(len(examples), longest, examples[0]["states"].shape[1])
    labels = torch.full((len(examples), longest), IGNORED)
    for row, one in enumerate(examples):
        states[row, : len(one["labels"])] = torch.from_numpy(one["states"])
        labels[row, : len(one["labels"])] = torch.from_numpy(one["labels"].astype(np.int64))
    ends = {name: np.concatenate([one[name] for one in examples]) for name in ("best", "chances", "deep_losses")}
    return {
        "states": states,
        "labels": labels,
        "best": torch.from_numpy(ends["best"].astype(np.int64)),
        "chances": torch.from_numpy(ends["chances"].astype(np.float32)),
        "deep_losses": torch.from_numpy(ends["deep_losses"].astype(np.float32)),
    }


def cached_teacher(
    directory: Path, name: str, model: ShallowDeep, examples: Sequence[Example], collate: Collator, bf16: bool
) -> Teacher:
    """From `directory`, or computed and written there first; `model` is run on the device where it stands."""
    if not (directory / f"{name}.starts.npy").exists():
        directory.mkdir(parents=True, exist_ok=True)
        _compute(directory, name, model, examples, collate, bf16)
    return Teacher(*(np.load(directory / f"{name}.{part}.npy", mmap_mode="r") for part in _PARTS))


@torch.no_grad()
def _compute(
    directory: Path, name: str, model: ShallowDeep, examples: Sequence[Example], collate: Collator, bf16: bool
) -> None:
    counts = [collate([example])["labels"] for example in examples]
    starts = np.concatenate([[0], np.cumsum([labels.numel() for labels in counts])])
    rows = np.concatenate([[0], np.cumsum([int((labels != IGNORED).sum()) for labels in counts])])
    width = int(model.head.norm.weight.shape[0])  # type: ignore[union-attr,index]
    best = min(BEST, int(model.head.linear.weight.shape[0]))  # type: ignore[union-attr,index]
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {
        "states": (np.float16, (int(starts[-1]), width)),
        "scales": (np.float32, (int(starts[-1]),)),
        "labels": (np.int32, (int(starts[-1]),)),
        "best": (np.int32, (int(rows[-1]), best)),
        "chances": (np.float16, (int(rows[-1]), best)),
        "deep_losses": (np.float32, (int(rows[-1]),)),
    }
    arrays = {
        part: np.lib.format.open_memmap(directory / f"{name}.{part}.npy", mode="w+", dtype=dtype, shape=shape)
        for part, (dtype, shape) in shapes.items()
    }
    lengths = [labels.numel() for labels in counts]
    model.eval()
    batches = LengthBatches(lengths, 1 << 20, max(4096, max(lengths)), seed=0)
    with progress(f"teacher of {name}, batches", len(batches)) as advance:
        for batch in batches:
            inputs = collate([examples[index] for index in batch])
            found = _states(model, {key: value.to(model.device) for key, value in inputs.items()}, bf16, best)
            for part, values in found.items():
                of = starts if part in ("states", "scales", "labels") else rows
                arrays[part][np.concatenate([np.arange(of[index], of[index + 1]) for index in batch])] = values
            advance()
    for array in arrays.values():
        array.flush()
    np.save(directory / f"{name}.rows.npy", rows)
    # Last: whoever finds it finds the others complete.
    np.save(directory / f"{name}.starts.npy", starts)


def _states(model: ShallowDeep, inputs: dict[str, torch.Tensor], bf16: bool, best: int) -> dict[str, np.ndarray]:
    """The arrays of a teacher for one batch, end to end."""
    valid = inputs["attention_mask"] > 0
    labels = inputs["labels"][valid]
    everywhere = {**inputs, "labels": torch.where(valid, 0, IGNORED)}
    with torch.autocast(valid.device.type, torch.bfloat16, enabled=bf16):
        hidden = model.hidden_states(**everywhere)
    states = hidden[model.exit_layer].float()
    scales = states.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    rows = (labels != IGNORED).nonzero()[:, 0]
    parts = []
    for piece in rows.split(_LOGIT_ROWS):
        # In float32: the best two of logits in bfloat16 are often equal.
        chances = model.head(hidden[model.layers][piece].float()).float().log_softmax(-1)
        top = chances.topk(best, dim=-1)
        parts.append((top.indices, top.values, -chances.gather(1, labels[piece, None])[:, 0]))
    tokens, values, losses = (torch.cat(part) for part in zip(*parts, strict=True))
    found = {"states": states / scales[:, None], "scales": scales, "labels": labels}
    found |= {"best": tokens, "chances": values, "deep_losses": losses}
    return {name: value.cpu().numpy() for name, value in found.items()}
