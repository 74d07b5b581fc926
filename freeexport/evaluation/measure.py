"""Every line in every setting, in turn, so that speeds compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from freeexport.calibration.source import fitting_prompts, unknown_of_bundle
from freeexport.evaluation.energy import Energy
from freeexport.evaluation.options import EvaluateOptions, Setting, settings_of
from freeexport.evaluation.records import Key, Record, Records
from freeexport.system.idle import cores_in_use
from freeexport.system.jsonl import Request
from freeexport.system.progress import progress
from runtime import Session
from runtime.bundle.bundle import Bundle


@dataclass(frozen=True)
class Entry:
    """A bundle, what it is called, and its settings."""

    name: str
    bundle: Bundle
    settings: tuple[Setting, ...]

    @property
    def adaptive(self) -> Setting | None:
        return next((one for one in self.settings if one.method == "adaptive"), None)


def entries_of(options: EvaluateOptions) -> list[Entry]:
    """Bundles are called by the last part of their paths, or by all of it where that is not enough."""
    opened = [(path, Bundle.open(path), methods) for path, methods in options.bundles]
    short = [path.resolve().name for path, _, _ in opened]
    names = short if len(set(short)) == len(short) else [str(path) for path, _, _ in opened]
    return [
        Entry(name, bundle, tuple(settings_of(methods, options.thresholds, bundle.manifest)))
        for name, (_, bundle, methods) in zip(names, opened, strict=True)
    ]


def measure(entries: Sequence[Entry], requests: Sequence[Request], options: EvaluateOptions, records: Records) -> None:
    """Decode what `records` does not have yet, at `options.rounds` rounds. Raises DataError where no input fits."""
    energy, busy = Energy(), cores_in_use()
    with ExitStack() as stack:
        sessions = [stack.enter_context(_session(entry, options, records)) for entry in entries]
        prompts = [_prompts(session, requests) for session in sessions]
        lines = [line for line in prompts[0] if all(line in each for each in prompts)]
        work = list(_work(entries, lines, options.rounds))
        left = [one for one in work if not records.has(_keys(*one))]
        total, missing = (sum(len(entry.settings) for entry, _, _ in each) for each in (work, left))
        advance = stack.enter_context(progress("evaluating", total, total - missing))
        for entry, session, each in zip(entries, sessions, prompts, strict=True):
            if any(one[0] is entry for one in left):
                _warm_up(session, entry, each[lines[0]])
        for entry, line, turn in left:
            place = entries.index(entry)
            found = []
            for setting in _turned(entry.settings, line + turn):
                found.append(
                    _decode(sessions[place], entry, setting, prompts[place][line], (line, turn), options, energy)
                )
                advance()
            records.add([Record(**one, busy=round(busy, 2)) for one in found])


def _session(entry: Entry, options: EvaluateOptions, records: Records) -> Session:
    if entry.adaptive is None:
        return Session(entry.bundle.path, threads=options.threads, slots=1)
    state = records.last_state(entry.name, entry.adaptive.name)
    return Session(entry.bundle.path, threads=options.threads, slots=1, threshold="adaptive", adaptive_state=state)


def _prompts(session: Session, requests: Sequence[Request]) -> dict[int, np.ndarray]:
    session.settle()
    unknown = unknown_of_bundle(session.bundle.path, session.manifest.files)
    return {request.line_number: ids for request, ids in fitting_prompts(session, requests, unknown)}


def _work(entries: Sequence[Entry], lines: Sequence[int], rounds: int) -> Iterator[tuple[Entry, int, int]]:
    for turn in range(rounds):
        for entry in entries:
            yield from ((entry, line, turn) for line in lines)


def _keys(entry: Entry, line: int, turn: int) -> list[Key]:
    return [Key(entry.name, setting.name, line, turn) for setting in entry.settings]


def _turned(settings: Sequence[Setting], by: int) -> list[Setting]:
    """None always follows the same other."""
    first = by % len(settings)
    return [*settings[first:], *settings[:first]]


def _warm_up(session: Session, entry: Entry, prompt: np.ndarray) -> None:
    for setting in entry.settings:
        if setting.method != "adaptive":  # which would learn from it
            session.generate(prompt, max_new_tokens=16, **setting.request)


def _decode(
    session: Session,
    entry: Entry,
    setting: Setting,
    prompt: np.ndarray,
    place: tuple[int, int],
    options: EvaluateOptions,
    energy: Energy,
) -> Mapping[str, Any]:
    adaptive = setting.method == "adaptive"
    threshold = session.threshold if adaptive else None
    before = energy.joules()
    result = session.generate(prompt, max_new_tokens=options.max_new_tokens, **setting.request)
    after = energy.joules()
    line, turn = place
    stats = result.stats
    found: dict[str, Any] = {
        "bundle": entry.name,
        "setting": setting.name,
        "line": line,
        "round": turn,
        "seconds": round(stats.seconds, 7),
        "decode_seconds": round(stats.seconds - stats.encode_seconds - stats.prefill_seconds, 7),
        "tokens": stats.tokens,
        "joules": None if before is None or after is None else after - before,
        "threshold": threshold,
        "adaptive_state": session.adaptive_state() if adaptive else None,
    }
    if turn == 0:
        found.update(
            text=result.text, token_ids=result.token_ids, exited=result.exited, finish_reason=result.finish_reason
        )
    return found
