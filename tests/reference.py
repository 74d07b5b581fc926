"""Independent reference of FREE decoding on Hugging Face modules, slow and without caches.

The shallow decoder is the model cut after layer S. The deep decoder reads the state after layer S of every position,
exited or not. Recomputing the whole sequence is therefore equivalent to synchronized passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from freeexport.training.layer_modules import Encoded, capped

Mode = Literal["free", "full"]


@dataclass
class Reference:
    """Output of FREE. All lists except `sync_sizes` have one element per token.

    Attributes:
        threshold: Threshold of the request.
        mode: Decoding mode.
        token_ids: Generated tokens, including the end of the sequence.
        exited: True for tokens of the shallow decoder.
        confidence: Shallow confidence. None in mode "full".
        forced: True if the token would have exited, but the stack was full.
        gaps: Best minus second best logit of the decoder that emitted the token.
        stacked: Number of pending tokens after each step.
        sync_sizes: Rows of each deep call after the prefill. All are 1 in mode "full".
        finish_reason: Reason for the end.
        predicted: Tokens that the deep decoder predicts while it reads the prompt, without a counted call. 1, or 0 for
            an encoder-decoder, whose first token is decided like all others.
    """

    threshold: float
    mode: Mode
    token_ids: list[int] = field(default_factory=list)
    exited: list[bool] = field(default_factory=list)
    confidence: list[float | None] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    stacked: list[int] = field(default_factory=list)
    sync_sizes: list[int] = field(default_factory=list)
    finish_reason: Literal["eos", "stop", "length"] = "length"
    predicted: int = 1

    def step(self, shallow: torch.Tensor, deep: torch.Tensor, max_pending: int) -> int:
        """Choose the next token and return it.

        Args:
            shallow: Logits [vocab], or [vocab + 1] if the exit has a class for unknown tokens.
            deep: Logits [vocab].
            max_pending: Maximum number of rows of a deep call.
        """
        first = len(self.token_ids) < self.predicted
        pending = self.stacked[-1] if self.stacked else 0
        confidence = None if self.mode == "full" else confidence_of(shallow, len(deep))
        sure = not first and confidence is not None and confidence > self.threshold
        exits = sure and pending < max_pending - 1
        if not first and not exits:
            self.sync_sizes.append(pending + 1)
        values, indices = (shallow if exits else deep).topk(2)
        self.token_ids.append(int(indices[0]))
        self.gaps.append(float(values[0] - values[1]))
        self.exited.append(exits)
        self.confidence.append(confidence)
        self.forced.append(sure and not exits)
        self.stacked.append(pending + 1 if exits else 0)
        return self.token_ids[-1]


def free_decode(
    model: Any,
    prompt_ids: Sequence[int],
    exit_layer: int,
    threshold: float,
    max_new_tokens: int,
    max_pending: int = 16,
    eos_ids: Iterable[int] | None = None,
    mode: Mode = "free",
    stop: Callable[[list[int]], bool] | None = None,
    expected: Sequence[int] = (),
) -> Reference:
    """Decode greedily with FREE.

    Args:
        max_pending: Maximum number of rows of a deep call.
        eos_ids: IDs that end the sequence. Default: those of the model's generation configuration.
        stop: Called with the emitted ids after each token. Returns True to end the sequence.
        expected: Likely token ids, see `Run`. They do not change the result.
    """
    ends = set(_eos_ids(model) if eos_ids is None else eos_ids)
    run = Run(model, prompt_ids, exit_layer, expected)
    reference = Reference(threshold, mode, predicted=predicted_of(model))
    while len(reference.token_ids) < max_new_tokens:
        shallow, deep = run.logits(reference.token_ids)
        token = reference.step(shallow[-1], deep[-1], max_pending)
        if token in ends:
            reference.finish_reason = "eos"
            break
        if stop is not None and stop(reference.token_ids):
            reference.finish_reason = "stop"
            break
    return reference


def replay(
    model: Any,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    exit_layer: int,
    threshold: float,
    max_pending: int = 16,
    mode: Mode = "free",
) -> Reference:
    """Choose the token after each `token_ids[:step]` with a single forward pass, for large models.

    The result equals that of `free_decode` up to and including the first difference from `token_ids`. Later tokens are
    meaningless. `finish_reason` is not set.
    """
    shallow, deep = Run(model, prompt_ids, exit_layer).logits(token_ids[:-1])
    reference = Reference(threshold, mode, predicted=predicted_of(model))
    for step in range(len(token_ids)):
        reference.step(shallow[step], deep[step], max_pending)
    return reference


Keeps = Callable[[torch.Tensor, int], bool]


def unlikely_goes(limit: float) -> Keeps:
    """Return the rule of rollback: keep a token if its deep cross-entropy is at most `limit` nats."""
    return lambda deep, token: float(-deep.double().log_softmax(-1)[token]) <= limit


def only_the_deep_choice_stays(deep: torch.Tensor, token: int) -> bool:
    """Rule of lossless: keep a token if the deep decoder predicts the same."""
    return int(deep.argmax()) == token


def draft_decode(
    model: Any,
    prompt_ids: Sequence[int],
    exit_layer: int,
    threshold: float,
    keeps: Keeps,
    max_new_tokens: int,
    max_pending: int = 16,
    eos_ids: Iterable[int] = (),
    expected: Sequence[int] = (),
) -> Reference:
    """Decode greedily with exits as drafts, which the next deep call verifies.

    Drafts are kept up to the first one that is rejected, which the deep prediction replaces. A draft that would end the
    request calls the deep decoder at once. `stacked` is not recorded.

    Args:
        keeps: Called with deep logits [vocab] and a drafted token. Returns False to reject the draft.
        max_pending: Maximum number of rows of a deep call.
        expected: Likely token ids, see `Run`. They do not change the result.
    """
    ends = set(eos_ids)
    run = Run(model, prompt_ids, exit_layer, expected)
    reference = Reference(threshold, "free", predicted=predicted_of(model))
    if reference.predicted:
        shallow, deep = run.logits([])
        _record(reference, deep[-1], False, confidence_of(shallow[-1], deep.shape[-1]))
    while len(reference.token_ids) < max_new_tokens and not ends.intersection(reference.token_ids[-1:]):
        final = list(reference.token_ids)
        drafts = list[int]()
        while True:
            shallow, deep = run.logits(final + drafts)
            exits = confidence_of(shallow[-1], deep.shape[-1]) > threshold
            if not exits or len(drafts) == max_pending - 1:
                rows = len(drafts) + 1
                break
            drafts.append(int(shallow[-1].argmax()))
            if drafts[-1] in ends or len(final + drafts) == max_new_tokens:
                rows = len(drafts)
                break
        reference.sync_sizes.append(rows)
        for row in range(len(final), len(final) + rows):
            place = row - len(final)
            kept = place < len(drafts) and keeps(deep[row], drafts[place])
            sure = confidence_of(shallow[row], deep.shape[-1])
            _record(reference, shallow[row] if kept else deep[row], kept, sure)
            if not kept:
                break
    reference.finish_reason = "eos" if reference.token_ids[-1] in ends else "length"
    return reference


def _record(reference: Reference, chosen: torch.Tensor, exited: bool, confidence: float) -> None:
    values, indices = chosen.topk(2)
    reference.token_ids.append(int(indices[0]))
    reference.gaps.append(float(values[0] - values[1]))
    reference.exited.append(exited)
    reference.confidence.append(confidence)
    reference.forced.append(False)


def predicted_of(model: Any) -> int:
    """Return the value of `Reference.predicted` for a model."""
    return int(not model.config.is_encoder_decoder)


class Run:
    """Computes logits of both decoders for continuations of a prompt. An encoder runs only once.

    Logits of `expected` token ids are computed in one pass, for any beginning of these ids.
    """

    def __init__(self, model: Any, prompt_ids: Sequence[int], exit_layer: int, expected: Sequence[int] = ()) -> None:
        self.model = model
        self.exit_layer = exit_layer
        self.read: list[torch.Tensor] = []  # input of the head in its last call
        if getattr(model, "exit_vocabulary", None) is not None:
            keep = self.read.__setitem__
            model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: keep(slice(None), inputs))
        self.prompt = torch.tensor([list(prompt_ids)])
        self.start = len(prompt_ids)
        self.inputs: dict[str, Any] = {}
        if model.config.is_encoder_decoder:
            with torch.no_grad():
                self.inputs["encoder_outputs"] = model.get_encoder()(input_ids=self.prompt)
            self.prompt = torch.tensor([[model.config.decoder_start_token_id]])
            self.start = 1
        self.expected = list(expected)
        self.expected_logits = self._logits(self.expected) if self.expected else None

    def logits(self, token_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return shallow and deep logits [len(token_ids) + 1, vocab] for each token and the next one."""
        count = len(token_ids)
        if self.expected_logits is None or self.expected[:count] != list(token_ids):
            return self._logits(token_ids)
        shallow, deep = self.expected_logits
        return shallow[: count + 1], deep[: count + 1]

    @torch.no_grad()
    def _logits(self, token_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.cat([self.prompt, torch.tensor([list(token_ids)], dtype=torch.long)], dim=1)
        name = "decoder_input_ids" if self.inputs else "input_ids"
        deep = self.model(**self.inputs, **{name: ids}, use_cache=False).logits
        own = getattr(self.model, "own_exit", None)
        if own is not None:  # the exit has its own layers
            out = self.model(**self.inputs, **{name: ids}, use_cache=False, output_hidden_states=True)
            states = out.decoder_hidden_states if self.inputs else out.hidden_states
            scale = self.model.config.d_model**-0.5 if getattr(self.model.config, "scale_decoder_outputs", False) else 1
            shallow = self.model.lm_head(own.norm(own(states[self.exit_layer], self.encoded())) * scale)
            shallow = shallow + getattr(self.model, "final_logits_bias", 0.0)
            softcap = getattr(self.model.get_decoder().config, "final_logit_softcapping", None)
            shallow = capped(shallow, softcap)
        else:
            with cut_after(self.model, self.exit_layer):
                shallow = self.model(**self.inputs, **{name: ids}, use_cache=False).logits
        known: ExitVocabulary | None = getattr(self.model, "exit_vocabulary", None)
        if known is not None:
            shallow = known.classes(shallow, self.read[-1])
        for logits in (shallow, deep):
            for (token,) in self.model.generation_config.bad_words_ids or ():
                logits[..., token] = float("-inf")
        return shallow[0, self.start - 1 :].float(), deep[0, self.start - 1 :].float()

    def encoded(self) -> Encoded | None:
        """Return the input of cross-attention in the exit's own layers. None without an encoder."""
        if not self.inputs:
            return None
        states = self.inputs["encoder_outputs"][0]
        return Encoded(states, torch.ones(states.shape[:2], dtype=torch.bool))


@dataclass(frozen=True)
class ExitVocabulary:
    """Vocabulary of an exit.

    Attributes:
        tokens: Tokens that the exit predicts, int64 [n].
        weight: Weight [d] of the class of all other tokens.
        bias: Bias of that class.
    """

    tokens: torch.Tensor
    weight: torch.Tensor
    bias: float

    def classes(self, logits: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Restrict logits to the vocabulary and append the class of all other tokens.

        Args:
            logits: Logits [1, n, vocab] of the head.
            read: Input of the head [1, n, d].

        Returns:
            Logits [1, n, vocab + 1].
        """
        whole = torch.full((*logits.shape[:2], logits.shape[2] + 1), float("-inf"))
        whole[..., self.tokens] = logits[..., self.tokens]
        whole[..., -1] = read @ self.weight + self.bias
        return whole


@contextmanager
def cut_after(model: Any, layers: int) -> Iterator[None]:
    """Cut all decoder layers after the first `layers` within the block. Norm and head stay."""
    stack = model.get_decoder()
    name = next(name for name in ("block", "layers", "h") if hasattr(stack, name))
    whole = getattr(stack, name)
    setattr(stack, name, whole[:layers])
    try:
        yield
    finally:
        setattr(stack, name, whole)


def confidence_of(logits: torch.Tensor, vocabulary: int | None = None) -> float:
    """Return the probability of the best token minus that of the second best.

    0 if the best token is not below `vocabulary`.
    """
    (best, second), (token, _) = logits.double().softmax(-1).topk(2)
    return 0.0 if vocabulary is not None and token >= vocabulary else float(best - second)


def separating_threshold(reference: Reference, quantile: float = 0.5) -> float:
    """Return a threshold that about `quantile` of the recorded confidences do not exceed, far from any of them.

    The threshold is the middle of the widest of the five gaps nearest to the quantile.

    Raises:
        ValueError: If fewer than two confidences were recorded.
    """
    values = sorted(value for value in reference.confidence if value is not None)
    if len(values) < 2:
        raise ValueError(f"a threshold needs two recorded confidences, got {len(values)}")
    middle = round(quantile * (len(values) - 2))
    nearby = range(max(0, middle - 2), min(len(values) - 1, middle + 3))
    below = max(nearby, key=lambda index: values[index + 1] - values[index])
    return (values[below] + values[below + 1]) / 2


class Decoded(Protocol):
    """A generation result or a reference, for `assert_same_tokens`."""

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def exited(self) -> Sequence[bool]: ...

    @property
    def confidence(self) -> Sequence[float | None]: ...


def assert_same_tokens(
    ours: Decoded,
    reference: Reference,
    gap: float = 1e-4,
    confidence_margin: float = 1e-5,
    confidence_tolerance: float = 1e-3,
) -> int | None:
    """Assert that ids and exit flags are equal, except for a tie.

    The comparison ends at a tie.

    Args:
        gap: Ids may differ if the two best logits of the reference are closer than this.
        confidence_margin: Exit flags may differ if the confidence of the reference is closer to the threshold.
        confidence_tolerance: Maximum difference of confidences.

    Returns:
        Index of the tie, or None.
    """
    both = min(len(ours.token_ids), len(reference.token_ids))
    for index in range(both):
        if ours.exited[index] != reference.exited[index]:
            confidence = reference.confidence[index]
            near = confidence is not None and abs(confidence - reference.threshold) < confidence_margin
            assert near, _difference("exit flags", index, ours.exited, reference.exited, f"confidence {confidence}")
            return index
        if ours.token_ids[index] != reference.token_ids[index]:
            logit_gap = reference.gaps[index]
            assert logit_gap < gap, _difference("ids", index, ours.token_ids, reference.token_ids, f"gap {logit_gap}")
            return index
        mine = ours.confidence[index]
        theirs = reference.confidence[index]
        assert (mine is None) == (theirs is None), _difference("confidence", index, [mine], [theirs], "one is missing")
        if mine is not None and theirs is not None:
            close = abs(mine - theirs) <= confidence_tolerance
            assert close, _difference("confidence", index, ours.confidence, reference.confidence, "too far apart")
    lengths = (len(ours.token_ids), len(reference.token_ids))
    assert lengths[0] == lengths[1], f"{lengths[0]} tokens, the reference has {lengths[1]}, and the common part agrees"
    return None


def _difference(what: str, index: int, ours: Sequence[object], reference: Sequence[object], why: str) -> str:
    return f"{what} differ at token {index} ({why}): ours {list(ours)}, reference {list(reference)}"


def _eos_ids(model: Any) -> list[int]:
    eos = model.generation_config.eos_token_id
    return list(eos) if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]
