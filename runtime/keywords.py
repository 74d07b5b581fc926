"""Options as keyword arguments, for editors and type checkers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from runtime.options import AdaptiveRule, Drafts, DraftSource, Mode
from runtime.text.sampler import LogitsProcessor


class SessionKeywords(TypedDict, total=False):
    """The fields of SessionOptions, which explains them."""

    threads: int | None
    slots: int
    queue: int
    capacity: int | None
    overlap: bool | None
    run_ahead: bool
    threshold: float | Literal["adaptive"] | None
    adaptive_rule: AdaptiveRule
    adaptive_memory: int
    adaptive_target: float | None
    adaptive_state: Mapping[str, Any] | None
    verify: Literal["sizes", "full"]
    device: str
    cuda_graphs: bool
    trust_templates: bool
    prefix_cache_mb: int


class GenerationKeywords(TypedDict, total=False):
    """The fields of GenerationOptions, which explains them."""

    max_new_tokens: int
    mode: Mode | None
    threshold: float | None
    output_confidence: bool
    rollback_threshold: float | None
    max_pending: int | None
    drafts: Drafts | None
    predicted_output: str | Sequence[int] | None
    draft_source: DraftSource | None
    sync_every: int
    parse_special: bool | None
    stop: Sequence[str]
    ignore_eos: bool
    deadline: float | None
    min_new_tokens: int
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    sequence_bias: Mapping[Any, float] | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor]
    output_logprobs: bool
    top_logprobs: int
    cache_salt: str | None
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
