"""Hidden states and logits of transformers, compared with those of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from freeexport.training.layer_modules import Encoded
from freeexport.training.shallow_deep import layer_list
from freeexport.verification.batches import Batch, mask_of, valid_indices
from freeexport.verification.checks import Check, Measure
from graphs.layers import SUPPRESSED
from runtime.bundle.manifest import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tolerance of the engines in fp32 and fp16: TIMES the error of transformers in the same precision,
# at least MIN_TOLERANCE. Errors are the largest difference from float64, relative to the largest
# value, or for an encoder in fp32 the root mean square.
TIMES = 4.0
MIN_TOLERANCE = {"fp32": 2e-5, "fp16": 3e-2}
# In bf16, and with weights in 8 or 4 bits, all values differ. There the error is the root mean
# square of the difference, relative to that of the values, and MIN_COARSE_TOLERANCE applies. An
# intact 8-bit model had an error of 0.05, 2.7 times that of transformers. A fault raises it to 1.
MIN_COARSE_TOLERANCE = 1e-2

# Maps states [B, n, d], encoder states, and the states after 0 to L layers, the last normed, to
# logits [B, n, V]. Also returns confidences [B, n, 1] if they depend on more than the logits.
ExitHead = Callable[
    [torch.Tensor, Encoded | None, Sequence[torch.Tensor]], tuple[torch.Tensor, torch.Tensor | None]
]


@dataclass(frozen=True)
class States:
    """Outputs of a model for the n valid rows of a batch.

    Attributes:
        deep: Logits [n, V].
        shallow: Logits [n, V] of the exit, or of the model cut after the exit layer.
        hidden: States [n, d] after the exit layer.
        encoded: Encoder states at the valid positions of the prompts. None for a decoder-only
            model.
        confidence: Confidences [n, 1] of an exit with a vocabulary.
    """

    deep: np.ndarray
    shallow: np.ndarray
    hidden: np.ndarray
    encoded: np.ndarray | None
    confidence: np.ndarray | None = None

    @classmethod
    def of(
        cls, model: PreTrainedModel, exit_layer: int, batch: Batch, exit_head: ExitHead | None
    ) -> States:
        """Return the outputs of transformers, as float32."""
        out = forward(model, batch)
        layers = out.get("decoder_hidden_states", out.get("hidden_states"))
        states = layers[exit_layer]
        encoded = out.get("encoder_last_hidden_state")
        prompts = None
        if batch.prompts is not None and batch.prompt_lengths is not None:
            prompts = Encoded(
                encoded, torch.from_numpy(mask_of(batch.prompt_lengths, encoded.shape[1])) > 0
            )
        deep = valid_rows(out["logits"].numpy(), batch.lengths)
        del out
        confidence = None
        if exit_head is not None:
            shallow, confidence = exit_head(states, prompts, layers)
        else:
            stack, name = layer_list(model)
            whole = getattr(stack, name)
            setattr(stack, name, whole[:exit_layer])
            try:
                shallow = forward(model, batch)["logits"]
            finally:
                setattr(stack, name, whole)
        return cls(
            deep,
            valid_rows(shallow.numpy(), batch.lengths),
            valid_rows(states.numpy(), batch.lengths),
            encoded=None if encoded is None else valid_rows(encoded.numpy(), batch.prompt_lengths),
            confidence=None
            if confidence is None
            else valid_rows(confidence.numpy(), batch.lengths),
        )


def forward(model: Any, batch: Batch) -> Any:
    """Run transformers on a batch.

    The output has `logits` [B, n, V] and the hidden states of all layers.
    """
    tokens = torch.from_numpy(batch.tokens)
    mask = torch.from_numpy(mask_of(batch.lengths, batch.width))
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if batch.prompts is not None and batch.prompt_lengths is not None:
        prompt_mask = torch.from_numpy(mask_of(batch.prompt_lengths, batch.prompts.shape[1]))
        inputs = {"input_ids": torch.from_numpy(batch.prompts), "attention_mask": prompt_mask}
        if batch.prompts.ndim == 3:
            inputs = {"input_features": torch.from_numpy(batch.prompts)}
        inputs |= {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
    # T5's cache fails if the decoder is deeper than the encoder.
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True, use_cache=False)


def valid_rows(states: np.ndarray, lengths: np.ndarray | None) -> np.ndarray:
    """Select the valid rows of [B, n, d] as float32 [N, d]."""
    rows = valid_indices(lengths, states.shape[1])
    return states.reshape(-1, states.shape[-1])[rows].astype(np.float32)


def state_checks(
    ours: States, truth: States, theirs: States, precision: Precision
) -> Iterator[Check]:
    """Compare our states, and transformers' in this precision, with float64.

    Yields one check per tensor. Tolerances depend on the errors of transformers.
    """
    # Ignore tokens that the exit cannot predict and suppressed ones.
    known = {name: getattr(ours, name)[0] > SUPPRESSED / 2 for name in ("shallow", "deep")}
    for name, tensor, field in (
        ("encoder", "encoder hidden", "encoded"),
        ("prefill", "shallow hidden", "hidden"),
        ("prefill", "shallow logits", "shallow"),
        ("prefill", "exit confidence", "confidence"),
        ("prefill", "deep logits", "deep"),
    ):
        values, wanted, reference = (getattr(states, field) for states in (ours, truth, theirs))
        if values is None or wanted is None or reference is None:
            continue
        if field in known:
            values, wanted, reference = (
                one[:, known[field]] for one in (values, wanted, reference)
            )
        # Rounding may move one row of an encoder far more than all others: a row in 3,000 of
        # Whisper tiny.en differs 60 times as much as the median. How far is chance, also in
        # transformers.
        coarse = precision not in MIN_TOLERANCE or (precision == "fp32" and field == "encoded")
        measure: Measure = "rms" if coarse else "largest"
        distance = _root_mean_square if coarse else _largest
        itself = distance(reference, wanted)
        tolerance = max(MIN_TOLERANCE.get(precision, MIN_COARSE_TOLERANCE), TIMES * itself)
        yield Check(
            name,
            tensor,
            distance(values, wanted),
            tolerance=tolerance,
            measure=measure,
            reference=itself,
            scale=scale_of(wanted),
        )


def scale_of(values: np.ndarray) -> float:
    """Return the largest magnitude, at least 1, to which differences are relative."""
    return max(1.0, float(np.abs(values).max(initial=0.0)))


def _largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max(initial=0.0)) / scale_of(theirs)


def _root_mean_square(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / max(1e-6, float(np.linalg.norm(theirs))))
