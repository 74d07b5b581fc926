"""The result of a request, its tokens and its statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from runtime.options import Mode

# Tokens with their log-probabilities in nats, best first.
TopLogprobs = tuple[tuple[int, float], ...]
FinishReason = Literal["eos", "stop", "length", "cancelled", "deadline"]


@dataclass(slots=True)
class DraftStats:
    """Drafts of one source: `outcomes[p, a]` of them had p tokens, of which a were accepted. One that the exit
    continued counts for both sources."""

    outcomes: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def drafts(self) -> int:
        return self.outcomes.total()

    @property
    def proposed(self) -> int:
        """Tokens of all drafts."""
        return sum(proposed * count for (proposed, _), count in self.outcomes.items())

    @property
    def accepted(self) -> int:
        """Tokens that the full model chose, too."""
        return sum(accepted * count for (_, accepted), count in self.outcomes.items())

    @property
    def mean_accepted(self) -> float:
        """Accepted tokens of a draft."""
        return self.accepted / max(1, self.drafts)

    @property
    def by_position(self) -> list[tuple[int, int]]:
        """Tokens accepted at each position of a draft, and compared there: none is behind a wrong one."""
        right = Counter[int]()
        compared = Counter[int]()
        for (proposed, accepted), count in self.outcomes.items():
            for position in range(min(accepted + 1, proposed)):
                right[position] += count * (position < accepted)
                compared[position] += count
        return [(right[position], compared[position]) for position in range(len(compared))]


@dataclass(slots=True)
class PassStats:
    """Number and total time of the deep passes over so many tokens."""

    count: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Stats:
    """Counts and seconds of one request.

    `mode` it was decoded in: the requested one, but "full" if the threshold lets nothing exit; None before it began.
    `cached_tokens` of the `prompt_tokens` were not read, but reused (SessionOptions.prefix_cache_mb).
    `exits` and `forced` count `candidates`; forced ones were confident enough, but the stack was full. `predicted`: the
    tokens, 1 or 0, that reading the prompt predicts: none of an encoder-decoder's.
    `forced_tokens` are those that a grammar left no choice for, and that needed no prediction: they were read with the
    next token. `grammar_seconds`: the time that following the grammar took.
    `rejected` counts drafts that a sync pass rejected ("rollback", "lossless"). `drafts`, in "lossless": by source,
    "exit", "lookup", "predicted" (`predicted_output`) and "own" (`draft_source`).
    `sync_sizes[k]` is how many deep passes ran over k tokens, `sync_seconds[k]` their total time: of `longer_passes`,
    over several tokens, and of `single_passes`, over one, which took the rest of `deep_seconds`. `seconds` is wall time
    from prompt to last token; encode, prefill, shallow and deep are the engine calls in it (prefill with copying what
    is reused), `overlapped_seconds` the deep ones that ran in the background and cost the caller no time.

    `queue_seconds`: from the call until its prompt began to be read; `first_token_seconds`: from the call to the first
    token. Both are wall time as the caller sees it, and 0 if that point was not reached. In a list, the call is that of
    the list.
    """

    mode: Mode | None = None
    predicted: int = 1
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    exits: int = 0
    forced: int = 0
    forced_tokens: int = 0
    rejected: int = 0
    drafts: dict[str, DraftStats] = field(default_factory=dict)
    single_passes: int = 0
    longer_passes: dict[int, PassStats] = field(default_factory=dict)
    seconds: float = 0.0
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    shallow_seconds: float = 0.0
    deep_seconds: float = 0.0
    overlapped_seconds: float = 0.0
    grammar_seconds: float = 0.0
    queue_seconds: float = 0.0
    first_token_seconds: float = 0.0

    @property
    def candidates(self) -> int:
        """Tokens that decoding decided, not reading the prompt or a grammar: each took a shallow step, and could
        exit."""
        return max(0, self.tokens - self.predicted - self.forced_tokens)

    @property
    def exit_rate(self) -> float:
        """Share of the `candidates` that exited."""
        return self.exits / max(1, self.candidates)

    @property
    def accepted(self) -> int:
        """Tokens of drafts that were accepted: exits, and those that came from a text."""
        return self.exits + sum(
            drafts.accepted for source, drafts in self.drafts.items() if source != "exit"
        )

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted: 1 in "free", where every exit is final, and if there was none."""
        return self.accepted / (self.accepted + self.rejected) if self.rejected else 1.0

    @classmethod
    def joined(cls, parts: Sequence[Stats]) -> Stats:
        """The sums of several requests, as of the windows of a sound; the mode is the first's, and the first token and
        the time in the queue are that of the first."""
        whole = cls(parts[0].mode)
        for part in parts:
            for each in fields(cls):
                if each.name not in (
                    "mode",
                    "drafts",
                    "longer_passes",
                    "queue_seconds",
                    "first_token_seconds",
                ):
                    start = 0 if part is parts[0] else getattr(whole, each.name)
                    setattr(whole, each.name, start + getattr(part, each.name))
            for source, counts in part.drafts.items():
                whole.drafts.setdefault(source, DraftStats()).outcomes += counts.outcomes
            for rows, done in part.longer_passes.items():
                passes = whole.longer_passes.setdefault(rows, PassStats())
                passes.count, passes.seconds = (
                    passes.count + done.count,
                    passes.seconds + done.seconds,
                )
        whole.queue_seconds = parts[0].queue_seconds
        whole.first_token_seconds = parts[0].first_token_seconds
        return whole

    def count_draft(self, source: str, proposed: int, accepted: int) -> None:
        if proposed:
            self.drafts.setdefault(source, DraftStats()).outcomes[proposed, accepted] += 1

    def count_pass(self, rows: int, seconds: float) -> None:
        self.deep_seconds += seconds
        if rows == 1:
            self.single_passes += 1
            return
        done = self.longer_passes.get(rows)
        if done is None:
            done = self.longer_passes[rows] = PassStats()
        done.count += 1
        done.seconds += seconds

    @property
    def sync_sizes(self) -> Counter[int]:
        sizes = Counter({rows: done.count for rows, done in self.longer_passes.items()})
        if self.single_passes:
            sizes[1] = self.single_passes
        return sizes

    @property
    def sync_seconds(self) -> dict[int, float]:
        seconds = {rows: done.seconds for rows, done in self.longer_passes.items()}
        if self.single_passes:
            seconds[1] = self.deep_seconds - sum(seconds.values())
        return seconds

    @property
    def sync_passes(self) -> int:
        return self.sync_sizes.total()

    @property
    def overhead_seconds(self) -> float:
        """Time spent outside the engine calls."""
        calls = (
            self.encode_seconds + self.prefill_seconds + self.shallow_seconds + self.deep_seconds
        )
        return self.seconds - calls + self.overlapped_seconds

    @property
    def tokens_per_second(self) -> float:
        """The `candidates` and forced tokens per second of decoding; prompt processing is not in it."""
        decoding = self.seconds - self.encode_seconds - self.prefill_seconds
        return (self.candidates + self.forced_tokens) / decoding if decoding > 0 else 0.0


class Token(NamedTuple):
    """One token of a stream. `text` is the text that became final with it: often "", then that of several tokens.

    `exited`: the id is an accepted shallow prediction. `confidence` of the shallow decoder in [0, 1], None where its
    head did not run: in "full", where the threshold lets nothing exit, and in "lossless" where no draft followed; see
    the option `output_confidence`. `logprob` in nats and `top_logprobs`, the likeliest tokens in its place, are None
    unless asked for.
    """

    id: int
    text: str
    exited: bool
    confidence: float | None
    logprob: float | None = None
    top_logprobs: TopLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a sound, from `start` to `end` in seconds, and what was said in it. Of the window that it was found in:
    the `temperature` it was decoded at, mean nats a token (`avg_logprob`) and the probability that there was no speech,
    None where they were not asked for. `compression_ratio` is that of its text, high where it repeats itself."""

    start: float
    end: float
    text: str
    token_ids: tuple[int, ...]
    temperature: float
    avg_logprob: float | None
    compression_ratio: float
    no_speech_prob: float | None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished request. `finish_reason`: "eos" and "stop" (a stop string) are the output's own end; "length"
    (`max_new_tokens`, or the cache is full), "cancelled" and "deadline" cut it. `token_ids` are the generated ones, end
    of sequence included; `exited`, `confidence`, `logprobs` and `top_logprobs` (None unless asked for) run parallel to
    them. `text` has no special tokens and no stop string. Of speech: its `language`, and its `segments` where
    timestamps were asked for or it is longer than a window; `token_ids` are those of all windows."""

    text: str
    token_ids: tuple[int, ...]
    exited: tuple[bool, ...]
    confidence: tuple[float | None, ...]
    finish_reason: FinishReason
    stats: Stats
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[TopLogprobs, ...] | None = None
    language: str | None = None
    segments: tuple[Segment, ...] | None = None

    @property
    def complete(self) -> bool:
        """True if the output came to its own end, so that JSON of a schema is whole; False if anything cut it."""
        return self.finish_reason in ("eos", "stop")

    @property
    def interrupted(self) -> bool:
        """True if the request was cancelled or its deadline passed."""
        return self.finish_reason in ("cancelled", "deadline")
