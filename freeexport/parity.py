"""Parity of a bundle's engines with the checkpoint they came from, measured on padded text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from freeexport.engine_pair import EnginePair
from runtime.bundle import Bundle
from runtime.encoder import Encoder
from runtime.engines.onnx import OnnxEngine
from runtime.machine import usable_cores
from runtime.precision import FloatType
from runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    ExitHead = Callable[[torch.Tensor], torch.Tensor]

# Largest difference allowed, as a share of the largest reference value: rounding of the precision through all layers.
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2}
# bf16, and weights in 8 and 4 bits, differ everywhere: the root mean square of the difference as a share of that of the
# reference.
ROUNDED_TOLERANCE = {"bf16": 0.15, "int8": 0.15, "fp8": 0.3, "mixed": 0.4, "int4": 0.5}
# A row alone and among others rounds its activations alike, but for the last bit of attention, which now and then
# tips one over to the next of 255 steps.
ROUNDED_NOISE = 5e-2
SYNC_SIZES = (1, 2, 3, 5, 8, 16)
MAX_TEXT = 48


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference of `tensor`, as a share of `scale`: its largest value, at least 1. With
    rounded weights, against the checkpoint: the root mean square difference, as a share of that of the tensor."""

    name: str
    tensor: str
    error: float
    tolerance: float
    scale: float = 1.0

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.tolerance)  # NaN fails


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids int64 [B, n] and their lengths [B]; for an encoder-decoder also the prompts."""

    tokens: np.ndarray
    lengths: np.ndarray
    prompts: np.ndarray | None = None
    prompt_lengths: np.ndarray | None = None


def sample_texts() -> list[str]:
    return files("freeexport").joinpath("data/verify.txt").read_text(encoding="utf-8").splitlines()


def sample_batch(bundle: Bundle) -> Batch:
    """The sample texts as a padded batch; random ids where the bundle has no tokenizer, or another vocabulary's."""
    manifest = bundle.manifest
    sequences = sample_ids(bundle)
    limit = max(1, min(MAX_TEXT, manifest.capacity - 1))
    if not manifest.encoder_decoder:
        return Batch(*pad([ids[:limit] for ids in sequences]))
    # What the decoder reads need not answer the prompt: any text will do.
    start = [manifest.decoder_start_token_id or 0]
    targets = [start + ids[: limit - 1] for ids in sequences[1:] + sequences[:1]]
    prompts = [ids[: min(MAX_TEXT, manifest.encoder_capacity)] for ids in sequences]
    return Batch(*pad(targets), *pad(prompts))


def sample_ids(bundle: Bundle) -> list[list[int]]:
    tokenizer, vocabulary = Tokenizer.load(bundle.path), bundle.manifest.vocab_size
    if tokenizer is not None:
        sequences = [tokenizer.encode(text) for text in sample_texts()]
        if all(0 <= token < vocabulary for ids in sequences for token in ids):
            return sequences
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocabulary, size).tolist() for size in (37, 11, 24, 5)]


def pad(sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = ids
    return tokens, np.array([len(ids) for ids in sequences], np.int32)


def engine_checks(
    bundle: Bundle,
    model: PreTrainedModel | None,
    batch: Batch,
    exit_head: ExitHead | None = None,
    float_type: FloatType | None = None,
) -> Iterator[Check]:
    """Engines against the reference model, if there is one, and against themselves called otherwise.

    `exit_head` is the reference of an exit with parameters of its own: hidden states [N, d] -> logits [N, V].
    `float_type` is the one that the bundle emulates, None for its own.
    """
    manifest = bundle.manifest
    precision = manifest.precision
    distance = _error if precision in TOLERANCE else _mean_error
    tolerance = TOLERANCE[precision] if precision in TOLERANCE else ROUNDED_TOLERANCE[precision]
    # For a GPU weights are rounded, and activations are not.
    exact = manifest.quantization is None or manifest.target != "cpu"
    noise = TOLERANCE.get(float_type or manifest.float_type, ROUNDED_NOISE) if exact else ROUNDED_NOISE
    cross, encoded = encode(bundle, batch)
    reference = Reference.of(model, bundle.manifest.exit_layer, batch, exit_head) if model is not None else None
    if reference is not None and encoded is not None and reference.encoded is not None:
        valid = rows_of(batch.prompt_lengths, encoded.shape[1])
        yield Check(
            "encoder", "encoder hidden", distance(_flat(encoded)[valid], _flat(reference.encoded)[valid]), tolerance
        )
    pair = EnginePair(bundle, len(batch.tokens), usable_cores(), cross)
    valid = rows_of(batch.lengths, batch.tokens.shape[1])
    shallow = pair.shallow(batch.tokens, batch.lengths)
    deep = pair.deep(shallow["hidden"], batch.lengths)
    if reference is not None:
        pairs = [
            ("shallow hidden", _flat(shallow["hidden"]), _flat(reference.hidden)),
            ("shallow logits", *_known(shallow["logits"], _flat(reference.shallow_logits))),
            ("deep logits", deep["logits"], _flat(reference.logits)),
        ]
        for tensor, ours, theirs in pairs:
            yield Check("prefill", tensor, distance(ours[valid], theirs[valid]), tolerance, _scale(theirs[valid]))
    yield from _stepping(pair, batch, shallow, deep, noise)
    yield from _sync_passes(pair, shallow["hidden"], noise)


def _stepping(
    pair: EnginePair, batch: Batch, shallow: dict[str, np.ndarray], deep: dict[str, np.ndarray], tolerance: float
) -> Iterator[Check]:
    """One token at a time, in rows of different lengths, against all at once."""
    pair.trim(0)
    width = batch.tokens.shape[1]
    worst = {"shallow hidden": 0.0, "deep logits": 0.0}
    for column in range(width):
        active = (batch.lengths > column).astype(np.int32)
        step = pair.shallow(batch.tokens[:, column : column + 1], active)
        logits = pair.deep(step["hidden"], active)["logits"]
        rows = np.flatnonzero(active)
        for tensor, ours, theirs in (
            ("shallow hidden", step["hidden"][:, 0], shallow["hidden"][:, column]),
            ("deep logits", logits, deep["logits"][np.arange(len(active)) * width + column]),
        ):
            # Unlike max, this keeps NaN.
            worst[tensor] = float(np.maximum(worst[tensor], _error(ours[rows], theirs[rows])))
    for tensor, error in worst.items():
        yield Check("stepping against prefill", tensor, error, tolerance)


def _sync_passes(pair: EnginePair, hidden: np.ndarray, tolerance: float) -> Iterator[Check]:
    """A deep pass over k rows against k passes over one row, with a past before them."""
    past = max(1, hidden.shape[1] // 3)
    ones = np.ones(pair.rows, np.int32)
    for size in SYNC_SIZES:
        if size > min(pair.manifest.max_pending, hidden.shape[1] - past):
            break
        pair.trim(0)
        pair.deep(hidden[:, :past], ones * past)
        together = pair.deep(hidden[:, past : past + size], ones * size)["logits"].reshape(pair.rows, size, -1)
        pair.trim(past)
        singles = [pair.deep(hidden[:, past + row : past + row + 1], ones)["logits"] for row in range(size)]
        yield Check(f"sync pass of {size}", "deep logits", _error(together, np.stack(singles, axis=1)), tolerance)


def encode(bundle: Bundle, batch: Batch) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Cross-attention inputs of a padded batch, and the encoder's output; nothing for a decoder-only bundle."""
    if batch.prompts is None or batch.prompt_lengths is None:
        return {}, None
    kernels = bundle.manifest.kernels
    engines = [OnnxEngine(bundle.engine(name), usable_cores(), kernels=kernels) for name in ("encoder", "prologue")]
    return Encoder(*engines).run_padded(batch.prompts, batch.prompt_lengths)


@dataclass(frozen=True)
class Reference:
    """What transformers computes: logits [B, n, V], those of the model cut after the exit layer, and the states
    [B, n, d] after it; for an encoder-decoder its encoder's output [B, E, d]."""

    logits: np.ndarray
    shallow_logits: np.ndarray
    hidden: np.ndarray
    encoded: np.ndarray | None

    @classmethod
    def of(cls, model: PreTrainedModel, exit_layer: int, batch: Batch, exit_head: ExitHead | None) -> Reference:
        out = forward(model, batch)
        states = out.get("decoder_hidden_states", out.get("hidden_states"))[exit_layer]
        shallow = _cut_logits(model, exit_layer, batch) if exit_head is None else exit_head(states)
        encoded = out.get("encoder_last_hidden_state")
        return cls(out["logits"].numpy(), shallow.numpy(), states.numpy(), None if encoded is None else encoded.numpy())


def _cut_logits(model: PreTrainedModel, exit_layer: int, batch: Batch) -> torch.Tensor:
    """Logits [B, n, V] of the model cut after the exit layer."""
    stack, name = _layer_list(model)
    layers = getattr(stack, name)
    setattr(stack, name, layers[:exit_layer])
    try:
        logits: torch.Tensor = forward(model, batch)["logits"]
        return logits
    finally:
        setattr(stack, name, layers)


def _layer_list(model: Any) -> tuple[Any, str]:
    """The module that holds the decoder layers, and under which name."""
    decoder = model.get_decoder()
    return decoder, "block" if hasattr(decoder, "block") else "layers"


def forward(model: Any, batch: Batch) -> Any:
    """What transformers returns for a batch: `logits` [B, n, V], and the hidden states of all layers."""
    import torch

    tokens, mask = torch.from_numpy(batch.tokens), torch.from_numpy(_mask(batch.lengths, batch.tokens.shape[1]))
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if batch.prompts is not None and batch.prompt_lengths is not None:
        prompt_mask = torch.from_numpy(_mask(batch.prompt_lengths, batch.prompts.shape[1]))
        inputs = {"input_ids": torch.from_numpy(batch.prompts), "attention_mask": prompt_mask}
        inputs |= {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
    # T5's cache fails where the decoder is deeper than the encoder.
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True, use_cache=False)


def _mask(lengths: np.ndarray, width: int) -> np.ndarray:
    return (np.arange(width)[None] < lengths[:, None]).astype(np.int64)


def rows_of(lengths: np.ndarray | None, width: int) -> np.ndarray:
    """Flat indices of the valid rows of a padded batch."""
    assert lengths is not None
    return np.flatnonzero(_mask(lengths, width))


def _flat(states: np.ndarray) -> np.ndarray:
    return states.reshape(-1, states.shape[-1]).astype(np.float32)


def _error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / _scale(theirs))


def _mean_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / max(1e-6, float(np.linalg.norm(theirs))))


def _known(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the tokens that the shallow head knows: all, or an exit vocabulary."""
    known = ours[0] > np.finfo(np.float32).min
    return ours[:, known], theirs[:, known]


def _scale(theirs: np.ndarray) -> float:
    return max(1.0, float(np.abs(theirs).max()))
