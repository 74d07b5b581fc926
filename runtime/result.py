"""Result of a request, its tokens, and its statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from runtime.options.generation_options import Mode

# Token ids with their log-probabilities in nats, best first.
TopLogprobs = tuple[tuple[int, float], ...]
FinishReason = Literal["eos", "stop", "length", "cancelled", "deadline"]


@dataclass(slots=True)
class DraftStats:
    """Drafts of one source.

    A draft of the exit that was continued from text counts for both sources.

    Attributes:
        drafts: Number of drafts.
        proposed: Number of tokens in all drafts.
        accepted: Number of tokens that the full model also chose.
        by_position: Accepted and compared tokens at each position of a draft. Tokens after a
            rejected one are not compared.
    """

    drafts: int = 0
    proposed: int = 0
    accepted: int = 0
    by_position: list[tuple[int, int]] = field(default_factory=list)

    @property
    def mean_accepted(self) -> float:
        """Mean number of accepted tokens per draft."""
        return self.accepted / max(1, self.drafts)

    def add(self, proposed: int, accepted: int) -> None:
        """Count a draft of `proposed` tokens of which the first `accepted` were accepted."""
        self.drafts += 1
        self.proposed += proposed
        self.accepted += accepted
        self._compare([(1, 1)] * accepted + [(0, 1)] * (accepted < proposed))

    def __iadd__(self, other: DraftStats) -> DraftStats:
        self.drafts += other.drafts
        self.proposed += other.proposed
        self.accepted += other.accepted
        self._compare(other.by_position)
        return self

    def _compare(self, positions: Sequence[tuple[int, int]]) -> None:
        """Add accepted and compared tokens at each position."""
        both = zip_longest(self.by_position, positions, fillvalue=(0, 0))
        self.by_position = [
            (accepted + more, compared + others) for (accepted, compared), (more, others) in both
        ]


@dataclass(slots=True)
class PassStats:
    """Deep passes over a given number of tokens.

    Attributes:
        count: Number of passes.
        seconds: Their total time.
    """

    count: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Stats:
    """Counts and times of one request. Times are in seconds.

    Attributes:
        mode: The mode used: the requested one, except where the threshold never lets a token exit
            (see the option `threshold`). None before the request started.
        predicted: Number of tokens predicted by reading the prompt: 1, or 0 for encoder-decoders.
        reads_exit: The shallow calls ran the exit's own layers, if it has any. In "lossless",
            requests that draft from text alone skip them.
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Prompt tokens that were reused (SessionOptions.prefix_cache_mb).
        tokens: Generated tokens.
        exits: Candidates that exited.
        forced: Candidates that were confident enough, but did not exit because the stack was full.
        forced_tokens: Tokens that a grammar forced. They need no prediction and are read with the
            next token.
        rejected: Drafted tokens that a sync pass rejected.
        drafts: Drafts by source: "exit", "lookup", "memory" (outputs of earlier
            requests), "phrases" (the bundle's table, or `draft_corpus`), "predicted"
            (`predicted_output`) and "own" (`draft_source`).
        single_passes: Number of deep passes over one token.
        longer_passes: Deep passes over several tokens, by number of tokens.
        seconds: Wall time from the prompt to the last token.
        encode_seconds: Engine calls of the encoder.
        prefill_seconds: Engine calls that read the prompt, and copying reused keys and values.
        shallow_seconds: Engine calls of shallow steps.
        deep_seconds: Engine calls of deep passes.
        overlapped_seconds: Part of `deep_seconds` that ran in the background, at no cost in time.
        grammar_seconds: Time spent on the grammar.
        queue_seconds: Wall time from the call until the prompt is read. In a list, from the call of
            the list. 0 if not reached.
        first_token_seconds: Wall time from the call to the first token. 0 if not reached.
    """

    mode: Mode | None = None
    predicted: int = 1
    reads_exit: bool = False
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
        """Tokens decided by decoding, not by reading the prompt or by a grammar.

        Each took a shallow step and could exit.
        """
        return max(0, self.tokens - self.predicted - self.forced_tokens)

    @property
    def exit_rate(self) -> float:
        """Share of the `candidates` that exited."""
        return self.exits / max(1, self.candidates)

    @property
    def accepted(self) -> int:
        """Number of accepted drafted tokens: exits, and those from text."""
        return self.exits + sum(
            drafts.accepted for source, drafts in self.drafts.items() if source != "exit"
        )

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted.

        1 if nothing was rejected, as in mode "free", where every exit is final.
        """
        return self.accepted / (self.accepted + self.rejected) if self.rejected else 1.0

    @classmethod
    def joined(cls, parts: Sequence[Stats]) -> Stats:
        """Return the sums over several requests, such as the windows of a sound.

        Mode, `queue_seconds` and `first_token_seconds` are those of the first.
        """
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
                total = whole.drafts.setdefault(source, DraftStats())
                total += counts
            for rows, done in part.longer_passes.items():
                passes = whole.longer_passes.setdefault(rows, PassStats())
                passes.count += done.count
                passes.seconds += done.seconds
        whole.queue_seconds = parts[0].queue_seconds
        whole.first_token_seconds = parts[0].first_token_seconds
        return whole

    def count_draft(self, source: str, proposed: int, accepted: int) -> None:
        """Add a draft of a source."""
        if not proposed:
            return
        counts = self.drafts.get(source)
        if counts is None:
            counts = self.drafts[source] = DraftStats()
        counts.add(proposed, accepted)

    def count_pass(self, rows: int, seconds: float) -> None:
        """Add a deep pass over `rows` tokens."""
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
        """Number of deep passes by number of tokens."""
        sizes = Counter({rows: done.count for rows, done in self.longer_passes.items()})
        if self.single_passes:
            sizes[1] = self.single_passes
        return sizes

    @property
    def sync_seconds(self) -> dict[int, float]:
        """Total time of the deep passes by number of tokens."""
        seconds = {rows: done.seconds for rows, done in self.longer_passes.items()}
        if self.single_passes:
            seconds[1] = self.deep_seconds - sum(seconds.values())
        return seconds

    @property
    def sync_passes(self) -> int:
        """Number of deep passes."""
        return self.sync_sizes.total()

    @property
    def overhead_seconds(self) -> float:
        """Time spent outside engine calls."""
        calls = (
            self.encode_seconds + self.prefill_seconds + self.shallow_seconds + self.deep_seconds
        )
        return self.seconds - calls + self.overlapped_seconds

    @property
    def tokens_per_second(self) -> float:
        """Candidates and forced tokens per second of decoding, without the time for the prompt."""
        decoding = self.seconds - self.encode_seconds - self.prefill_seconds
        return (self.candidates + self.forced_tokens) / decoding if decoding > 0 else 0.0


class Token(NamedTuple):
    """One token of a stream.

    Attributes:
        id: Token id.
        text: Text that became final with this token: often "", then that of several tokens.
        exited: The id is an accepted shallow prediction.
        confidence: Confidence of the shallow decoder in [0, 1]. None if its head did not run: in
            "full", if the threshold never lets a token exit, and in "lossless" without a draft (see
            the option `output_confidence`).
        logprob: Log-probability in nats. None unless requested.
        top_logprobs: Most likely tokens at this position. None unless requested.
        source: Where the token came from: "exit"; "deep", the whole model; "forced" by a grammar;
            or in "lossless" the text that drafted it, a key of `Stats.drafts`.
    """

    id: int
    text: str
    exited: bool
    confidence: float | None
    logprob: float | None = None
    top_logprobs: TopLogprobs | None = None
    source: str = "deep"


@dataclass(frozen=True, slots=True)
class Word:
    """A word of speech.

    Attributes:
        text: The word, with the space before it and punctuation.
        start: Start time in seconds.
        end: End time in seconds.
        probability: Mean probability of its tokens.
    """

    text: str
    start: float
    end: float
    probability: float


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment of speech.

    Attributes:
        start: Start time in seconds.
        end: End time in seconds.
        text: Transcript.
        token_ids: Tokens of the segment.
        temperature: Temperature at which its window was decoded.
        avg_logprob: Mean log-probability per token of its window, in nats. None unless computed.
        compression_ratio: Compression ratio of the text, which is high if it repeats itself.
        no_speech_prob: Probability that its window has no speech. None unless computed.
        words: Its words. Their joined texts are `text`. None unless requested.
    """

    start: float
    end: float
    text: str
    token_ids: tuple[int, ...]
    temperature: float
    avg_logprob: float | None
    compression_ratio: float
    no_speech_prob: float | None
    words: tuple[Word, ...] | None = None


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of the tokens of a prompt in the full model, in nats.

    Attributes:
        token_ids: Tokens of the prompt.
        logprobs: Log-probability of each token after those before it. None for the first.
        top_logprobs: Most likely tokens at each position. Empty for the first.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    top_logprobs: tuple[TopLogprobs, ...]


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Result of a request.

    `exited`, `confidence`, `logprobs`, `top_logprobs` and `sources` have one entry per token.

    Attributes:
        text: Generated text, without special tokens and stop string.
        token_ids: Generated tokens, including the end-of-sequence token. For speech, those of all
            windows.
        exited: True for each accepted shallow prediction.
        confidence: Shallow confidences, see Token.
        finish_reason: "eos" or "stop" (a stop string) if the output is complete. "length"
            (`max_new_tokens`, or the cache is full), "cancelled" or "deadline" if it was cut off.
        stats: Statistics.
        logprobs: Log-probabilities in nats. None unless requested.
        top_logprobs: Most likely tokens at each position. None unless requested.
        language: Language of speech.
        segments: Segments of speech, if times were requested or it is longer than a window.
        sources: Where each token came from, see Token.
        prompt_logprobs: Log-probabilities of the prompt. None unless requested.
    """

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
    sources: tuple[str, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None

    @property
    def complete(self) -> bool:
        """True if the output ended by itself, so that constrained JSON is whole."""
        return self.finish_reason in ("eos", "stop")

    @property
    def interrupted(self) -> bool:
        """True if the request was cancelled or its deadline passed."""
        return self.finish_reason in ("cancelled", "deadline")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, including those of `stats`, as values that json.dumps accepts."""
        return asdict(self)
