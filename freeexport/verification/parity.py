"""Parity of a bundle's engines with the checkpoint they came from, measured on padded text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from freeexport.verification.checks import Check, Measure
from freeexport.verification.engine_pair import EnginePair
from freeexport.verification.row_parity import Arithmetic, Rows, Text, scale_of, self_checks
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Manifest, Precision
from runtime.bundle.precision import FloatType
from runtime.engines.encoder import Encoder
from runtime.engines.onnx import OnnxEngine
from runtime.machine.machine import usable_cores
from runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    ExitHead = Callable[[torch.Tensor], torch.Tensor]

# An engine may be so many times as far from float64 as transformers is in the same precision, and always so far: by the
# largest difference, as a share of the largest value.
TIMES = 4.0
LEAST = {"fp32": 2e-5, "fp16": 3e-2}
# bf16, and weights in 8 and 4 bits, differ everywhere: there by the root mean square of the difference, as a share of
# that of the values. A sound model in 8 bits was 2.7 times as far as transformers, 0.05; a fault makes it 1.
COARSE_LEAST = 1e-2
MAX_TEXT = 48


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
    tokenizer, vocabulary = Tokenizer.load(bundle.path, bundle.manifest.files), bundle.manifest.vocab_size
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
    cross, encoded = encode(bundle, batch)
    pair = EnginePair(bundle, len(batch.tokens), usable_cores(), cross)
    shallow = pair.shallow(batch.tokens, batch.lengths)
    deep = pair.deep(shallow["hidden"], batch.lengths)
    index = rows_of(batch.lengths, batch.tokens.shape[1])
    whole = Rows.of_call(index, index, shallow, deep["logits"])
    if model is not None:
        ours = States(whole.deep, whole.shallow, whole.hidden, _encoded(encoded, batch))
        yield from _against(model, manifest, batch, ours, exit_head)
    # For a GPU weights are quantized, and activations are not.
    rounds = manifest.quantization is not None and manifest.target == "cpu"
    arithmetic: Arithmetic = "8 bits" if rounds else float_type or manifest.float_type
    yield from self_checks(pair, Text(batch.tokens, batch.lengths), whole, shallow["hidden"], arithmetic)


def _against(
    model: PreTrainedModel, manifest: Manifest, batch: Batch, ours: States, exit_head: ExitHead | None
) -> Iterator[Check]:
    """Engines, and transformers in fp32 or half precision, against transformers in float64."""
    # torch takes a second to import, and a bundle is checked without it too.
    from freeexport.verification.reference_arithmetic import Float64

    with Float64():
        truth = States.of(model, manifest.exit_layer, batch, exit_head)
    with in_precision_of(manifest, model):
        theirs = States.of(model, manifest.exit_layer, batch, exit_head)
    yield from state_checks(ours, truth, theirs, manifest.precision)


def state_checks(ours: States, truth: States, theirs: States, precision: Precision) -> Iterator[Check]:
    """How far ours and transformers' states in this precision are from float64's, and how far ours may be."""
    known = np.flatnonzero(ours.shallow[0] > np.finfo(np.float32).min)
    measure: Measure = "largest" if precision in LEAST else "rms"
    for name, tensor, field in (
        ("encoder", "encoder hidden", "encoded"),
        ("prefill", "shallow hidden", "hidden"),
        ("prefill", "shallow logits", "shallow"),
        ("prefill", "deep logits", "deep"),
    ):
        values, wanted, reference = (getattr(states, field) for states in (ours, truth, theirs))
        if values is None or wanted is None or reference is None:
            continue
        if field == "shallow":
            values, wanted, reference = values[:, known], wanted[:, known], reference[:, known]
        error, itself = (DISTANCES[measure](states, wanted) for states in (values, reference))
        tolerance = max(LEAST.get(precision, COARSE_LEAST), TIMES * itself)
        yield Check(name, tensor, error, tolerance, measure, itself, scale_of(wanted))


def in_precision_of(manifest: Manifest, model: PreTrainedModel) -> AbstractContextManager[None]:
    """The reference is as coarse in there as a bundle of this precision may be."""
    from freeexport.verification.reference_arithmetic import BITS, coarsening, rounding

    if manifest.quantization is not None:
        engines = {engine.engine: engine for engine in manifest.quantization.engines}
        exit_layer = manifest.exit_layer
        return coarsening(model, lambda name: engines.get(engine_of(name, exit_layer)), manifest.target == "cpu")
    return rounding(model, BITS[manifest.precision]) if manifest.precision in BITS else nullcontext()


def engine_of(module: str, exit_layer: int) -> str:
    """The engine that computes a module of transformers, by its name."""
    if module.startswith("encoder."):
        return "encoder"
    if module.endswith(("EncDecAttention.k", "EncDecAttention.v")):
        return "prologue"
    layer = re.search(r"\.(?:layers|block)\.(\d+)\.", module)
    return "shallow" if layer and int(layer[1]) < exit_layer else "deep"


def _encoded(encoded: np.ndarray | None, batch: Batch) -> np.ndarray | None:
    return None if encoded is None else _valid(encoded, batch.prompt_lengths)


def encode(bundle: Bundle, batch: Batch) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Cross-attention inputs of a padded batch, and the encoder's output; nothing for a decoder-only bundle."""
    if batch.prompts is None or batch.prompt_lengths is None:
        return {}, None
    kernels = bundle.manifest.kernels
    engines = [OnnxEngine(bundle.engine(name), usable_cores(), kernels=kernels) for name in ("encoder", "prologue")]
    return Encoder(*engines).run_padded(batch.prompts, batch.prompt_lengths)


@dataclass(frozen=True)
class States:
    """What a model gives for the n valid rows of a batch: logits [n, V], those of the model cut after the exit layer,
    the states [n, d] after it, and for an encoder-decoder its encoder's output at the valid rows of the prompts."""

    deep: np.ndarray
    shallow: np.ndarray
    hidden: np.ndarray
    encoded: np.ndarray | None

    @classmethod
    def of(cls, model: PreTrainedModel, exit_layer: int, batch: Batch, exit_head: ExitHead | None) -> States:
        """What transformers computes, as float32."""
        out = forward(model, batch)
        states = out.get("decoder_hidden_states", out.get("hidden_states"))[exit_layer]
        encoded = out.get("encoder_last_hidden_state")
        deep = _valid(out["logits"].numpy(), batch.lengths)
        del out
        shallow = _cut_logits(model, exit_layer, batch) if exit_head is None else exit_head(states)
        return cls(
            deep,
            _valid(shallow.numpy(), batch.lengths),
            _valid(states.numpy(), batch.lengths),
            None if encoded is None else _valid(encoded.numpy(), batch.prompt_lengths),
        )


def _cut_logits(model: PreTrainedModel, exit_layer: int, batch: Batch) -> torch.Tensor:
    """Logits [B, n, V] of the model cut after the exit layer."""
    stack, name = layer_list(model)
    layers = getattr(stack, name)
    setattr(stack, name, layers[:exit_layer])
    try:
        logits: torch.Tensor = forward(model, batch)["logits"]
        return logits
    finally:
        setattr(stack, name, layers)


def layer_list(model: Any) -> tuple[Any, str]:
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


def _valid(states: np.ndarray, lengths: np.ndarray | None) -> np.ndarray:
    """[B, n, d] -> those of the valid rows, [N, d], as float32."""
    rows = rows_of(lengths, states.shape[1])
    return states.reshape(-1, states.shape[-1])[rows].astype(np.float32)


def _largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / scale_of(theirs))


def _root_mean_square(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / max(1e-6, float(np.linalg.norm(theirs))))


DISTANCES: dict[Measure, Callable[[np.ndarray, np.ndarray], float]] = {"largest": _largest, "rms": _root_mean_square}
