"""`--tune exit`: the exit's own parameters are trained on the predictions of the frozen model, which runs once over
the data and is kept on disk as states and best tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    Encoded,
    ExitLayers,
    KnownTokens,
    capped,
)
from freeexport.training.options import TrainingOptions
from freeexport.training.shallow_deep import (
    ENCODER,
    IGNORED,
    Outputs,
    ShallowDeep,
    SharedHead,
    exits_of,
    measures,
    products,
)

BEST = 32  # tokens of the teacher that are kept, or classes of an exit vocabulary
_LOGITS = 1 << 28  # that are in memory at a time
_OTHERS = 2048  # tokens beside those in question that a step's softmax is estimated from


class Taught(NamedTuple):
    """The teacher's records of one example: of its decoder, and of its encoder where cross-attention reads that."""

    decoder: np.ndarray
    encoder: np.ndarray | None = None

    @property
    def positions(self) -> int:
        """How many records there are."""
        return sum(len(part) for part in self if part is not None)


def collate_teacher(examples: Sequence[Taught]) -> dict[str, torch.Tensor]:
    """Batch records of `cached_teacher`: `states`, and `features` where there are some, float32 [B, n, d] and `labels`
    int64 [B, n], padded on the right; and of the rows with a label, in their order, `best` int64 [R, 32], `chances`
    float32 [R, 32], `predicted` int64 [R] and `nats` float32 [R]; of an encoder `encoded` float32 [B, E, d] and
    `attention_mask` bool [B, E]."""
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
    """Records as rows of one length [B, n], and which of them are valid, bool [B, n]."""
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
    """Records of the frozen model's outputs at the positions of each example, from the file `path`; where there is none
    they are computed, on the device where the model stands, and written there first.

    `states` float16 [d] times `scales` is the state after the exit layer: for an exit of layers of all positions that
    its attention sees, for an adapter of those with a label; `features`, for an exit that reads them, the final normed
    state; `labels` is -100 where nothing is predicted. Where something is: the `best` 32 tokens, or classes of `known`,
    with the logarithms of their `chances`, the one `predicted`, and the `nats` of the label. Where `model` keeps
    ENCODER, its states are written, too: to run it in every step would take longer than the rest of the step.
    """
    ends_path = path.with_suffix(".ends.npy")
    encoder_path = path.with_suffix(".encoder.npy")
    paths = [path, encoder_path] if ENCODER in model.kept else [path]
    if not ends_path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_teacher(paths, ends_path, model, examples, collate, options, known)
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
    everywhere = options.exit_layers > 0 and (
        not model.seq2seq or any(example.given for example in examples)
    )
    labels = [collate([example])["labels"] for example in examples]
    rows = [one.numel() if everywhere else int((one != IGNORED).sum()) for one in labels]
    counts = np.array([rows, [len(example.prompt) for example in examples]][: len(paths)])
    ends = counts.cumsum(axis=1)
    vocabulary, width = model.head.weight.shape
    best = min(BEST, vocabulary if known is None else len(known) + 1)
    fields: list[tuple[Any, ...]] = [("states", np.float16, width), ("scales", np.float32)]
    if options.exit_input == "feature":
        fields += [("features", np.float16, width), ("feature_scales", np.float32)]
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
            if options.exit_input == "feature":
                features = model.head.normed(hidden[model.layers].float())
                _write_states(records, places, features, "features", "feature_scales")
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
    np.save(ends_path, ends)  # last: where it is, the records are complete


def _records(path: Path, kept: np.dtype[Any], count: int) -> np.memmap[Any, Any]:
    """A file of so many records, mapped. Raises OSError where the disk has no room for them: writing to the map would
    end the process."""
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
    """Logarithms of probabilities [N, V] of states [N, d], in `room` where that is float32: the memory of so many
    logits costs more to get than to fill."""
    with products(bf16):
        read = (head.normed(states) * head.scale).to(room.dtype)
        logits = torch.mm(read, head.weight.T, out=room[: len(states)]).float()
    for suppress in head.linear._forward_hooks.values():  # what speech never says (tuning.py)
        logits = suppress(head.linear, (read,), logits)
    if head.bias is not None:
        logits += head.bias
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return torch.log_softmax(logits, -1, out=logits)


def _states(records: np.ndarray, name: str = "states", scale: str = "scales") -> np.ndarray:
    """Read what `_write_states` wrote, float32 [..., d]."""
    states: np.ndarray = records[name].astype(np.float32) * records[scale][..., None]
    return states


def _write_states(
    records: np.ndarray,
    places: np.ndarray,
    states: torch.Tensor,
    name: str = "states",
    scale: str = "scales",
) -> None:
    """Write states [N, d]: in float16 the largest number of each is 1."""
    states = states.float()
    scales = states.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    records[name][places] = (states / scales[:, None]).cpu().numpy()
    records[scale][places] = scales.cpu().numpy()


class FrozenExit(nn.Module):
    """An exit over a teacher's states, with the frozen head of its model."""

    accepts_loss_kwargs = True
    _keys_to_ignore_on_save: tuple[str, ...] | None = None
    _rows: torch.Tensor  # [n, d] of the known tokens
    _bias: torch.Tensor | None  # [n]

    def __init__(self, whole: ShallowDeep) -> None:
        """Take the exit of `whole`, not its model."""
        super().__init__()
        self.seq2seq = whole.seq2seq
        self.exit = whole.own
        self.known = whole.known
        # The norm and the head alone, so that the layers' memory goes back.
        head = whole.head
        self.head = SharedHead(
            head.norm, head.linear, head.scale, None, head.bias, head.softcap
        ).requires_grad_(False)
        rows, bias = (None, None) if self.known is None else self.head.rows(self.known.vocabulary)
        self.register_buffer("_rows", None if rows is None else rows.detach(), persistent=False)
        self.register_buffer("_bias", bias, persistent=False)
        self.exit_layer = whole.exit_layer
        self.layers = whole.layers
        self.loss_name = whole.loss_name
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
        """Take what `collate_teacher` gives. An exit that reads features is trained as the first tokens after a sync
        pass, PASSES of them, and measured as the second of these."""
        wanted = labels != IGNORED
        known = self.known
        labels = labels[wanted]
        classes = labels if known is None else known.classes(labels)
        assert self.exit is not None
        prompts = (
            None if encoded is None or attention_mask is None else Encoded(encoded, attention_mask)
        )
        if features is None:
            passes = [self.exit(states, prompts)]
        else:
            assert isinstance(self.exit, ExitLayers)
            passes = self.exit.passes(
                states, prompts, features, PASSES if self.training else MEASURED
            )
        students = [self.exit.norm(one[wanted]) * self.head.scale for one in passes]  # [R, d] each
        # In float32: logits in bfloat16 are off by a twentieth.
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
            total = [self._loss(student, classes, best, chances, nats) for student in students]
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
        # The deep one is a constant, so that losses compare with other modes.
        loss = losses.by_depth({self.exit_layer: -found[:, 0], self.layers: nats}).sum()
        if self.loss_name == "logit-kd":
            loss = loss + self.alpha * losses.best_distillation(chances, found[:, 1:])
        return loss

    def _logits(self, student: torch.Tensor) -> torch.Tensor:
        """Logits of all tokens, [R, V], or of the classes of an exit vocabulary."""
        if self.known is not None:
            return self.known.logits(student, self._rows, self._bias, self.head.softcap)
        return capped(
            functional.linear(student, self.head.weight, self.head.bias), self.head.softcap
        )

    def _log_chances(
        self, student: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logarithms of probabilities [R, n] of n tokens, and where those of `tokens` [R, m] stand among them; classes,
        where there is an exit vocabulary.

        The head's product with a large vocabulary is most of a step. All tokens that some row needs are taken, and
        of the others a sample, which stands for all of them.
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
