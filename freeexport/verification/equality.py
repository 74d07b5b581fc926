"""Certify that a bundle decodes the same tokens and log-probabilities in every setting.

The reference decodes each request in mode full, alone, on one thread, without a prefix cache. Every
setting decodes the same requests, and its answers are compared with the reference bit by bit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from freeexport.system.child import run_child
from freeexport.system.jsonl import BrokenLine, read_requests
from freeexport.system.progress import Advance, progress
from freeexport.verification.batches import sample_ids
from runtime import GenerationResult, Session
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Manifest
from runtime.decoding import decoder
from runtime.engines.kernels import instructions, missing, prompt_differs_from
from runtime.errors import OptionError, PromptError
from runtime.text.prompt import encode_prompt
from runtime.text.tokenizer import Tokenizer

# Maximum tokens of an answer if there are enough prompts. Turns of a conversation. Minimum requests
# per setting, more than the largest batch. Rows of a piece of a prompt. MB of a warm prefix cache.
ANSWER = 64
TURNS = 3
REQUESTS = 9
PIECE = 16
CACHE_MB = 256
BATCHES = range(2, 9)
# Built-in prompts: every request with every subject.
_REQUESTS = (
    "Explain {} to a child.",
    "Write a short poem about {}.",
    "List five facts about {}.",
    "What is {}?",
    "Write an email to a colleague about {}.",
    "Give three reasons to learn about {}, as a numbered list.",
    "Tell a story in which {} matters.",
    "Write a Python function that has to do with {}.",
    "Summarize what most people believe about {}.",
    'Answer as JSON with keys "name" and "uses": {}.',
    "Translate into French: we talked about {} all day.",
    "Ask me five questions about {}.",
)
_SUBJECTS = (
    *("rain", "prime numbers", "the moon", "bread", "old maps", "bicycles", "the sea", "sorting"),
    *("chess", "honey bees", "earthquakes", "the printing press", "coffee", "train tables"),
    *("glass", "music"),
)


@dataclass(frozen=True)
class DecodingSetting:
    """A way to decode requests.

    Attributes:
        warm: Use a prefix cache.
        pieces: Read prompts in pieces of PIECE tokens.
        logprobs: Compare log-probabilities. Otherwise requests take the faster path without logits,
            and only ids are compared.
    """

    name: str
    options: Mapping[str, Any]
    batch: int = 1
    threads: int = 1
    warm: bool = False
    pieces: bool = False
    logprobs: bool = True


@dataclass
class Row:
    """Result of comparing one setting.

    All tokens of an answer are compared, even after a different one.

    Attributes:
        tokens: Number of tokens compared.
        differing_logprobs: Number of different log-probabilities. None: not compared.
        cached_tokens: Number of prompt tokens that were reused from the prefix cache.
    """

    setting: str
    instructions: str
    tokens: int = 0
    differing_tokens: int = 0
    differing_logprobs: int | None = 0
    cached_tokens: int = 0
    first_difference: str | None = None

    @property
    def equal(self) -> bool:
        return not (self.differing_tokens or self.differing_logprobs)

    def compare(
        self, request: int, reference: Answer, ids: Sequence[int], logprobs: Sequence[float] | None
    ) -> None:
        if logprobs is None:
            self.differing_logprobs = None
        for place, (token, other) in enumerate(zip(ids, reference.ids, strict=False)):
            self.tokens += 1
            difference = None
            if token != other:
                self.differing_tokens += 1
                difference = f"{token} instead of {other}"
            elif logprobs is not None and logprobs[place] != reference.logprobs[place]:
                assert self.differing_logprobs is not None
                self.differing_logprobs += 1
                difference = (
                    f"a log-probability of {logprobs[place]!r} instead of "
                    f"{reference.logprobs[place]!r}"
                )
            if difference is not None and self.first_difference is None:
                self.first_difference = f"request {request}, token {place}: {difference}"


@dataclass(frozen=True)
class Answer:
    """Output of the reference."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass
class Equality:
    """Outcome of a comparison.

    Attributes:
        tokens: Number of tokens to compare.
        answer_tokens: Tokens of an answer.
        answers: Answers of the reference, for comparison with other instruction sets.
        reads_alike: True if reading a prompt computes the same bits as single steps.
        complete: True once all tokens have been compared.
    """

    tokens: int
    answer_tokens: int
    rows: list[Row] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    reads_alike: bool = True
    complete: bool = False

    @property
    def compared(self) -> int:
        return sum(row.tokens for row in self.rows)

    @property
    def equal(self) -> bool:
        return all(row.equal for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        fields = {
            name: getattr(self, name)
            for name in ("tokens", "compared", "complete", "equal", "answer_tokens")
        }
        return {
            **fields,
            "requests": len(self.answers),
            "settings": [asdict(row) for row in self.rows],
        }


def all_settings() -> list[DecodingSetting]:
    """Return every setting.

    Rollback reverts uncertain tokens, so its tokens equal those of mode full.
    """
    full: dict[str, Any] = {"mode": "full"}
    both: dict[str, Any] = {"mode": "lossless", "drafts": "auto"}
    modes = {
        "full": full,
        "lossless, drafts from the text": {"mode": "lossless", "drafts": "lookup"},
        "lossless, drafts of the exit": {"mode": "lossless", "drafts": "exit"},
        "lossless, both drafts": both,
        "rollback": {"mode": "rollback", "threshold": 0.0, "rollback_threshold": 0.0},
    }
    pair = {"full": full, "lossless, both drafts": both}
    return [
        *(DecodingSetting(name, options) for name, options in modes.items() if name != "full"),
        *(
            DecodingSetting(f"{name}, 2 threads", options, threads=2)
            for name, options in modes.items()
        ),
        *(
            DecodingSetting(f"{name}, warm cache", options, warm=True)
            for name, options in modes.items()
        ),
        *(
            DecodingSetting(f"{name}, prompt in pieces", options, pieces=True)
            for name, options in pair.items()
        ),
        *(
            DecodingSetting(f"{name}, batch {size}", options, size)
            for size in BATCHES
            for name, options in pair.items()
        ),
        *(
            DecodingSetting(f"{name}, batch 4, warm cache", options, 4, warm=True)
            for name, options in pair.items()
        ),
        *(
            DecodingSetting(f"{name}, ids alone", options, logprobs=False)
            for name, options in pair.items()
        ),
    ]


def check_equality(
    bundle: Bundle,
    tokens: int,
    prompts: list[list[int]],
    sets: Sequence[str] = (),
    file: Path | None = None,
) -> Iterator[Equality]:
    """Compare `tokens` tokens in total, spread evenly over all settings and instruction sets.

    Each instruction set runs in its own process. The others are compared with the first.

    Args:
        tokens: Number of tokens.
        prompts: Prompts of `file`, or built-in ones, as token ids.
        sets: Names of instruction sets. Empty: that of this process.
        file: JSONL file of the prompts.

    Yields:
        The outcome after each setting. With `sets`, after each set. The last one is complete.

    Raises:
        OptionError: If that number of tokens cannot be compared. Raised before anything is decoded.
    """
    settings = all_settings()
    shares, answer = _planned(
        bundle.manifest, tokens, len(settings), sets=max(1, len(sets)), prompts=prompts
    )
    if not sets:
        yield from _compare(bundle, shares[0], answer, settings=settings, prompts=prompts)
        return
    whole = Equality(tokens, answer)
    for place, name in enumerate(sets):
        given = [str(bundle.path), str(shares[place]), "" if file is None else str(file)]
        variables = {"FREEEXPORT_INSTRUCTIONS": name}
        report = json.loads(run_child(__name__, *given, variables=variables))
        answers = [Answer(tuple(ids), tuple(logprobs)) for ids, logprobs in report["answers"]]
        whole.rows += [Row(**row) for row in report["settings"]]
        if place == 0:
            whole.answers = answers
            whole.reads_alike = report["reads_alike"]
        elif whole.reads_alike and report["reads_alike"]:
            whole.rows.append(between(whole.answers, answers, sets[0], name))
        whole.complete = place + 1 == len(sets)
        yield whole


def between(first: Sequence[Answer], second: Sequence[Answer], one: str, other: str) -> Row:
    """Compare the references of two instruction sets.

    They are equal if both sets read prompts with the bits of single steps.
    """
    row = Row(f"full, beside {one}", other)
    for number, (reference, answer) in enumerate(zip(first, second, strict=False)):
        row.compare(number, reference, answer.ids, answer.logprobs)
    return row


def prompt_ids(bundle: Bundle, file: Path | None) -> list[list[int]]:
    """Return the prompts of a JSONL file, or built-in ones, as token ids."""
    manifest = bundle.manifest
    tokenizer = Tokenizer.load(bundle.path, manifest.files)
    limit = manifest.encoder_capacity or manifest.capacity

    def encoded(prompt: Any) -> list[int]:
        return encode_prompt(prompt, tokenizer, manifest.vocab_size, limit).tolist()  # type: ignore[no-any-return]

    if file is not None:
        prompts = []
        for line in read_requests(file):
            if isinstance(line, BrokenLine):
                raise OptionError(
                    f"{file}, line {line.line_number}: {line.reason}; correct it or leave it out"
                )
            try:
                prompts.append(encoded(line.text))
            except PromptError as error:
                raise OptionError(f"{file}, line {line.line_number}: {error}") from None
        if not prompts:
            raise OptionError(f"{file} has no prompt; give lines like " + '{"input": "..."}')
        return prompts
    if tokenizer is None:
        return sample_ids(bundle)
    texts = [request.format(subject) for subject in _SUBJECTS for request in _REQUESTS]
    chats = tokenizer.chat_template is not None
    try:
        return [encoded([{"role": "user", "content": text}] if chats else text) for text in texts]
    except PromptError:  # a tokenizer with another vocabulary, or a small capacity
        return sample_ids(bundle)


def _planned(
    manifest: Manifest, tokens: int, settings: int, sets: int, prompts: list[list[int]]
) -> tuple[list[int], int]:
    """Return the tokens that each instruction set compares, and the tokens of a request."""
    if manifest.speech is not None:
        raise OptionError(
            "--equal compares answers to text, and this bundle reads speech; leave it out"
        )
    if tokens < settings * sets:
        raise OptionError(
            f"--equal {tokens} is less than a token for each of {settings} settings"
            + (f" and {sets} instruction sets" if sets > 1 else "")
            + f"; give {settings * sets} or more"
        )
    shares = [len(range(number, tokens, sets)) for number in range(sets)]
    max_tokens = -(-shares[0] // settings)
    longest = 1 if manifest.encoder_decoder else max(map(len, prompts))
    answer = max(1, min(ANSWER, max_tokens // REQUESTS), -(-max_tokens // (len(prompts) * TURNS)))
    room = manifest.capacity - longest + 1
    if room < 1 or -(-max_tokens // min(room, answer)) > len(prompts) * TURNS:
        raise OptionError(
            f"--equal {tokens} needs answers of {answer} tokens to {len(prompts)} prompts, and "
            f"{max(0, room)} fit after the longest; give --data with more or shorter prompts, or "
            "compare fewer tokens"
        )
    return shares, min(room, answer)


def _compare(
    bundle: Bundle,
    total: int,
    answer: int,
    settings: Sequence[DecodingSetting],
    prompts: list[list[int]],
) -> Iterator[Equality]:
    shares = [len(range(number, total, len(settings))) for number in range(len(settings))]
    count = -(-shares[0] // answer)
    answer = min(answer, shares[0])
    manifest = bundle.manifest
    exact = manifest.kernels is None or manifest.quantization is None
    differs_from = None if exact else prompt_differs_from()
    alike = differs_from is None or differs_from >= manifest.capacity
    outcome = Equality(total, answer, reads_alike=alike)
    name = instructions() if missing() is None else "none"
    with progress("comparing", total + count * answer) as advance:
        requests, outcome.answers = _reference(
            bundle, prompts, count, answer=answer, advance=advance
        )
        for setting, share in zip(settings, shares, strict=True):
            row = Row(setting.name, name, differing_logprobs=0 if setting.logprobs else None)
            subset = requests[: -(-share // answer)]
            for number, result in enumerate(_decoded(bundle, setting, subset, answer)):
                left = share - row.tokens
                row.compare(
                    number, outcome.answers[number], result.token_ids[:left], result.logprobs
                )
                row.cached_tokens += result.stats.cached_tokens
                advance(min(left, answer))
            if row.tokens != share:  # an answer was shorter than the reference's
                row.differing_tokens += share - row.tokens
                row.first_difference = (
                    row.first_difference or f"{share - row.tokens} tokens are missing"
                )
            outcome.rows.append(row)
            outcome.complete = len(outcome.rows) == len(settings)
            yield outcome


def _reference(
    bundle: Bundle, prompts: list[list[int]], count: int, answer: int, advance: Advance
) -> tuple[list[list[int]], list[Answer]]:
    """Return `count` requests and their answers.

    Requests are conversations of TURNS turns. The first turn is a prompt. Each later turn is the
    conversation so far and another prompt. An encoder-decoder repeats each prompt TURNS times.
    """
    manifest = bundle.manifest
    requests = list[list[int]]()
    answers = list[Answer]()
    history: list[int] = []
    with _session(bundle, DecodingSetting("full", {})) as session:
        for number in range(count):
            turn = number % TURNS
            conversation = number // TURNS
            prompt = prompts[
                (conversation + (0 if manifest.encoder_decoder else turn)) % len(prompts)
            ]
            fits = len(history) + len(prompt) + answer - 1 <= manifest.capacity
            ids = (
                [*history, *prompt]
                if turn and fits and not manifest.encoder_decoder
                else list(prompt)
            )
            result = session.generate(ids, **_asked({"mode": "full"}, answer, True))
            requests.append(ids)
            answers.append(Answer(result.token_ids, tuple(result.logprobs or ())))
            history = [*ids, *result.token_ids]
            advance(answer)
    return requests, answers


def _decoded(
    bundle: Bundle, setting: DecodingSetting, requests: list[list[int]], answer: int
) -> Iterator[GenerationResult]:
    options = _asked(setting.options, answer, setting.logprobs)
    # Several batches at once, so that requests join and leave the batch.
    together = setting.batch * 4 if setting.batch > 1 else 1
    with (
        _session(bundle, setting) as session,
        _reading(PIECE if setting.pieces else decoder.PREFILL_ROWS),
    ):
        for first in range(0, len(requests), together):
            yield from session.generate(requests[first : first + together], **options)


def _session(bundle: Bundle, setting: DecodingSetting) -> Session:
    cache = CACHE_MB if setting.warm else 0
    return Session(bundle.path, threads=setting.threads, slots=setting.batch, prefix_cache_mb=cache)


def _asked(options: Mapping[str, Any], answer: int, logprobs: bool) -> dict[str, Any]:
    return {**options, "max_new_tokens": answer, "ignore_eos": True, "output_logprobs": logprobs}


@contextmanager
def _reading(rows: int) -> Iterator[None]:
    """Context manager: read prompts in pieces of `rows` tokens."""
    before = decoder.PREFILL_ROWS
    decoder.PREFILL_ROWS = rows
    try:
        yield
    finally:
        decoder.PREFILL_ROWS = before


def _main(path: str, tokens: str, file: str) -> None:
    """Compare one instruction set in its own process, and print the outcome as JSON.

    It includes the answers of the reference.
    """
    bundle = Bundle.open(Path(path))
    prompts = prompt_ids(bundle, Path(file) if file else None)
    *_, outcome = check_equality(bundle, int(tokens), prompts)
    answers = [(answer.ids, answer.logprobs) for answer in outcome.answers]
    print(json.dumps({**outcome.to_json(), "answers": answers, "reads_alike": outcome.reads_alike}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
