"""Types of the keyword arguments that are options, for type checkers and editors.

Generated from the options in runtime/ by `python -m tools.pages`; do not edit.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from runtime.options.generation_options import Drafts, DraftSource, Mode
from runtime.text.sampler import LogitsProcessor


class SessionKeywords(TypedDict, total=False):
    """Options of a session, explained in SessionOptions."""

    threads: int | None
    slots: int
    queue: int
    capacity: int | None
    overlap: bool | None
    threshold: float | Literal["adaptive"] | None
    adaptive_memory: int
    adaptive_target: float | None
    adaptive_state: Mapping[str, Any] | None
    verify: Literal["sizes", "full"]
    device: str
    cuda_graphs: bool
    trust_templates: bool
    prefix_cache_mb: int | None
    draft_memory_mb: int
    draft_corpus: Path | str | None


class GenerationKeywords(TypedDict, total=False):
    """Options of a request, explained in GenerationOptions and SpeechOptions.

    Setting `cancel` ends the request after its next token.
    """

    cancel: threading.Event | None
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
    src_lang: str | None
    tgt_lang: str | None
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
    frequency_penalty: float
    presence_penalty: float
    seed: int | None
    sequence_bias: Mapping[Any, float] | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor]
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    grammar: str | None
    choice: Sequence[str] | None
    output_logprobs: bool
    top_logprobs: int
    prompt_logprobs: int | None
    cache_salt: str | None
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    language: str | None
    task: Literal["transcribe", "translate"]
    timestamps: bool
    word_timestamps: bool
    initial_prompt: str | None
    condition_on_previous: bool
    fallback_temperatures: Sequence[float]
    compression_ratio_threshold: float | None
    logprob_threshold: float | None
    no_speech_threshold: float | None
