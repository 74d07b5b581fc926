"""Reference values from transformers, in float64 and in the precision of a bundle."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from freeexport.checkpoints.examples import TARGETS_WANTED, DataError, read_examples, recording_of
from freeexport.training.layer_modules import Encoded
from freeexport.training.shallow_deep import layer_list
from freeexport.verification.checks import Check, Measure
from freeexport.verification.engines import (
    Batch,
    EnginePair,
    Moved,
    encode,
    mask_of,
    pad,
    rows_of,
)
from graphs.layers import SUPPRESSED
from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import EnginePrecision, Manifest, Precision
from runtime.errors import OptionError
from runtime.machine.machine import usable_cores
from runtime.speech import SpeechPrompt
from runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tolerance of the engines in fp32 and fp16: TIMES the error of transformers in the same precision,
# at least LEAST. Errors are the largest difference from float64, relative to the largest value.
TIMES = 4.0
LEAST = {"fp32": 2e-5, "fp16": 3e-2}
# In bf16, and with weights in 8 or 4 bits, all values differ. There the error is the root mean
# square of the difference, relative to that of the values, and COARSE_LEAST applies. An intact
# 8-bit model had an error of 0.05, 2.7 times that of transformers. A fault raises it to 1.
COARSE_LEAST = 1e-2
# Bits of the significand.
BITS = {"fp16": 11, "bf16": 8}
# Longest block of inputs that shares a scale, if activations have one scale per block.
ACTIVATION_BLOCK = 128
# Functions that read no values, so nothing needs to be widened.
_ATTRIBUTES = frozenset(
    {"__get__", "size", "dim", "stride", "numel", "is_floating_point", "__len__"}
)
# If the two best logits are closer than this, rounding decides. Calls with k rows and single steps
# round differently.
TIE = 1e-4
# Tolerance of the mean divergence in nats: QUALITY_TIMES that of transformers in the same
# precision, at least QUALITY_LEAST or QUALITY_COARSE_LEAST. More than that indicates a fault, not
# low precision.
QUALITY_TIMES = 2.5
QUALITY_LEAST = {"fp32": 1e-4, "fp16": 2e-2}
QUALITY_COARSE_LEAST = 5e-2
# Sequences per batch, their maximum length in tokens, and the maximum number of lines read.
ROWS = 8
LONGEST = 256
LINES = 256
# Maximum lines of speech: the encoder takes as long as hundreds of tokens.
RECORDINGS = 32

# Maps states [B, n, d], encoder states, and the states after 0 to L layers, the last normed, to
# logits [B, n, V]. Also returns confidences [B, n, 1] if they depend on more than the logits.
ExitHead = Callable[
    [torch.Tensor, Encoded | None, Sequence[torch.Tensor]],
    tuple[torch.Tensor, torch.Tensor | None],
]


# Options that disable what a checkpoint may recommend beyond greedy decoding.
PLAIN = {
    **{
        "min_new_tokens": None,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
    },
    "repetition_penalty": 1.0,
}


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
            None if encoded is None else valid_rows(encoded.numpy(), batch.prompt_lengths),
            None if confidence is None else valid_rows(confidence.numpy(), batch.lengths),
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
    rows = rows_of(lengths, states.shape[1])
    return states.reshape(-1, states.shape[-1])[rows].astype(np.float32)


def state_checks(
    ours: States, truth: States, theirs: States, precision: Precision
) -> Iterator[Check]:
    """Compare our states, and transformers' in this precision, with float64.

    Yields one check per tensor. Tolerances depend on the errors of transformers.
    """
    # Ignore tokens that the exit cannot predict and suppressed ones.
    known = {name: getattr(ours, name)[0] > SUPPRESSED / 2 for name in ("shallow", "deep")}
    measure: Measure = "largest" if precision in LEAST else "rms"
    distance = _largest if precision in LEAST else _root_mean_square
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
        itself = distance(reference, wanted)
        tolerance = max(LEAST.get(precision, COARSE_LEAST), TIMES * itself)
        yield Check(
            name, tensor, distance(values, wanted), tolerance, measure, itself, scale_of(wanted)
        )


def scale_of(values: np.ndarray) -> float:
    """Return the largest magnitude, at least 1, to which differences are relative."""
    return max(1.0, float(np.abs(values).max(initial=0.0)))


def _largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max(initial=0.0)) / scale_of(theirs)


def _root_mean_square(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / max(1e-6, float(np.linalg.norm(theirs))))


def in_precision_of(manifest: Manifest, model: PreTrainedModel) -> AbstractContextManager[None]:
    """Context manager: reduce the precision of the reference to that of a bundle."""
    if manifest.quantization is not None:
        engines = {engine.engine: engine for engine in manifest.quantization.engines}
        exit_layer = manifest.exit_layer
        return coarsening(
            model, lambda name: engines.get(engine_of(name, exit_layer)), manifest.target == "cpu"
        )
    return (
        rounding(model, BITS[manifest.precision]) if manifest.precision in BITS else nullcontext()
    )


def engine_of(module: str, exit_layer: int) -> str:
    """Return the engine that computes a module of transformers, from the module's name."""
    if module.startswith(("encoder.", "model.encoder.")):
        return "encoder"
    if module.endswith(
        ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")
    ):
        return "prologue"
    layer = re.search(r"\.(?:layers|block|h)\.(\d+)\.", module)
    return "shallow" if layer and int(layer[1]) < exit_layer else "deep"


class Float64(TorchFunctionMode):
    """Run every operator in float64, even if the code requests float32.

    Norms, softmax and rotary positions do that. A float32 parameter is widened only while an
    operator reads it, so the extra memory is one float64 copy of the largest weight.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _ATTRIBUTES:
            return func(*args, **kwargs)
        if func is functional.embedding:  # widens the rows read, not the table
            return _wide(func(*args, **kwargs))
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return tree_map(_wide, func(*tree_map(_wide, args), **tree_map(_wide, kwargs)))


def _wide(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return item.double() if item.dtype is torch.float32 else item
    return torch.float64 if item is torch.float32 else item


@contextmanager
def hooked(hooks: Iterable[Any]) -> Iterator[None]:
    """Context manager: register hooks of torch modules, and remove them at the end."""
    hooks = list(hooks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rounding(model: Any, bits: int) -> AbstractContextManager[None]:
    """Round the output of every leaf module to `bits` of significand, with the range of float32."""

    def rounded(item: Any) -> Any:
        if not isinstance(item, torch.Tensor) or not item.is_floating_point():
            return item
        fraction, exponent = torch.frexp(item)
        return torch.ldexp(torch.round(fraction * 2**bits) / 2**bits, exponent)

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    return hooked(
        leaf.register_forward_hook(lambda _, inputs, output: tree_map(rounded, output))
        for leaf in leaves
    )


def coarsening(
    model: Any, precision_of: Callable[[str], EnginePrecision | None], activations: bool
) -> AbstractContextManager[None]:
    """Add random errors to every linear layer, as from quantization.

    The errors correspond to the relative error of weights in the layer's engine.

    Args:
        model: A model of transformers.
        precision_of: Returns the precision of a module's engine, by the module's name.
        activations: Add errors as if inputs had 8 bits too.
    """
    generator = torch.Generator().manual_seed(0)

    def coarsener(found: EnginePrecision) -> Callable[[Any, Any, torch.Tensor], torch.Tensor]:
        def coarse(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            (read,) = inputs
            wrong = found.largest_error * torch.linalg.vector_norm(read, dim=-1, keepdim=True)
            if activations:
                size = read.shape[-1]
                wrong = torch.hypot(
                    wrong,
                    _rounding_error(read, size if found.linears == "int8" else ACTIVATION_BLOCK),
                )
            weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
            rows = torch.linalg.vector_norm(weight, dim=1) / weight.shape[1] ** 0.5
            return output + torch.randn(output.shape, generator=generator) * rows * wrong

        return coarse

    linear = (
        (name, part)
        for name, part in model.named_modules()
        if isinstance(part, (torch.nn.Linear, Conv1D))
    )
    known = ((part, found) for name, part in linear if (found := precision_of(name)) is not None)
    return hooked(part.register_forward_hook(coarsener(found)) for part, found in known)


def _rounding_error(read: torch.Tensor, block: int) -> torch.Tensor:
    """Return the norm [..., 1] of the error of rounding [..., n] to 8 bits.

    Each block of inputs has a scale.
    """
    size = read.shape[-1]
    length = min(block, size)
    padded = functional.pad(read, (0, -size % length))
    steps = padded.unflatten(-1, (-1, length)).abs().amax(-1) / 127
    # The standard deviation of rounding is a step divided by sqrt(12).
    return torch.linalg.vector_norm(steps, dim=-1, keepdim=True) * (length / 12) ** 0.5


@dataclass(frozen=True)
class Comparison:
    """Greedy decoding of one prompt.

    Attributes:
        prompt: Number of the prompt.
        tokens: Number of tokens compared.
        first_difference: Position of the first different id. None if all are equal.
        gap: Distance of the reference's two best logits there.
    """

    prompt: int
    tokens: int
    first_difference: int | None = None
    gap: float | None = None

    def passed(self, tie: float | None) -> bool:
        """Return True if the ids are equal up to a tie.

        If `tie` is None, no equality is required.
        """
        return (
            tie is None
            or self.first_difference is None
            or (self.gap is not None and self.gap < tie)
        )


def compare(
    session: Session,
    model: Any,
    prompts: Sequence[Sequence[int] | SpeechPrompt],
    new_tokens: int,
    seconds: Callable[[], float] = lambda: math.inf,
) -> Iterator[Comparison]:
    """Compare mode `full` of a session with transformers' `generate`.

    Both stop at the bundle's end-of-sequence ids.

    Args:
        session: Session of the bundle.
        model: A model of transformers.
        prompts: Token ids, or windows of speech.
        new_tokens: Maximum tokens per prompt.
        seconds: Returns the time left for the reference. If it runs out, only the tokens generated
            by then are compared.
    """
    ends = session.manifest.eos_token_ids
    room = session.capacity - (0 if session.manifest.encoder_decoder else max(map(len, prompts)))
    count = max(1, min(new_tokens, room))
    for number, prompt in enumerate(prompts):
        asked: Any = prompt if isinstance(prompt, SpeechPrompt) else list(prompt)
        ours = session.generate(asked, mode="full", max_new_tokens=count).token_ids
        most = max(1.0, seconds())
        theirs, gaps = reference_ids(model, asked, count, ends, most)
        if most < math.inf and theirs and theirs[-1] not in ends:
            ours = ours[: len(theirs)]
        differing = (
            index for index, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b
        )
        first = next(differing, None if len(ours) == len(theirs) else min(len(ours), len(theirs)))
        yield Comparison(
            number,
            len(ours),
            first,
            gaps[first] if first is not None and first < len(gaps) else None,
        )


def reference_ids(
    model: Any,
    prompt: list[int] | SpeechPrompt,
    count: int,
    eos: Sequence[int],
    seconds: float = math.inf,
) -> tuple[list[int], list[float]]:
    """Return greedy ids of `generate`, and the distance of the two best logits at each.

    Whisper's `generate` applies its own token rules, so windows of speech are decoded step by step.
    """
    if isinstance(prompt, SpeechPrompt):
        return _window_ids(model, prompt, count, eos, seconds)
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        max_time=seconds if seconds < math.inf else None,
        **PLAIN,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(eos) or None,
        # T5's cache fails if the decoder is deeper than the encoder.
        use_cache=not model.config.is_encoder_decoder,
        output_logits=True,
        return_dict_in_generate=True,
    )
    start = 1 if model.config.is_encoder_decoder else len(prompt)
    best = [np.sort(logits[0].float().numpy())[-2:] for logits in out.logits]
    return out.sequences[0, start:].tolist(), [float(first - second) for second, first in best]


@torch.no_grad()
def _window_ids(
    model: Any, prompt: SpeechPrompt, count: int, eos: Sequence[int], seconds: float
) -> tuple[list[int], list[float]]:
    encoded = model.get_encoder()(torch.from_numpy(prompt.sound.features))
    ids = list(prompt.prefix)
    gaps = list[float]()
    until = monotonic() + seconds
    while len(gaps) < count and (not gaps or (ids[-1] not in eos and monotonic() < until)):
        read = torch.tensor([ids])
        logits = model(encoder_outputs=encoded, decoder_input_ids=read, use_cache=False).logits[
            0, -1
        ]
        (best, second), tokens = torch.topk(logits.float(), 2)
        ids.append(int(tokens[0]))
        gaps.append(float(best - second))
    return ids[len(prompt) :], gaps


@dataclass(frozen=True)
class Quality:
    """Quality of a bundle's predictions.

    Attributes:
        tokens: Number of predictions.
        reference_nll: Mean negative log-likelihood of the checkpoint, in nats.
        nll: That of the bundle.
        divergence: Mean Kullback-Leibler divergence of the bundle's predictions from the
            checkpoint's, in nats.
        agreement: Share of predictions with the same best token.
        tolerance: Largest divergence that passes.
        coarse_divergence: Divergence of transformers in the bundle's precision.
    """

    tokens: int
    reference_nll: float
    nll: float
    divergence: float
    agreement: float
    tolerance: float
    coarse_divergence: float = 0.0

    @property
    def perplexity_ratio(self) -> float:
        return float(np.exp(self.nll - self.reference_nll))

    @property
    def passed(self) -> bool:
        return bool(self.divergence <= self.tolerance)  # NaN fails


class Predictions(NamedTuple):
    """Predictions for n positions.

    Attributes:
        ours: Logits [n, V] of the bundle.
        theirs: Logits [n, V] of the checkpoint.
        coarse: Logits [n, V] of transformers in the bundle's precision.
        targets: Next tokens [n].
    """

    ours: np.ndarray
    theirs: np.ndarray
    coarse: np.ndarray
    targets: np.ndarray


def quality_of(predictions: Iterable[Predictions], precision: Precision) -> Quality:
    """Measure how far a bundle's predictions are from the checkpoint's.

    Raises:
        DataError: If there are no predictions.
    """
    parts = [
        (
            Moved.between(one.theirs, one.ours, one.targets),
            Moved.between(one.theirs, one.coarse, one.targets),
        )
        for one in predictions
    ]
    count = sum(len(ours.nll) for ours, _ in parts)
    if not count:
        raise DataError("no text has two tokens, so nothing is predicted; give longer text")
    ours, coarse = (Moved.joined(moved) for moved in zip(*parts, strict=True))
    means = (ours.nll, ours.nll + ours.nats, ours.divergence, ~ours.other_best, coarse.divergence)
    reference_nll, nll, divergence, agreement, itself = (float(values.mean()) for values in means)
    tolerance = max(QUALITY_LEAST.get(precision, QUALITY_COARSE_LEAST), QUALITY_TIMES * itself)
    return Quality(count, reference_nll, nll, divergence, agreement, tolerance, itself)


def predictions_on(bundle: Bundle, model: PreTrainedModel, data: Path) -> Iterator[Predictions]:
    """Yield teacher-forced predictions on the targets of `data`, a JSONL file.

    Raises:
        DataError: If the file is broken.
        OptionError: If the bundle has no tokenizer.
    """
    threads = usable_cores()
    speech = bundle.manifest.speech
    given = 0 if speech is None else len(speech.prefix(next(iter(speech.languages), "en")))

    def logits(batch: Batch, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = forward(model, batch)["logits"].flatten(0, 1).numpy()[rows]
        return found

    for batch in _batches(bundle, data):
        pair = EnginePair(bundle, len(batch.tokens), threads, encode(bundle, batch, threads)[0])
        deep = pair.deep(pair.shallow(batch.tokens, batch.lengths)["hidden"], batch.lengths)
        rows = rows_of(np.maximum(batch.lengths - 1, 0), batch.width)
        rows = rows[rows % batch.width >= given]
        theirs = coarse = logits(batch, rows)
        if bundle.manifest.precision != "fp32":
            with in_precision_of(bundle.manifest, model):
                coarse = logits(batch, rows)
        yield Predictions(deep["logits"][rows], theirs, coarse, batch.following(rows))


def _batches(bundle: Bundle, data: Path) -> Iterator[Batch]:
    """Yield batches of the first lines of `data`.

    A decoder-only bundle gets input and target as one sequence, others get them as prompt and
    answer.
    """
    manifest, tokenizer = bundle.manifest, Tokenizer.load(bundle.path, bundle.manifest.files)
    if tokenizer is None:
        raise OptionError("the bundle has no tokenizer, so it takes no text; leave --data out")
    longest = min(LONGEST, manifest.capacity)
    if (speech := manifest.speech) is not None:
        requests = read_examples(data, RECORDINGS, TARGETS_WANTED)
        start = manifest.decoder_start_token_id or 0
        for first in range(0, len(requests), ROWS):
            lines = requests[first : first + ROWS]
            sounds = [recording_of(line, speech, manifest.encoder_capacity, data) for line in lines]
            texts = [
                tokenizer.encode(f" {str(line.target).strip()}", special=False) for line in lines
            ]
            begins = [[start, *speech.prefix(sound.language)] for sound in sounds]
            targets = [(begin + text)[:longest] for begin, text in zip(begins, texts, strict=True)]
            features = [sound.features() for sound in sounds]
            counts = [len(sound) for sound in sounds]
            yield Batch(*pad(targets), np.stack(features), np.array(counts, np.int32))
        return
    pairs = []
    for request in read_examples(data, LINES, TARGETS_WANTED):
        text = request.text
        prompt = tokenizer.encode(text) if isinstance(text, str) else tokenizer.encode_chat(text)
        pairs.append((prompt, tokenizer.encode(request.target or "", special=False)))
    for start in range(0, len(pairs), ROWS):
        chunk = pairs[start : start + ROWS]
        if manifest.encoder_decoder:
            begin = manifest.output_begins
            targets = [(begin + target)[:longest] for _, target in chunk]
            yield Batch(
                *pad(targets), *pad([prompt[: manifest.encoder_capacity] for prompt, _ in chunk])
            )
        else:
            yield Batch(*pad([(prompt + target)[:longest] for prompt, target in chunk]))
