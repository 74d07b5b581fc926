"""Compare decoded tokens up to ties, on devices where a product of k rows rounds differently.

On a GPU, kernels for one row and for several rows add in a different order, so their fp16 and bf16
results differ in the last bits. Mode lossless verifies drafts in passes over several rows. Its
tokens therefore equal those of mode full except where two tokens are closer than this noise. The
noise is measured: the same tokens are decoded one row at a time and in passes over several rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any

import numpy as np

from freeexport.verification.equality import all_settings
from runtime import GenerationResult, Session
from runtime.bundle.manifest import FloatType
from runtime.options.generation_options import MAX_TOP_LOGPROBS
from runtime.result import TopLogprobs

# Largest plausible noise, as a root mean square in nats. Rounding stays below a tenth of it, and
# faults, such as a row that reads another row's cache, exceed it many times.
LIMIT: dict[FloatType, float] = {"fp32": 0.01, "fp16": 0.2, "bf16": 1.0}
BATCHES = (1, 4)  # numbers of concurrent requests


@dataclass(frozen=True)
class ScoredTokens:
    """Tokens of one request, and the likeliest tokens at each position with their scores in nats.

    All tokens before a position belong to the context of its scores.
    """

    ids: Sequence[int]
    scores: Sequence[TopLogprobs]

    @classmethod
    def of(cls, result: GenerationResult) -> ScoredTokens:
        """Return those of a result with `top_logprobs`."""
        return cls(result.token_ids, result.top_logprobs or ())


@dataclass(frozen=True)
class Noise:
    """How far the distance between two scores moves if rows are computed together.

    Attributes:
        typical: Root mean square, in nats.
        largest: Largest value, in nats. Two tokens that are closer than this are tied.
        positions: Number of positions that were measured.
    """

    typical: float
    largest: float
    positions: int

    @classmethod
    def between(cls, pairs: Iterable[tuple[ScoredTokens, ScoredTokens]]) -> Noise:
        """Measure the noise between requests decoded by single rows and by several rows.

        A position counts if both decoded the same token there, so a fault that changes a token
        does not excuse itself.
        """
        moved = np.array([each for alone, together in pairs for each in _moved(alone, together)])
        if not len(moved):
            return cls(0.0, 0.0, 0)
        return cls(float(np.sqrt(np.mean(moved**2))), float(moved.max()), len(moved))

    def plausible(self, float_type: FloatType) -> bool:
        """Return True if it was measured and rounding can explain it."""
        return bool(self.positions) and self.typical <= LIMIT[float_type]


@dataclass(frozen=True)
class Difference:
    """First token of a request that differs from that of mode full.

    Attributes:
        request: Number of the request.
        position: Position in the output.
        token: Token of mode full.
        other: The different token. None: the output ended.
        gap: Score of `token` minus that of `other` in mode full, in nats. Infinite if `other` is
            not among the likeliest tokens.
    """

    request: int
    position: int
    token: int
    other: int | None
    gap: float

    def tied(self, noise: Noise) -> bool:
        return self.gap < noise.largest


def first_difference(request: int, expected: ScoredTokens, ids: Sequence[int]) -> Difference | None:
    """Return the first difference of `ids` from `expected`. None if all tokens are equal.

    Later tokens have another context and are not compared.
    """
    for position, token in enumerate(expected.ids):
        other = ids[position] if position < len(ids) else None
        if other == token:
            continue
        scores = dict(expected.scores[position])
        gap = scores[token] - scores[other] if token in scores and other in scores else inf
        return Difference(request, position, token, other=other, gap=gap)
    return None


@dataclass
class SettingTies:
    """Tokens of one setting, compared with mode full.

    Attributes:
        tokens: Number of tokens that were compared.
        ties: Differences between tied tokens, which are accepted.
        faults: Other differences.
    """

    setting: str
    tokens: int = 0
    ties: list[Difference] = field(default_factory=list)
    faults: list[Difference] = field(default_factory=list)

    def add(self, request: int, expected: ScoredTokens, ids: Sequence[int], noise: Noise) -> None:
        """Compare the tokens of one request."""
        found = first_difference(request, expected, ids)
        self.tokens += len(expected.ids) if found is None else found.position + 1
        if found is not None:
            (self.ties if found.tied(noise) else self.faults).append(found)


@dataclass(frozen=True)
class TieReport:
    """Outcome of `compare_up_to_ties`.

    Attributes:
        float_type: Type of the activations.
    """

    float_type: FloatType
    noise: Noise
    rows: Sequence[SettingTies]

    @property
    def passed(self) -> bool:
        return self.noise.plausible(self.float_type) and not any(row.faults for row in self.rows)

    @property
    def line(self) -> str:
        """The outcome as one line."""
        noise = self.noise
        measured = f"noise {noise.largest:.2g} nats at {noise.positions} positions"
        if not noise.positions:
            return "no pass over several rows was measured"
        if not noise.plausible(self.float_type):
            return (
                f"passes over several rows differ from single rows by {noise.typical:.2g} nats, "
                f"which {self.float_type} cannot explain (at most {LIMIT[self.float_type]:g})"
            )
        for row in self.rows:
            for fault in row.faults:
                return (
                    f"{row.setting}: request {fault.request} has token {fault.other} instead of "
                    f"{fault.token} at position {fault.position}, {fault.gap:.2g} nats apart; "
                    f"{measured}"
                )
        tokens = sum(row.tokens for row in self.rows)
        ties = sum(len(row.ties) for row in self.rows)
        return f"{tokens} tokens in {len(self.rows)} settings equal, {ties} ties; {measured}"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values. An infinite gap is None."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            for each in (*row["ties"], *row["faults"]):
                each["gap"] = None if each["gap"] == inf else each["gap"]
        return {
            "passed": self.passed,
            "line": self.line,
            "noise": asdict(self.noise),
            "settings": rows,
        }


def compare_up_to_ties(session: Session, prompts: Sequence[Any], count: int) -> TieReport:
    """Compare lossless, rollback and batches with mode full, on the device of a session.

    Args:
        session: Session with at least `max(BATCHES)` slots.
        prompts: Token ids of each prompt.
        count: Tokens to generate per prompt. Ends of sequence are ignored.
    """
    longest = max(map(len, prompts))
    room = session.capacity - (1 if session.manifest.encoder_decoder else longest)
    plain: dict[str, Any] = {"max_new_tokens": max(1, min(count, room)), "ignore_eos": True}
    scored = plain | {"output_logprobs": True, "top_logprobs": MAX_TOP_LOGPROBS}
    expected = [
        ScoredTokens.of(session.generate(prompt, mode="full", **scored)) for prompt in prompts
    ]
    pairs = list[tuple[ScoredTokens, ScoredTokens]]()
    measured = list[tuple[ScoredTokens, ScoredTokens]]()
    for prompt, one in zip(prompts, expected, strict=True):
        result = session.generate(prompt, mode="lossless", predicted_output=list(one.ids), **scored)
        pairs.append((one, ScoredTokens.of(result)))
        if result.stats.longer_passes:
            measured.append(pairs[-1])
    noise = Noise.between(measured)
    rows = [SettingTies("lossless, predicted output")]
    for request, (one, drafted) in enumerate(pairs):
        rows[0].add(request, one, drafted.ids, noise)
    for setting in all_settings():
        if setting.threads > 1 or setting.warm or setting.pieces or setting.batch not in BATCHES:
            continue
        row = SettingTies(setting.name)
        results = list[GenerationResult]()
        for first in range(0, len(prompts), setting.batch):
            results += session.generate(
                list(prompts[first : first + setting.batch]), **setting.options, **plain
            )
        for request, result in enumerate(results):
            row.add(request, expected[request], result.token_ids, noise)
        rows.append(row)
    return TieReport(session.manifest.float_type, noise, rows)


def _moved(alone: ScoredTokens, together: ScoredTokens) -> Iterator[float]:
    """Yield how far the distance between the two likeliest tokens moves, by position."""
    for token, other, before, after in zip(
        alone.ids, together.ids, alone.scores, together.scores, strict=False
    ):
        if token != other:
            return
        (best, best_score), (second, second_score) = before[:2]
        seen = dict(after)
        if best in seen and second in seen:
            yield abs((best_score - second_score) - (seen[best] - seen[second]))
