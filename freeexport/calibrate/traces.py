"""Traces of shallow and deep predictions.

A trace has both predictions at each token of the model's own greedy output. A replay simulates mode
free on traces.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from freeexport.costs.intervals import Share, share
from freeexport.system.jsonl import append_lines, whole_lines
from runtime import Session
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.costs import Costs
from runtime.bundle.json_file import parse_json
from runtime.errors import OptionError
from runtime.speech.windows import SpeechPrompt

_KIND = "freeexport traces"
# Traces of other formats are dropped. In format 3 a T5's first token may exit.
_FORMAT = 3
_START = json.dumps({"kind": _KIND})[:-1].encode()
# Tokens between two sync passes in traces of an exit that reads features.
DRAFTED = 4
_TYPES = {"confidence": np.float32, "agrees": np.bool_, "nll": np.float32, "token": np.int32}


@dataclass(frozen=True)
class Traces:
    """Traces of S sequences with N tokens, which are concatenated.

    Includes only tokens that may exit: all tokens of an encoder-decoder, and all but the first of a
    decoder-only model.

    Attributes:
        line: Line of each sequence in its file, from 1, int64 [S].
        length: Tokens of each sequence, int64 [S].
        confidence: Confidence of the shallow prediction, float32 [N].
        agrees: The shallow prediction equals the deep one, bool [N].
        nll: Negative log-likelihood of the shallow prediction under the deep decoder, in nats,
            float32 [N].
        token: Shallow prediction, int32 [N].
    """

    line: np.ndarray
    length: np.ndarray
    confidence: np.ndarray
    agrees: np.ndarray
    nll: np.ndarray
    token: np.ndarray

    @classmethod
    def one(cls, line: int, **tokens: Sequence[float] | np.ndarray) -> Traces:
        """Build the trace of one sequence from the four values of each token."""
        flat: dict[str, np.ndarray] = {
            name: np.asarray(tokens[name], kind) for name, kind in _TYPES.items()
        }
        return cls(np.array([line]), np.array([len(flat["token"])]), **flat)

    @classmethod
    def joined(cls, parts: Iterable[Traces]) -> Traces:
        """Concatenate traces."""
        few = list(parts) or [
            cls(*np.zeros((2, 0), np.int64), *(np.zeros(0, kind) for kind in _TYPES.values()))
        ]
        names = ("line", "length", *_TYPES)
        return cls(*(np.concatenate([getattr(one, name) for one in few]) for name in names))

    @cached_property
    def sequence(self) -> np.ndarray:
        """Number of each token's sequence, int64 [N]."""
        return np.repeat(np.arange(len(self.length)), self.length)

    @property
    def tokens(self) -> int:
        return len(self.confidence)

    @property
    def mean_length(self) -> int:
        """Approximate mean number of tokens per sequence, at least 2."""
        return max(2, round(self.tokens / max(1, len(self.length))) + 1)

    @property
    def agreement(self) -> float:
        """Share of tokens whose predictions agree. 0 without tokens."""
        return float(self.agrees.mean()) if self.tokens else 0.0

    def part(self, sequences: np.ndarray) -> Traces:
        """Return the traces of the sequences in the mask bool [S]."""
        marked = sequences[self.sequence]
        flat = {name: getattr(self, name)[marked] for name in _TYPES}
        return Traces(self.line[sequences], self.length[sequences], **flat)

    def above(self, threshold: float) -> np.ndarray:
        """Return a mask of the tokens above a threshold, bool [N].

        Compares in double precision, as decoding does.
        """
        confident: np.ndarray = self.confidence.astype(np.float64) > threshold
        return confident

    def share(self, hits: np.ndarray, among: np.ndarray | None = None) -> Share | None:
        """Return the share of tokens `hits`, bool [N], `among` others or all, with its interval."""
        counted = np.ones(self.tokens, np.bool_) if among is None else among
        of = self.sequence
        size = len(self.length)
        return share(np.bincount(of, hits & counted, size), np.bincount(of, counted, size))


@dataclass(frozen=True)
class Replay:
    """Traces decoded in mode free.

    Attributes:
        exits: Tokens that exit, bool [N].
        agreeing: Number of exits that agree with the deep prediction.
        sync_sizes: Number of sync passes by their rows. Rows on the stack at the end of a sequence
            are not passed.
    """

    threshold: float
    exits: np.ndarray
    agreeing: int
    sync_sizes: Mapping[int, int]

    @property
    def exit_rate(self) -> float:
        """Share of tokens that exit. 0 without tokens."""
        return float(self.exits.mean()) if len(self.exits) else 0.0

    @property
    def agreement(self) -> float | None:
        """Share of the exits that agree. None without exits."""
        return self.agreeing / int(self.exits.sum()) if self.exits.any() else None

    def speedup(self, costs: Costs) -> float:
        """Return tokens per second relative to mode full (docs/decoding.md).

        1 if nothing can exit, because a session then decodes in mode full.
        """
        decided = len(self.exits)
        return (
            costs.speedup_of(self.sync_sizes, decided)
            if decided and self.threshold < NEVER_EXIT
            else 1.0
        )


def replay(traces: Traces, threshold: float, max_pending: int) -> Replay:
    """Simulate mode free on traces.

    The replay follows the full model's output, although exits may change the tokens after them.
    """
    above = traces.above(threshold)
    place = np.arange(traces.tokens)
    # A run of confident tokens begins with its sequence, or after the last token below the
    # threshold.
    begins = np.repeat(np.cumsum(traces.length) - traces.length, traces.length)
    after = np.concatenate([[0], np.where(above, 0, place + 1)])[:-1]
    run = place - np.maximum(begins, np.maximum.accumulate(after))
    # Rows on the stack, including the token's. A full stack forces a pass.
    rows = run % max_pending + 1
    exits = above & (rows < max_pending)
    sizes, counts = np.unique(rows[~exits], return_counts=True)
    agreeing = int((exits & traces.agrees).sum())
    return Replay(
        threshold, exits, agreeing, dict(zip(sizes.tolist(), counts.tolist(), strict=True))
    )


def trace_of(
    session: Session, line: int, prompt: np.ndarray | SpeechPrompt, max_new_tokens: int
) -> Traces:
    """Decode a prompt in mode full, and record both predictions at each token.

    An exit that reads features predicts as for drafts, with DRAFTED tokens between sync passes,
    because its agreement is highest for the first token after a pass.

    Args:
        line: Line of the prompt in its file.
        prompt: Token ids int64 [n], or a window of speech.
        max_new_tokens: Maximum tokens. Decoding also ends at an end-of-sequence token.
    """
    manifest = session.manifest
    if manifest.exit_engine or isinstance(prompt, SpeechPrompt):
        return _drafted_trace(session, line, prompt, max_new_tokens)
    found: dict[str, list[Any]] = {name: [] for name in _TYPES}
    with session.decoder(prompt) as decoder:
        if manifest.encoder_decoder:
            # Forced tokens are not predicted.
            *before, token = manifest.output_begins
            count = min(max_new_tokens, session.capacity) - len(before)
            for given in before:
                decoder.step(given, head=True)
                decoder.sync(0)
        else:
            token = decoder.prefill(prompt.astype(np.int64), head=False, exits=True).token
            count = min(max_new_tokens, session.capacity - len(prompt) + 1) - 1
            count = 0 if token in manifest.eos_token_ids else count
        for _ in range(count):
            shallow = decoder.step(token, head=True)
            (deep,) = decoder.sync(1, drafts=[shallow.token])
            values = (
                shallow.confidence or 0.0,
                shallow.token == deep.token,
                deep.nll or 0.0,
                shallow.token,
            )
            for name, value in zip(_TYPES, values, strict=True):
                found[name].append(value)
            token = deep.token
            if token in manifest.eos_token_ids:
                break
    return Traces.one(line, **found)


def _drafted_trace(
    session: Session, line: int, prompt: np.ndarray | SpeechPrompt, max_new_tokens: int
) -> Traces:
    """Trace an exit that reads features, or speech, whose rules also affect the output."""
    spoken = isinstance(prompt, SpeechPrompt)
    manifest = session.manifest
    answer = session.generate(cast(Any, prompt), mode="full", max_new_tokens=max_new_tokens)
    ids = answer.token_ids
    found: dict[str, list[Any]] = {name: [] for name in _TYPES}
    with session.decoder(prompt) as decoder:
        if manifest.encoder_decoder and not spoken:
            *before, token = manifest.output_begins
            ids = (token, *ids[len(before) :])
            decoder.start(True)
            for given in before:  # forced tokens are not predicted
                decoder.step(given, head=True)
                decoder.sync(0)
        else:
            read_first = np.array(
                prompt.prefix if isinstance(prompt, SpeechPrompt) else prompt, np.int64
            )
            decoder.prefill(read_first, head=False, exits=True)
        width = 1 if spoken else min(DRAFTED, manifest.max_pending)
        for start in range(0, len(ids) - 1, width):
            read = ids[start : min(start + width, len(ids) - 1)]
            drafts = [decoder.step(token, head=True) for token in read]
            answers = decoder.sync(len(read), drafts=[draft.token for draft in drafts])
            for place, (draft, deep) in enumerate(zip(drafts, answers, strict=True), start + 1):
                right = draft.token == (ids[place] if spoken else deep.token)
                values = (draft.confidence or 0.0, right, deep.nll or 0.0, draft.token)
                for name, value in zip(_TYPES, values, strict=True):
                    found[name].append(value)
    return Traces.one(line, **found)


class TraceCache:
    """File of collected traces, one JSON line each, from which an interrupted run continues.

    Args:
        key: Everything that traces depend on. The first `add` drops traces with another key.

    Raises:
        OptionError: If the file is of another kind. It is not changed.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self._path = path
        self._header = {"kind": _KIND, "format": _FORMAT, **key}
        self._traces: dict[int, Traces] = {}
        self._appends = path.exists() and self._read(path.read_bytes())

    def get(self, line: int) -> Traces | None:
        """Return the trace of a line. None if it is missing."""
        return self._traces.get(line)

    def add(self, trace: Traces) -> None:
        """Append a trace to the file.

        Raises:
            FreeExportError: If the file cannot be written.
        """
        record: dict[str, Any] = {"line": int(trace.line[0])}
        for name, kind in _TYPES.items():
            values = getattr(trace, name).tolist()
            # Nine digits represent a float32 exactly.
            record[name] = [
                float(f"{one:.9g}") if kind is np.float32 else int(one) for one in values
            ]
        if not self._appends:
            self._path.write_bytes(b"")
        append_lines(self._path, [record] if self._appends else [self._header, record])
        self._appends = True
        self._traces[record["line"]] = trace

    def _read(self, content: bytes) -> bool:
        """Read the traces of a file. Return True if new traces can be appended to it."""
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and content[: len(_START)] == _START[: len(content)]:
            return False  # a run killed in its first line
        try:
            header, *records = [parse_json(line, nan=True) for line in whole.splitlines()]
            if header.get("kind") != _KIND:
                raise ValueError
            if header != self._header:
                return False
            for record in records:
                values = {name: record[name] for name in _TYPES}
                if (
                    type(record["line"]) is not int
                    or len({len(value) for value in values.values()}) != 1
                ):
                    raise ValueError
                self._traces[record["line"]] = Traces.one(record["line"], **values)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise OptionError(
                f"{self._path} exists and holds no traces that can be read; "
                "move it, or name another --output"
            ) from None
        whole_lines(self._path)  # truncates the partial last line of a killed run
        return True
