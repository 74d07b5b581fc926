"""Options of sessions and requests, validated on construction."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict, TypeVar, get_args

import numpy as np

from runtime.checks import (
    check_bool,
    check_choice,
    check_grammar,
    check_number,
    check_whole,
    is_text,
    json_schema,
    listed,
    logits_processors,
    number,
    output_choices,
    stop_strings,
    token_biases,
)
from runtime.errors import OptionError, shown
from runtime.machine.device import Device
from runtime.text.sampler import LogitsProcessor

Mode = Literal["free", "rollback", "lossless", "full", "shallow"]
MODES: tuple[Mode, ...] = get_args(Mode)
AdaptiveRule = Literal["bmm", "paper"]
Drafts = Literal["auto", "exit", "lookup", "none"]
# Token ids that may come after those that the decoder read or wrote so far, int64 [n].
DraftSource = Callable[[np.ndarray], Sequence[int] | np.ndarray]

# Logits are float32: divided by less, or raised by more, they become infinite, and every token is token 0.
LEAST_DIVISOR, MOST_PENALTY = 1e-6, 1e6
FLOAT32_MAX = 3.4e38
# A length to a greater power is beyond float64, and a lock waits no longer.
MOST_LENGTH_PENALTY, MOST_SECONDS = 50, 1e9
ABOVE_ZERO = math.ulp(0.0)
MOST_TOP_LOGPROBS = 20  # as OpenAI's interface
SPEECH = (
    *("language", "task", "timestamps", "initial_prompt", "condition_on_previous", "fallback_temperatures"),
    *("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"),
)
CONSTRAINTS = ("json_schema", "regex", "grammar", "choice")


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How a session runs. OptionError names a value that is out of range.

    Documented as `name: text`, a field at a time, in the order of the fields (see `documented`).

    threads: CPU threads of an engine call; None is one per physical core this process may use.
    slots: requests that are decoded at once, in shared engine calls; further requests wait. Default 4.
    queue: requests that may wait for a slot; one more is refused with QueueFullError. Default 256.
    capacity: valid positions of a slot's KV cache; None is what the bundle was converted for, more is refused.
    overlap: on a GPU, run deep passes beside shallow steps, in a stream of their own. The tokens are the same. None is
        on. On a CPU both would share cores and memory bandwidth, which measured slower: True is refused there.
    run_ahead: where sessions overlap, take shallow steps on the shallow prediction while a deep pass runs; they are
        discarded where the deep decoder disagrees. Not measured on a GPU yet. Default False.
    threshold: of requests that give none. "adaptive" is for mode "free": it begins as calibrated, or high where
        nothing is, and is refitted from the agreement in sync passes (docs/calibration.md); other modes then use the
        bundle's. None is the bundle's.
    adaptive_rule: how it is refitted. "bmm": by P(agree | confidence). "paper": by the likelihood ratio, as FREE's
        authors run it, for comparison: it may exit where most tokens disagree (docs/calibration.md). Default "bmm".
    adaptive_memory: bmm: the weight of a token is 1/e after so many further tokens. Default 4000.
    adaptive_target: bmm: the probability of agreeing that an exit at the adaptive threshold must have, in (0, 1). None
        is what the bundle was calibrated for, else 0.95. paper: zeta, None is 0.4.
    adaptive_state: of `Session.adaptive_state()`, to continue from there.
    verify: "sizes" checks the sizes of the bundle's files, "full" their sha256 too. Default "sizes".
    device: "cpu", or "cuda:0" for one of `convert --target cuda` or tensorrt. No fallback to another device.
    cuda_graphs: on a GPU, capture repeated shallow steps as CUDA graphs: one call starts all their kernels.
    trust_templates: load the bundle's tokenizer and chat template. False loads neither: prompts are token ids alone,
        and results have the text "" (docs/serving.md says whom the files of a bundle must come from).
    prefix_cache_mb: keep the keys and values of what requests read, in at most so many MB (1e6 bytes) beside the slots,
        for requests that begin with the same tokens (docs/serving.md). 0 keeps nothing. CPU only. Default 0.
    """

    threads: int | None = None
    slots: int = 4
    queue: int = 256
    capacity: int | None = None
    overlap: bool | None = None
    run_ahead: bool = False
    threshold: float | Literal["adaptive"] | None = None
    adaptive_rule: AdaptiveRule = "bmm"
    adaptive_memory: int = 4000
    adaptive_target: float | None = None
    adaptive_state: Mapping[str, Any] | None = None
    verify: Literal["sizes", "full"] = "sizes"
    device: str = "cpu"
    cuda_graphs: bool = True
    trust_templates: bool = True
    prefix_cache_mb: int = 0

    @property
    def prefix_cache_bytes(self) -> int:
        return int(self.prefix_cache_mb) * 1_000_000

    def __post_init__(self) -> None:
        check_whole("threads", self.threads, 1, 1024, optional=True)
        check_whole("slots", self.slots, 1, 4096)
        check_whole("queue", self.queue, 0)
        check_whole("capacity", self.capacity, 1, optional=True)
        check_whole("adaptive_memory", self.adaptive_memory, 100)
        check_whole("prefix_cache_mb", self.prefix_cache_mb, 0)
        adaptive = is_text(self.threshold, "adaptive")
        if not adaptive:
            check_number("threshold", self.threshold, 0, 1, "from 0 (exit always) to 1 (never), or 'adaptive'")
        check_choice("adaptive_rule", self.adaptive_rule, get_args(AdaptiveRule))
        check_choice("verify", self.verify, ("sizes", "full"))
        check_number("adaptive_target", self.adaptive_target, 1e-6, 1 - 1e-6, "between 0 and 1")
        for name in ("adaptive_target", "adaptive_state"):
            if getattr(self, name) is not None and not adaptive:
                raise OptionError(f"{name} is given, but threshold is {shown(self.threshold)}; choose 'adaptive'")
        if self.adaptive_state is not None and not isinstance(self.adaptive_state, Mapping):
            raise OptionError(f"adaptive_state is {shown(self.adaptive_state)}; give what adaptive_state() gave")
        check_bool("overlap", self.overlap, none="(on, on a GPU)")
        for name in ("cuda_graphs", "run_ahead", "trust_templates"):
            check_bool(name, getattr(self, name))
        on_cpu = Device.parse(self.device).index is None
        if on_cpu and self.overlap:
            raise OptionError(
                "overlap is True on the CPU, where both engines share the cores and it measured slower "
                "(152 tokens/s, in turn 251); leave it out"
            )
        if self.run_ahead and (on_cpu or self.overlap is False):
            raise OptionError("run_ahead is True, and nothing overlaps on the CPU or with overlap=False; leave it out")
        if self.prefix_cache_mb and not on_cpu:
            raise OptionError(
                f"prefix_cache_mb is {self.prefix_cache_mb} with device {self.device!r}: prefixes are kept on the CPU "
                "only; leave it out"
            )


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How one request is decoded. OptionError names a value that is out of range, and options that contradict.

    Documented as SessionOptions is.

    max_new_tokens: maximum tokens to generate, end of sequence included; clipped to the KV cache. Default 256.
    mode: "free": exits are final. "rollback": the next deep pass rejects those it finds unlikely. "lossless": exits
        are drafts, and the tokens those of "full", which never exits and runs no shallow head. "shallow" always exits
        and runs the deep decoder on a decoder-only model's prompt alone (static exiting, to compare with). None is
        "free" where a threshold is given or calibrated, else "lossless" with drafts from the text ("full" for what that
        does not support: beams, output_confidence); `stats.mode` says which.
    threshold: a token exits if its confidence is greater; in [0, 1]. None is the bundle's; in "lossless" none: drafts
        are as long as they paid before. Nothing exits at 1: "free" and "rollback" then decode as "full", which runs no
        shallow head, and `stats.mode` says so.
    output_confidence: the shallow confidence of every token, also in "full" and at threshold 1: runs the shallow head
        at each token. Not in "lossless", nor with beams.
    rollback_threshold: nats of deep cross-entropy above which "rollback" rejects a token. None is the bundle's.
    max_pending: maximum tokens in a sync pass; None is the bundle's (in mode free, as it was tuned).
    drafts: in "lossless", where drafts come from: "exit", the shallow decoder; "lookup", text that is repeated, of the
        prompt or of the output; "none", which is "full". None is "auto": lookup first, else the exit
        (docs/decoding.md).
    predicted_output: text or token ids that the output is expected to be, but for changes: drafts for "lossless".
    draft_source: called as source(token_ids int64 [n]), with what the decoder read and wrote so far, it returns a list
        of token ids that may follow: drafts for "lossless". Those beyond a sync pass are not used. It must return soon.
    sync_every: where a session overlaps, "free" starts a deep pass once so many tokens wait; 0 is never. Default 4.
    parse_special: control tokens that the prompt spells, such as <|im_start|>, become their ids; else they are text, as
        with llama.cpp's option of this name and transformers' split_special_tokens. None is True for a text prompt, as
        in transformers, and False for the contents of messages, so that no user can end a turn or begin one.
    src_lang: the language of a text prompt, by a code of the translation model ("deu_Latn", "de_DE", "de"). None is the
        one of its tokenizer.
    tgt_lang: the language that a translation model writes. None is what its generation_config.json says.
    stop: generation ends before the first of these strings appears in the text.
    ignore_eos: go on after an end-of-sequence token (to measure).
    deadline: seconds from the call, waiting for a slot included, after which the request ends as if it were cancelled:
        with the tokens so far, and finish_reason "deadline". None is no deadline.
    min_new_tokens: no end of sequence before so many tokens. Default 0.
    do_sample: draw tokens; None does where a temperature above 0 is given. This and the following fields have the
        meaning of transformers' GenerationConfig; where tokens are drawn, None takes the value of the bundle's
        generation_config.json, then the default.
    temperature: divides logits, from 1e-6 on; 0 is greedy. Default 1.
    top_k: draw from so many of the likeliest tokens; 0 is all. Default 50.
    top_p: draw from the likeliest tokens of so much probability together. Default 1, all.
    min_p: draw from tokens of at least this share of the likeliest one's probability. Default 0, all.
    repetition_penalty: divides the logits of tokens that were read or written, from 1e-6 to 1e6. Default 1, none.
    seed: the same seed gives the same tokens; None is another one each time.
    sequence_bias: nats added to a token ({42: -5.0}), or to the last of a sequence of tokens ({(7, 42): 2.0}).
    logits_processor: called as in transformers, on numpy: (input_ids [1, n], scores [1, V]) -> scores [1, V]. It must
        depend on its arguments alone. One, or several in order.
    json_schema: the output is JSON of this schema, a mapping or its text, on one line as Python's json.dumps writes it;
        {} is any JSON. Objects have the listed properties alone, in their order, unless additionalProperties says
        otherwise. This and the next three need `pip install 'freeexport[grammar]'`; give one of them. A token that the
        grammar refuses has confidence 0, so it does not exit.
    regex: the output matches this regular expression, of Rust's regex, whole.
    grammar: the output is of this context-free grammar: Lark as llguidance reads it, or llama.cpp's GBNF.
    choice: the output is one of these strings.
    output_logprobs: also return the log-probability of each token, in nats, before any processing.
    top_logprobs: and those of so many of the likeliest tokens in its place, with ids, best first; 0 to 20, not with
        beams. Fewer where an exit vocabulary knows fewer.
    cache_salt: text that tells users apart: a request reuses prefixes (SessionOptions.prefix_cache_mb) only of requests
        with the same salt, and without one only of those without.
    language: of speech: the code of what is spoken, such as "en"; None finds it out in the first 30 s.
    task: of speech: "transcribe", or "translate" into English. Default "transcribe".
    timestamps: of speech: find out when what was said; the result has segments. Audio that is longer than 30 s is
        decoded with timestamps anyway, as its windows begin where the segments of the last one end. Default False.
    initial_prompt: of speech: text before the first window: names and spellings that it is likely to have.
    condition_on_previous: of speech: let each window read the text of those before. It keeps names and style alike, and
        errors too. Default False.
    fallback_temperatures: of speech: where the text of a window repeats itself or is unlikely, it is decoded again at
        each of these in turn, until it is not; () accepts the first. Default (0.2, 0.4, 0.6, 0.8, 1.0).
    compression_ratio_threshold: of speech: a text that zlib makes shorter by more than this factor repeats itself; None
        accepts any. Default 2.4.
    logprob_threshold: of speech: a text of fewer nats a token is unlikely; None accepts any. Default -1.0.
    no_speech_threshold: of speech: a window whose text is unlikely is silent where the probability that nothing is
        said is greater; None looks for no silence. Default 0.6.
    num_beams: more than 1 is beam search: encoder-decoders in "full", without sampling. Default 1.
    length_penalty: a finished beam's log-probability is divided by its length to this power. Default 1.
    early_stopping: when beam search stops, as in transformers: True, False or "never". Default False.
    """

    max_new_tokens: int = 256
    mode: Mode | None = None
    threshold: float | None = None
    output_confidence: bool = False
    rollback_threshold: float | None = None
    max_pending: int | None = None
    drafts: Drafts | None = None
    predicted_output: str | Sequence[int] | None = None
    draft_source: DraftSource | None = None
    sync_every: int = 4
    parse_special: bool | None = None
    src_lang: str | None = None
    tgt_lang: str | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    deadline: float | None = None
    min_new_tokens: int = 0
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    sequence_bias: Mapping[Any, float] | None = None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] = ()
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None
    output_logprobs: bool = False
    top_logprobs: int = 0
    cache_salt: str | None = None
    language: str | None = None
    task: Literal["transcribe", "translate"] = "transcribe"
    timestamps: bool = False
    initial_prompt: str | None = None
    condition_on_previous: bool = False
    fallback_temperatures: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0)
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole("max_pending", self.max_pending, 1, optional=True)
        check_whole("sync_every", self.sync_every, 0)
        check_whole("min_new_tokens", self.min_new_tokens, 0)
        check_whole("top_k", self.top_k, 0, optional=True)
        check_whole("seed", self.seed, 0, 2**64 - 1, optional=True)
        check_whole("num_beams", self.num_beams, 1, 256)
        check_whole("top_logprobs", self.top_logprobs, 0, MOST_TOP_LOGPROBS)
        if self.mode is not None:
            check_choice("mode", self.mode, MODES)
        if self.drafts is not None:
            check_choice("drafts", self.drafts, get_args(Drafts))
        check_number("threshold", self.threshold, 0, 1, "from 0 (exit always) to 1 (never)")
        if self.temperature is not None and number(self.temperature) != 0:
            allowed = f"from {LEAST_DIVISOR} on, or 0 (greedy)"
            check_number("temperature", self.temperature, LEAST_DIVISOR, FLOAT32_MAX, allowed)
        check_number("top_p", self.top_p, ABOVE_ZERO, 1, "above 0, up to 1 (all tokens)")
        check_number("min_p", self.min_p, 0, 1, "from 0 (all tokens) to 1")
        allowed = f"from {LEAST_DIVISOR} to {MOST_PENALTY:.0f}; 1 is none"
        check_number("repetition_penalty", self.repetition_penalty, LEAST_DIVISOR, MOST_PENALTY, allowed)
        check_number("rollback_threshold", self.rollback_threshold, 0, math.inf, "of nats from 0")
        check_number("deadline", self.deadline, ABOVE_ZERO, MOST_SECONDS, "of seconds above 0, up to 1e9, or None")
        most = MOST_LENGTH_PENALTY
        check_number("length_penalty", self.length_penalty, -most, most, f"from -{most} to {most}", optional=False)
        for name in ("src_lang", "tgt_lang"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise OptionError(f"{name} is {shown(getattr(self, name))}; give the code of a language, or None")
        check_bool("parse_special", self.parse_special, none="(in text, not in messages)")
        check_bool("do_sample", self.do_sample, none="(as temperature says)")
        for name in ("ignore_eos", "output_logprobs", "output_confidence"):
            check_bool(name, getattr(self, name))
        if self.cache_salt is not None and not (isinstance(self.cache_salt, str) and self.cache_salt):
            raise OptionError(f"cache_salt is {shown(self.cache_salt)}; give a text that is not empty, or None")
        if not isinstance(self.early_stopping, (bool, np.bool_)) and not is_text(self.early_stopping, "never"):
            raise OptionError(f"early_stopping is {shown(self.early_stopping)}; choose True, False or 'never'")
        object.__setattr__(self, "stop", stop_strings(self.stop))
        object.__setattr__(self, "sequence_bias", token_biases(self.sequence_bias))
        object.__setattr__(self, "logits_processor", logits_processors(self.logits_processor))
        self._check_speech()
        self._check_grammar()
        self._check_sampling()
        self._check_beams()
        self._check_drafts()

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn; temperature 0 is greedy."""
        return bool(self.do_sample or self.temperature) and self.temperature != 0

    @property
    def constraint(self) -> tuple[str, str] | None:
        """The option that constrains the output and its text, a choice as a JSON list; None where nothing does."""
        name = next((name for name in CONSTRAINTS if getattr(self, name) is not None), None)
        if name is None:
            return None
        given = getattr(self, name)
        return name, given if isinstance(given, str) else json.dumps(given)

    @property
    def speech(self) -> str | None:
        """The first option of speech that is not as by default; None where there is none."""
        named = [field for field in fields(self) if field.name in SPEECH]
        return next((field.name for field in named if getattr(self, field.name) != field.default), None)

    def _check_speech(self) -> None:
        check_choice("task", self.task, ("transcribe", "translate"))
        for name in ("timestamps", "condition_on_previous"):
            check_bool(name, getattr(self, name))
        for name in ("language", "initial_prompt"):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and text):
                raise OptionError(f"{name} is {shown(text)}; give a text that is not empty, or None")
        check_number("compression_ratio_threshold", self.compression_ratio_threshold, 0, 1e9, "from 0 on, or None")
        check_number("logprob_threshold", self.logprob_threshold, -1e9, 0, "of at most 0, or None")
        check_number("no_speech_threshold", self.no_speech_threshold, 0, 1, "from 0 to 1, or None")
        given = listed(self.fallback_temperatures)
        if given is None or not all(LEAST_DIVISOR <= number(each) <= FLOAT32_MAX for each in given):
            raise OptionError(
                f"fallback_temperatures is {shown(self.fallback_temperatures)}; give temperatures above 0, or ()"
            )
        object.__setattr__(self, "fallback_temperatures", given)

    def _check_grammar(self) -> None:
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(f"{given[0]} and {given[1]} are both given; an output has one constraint, choose one")
        for name in given:
            for other in ("ignore_eos", "min_new_tokens"):
                if getattr(self, other):
                    raise OptionError(f"{other} is {getattr(self, other)!r}, but {name} ends the output; choose one")
        object.__setattr__(self, "json_schema", json_schema(self.json_schema))
        object.__setattr__(self, "choice", output_choices(self.choice))
        for name in ("regex", "grammar"):
            check_grammar(name, getattr(self, name))

    def _check_sampling(self) -> None:
        if self.do_sample is False and self.temperature:
            raise OptionError(f"do_sample is False and temperature is {self.temperature!r}; leave one of them out")
        for name in ("top_k", "top_p", "min_p"):
            if getattr(self, name) is not None and not self.samples:
                raise OptionError(
                    f"{name} is {getattr(self, name)!r}, but nothing is sampled; "
                    "add do_sample=True or a temperature above 0"
                )
        if self.min_new_tokens > self.max_new_tokens:
            raise OptionError(
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens, {self.max_new_tokens}; lower it"
            )

    def _check_beams(self) -> None:
        beams = self.num_beams
        if self.output_confidence and (self.mode == "lossless" or beams > 1):
            other = f"num_beams {beams}" if beams > 1 else "mode lossless"
            raise OptionError(f"output_confidence is True with {other}, which has none for every token; leave it out")
        if beams == 1:
            return
        if self.mode not in (None, "full"):
            raise OptionError(
                f"num_beams is {beams} in mode {self.mode}: early exit is not supported with beam search; "
                "use mode 'full'"
            )
        others = {
            "sampling": self.samples,
            "stop strings": self.stop,
            f"top_logprobs {self.top_logprobs}": self.top_logprobs,
        }
        for other, given in others.items():
            if given:
                raise OptionError(f"num_beams is {beams} with {other}; choose one of them")

    def _check_drafts(self) -> None:
        if self.draft_source is not None and not callable(self.draft_source):
            raise OptionError(f"draft_source is {shown(self.draft_source)}; give a callable")
        text = self.predicted_output
        if not (text is None or isinstance(text, (str, Sequence, np.ndarray))) or isinstance(text, (bytes, bytearray)):
            raise OptionError(f"predicted_output is {shown(text)}; give text or a list of token ids")
        for name in ("drafts", "predicted_output", "draft_source"):
            given = getattr(self, name)
            if given is None:
                continue
            if self.mode not in (None, "lossless"):
                raise OptionError(f"{name} is {shown(given)} in mode {self.mode}, which drafts nothing; use 'lossless'")
            if name != "drafts" and self.drafts in ("exit", "none"):
                raise OptionError(f"{name} is {shown(given)}, but drafts is {self.drafts!r}; choose 'auto' or 'lookup'")


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
    """The fields of GenerationOptions, and `cancel`, which ends the request after its next token once it is set."""

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
    seed: int | None
    sequence_bias: Mapping[Any, float] | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor]
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    grammar: str | None
    choice: Sequence[str] | None
    output_logprobs: bool
    top_logprobs: int
    cache_salt: str | None
    language: str | None
    task: Literal["transcribe", "translate"]
    timestamps: bool
    initial_prompt: str | None
    condition_on_previous: bool
    fallback_temperatures: Sequence[float]
    compression_ratio_threshold: float | None
    logprob_threshold: float | None
    no_speech_threshold: float | None
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]


Options = TypeVar("Options", SessionOptions, GenerationOptions)


def merged(kind: type[Options], given: Options | None, keywords: Mapping[str, Any]) -> Options:
    """The options given as an object, or the defaults, with `keywords` in place of its fields. Raises OptionError for
    another object, an unknown keyword, and what `kind` refuses."""
    names = [field.name for field in fields(kind)]
    unknown = sorted(keywords.keys() - set(names))
    if unknown:
        raise OptionError(f"unknown option {', '.join(unknown)}; known are {', '.join(names)}")
    if given is None:
        return kind(**keywords)
    if not isinstance(given, kind):
        raise OptionError(f"options is {shown(given)}; give a {kind.__name__}, or its fields as keywords")
    return replace(given, **keywords) if keywords else given


def documented(kind: type[Options]) -> dict[str, str]:
    """The documentation of each field, by its name, in one line: for tables and help."""
    found: dict[str, str] = {}
    for line in (kind.__doc__ or "").splitlines():
        entry = re.match(r"    (\w+): (.+)", line)
        if entry is not None and entry[1] in {field.name for field in fields(kind)}:
            found[entry[1]] = entry[2].strip()
        elif line.startswith(" " * 8) and found:
            found[next(reversed(found))] += f" {line.strip()}"
    return found
