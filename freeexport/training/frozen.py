"""Train the exit's own parameters on the predictions of a frozen model (`--tune exit`).

The model runs over the data once. Its states and most likely tokens are cached on disk.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from freeexport.checkpoints.examples import Example
from freeexport.system.output import naming
from freeexport.system.progress import progress
from freeexport.training import losses
from freeexport.training.batches import Collator, LengthBatches, token_counts
from freeexport.training.exit_modules import (
    MEASURED,
    PASSES,
    ExitLayers,
    KnownTokens,
    joined_feature,
)
from freeexport.training.layer_modules import Encoded, capped
from freeexport.training.shallow_deep import (
    ENCODER,
    IGNORED,
    Outputs,
    ShallowDeep,
    SharedHead,
    exits_of,
    matmul_precision,
    measures,
)
from freeexport.training.training_options import TrainingOptions
from graphs.exit_head import fused_layers
from runtime.bundle.manifest import FEATURE_STATES

BEST = 32  # most likely tokens, or classes of an exit vocabulary, kept per position
_LOGITS = 1 << 28  # logits in memory at once
_OTHERS = 2048  # random tokens that represent the rest of the vocabulary in a step's softmax


class Taught(NamedTuple):
    """Teacher records of one example.

    Attributes:
        decoder: Records of the decoder's positions.
        encoder: Records of the encoder's positions, if the exit has cross-attention.
    """

    decoder: np.ndarray
    encoder: np.ndarray | None = None

    @property
    def positions(self) -> int:
        """Return the number of records."""
        return sum(len(part) for part in self if part is not None)


def collate_teacher(examples: Sequence[Taught]) -> dict[str, torch.Tensor]:
    """Batch records of `cached_teacher`.

    Returns:
        `states` and, if recorded, `features`: float32 [B, n, d] and [B, n, f], padded on the right.
        `labels`: int64 [B, n].
        For the R labelled positions, in order: `best` int64 [R, 32], `chances` float32 [R, 32],
        `predicted` int64 [R] and `nats` float32 [R].
        With an encoder: `encoded` float32 [B, E, d] and `attention_mask` bool [B, E].
    """
    whole, valid = _padded([one.decoder for one in examples])
    whole["labels"][~valid] = IGNORED
    rows = whole[whole["labels"] != IGNORED]
    arrays = {
        "states": _states(whole),
        "labels": whole["labels"].astype(np.int64),
        "best": rows["best"].astype(np.int64),
        "chances": rows["chances"].astype(np.float32),
        "predicted": rows["predicted"].astype(np.int64),
        "nats": np.ascontiguousarray(rows["nats"]),
    }
    if prompts := [one.encoder for one in examples if one.encoder is not None]:
        encoded, valid = _padded(prompts)
        arrays["encoded"] = _states(encoded)
        arrays["attention_mask"] = valid
    if "features" in (whole.dtype.names or ()):
        arrays["features"] = _states(whole, "features", "feature_scales")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _padded(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pad records to one length [B, n], and return a mask of the valid ones, bool [B, n]."""
    lengths = np.array([len(part) for part in parts])
    valid = np.arange(lengths.max()) < lengths[:, None]
    whole = np.zeros(valid.shape, parts[0].dtype)
    whole[valid] = np.concatenate(parts)
    return whole, valid


@torch.no_grad()
def cached_teacher(
    path: Path,
    model: ShallowDeep,
    examples: Sequence[Example],
    collate: Collator,
    options: TrainingOptions,
    known: KnownTokens | None,
) -> list[Taught]:
    """Return the frozen model's outputs for each example, cached in the file `path`.

    If the cache is missing, compute it on the model's device and write it first. Each record has
    these fields:

        states, scales: State after the exit layer is `states` float16 [d] times `scales`.
        features, feature_scales: Likewise the feature, if the exit reads one.
        labels: Label of the position, -100 if it predicts nothing.
        best: The 32 most likely tokens, or classes of `known`.
        chances: Their log probabilities.
        predicted: The most likely token.
        nats: Cross-entropy of the label.

    The last four are valid only at labelled positions. There are records of all positions that the
    attention of the exit's layers may see. If `model` keeps ENCODER, the encoder's states are
    cached too, because running it in every step would take longer than the rest of the step.
    """
    ends_path = path.with_suffix(".ends.npy")
    encoder_path = path.with_suffix(".encoder.npy")
    paths = [path, encoder_path] if ENCODER in model.kept else [path]
    if not ends_path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_teacher(
            paths,
            ends_path,
            model,
            examples=examples,
            collate=collate,
            options=options,
            known=known,
        )
    ends = np.atleast_2d(np.load(ends_path))
    parts = [
        np.split(np.asarray(np.load(file, mmap_mode="r")), places[:-1])
        for file, places in zip(paths, ends, strict=True)
    ]
    return [Taught(*each) for each in zip(*parts, strict=True)]


def _write_teacher(
    paths: Sequence[Path],
    ends_path: Path,
    model: ShallowDeep,
    examples: Sequence[Example],
    collate: Collator,
    options: TrainingOptions,
    known: KnownTokens | None,
) -> None:
    everywhere = not model.seq2seq or any(example.given for example in examples)
    labels = [collate.labels(example) for example in examples]
    rows = [one.size if everywhere else int((one != IGNORED).sum()) for one in labels]
    counts = np.array([rows, [len(example.prompt) for example in examples]][: len(paths)])
    ends = counts.cumsum(axis=1)
    vocabulary, width = model.head.weight.shape
    best = min(BEST, vocabulary if known is None else len(known) + 1)
    feature_size = FEATURE_STATES[options.exit_input] * width
    fields: list[tuple[Any, ...]] = [("states", np.float16, width), ("scales", np.float32)]
    if feature_size:
        fields += [("features", np.float16, feature_size), ("feature_scales", np.float32)]
    fields += [("labels", np.int32), ("best", np.int32, best)]
    fields += [("chances", np.float16, best), ("predicted", np.int32), ("nats", np.float32)]
    records, *encoder = (
        _records(path, np.dtype(kept), int(end[-1]))
        for path, kept, end in zip(paths, (fields, fields[:2]), ends, strict=False)
    )
    lengths = token_counts(examples)
    model.eval()
    room = model.head.weight.new_empty(max(1, min(_LOGITS // vocabulary, sum(lengths))), vocabulary)
    batches = LengthBatches(lengths, max(4096, max(lengths)), seed=0)
    with progress(
        f"teacher of {ends_path.name.partition('.')[0]}, batches", len(batches)
    ) as advance:
        for batch in batches:
            inputs = {
                key: one.to(model.device)
                for key, one in collate([examples[i] for i in batch]).items()
            }
            kept = inputs["labels"] != IGNORED
            if everywhere:  # padding is on the right
                kept = (
                    torch.arange(kept.shape[1])[None] < torch.from_numpy(counts[0][batch])[:, None]
                )
                kept = kept.to(model.device)
            places, *prompts = (
                np.concatenate([np.arange(end[i] - count[i], end[i]) for i in batch])
                for end, count in zip(ends, counts, strict=True)
            )
            found = inputs["labels"][kept]
            with torch.autocast(model.device.type, torch.bfloat16, enabled=options.bf16):
                hidden = model.hidden_states(**{**inputs, "labels": torch.where(kept, 0, IGNORED)})
            _write_states(records, places, hidden[model.exit_layer])
            if feature_size:
                normed = model.head.normed(hidden[model.layers].float())
                earlier = fused_layers(options.exit_input, model.exit_layer, model.layers)
                features = joined_feature(normed, [hidden[number] for number in earlier])
                _write_states(records, places, features, name="features", scale="feature_scales")
            for into, where in zip(encoder, prompts, strict=True):
                _write_states(into, where, hidden[ENCODER])
            records["labels"][places] = found.cpu().numpy()
            for piece in (found != IGNORED).nonzero()[:, 0].split(len(room)):
                chances = _log_chances(
                    model.head, hidden[model.layers][piece].float(), room, options.bf16
                )
                predicted = chances.argmax(-1)
                nats = -chances.gather(1, found[piece, None])[:, 0]
                top = (chances if known is None else known.folded_chances(chances)).topk(
                    best, dim=-1
                )
                values = {
                    "best": top.indices,
                    "chances": top.values,
                    "predicted": predicted,
                    "nats": nats,
                }
                for name, value in values.items():
                    records[name][places[piece.cpu().numpy()]] = value.cpu().numpy()
            advance()
    for each in (records, *encoder):
        each.flush()
    np.save(ends_path, ends)  # written last: its presence marks the records as complete


def _records(path: Path, kept: np.dtype[Any], count: int) -> np.memmap[Any, Any]:
    """Create a memory-mapped file of `count` records.

    Raises:
        OSError: If the disk has no space for them. Writing to the map would kill the process.
    """
    mapped: np.memmap[Any, Any] = np.lib.format.open_memmap(
        path, mode="w+", dtype=kept, shape=(count,)
    )
    if hasattr(os, "posix_fallocate"):
        with naming(path), path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return mapped


def _log_chances(
    head: SharedHead, states: torch.Tensor, room: torch.Tensor, bf16: bool
) -> torch.Tensor:
    """Return log probabilities [N, V] of states [N, d].

    The result is stored in `room` if that is float32, since allocating that many logits costs more
    than computing them.
    """
    with matmul_precision(bf16):
        read = (head.normed(states) * head.scale).to(room.dtype)
        logits = torch.mm(read, head.weight.T, out=room[: len(states)]).float()
    # Hooks suppress tokens that speech never emits. See tuning.py.
    for suppress in head.linear._forward_hooks.values():
        logits = suppress(head.linear, (read,), logits)
    if head.bias is not None:
        logits += head.bias
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return torch.log_softmax(logits, -1, out=logits)


def _states(records: np.ndarray, name: str = "states", scale: str = "scales") -> np.ndarray:
    """Read states written by `_write_states`, float32 [..., d]."""
    states: np.ndarray = records[name].astype(np.float32) * records[scale][..., None]
    return states


def _write_states(
    records: np.ndarray,
    places: np.ndarray,
    states: torch.Tensor,
    name: str = "states",
    scale: str = "scales",
) -> None:
    """Write states [N, d] in float16, scaled so that the largest magnitude of each is 1."""
    states = states.float()
    scales = states.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    records[name][places] = (states / scales[:, None]).cpu().numpy()
    records[scale][places] = scales.cpu().numpy()


class FrozenExit(nn.Module):
    """An exit that reads a teacher's cached states and uses the frozen head of its model."""

    accepts_loss_kwargs = True
    _keys_to_ignore_on_save: tuple[str, ...] | None = None
    _rows: torch.Tensor  # [n, d] of the known tokens
    _bias: torch.Tensor | None  # [n]

    def __init__(self, whole: ShallowDeep) -> None:
        """Take the exit of `whole`, without keeping its model."""
        super().__init__()
        self.seq2seq = whole.seq2seq
        self.exit = cast(ExitLayers, whole.own)
        self.known = whole.known
        # Keep only the norm and the head, so that the layers' memory is freed.
        head = whole.head
        self.head = SharedHead(
            head.norm, head.linear, head.scale, dropout=None, bias=head.bias, softcap=head.softcap
        ).requires_grad_(False)
        rows, bias = (None, None) if self.known is None else self.head.rows(self.known.vocabulary)
        self.register_buffer("_rows", None if rows is None else rows.detach(), persistent=False)
        self.register_buffer("_bias", bias, persistent=False)
        self.exit_layer = whole.exit_layer
        self.layers = whole.layers
        self.loss = whole.loss
        self.alpha = whole.alpha

    def forward(
        self,
        states: torch.Tensor,
        labels: torch.Tensor,
        best: torch.Tensor,
        chances: torch.Tensor,
        predicted: torch.Tensor,
        nats: torch.Tensor,
        encoded: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
    ) -> Outputs:
        """Compute the loss, or the measures in evaluation mode, of a batch of `collate_teacher`.

        An exit that reads features is trained on PASSES passes after a sync pass and evaluated on
        pass MEASURED.
        """
        wanted = labels != IGNORED
        known = self.known
        labels = labels[wanted]
        classes = labels if known is None else known.classes(labels)
        prompts = (
            None if encoded is None or attention_mask is None else Encoded(encoded, attention_mask)
        )
        count = PASSES if self.training else MEASURED
        passes = self.exit.passes(states, prompts, features, 1 if features is None else count)
        students = [self.exit.norm(one[wanted]) * self.head.scale for one in passes]  # [R, d] each
        # In float32, since bfloat16 logits are off by about 0.05.
        with torch.autocast(states.device.type, enabled=False):
            if not self.training:
                logits = self._logits(students[-1])
                by_layer = {
                    self.exit_layer: losses.cross_entropy(logits, classes),
                    self.layers: nats,
                }
                return measures(
                    by_layer,
                    labels,
                    exits_of(logits, None if known is None else known.vocabulary),
                    predicted,
                )
            total = [
                self._loss(student, classes, best, chances=chances, nats=nats)
                for student in students
            ]
            return {"loss": torch.stack(total).mean()}

    def _loss(
        self,
        student: torch.Tensor,
        classes: torch.Tensor,
        best: torch.Tensor,
        chances: torch.Tensor,
        nats: torch.Tensor,
    ) -> torch.Tensor:
        found, places = self._log_chances(student, torch.cat([classes[:, None], best], dim=1))
        found = found.gather(1, places)  # [R, 1 + 32]
        # The deep loss is constant here. It keeps losses comparable with other modes.
        loss = losses.by_depth({self.exit_layer: -found[:, 0], self.layers: nats}).sum()
        if self.loss == "logit-kd":
            loss = loss + self.alpha * losses.best_distillation(chances, found[:, 1:])
        return loss

    def _logits(self, student: torch.Tensor) -> torch.Tensor:
        """Compute logits [R, V] of all tokens, or of the classes of an exit vocabulary."""
        if self.known is not None:
            return self.known.logits(student, self._rows, self._bias, self.head.softcap)
        return capped(
            functional.linear(student, self.head.weight, self.head.bias), self.head.softcap
        )

    def _log_chances(
        self, student: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log probabilities [R, n] of n sampled tokens, and the columns of `tokens` [R, m].

        With an exit vocabulary, tokens are classes. The product with a large head takes most of a
        step, so only tokens that some row needs are computed exactly. A random sample represents
        all others.
        """
        if self.known is not None:
            return self._logits(student).log_softmax(-1), tokens
        weight = self.head.weight
        size = len(weight)
        needed = tokens.unique()
        if len(needed) + _OTHERS >= size:
            return self._logits(student).log_softmax(-1), tokens
        place = torch.full((size,), -1, device=tokens.device)
        place[needed] = torch.arange(len(needed), device=tokens.device)
        others = torch.randint(size, (_OTHERS,), device=tokens.device)
        others = others[place[others] < 0]
        rows, bias = self.head.rows(torch.cat([needed, others]))
        logits = capped(functional.linear(student, rows, bias), self.head.softcap)
        more = torch.zeros(logits.shape[1], device=logits.device)
        more[len(needed) :] = torch.log(torch.tensor((size - len(needed)) / max(1, len(others))))
        return (logits + more).log_softmax(-1), place[tokens]
