"""Hidden states of a frozen model after the exit layer and the last one, computed once and kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from freeexport.checkpoints.examples import Example
from freeexport.system.progress import progress
from freeexport.training.batches import Collator, LengthBatches
from freeexport.training.shallow_deep import IGNORED, ShallowDeep


@dataclass(frozen=True)
class TeacherStates:
    """One example's rows stand together. `states` float16 [N, 2, d] (exit layer, last layer) and their `scales`
    float32 [N, 2] (each state is stored over its largest magnitude), `labels` int32 [N], `starts` [examples + 1]."""

    states: np.ndarray
    scales: np.ndarray
    labels: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """States float32 [n, 2, d] and labels [n] of an example."""
        rows = slice(self.starts[index], self.starts[index + 1])
        return self.states[rows].astype(np.float32) * self.scales[rows][..., None], self.labels[rows]

    @property
    def lengths(self) -> list[int]:
        rows: list[int] = np.diff(self.starts).tolist()
        return rows


def collate_states(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    """`shallow`, `deep` float32 [N, d] and `labels` int64 [N] of several examples, end to end."""
    states = torch.from_numpy(np.concatenate([states for states, _ in examples]))
    labels = torch.from_numpy(np.concatenate([labels for _, labels in examples]).astype(np.int64))
    return {"shallow": states[:, 0], "deep": states[:, 1], "labels": labels}


def cached_states(
    directory: Path, name: str, model: ShallowDeep, examples: Sequence[Example], collate: Collator, bf16: bool
) -> TeacherStates:
    """From `directory`, or computed and written there first; `model` is run on the device where it stands."""
    if not (directory / f"{name}.starts.npy").exists():
        directory.mkdir(parents=True, exist_ok=True)
        _compute(directory, name, model, examples, collate, bf16)
    return TeacherStates(
        *(_open(directory / f"{name}.{part}.npy") for part in ("states", "scales", "labels", "starts"))
    )


def _open(path: Path) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r")
    return array


@torch.no_grad()
def _compute(
    directory: Path, name: str, model: ShallowDeep, examples: Sequence[Example], collate: Collator, bf16: bool
) -> None:
    counts = [int((collate([example])["labels"] != IGNORED).sum()) for example in examples]
    starts = np.concatenate([[0], np.cumsum(counts)])
    device = next(model.parameters()).device
    width = int(cast(torch.Tensor, model.head.norm.weight).shape[0])
    states = _create(directory / f"{name}.states.npy", np.float16, (int(starts[-1]), 2, width))
    scales = _create(directory / f"{name}.scales.npy", np.float32, (int(starts[-1]), 2))
    labels = _create(directory / f"{name}.labels.npy", np.int32, (int(starts[-1]),))
    lengths = [len(example.prompt) + len(example.target) for example in examples]
    model.eval()
    batches = LengthBatches(lengths, 1 << 20, max(4096, max(lengths)), seed=0)
    with progress("teacher states, batches", len(batches)) as advance:
        for batch in batches:
            inputs = {key: value.to(device) for key, value in collate([examples[index] for index in batch]).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                hidden = model.hidden_states(**inputs)
            both = torch.stack([hidden[model.exit_layer], hidden[model.layers]], dim=1).float()
            scale = both.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
            rows = np.concatenate([np.arange(starts[index], starts[index + 1]) for index in batch])
            states[rows] = (both / scale[..., None]).cpu().numpy()
            scales[rows] = scale.cpu().numpy()
            labels[rows] = inputs["labels"][inputs["labels"] != IGNORED].cpu().numpy()
            advance()
    for array in (states, scales, labels):
        array.flush()
    # Last: whoever finds it finds the others complete.
    np.save(directory / f"{name}.starts.npy", starts)


def _create(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    created: np.memmap = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    return created
