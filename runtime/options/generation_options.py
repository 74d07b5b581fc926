"""Options of requests.

Each option is declared once: its name, its type with the allowed values, its default, and its text.
The checks, docs/options.md and the types of keyword arguments (option_keywords.py) are derived
from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np

from runtime.errors import OptionError, shown
from runtime.options import checks
from runtime.options.session_options import SessionOptions
from runtime.text.sampler import LogitsProcessor

Mode = Literal["free", "rollback", "lossless", "full", "shallow"]
MODES: tuple[Mode, ...] = get_args(Mode)
Drafts = Literal["auto", "exit", "phrases", "lookup", "none"]
# Given the tokens read and generated so far, int64 [n], returns token ids that may follow, or a
# pair of token ids and their probabilities.
DraftSource = Callable[
    [np.ndarray],
    Sequence[int] | np.ndarray | tuple[Sequence[int] | np.ndarray, Sequence[float] | np.ndarray],
]

# Limits of temperature and penalty. Beyond them float32 logits become infinite, and every token
# becomes token 0.
SMALLEST_DIVISOR = 1e-6
LARGEST_PENALTY = 1e6
FLOAT32_MAX = 3.4e38
MAX_TOP_LOGPROBS = 20  # as in OpenAI's API
CONSTRAINTS = ("json_schema", "regex", "grammar", "choice")


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """Options of a request.

    Raises:
        OptionError: If a value is not allowed, or options contradict each other.
    """

    max_new_tokens: Annotated[int, checks.Whole(0)] = 256
    """Maximum number of tokens to generate, the end-of-sequence token included. Limited by the KV
    cache. 0 only reads the prompt, for the prefix cache or `prompt_logprobs`."""

    mode: Mode | None = None
    """How tokens are decided. "free": confident exits are final, and other drafts are verified.
    "rollback": exits are final unless the next deep pass finds them unlikely. "lossless": all
    drafts are verified, and the output is that of "full". "full": never exits and does not run the
    shallow head. "shallow": every token exits, and the deep decoder only reads a decoder-only
    model's prompt (static exiting, for comparison). Default: "free" if a threshold is given or
    calibrated, otherwise "lossless", or "full" for beams and output_confidence. `stats.mode`
    reports the mode used."""

    threshold: Annotated[float | None, checks.Real(0, 1, "from 0 (exit always) to 1 (never)")] = (
        None
    )
    """Confidence above which a token exits. At 1 nothing exits: "free" then decodes as "lossless",
    and "rollback" as "full". Default: the bundle's threshold. In "lossless", it is the minimum
    confidence of a draft of the exit. By default, drafts have no minimum there, nor in "free", and
    their length follows from their expected benefit."""

    output_confidence: bool = False
    """Return the shallow confidence of every token, also in "full" and at threshold 1. Runs the
    shallow head for each token. Not supported in "lossless" or with beams."""

    rollback_threshold: Annotated[float | None, checks.Real(0, text="from 0, in nats")] = None
    """Deep cross-entropy, in nats, above which "rollback" rejects a token. Default: the bundle's
    value."""

    max_pending: Annotated[int | None, checks.Whole(1)] = None
    """Maximum number of tokens in a sync pass. Default: the bundle's value. In mode "free", the
    value that `calibrate` chose, if any."""

    drafts: Drafts | None = None
    """Source of drafts in "lossless" and "free". "exit": the shallow decoder; in "free" nothing is
    drafted, as in the published method. "lookup": text repeated from the prompt or the output, and
    in "lossless" from earlier outputs (draft_memory_mb). "phrases": also the bundle's table of the
    model's frequent phrases. "none": no drafts, as "full". "auto": phrases and the exit, or in
    "lossless" phrases alone if `convert` measured that the exit does not pay (docs/decoding.md).
    Default: "auto"."""

    predicted_output: Annotated[str | Sequence[int] | None, checks.expected_output] = None
    """Text or token ids that the output is expected to resemble, such as the earlier version of an
    edited document. Used as drafts in "lossless" and "free"."""

    draft_source: Annotated[DraftSource | None, checks.draft_source] = None
    """Callable that proposes drafts in "lossless" and "free": draft_source(token_ids) receives the
    tokens read and generated so far, int64 [n]. It returns a list of token ids that may follow, or
    a pair of token ids and their probabilities. Tokens that do not fit into a sync pass are
    ignored. It runs in the session's worker thread, so it must return quickly."""

    sync_every: Annotated[int, checks.Whole(0)] = 4
    """Mode "free" with overlap: number of pending tokens that start a deep pass in the background.
    0 disables it."""

    parse_special: bool | None = None
    """Parse control tokens spelled out in a prompt, such as <|im_start|>, into their ids, as with
    the option of this name in llama.cpp. Default: True for text, as in transformers, and False for
    the contents of messages, so that no user can end a turn or begin one."""

    src_lang: str | None = None
    """Language of a text prompt, as a code of the translation model ("deu_Latn", "de_DE", "de").
    Default: the language of its tokenizer."""

    tgt_lang: str | None = None
    """Language that a translation model generates. Default: the one in its
    generation_config.json."""

    stop: Annotated[Sequence[str], checks.stop_strings] = ()
    """Strings that stop the generation. The returned text does not contain them."""

    ignore_eos: bool = False
    """Continue generating after the end-of-sequence token. For measurements."""

    deadline: Annotated[
        float | None, checks.Real(checks.ABOVE_ZERO, 1e9, "above 0, up to 1e9 seconds, or None")
    ] = None
    """Maximum duration of the request in seconds, from the call on, including time in the queue. At
    the deadline the tokens so far are returned with finish_reason "deadline". Default: no
    deadline."""

    min_new_tokens: Annotated[int, checks.Whole(0)] = 0
    """Minimum number of tokens to generate before an end-of-sequence token is allowed."""

    do_sample: bool | None = None
    """Sample instead of decoding greedily. Default: sample if temperature > 0. This and the next
    five options have the meaning they have in transformers' GenerationConfig. When sampling, unset
    options take their value from the bundle's generation_config.json, or else the default given
    here."""

    temperature: Annotated[
        float | None,
        checks.Real(
            SMALLEST_DIVISOR, FLOAT32_MAX, f"from {SMALLEST_DIVISOR} on, or 0 (greedy)", also=0
        ),
    ] = None
    """Sampling temperature: divides the logits. Lower values make the output more deterministic. 0
    is greedy decoding. Default: 1."""

    top_k: Annotated[int | None, checks.Whole(0)] = None
    """Number of most likely tokens to sample from. 0 considers all tokens. Default: 50."""

    top_p: Annotated[
        float | None, checks.Real(checks.ABOVE_ZERO, 1, "above 0, up to 1 (all tokens)")
    ] = None
    """Cumulative probability of the most likely tokens to sample from. 1 considers all tokens.
    Default: 1."""

    min_p: Annotated[float | None, checks.Real(0, 1, "from 0 (all tokens) to 1")] = None
    """Minimum probability of a token to be sampled, relative to the most likely token. Default:
    0."""

    repetition_penalty: Annotated[
        float | None,
        checks.Real(
            SMALLEST_DIVISOR,
            LARGEST_PENALTY,
            f"from {SMALLEST_DIVISOR} to {LARGEST_PENALTY:.0f}; 1 is none",
        ),
    ] = None
    """Penalizes tokens that appear in the prompt or in the generated text. Values above 1
    discourage repetition. Also applies to greedy decoding. Default: 1."""

    frequency_penalty: Annotated[float, checks.Real(-2, 2)] = 0.0
    """Subtracted from the logit of a token for each time it appears in the generated text, as in
    OpenAI's API. Values above 0 discourage repetition. Also applies to greedy decoding."""

    presence_penalty: Annotated[float, checks.Real(-2, 2)] = 0.0
    """Subtracted from the logit of a token if it appears in the generated text, as in OpenAI's API.
    Values above 0 encourage new words. Also applies to greedy decoding."""

    seed: Annotated[int | None, checks.Whole(0, 2**64 - 1)] = None
    """Random seed for sampling: the same seed gives the same tokens. Default: a new seed for each
    request."""

    sequence_bias: Annotated[Mapping[Any, float] | None, checks.token_biases] = None
    """Bias in nats, added to the logit of a token ({42: -5.0}) or of the last token of a sequence
    ({(7, 42): 2.0})."""

    logits_processor: Annotated[
        LogitsProcessor | Sequence[LogitsProcessor], checks.logits_processors
    ] = ()
    """Callable, or several applied in order, that modifies logits as in transformers, on numpy
    arrays: (input_ids [1, n], scores [1, V]) -> scores [1, V]. The result must depend on the
    arguments only."""

    json_schema: Annotated[Mapping[str, Any] | str | None, checks.json_schema] = None
    """JSON schema of the output, as a mapping or as text; {} allows any JSON. The output is on one
    line, formatted as by Python's json.dumps. Objects have exactly the listed properties, in that
    order, unless additionalProperties says otherwise. Only one of json_schema, regex, grammar and
    choice may be given; they require `pip install 'freeexport[grammar]'`. Tokens that a constraint
    refuses have confidence 0, so they do not exit."""

    regex: Annotated[str | None, checks.grammar] = None
    """Regular expression, in the syntax of Rust's regex crate, that the whole output matches."""

    grammar: Annotated[str | None, checks.grammar] = None
    """Context-free grammar of the output, as Lark in the dialect of llguidance or as llama.cpp's
    GBNF."""

    choice: Annotated[Sequence[str] | None, checks.choices] = None
    """Strings of which the output is one."""

    output_logprobs: bool = False
    """Return the log-probability of each token in nats, before any logits processing."""

    top_logprobs: Annotated[int, checks.Whole(0, MAX_TOP_LOGPROBS)] = 0
    """Also return the k most likely tokens at each position with their log-probabilities, best
    first. Not supported with beams. An exit vocabulary with fewer tokens returns fewer."""

    prompt_logprobs: Annotated[int | None, checks.Whole(0, MAX_TOP_LOGPROBS)] = None
    """Also return the log-probability of each token of the prompt in the full model, and the k most
    likely tokens at each position. Reads the whole prompt, without the prefix cache. Decoder-only
    bundles. Default: none."""

    cache_salt: Annotated[str | None, checks.salt] = None
    """Isolates the prefix cache and the draft memory between users: a request reuses prefixes and
    drafts outputs only of requests with the same salt. Requests without a salt share theirs. At
    most 256 characters."""

    num_beams: Annotated[int, checks.Whole(1, 256)] = 1
    """Number of beams. More than 1 enables beam search, for encoder-decoders in mode "full" without
    sampling."""

    # Lengths to a greater power exceed float64.
    length_penalty: Annotated[float, checks.Real(-50, 50)] = 1.0
    """Exponent of the length by which the log-probability of a finished beam is divided."""

    early_stopping: bool | Literal["never"] = False
    """Stopping condition of beam search, as in transformers: True, False or "never"."""

    def __post_init__(self) -> None:
        checks.check_fields(self)
        self._check_constraint()
        self._check_sampling()
        self._check_beams()
        self._check_drafts()

    @property
    def samples(self) -> bool:
        """True if tokens are sampled. Temperature 0 is greedy."""
        return bool(self.do_sample or self.temperature) and self.temperature != 0

    @property
    def constraint(self) -> tuple[str, str] | None:
        """Name and text of the option that constrains the output, None if there is none.

        A choice is returned as a JSON list.
        """
        name = next((name for name in CONSTRAINTS if getattr(self, name) is not None), None)
        if name is None:
            return None
        given = getattr(self, name)
        return name, given if isinstance(given, str) else json.dumps(given)

    def _check_constraint(self) -> None:
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(
                f"{given[0]} and {given[1]} are both given; an output has one constraint, choose "
                "one"
            )
        for name in given:
            for other in ("ignore_eos", "min_new_tokens"):
                if getattr(self, other):
                    raise OptionError(
                        f"{other} is {getattr(self, other)!r}, but {name} ends the output; "
                        "choose one"
                    )

    def _check_sampling(self) -> None:
        if self.do_sample is False and self.temperature:
            raise OptionError(
                f"do_sample is False and temperature is {self.temperature!r}; leave one of them out"
            )
        for name in ("top_k", "top_p", "min_p"):
            if getattr(self, name) is not None and not self.samples:
                raise OptionError(
                    f"{name} is {getattr(self, name)!r}, but nothing is sampled; "
                    "add do_sample=True or a temperature above 0"
                )
        if self.min_new_tokens > self.max_new_tokens:
            raise OptionError(
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens, "
                f"{self.max_new_tokens}; lower it"
            )

    def _check_beams(self) -> None:
        beams = self.num_beams
        if self.output_confidence and (self.mode == "lossless" or beams > 1):
            other = f"num_beams {beams}" if beams > 1 else "mode lossless"
            raise OptionError(
                f"output_confidence is True with {other}, which has none for every token; leave "
                "it out"
            )
        if beams == 1:
            return
        if self.mode not in (None, "full"):
            raise OptionError(
                f"num_beams is {beams} in mode {self.mode}: early exit is not supported with "
                "beam search; use mode 'full'"
            )
        others = {
            "sampling": self.samples,
            "stop strings": self.stop,
            f"top_logprobs {self.top_logprobs}": self.top_logprobs,
            "max_new_tokens 0": not self.max_new_tokens,
        }
        for other, given in others.items():
            if given:
                raise OptionError(f"num_beams is {beams} with {other}; choose one of them")

    def _check_drafts(self) -> None:
        for name in ("drafts", "predicted_output", "draft_source"):
            given = getattr(self, name)
            if given is None:
                continue
            if self.mode not in (None, "lossless", "free"):
                raise OptionError(
                    f"{name} is {shown(given)} in mode {self.mode}, which drafts nothing; use "
                    "'lossless' or 'free'"
                )
            if name != "drafts" and self.drafts in ("exit", "none"):
                raise OptionError(
                    f"{name} is {shown(given)}, but drafts is {self.drafts!r}; choose 'auto' or "
                    "'lookup'"
                )


@dataclass(frozen=True, slots=True)
class SpeechOptions(GenerationOptions):
    """Options of a request to a speech bundle, in addition to those of GenerationOptions."""

    language: str | None = None
    """Code of the spoken language, such as "en". Default: detected in the first 30 s."""

    task: Literal["transcribe", "translate"] = "transcribe"
    """"transcribe", or "translate" into English."""

    timestamps: bool = False
    """Return segments with their times. Audio longer than 30 s is always decoded with timestamps,
    because a window begins where the last segment of the one before ends."""

    word_timestamps: bool = False
    """Return segments whose words have times, from the decoder's cross-attention. Takes another
    pass of the decoder over the tokens of each window."""

    initial_prompt: str | None = None
    """Text that precedes the first window, such as names and spellings that are likely to occur."""

    condition_on_previous: bool = False
    """Condition each window on the text of the windows before it. Keeps names and style consistent,
    and repeats errors."""

    fallback_temperatures: Annotated[
        Sequence[float], checks.temperatures(SMALLEST_DIVISOR, FLOAT32_MAX)
    ] = (
        0.2,
        0.4,
        0.6,
        0.8,
        1.0,
    )
    """Temperatures at which a window is decoded again, in turn, while its text is repetitive or
    unlikely. () accepts the first text."""

    compression_ratio_threshold: Annotated[
        float | None, checks.Real(0, 1e9, "from 0 on, or None")
    ] = 2.4
    """Reject a window as repetitive if zlib compresses its text by more than this factor. None
    accepts any."""

    logprob_threshold: Annotated[float | None, checks.Real(-1e9, 0, "of at most 0, or None")] = -1.0
    """Reject a window as unlikely if its mean log-probability is lower, in nats per token. None
    accepts any."""

    no_speech_threshold: Annotated[float | None, checks.Real(0, 1, "from 0 to 1, or None")] = 0.6
    """Treat a window as silent if its text is unlikely and the probability of no speech is higher.
    None disables the detection of silence."""


Options = TypeVar("Options", SessionOptions, GenerationOptions, SpeechOptions)


def merged(
    kind: type[Options],
    given: SessionOptions | GenerationOptions | None,
    keywords: Mapping[str, Any],
) -> Options:
    """Return `given`, by default `kind()`, with fields replaced by `keywords`.

    Raises:
        OptionError: If `given` has another type, a keyword is unknown, or a value is not allowed.
    """
    names = [field.name for field in fields(kind)]
    unknown = sorted(keywords.keys() - set(names))
    speech = {field.name for field in fields(SpeechOptions)}
    if unknown and kind is GenerationOptions and unknown[0] in speech:
        raise OptionError(
            f"{unknown[0]} is for bundles that read speech, and this one reads text; leave it out"
        )
    if unknown:
        raise OptionError(f"unknown option {', '.join(unknown)}; known are {', '.join(names)}")
    if given is None:
        return kind(**keywords)
    if kind is SpeechOptions and type(given) is GenerationOptions:
        return kind(
            **{**{field.name: getattr(given, field.name) for field in fields(given)}, **keywords}
        )
    if type(given) is not kind:
        raise OptionError(
            f"options is {shown(given)}; give a {kind.__name__}, or its fields as keywords"
        )
    return replace(given, **keywords) if keywords else given
