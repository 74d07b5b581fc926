"""Decodes prompts in every setting of every bundle, interleaved, and records them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import product, starmap
from time import perf_counter
from typing import Any

import numpy as np

from freeexport.costs.bytes import calls_of
from freeexport.costs.timing import interleave
from freeexport.evaluate.records import OUTPUT_FIELDS, Key, Record, Records
from freeexport.evaluate.settings import Entry, EvaluateOptions, Setting
from freeexport.system.load import OtherLoad
from runtime import Session

# Each setting first decodes this many tokens of a prompt to bind buffers and fault pages. If speed
# alone is measured, it decodes this many prompts in full.
WARM_UP = 16
WARM_UP_PROMPTS = 4

Prompt = np.ndarray | Sequence[int]
Emit = Callable[[int], None]
# Another decoder of a bundle. Takes the setting, a prompt and the maximum number of tokens, and
# returns the fields of its record.
OtherDecoder = Callable[[Setting, Any, int], dict[str, Any]]
# Other decoders by name of the bundle and method of the setting.
OtherDecoders = Mapping[tuple[str, str], OtherDecoder]


def decode(
    session: Session,
    setting: Setting,
    prompt: Prompt,
    options: Mapping[str, Any],
    emit: Emit | None = None,
) -> dict[str, Any]:
    """Decode a prompt, and return the fields of its record that the decoder determines.

    Args:
        setting: How to decode.
        prompt: Token ids [n], or a window of speech.
        options: Options of the request, besides those of the setting.
        emit: Called with each token as it is generated. Ends of sequence are then ignored, and
            `times` is recorded.
    """
    adaptive = setting.method == "adaptive"
    threshold = session.threshold if adaptive else None
    given = {**options, **setting.options}
    if emit is None:
        result = session.generate(prompt, **given)
        stats = result.stats
        timing: dict[str, Any] = {
            "seconds": round(stats.seconds, 7),
            "decode_seconds": round(
                stats.seconds + stats.queue_seconds - stats.first_token_seconds, 7
            ),
            "first_seconds": round(stats.first_token_seconds, 7),
        }
    else:
        times: list[float] = []
        began = perf_counter()
        stream = session.stream(prompt, ignore_eos=True, **given)
        for token in stream:
            times.append(perf_counter() - began)
            emit(token.id)
        seconds = perf_counter() - began
        result = stream.result
        stats = result.stats
        timing = timing_of(times, seconds)
    return {
        **timing,
        "tokens": stats.tokens,
        "text": result.text,
        "token_ids": result.token_ids,
        "exited": result.exited,
        "finish_reason": result.finish_reason,
        "threshold": threshold,
        "adaptive_state": session.adaptive_state() if adaptive else None,
        "calls": calls_of(result),
        "acceptance": stats.acceptance,
        "overhead": round(stats.overhead_seconds, 7),
    }


def timing_of(times: Sequence[float], seconds: float) -> dict[str, Any]:
    """Return a record's fields about time, from the seconds to each token and of all."""
    return {
        "seconds": seconds,
        "decode_seconds": times[-1] - times[0],
        "first_seconds": times[0],
        "times": tuple(times),
    }


def open_session(entry: Entry, options: EvaluateOptions, records: Records) -> Session:
    """Open the session of a bundle. An adaptive one continues from its last record."""
    adaptive: dict[str, Any] = {}
    if "adaptive" in entry.methods:
        state = records.last_state(entry.name, "adaptive")
        adaptive = {"threshold": "adaptive", "adaptive_state": state}
    return Session(
        entry.bundle.path,
        threads=options.count,
        slots=1,
        device=options.device,
        # A line must not use the output or the prompt of another setting.
        draft_memory_mb=0,
        prefix_cache_mb=0,
        **adaptive,
    )


OpenSession = Callable[[Entry, EvaluateOptions, Records], Session]


class Work:
    """Sessions, prompts and settings of an evaluation.

    Lines whose prompt does not fit every bundle are left out.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        sessions: Sequence[Session],
        prompts: Sequence[Mapping[int, Any]],
        speed_only: bool,
        others: OtherDecoders,
        temperature: float = 0.0,
    ) -> None:
        self._names = [entry.name for entry in entries]
        self._sessions = sessions
        self._prompts = prompts
        self._speed_only = speed_only
        self._others = others
        self._temperature = temperature
        self.lines = [line for line in prompts[0] if all(line in each for each in prompts)]
        # Number of the bundle, and a setting of it.
        self.settings = [
            (number, setting) for number, entry in enumerate(entries) for setting in entry.settings
        ]

    def keys(self, turn: int, place: int) -> list[Key]:
        """Return the keys of the records of a line in one round."""
        line = self.lines[place]
        return [
            (self._names[number], setting.name, line, turn) for number, setting in self.settings
        ]

    def decode(self, which: tuple[int, Setting], line: int, max_new_tokens: int) -> dict[str, Any]:
        """Decode a line in a setting, and return the fields of its record."""
        number, setting = which
        other = self._others.get((self._names[number], setting.method))
        if other is not None:
            return other(setting, self._prompts[number][line], max_new_tokens)
        emit = (lambda token: None) if self._speed_only else None
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        if self._temperature:
            # With one seed per line, every setting that decodes like `full` has its tokens.
            options.update(temperature=self._temperature, seed=line)
        return decode(
            self._sessions[number], setting, self._prompts[number][line], options, emit=emit
        )

    def warm_up(self, max_new_tokens: int) -> None:
        """Decode some lines untimed. An adaptive session would learn from them."""
        lines = self.lines[: WARM_UP_PROMPTS if self._speed_only else 1]
        for line, which in product(lines, self.settings):
            if which[1].method != "adaptive":
                self.decode(which, line, max_new_tokens if self._speed_only else WARM_UP)


def measure(
    entries: Sequence[Entry],
    options: EvaluateOptions,
    records: Records,
    prompts_of: Callable[[Session], Mapping[int, Any]],
    others: OtherDecoders | None = None,
    open_with: OpenSession = open_session,
) -> None:
    """Decode all prompts without a record, each in every setting of every bundle in turn.

    Args:
        records: Records of the run, to which others are added.
        prompts_of: Returns the prompts of a bundle by line.
        others: Decoders of settings that no session decodes. Their outputs must be scored.
    """
    load = OtherLoad()
    speed_only = not options.metrics
    max_new_tokens = options.max_new_tokens
    with ExitStack() as stack:
        sessions = [stack.enter_context(open_with(entry, options, records)) for entry in entries]
        work = Work(
            entries,
            sessions,
            list(map(prompts_of, sessions)),
            speed_only=speed_only,
            others=others or {},
            temperature=options.temperature,
        )

        def done(turn: int, place: int) -> bool:
            return records.has(work.keys(turn, place))

        if not all(starmap(done, product(range(options.rounds), range(len(work.lines))))):
            work.warm_up(max_new_tokens)
        turns = interleave(
            work.settings,
            work.lines,
            options.rounds,
            lambda which, line: work.decode(which, line, max_new_tokens),
            warm_up=0,
            done=done,
            title="measuring" if speed_only else "evaluating",
        )
        for turn in turns:
            busy = load.so_far()
            # Without scores, what each round drafted counts too.
            left_out = OUTPUT_FIELDS if turn.round and not speed_only else ()
            fields = [
                {name: value for name, value in one.items() if name not in left_out}
                for one in turn.runs
            ]
            keys = work.keys(turn.round, turn.prompt)
            records.add(
                [Record(*key, busy=busy, **one) for key, one in zip(keys, fields, strict=True)]
            )
