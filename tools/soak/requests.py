"""Requests of a soak test: random ones, with what each gives alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from runtime import GenerationResult, Session
from runtime.options import MODES

MOST_TOKENS = 40


@dataclass(frozen=True)
class Ask:
    """A prompt with its options, and its result `alone`."""

    prompt: list[int]
    options: dict[str, Any]
    alone: GenerationResult

    def differs(self, result: GenerationResult) -> str | None:
        """How a result is not the one alone."""
        names = ["token_ids", "text", "finish_reason"]
        # How long lossless drafts are is a matter of timing.
        names += [] if self.options["mode"] == "lossless" else ["exited"]
        wrong = [name for name in names if getattr(result, name) != getattr(self.alone, name)]
        return f"{', '.join(wrong)} of {self.told()} differ from what it gives alone" if wrong else None

    def departs(self, ids: Sequence[int]) -> str | None:
        """How tokens are not the beginning of those alone."""
        return None if tuple(ids) == self.alone.token_ids[: len(ids)] else f"tokens of {self.told()} are not its own"

    def told(self) -> str:
        return f"{len(self.prompt)} ids with {self.options}"


def draw_asks(session: Session, count: int, source: Random) -> list[Ask]:
    """As many, run one by one."""
    vocabulary = session.manifest.vocab_size
    longest = (session.manifest.encoder_capacity or session.capacity) - MOST_TOKENS
    asks: list[Ask] = []
    for _ in range(count):
        length = min(longest, source.choice((1, 3, 8, source.randint(9, 60))))
        prompt = [source.randrange(3, vocabulary) for _ in range(length)]
        options = draw_options(session, source)
        asks.append(Ask(prompt, options, session.generate(prompt, **options)))
    return asks


def draw_options(session: Session, source: Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "mode": source.choice(MODES),
        "max_new_tokens": source.randint(1, MOST_TOKENS),
        "ignore_eos": source.random() < 0.7,
    }
    if options["mode"] != "full":
        options["threshold"] = source.choice((0.0, 0.2, 0.5, 0.9))
    if options["mode"] == "rollback":
        options["rollback_threshold"] = source.choice((1.0, 3.0))
    if source.random() < 0.3:
        options["max_pending"] = min(session.manifest.max_pending, source.choice((1, 2, 5)))
    if source.random() < 0.4:
        options |= {"temperature": source.choice((0.7, 1.2)), "seed": source.randrange(1000)}
        options |= {"top_p": 0.9} if source.random() < 0.5 else {}
    if source.random() < 0.1:
        options["repetition_penalty"] = 1.2
    if source.random() < 0.2:
        options["output_logprobs"] = True
    if source.random() < 0.1 and session.tokenizer is not None:
        options["stop"] = ("e", "\n")
    beams = session.manifest.encoder_decoder and options["mode"] == "full" and not options.keys() & {"seed", "stop"}
    return {**options, "num_beams": 3} if beams and source.random() < 0.2 else options
