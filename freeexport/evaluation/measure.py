"""Every line in every setting, in turn, so that speeds compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from freeexport.calibration.source import fitting_prompts, unknown_of_bundle
from freeexport.evaluation.calm import Calm
from freeexport.evaluation.energy import Energy
from freeexport.evaluation.options import EvaluateOptions, Setting, settings_of
from freeexport.evaluation.records import Key, Record, Records
from freeexport.system.idle import cores_in_use
from freeexport.system.jsonl import Request
from freeexport.system.progress import progress
from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.machine.machine import usable_cores

CALM = "calm"  # the directory of its engines in that of results
# Kept of the first round only.
_OUTPUTS = ("text", "token_ids", "exited", "finish_reason")


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
        loaded = [stack.enter_context(_loaded(entry, options, records)) for entry in entries]
        prompts = [_prompts(one.session, requests) for one in loaded]
        lines = [line for line in prompts[0] if all(line in each for each in prompts)]
        work = list(_work(entries, lines, options.rounds))
        left = [one for one in work if not records.has(_keys(*one))]
        total, missing = (sum(len(entry.settings) for entry, _, _ in each) for each in (work, left))
        advance = stack.enter_context(progress("evaluating", total, total - missing))
        for entry, one, each in zip(entries, loaded, prompts, strict=True):
            if any(first is entry for first, _, _ in left):
                one.warm_up(entry.settings, each[lines[0]])
        for entry, line, turn in left:
            place = entries.index(entry)
            found = []
            for setting in _turned(entry.settings, line + turn):
                before = energy.joules()
                decoded = loaded[place].decode(setting, prompts[place][line], options.max_new_tokens)
                after = energy.joules()
                if turn:
                    decoded = {name: value for name, value in decoded.items() if name not in _OUTPUTS}
                used = None if before is None or after is None else after - before
                place_of: dict[str, Any] = {"bundle": entry.name, "setting": setting.name, "line": line, "round": turn}
                found.append(Record(**place_of, **decoded, joules=used, busy=round(busy, 2)))
                advance()
            records.add(found)


@dataclass(frozen=True)
class Loaded:
    """What decodes the settings of a bundle; `calm` where one of them needs it."""

    session: Session
    calm: Calm | None
    decays: bool

    def warm_up(self, settings: Sequence[Setting], prompt: np.ndarray) -> None:
        for setting in settings:
            if setting.method != "adaptive":  # which would learn from it
                self.decode(setting, prompt, 16)

    def decode(self, setting: Setting, prompt: np.ndarray, most: int) -> dict[str, Any]:
        """The fields of a record that decoding gives."""
        if setting.method == "calm":
            return self._by_calm(setting, prompt, most)
        adaptive = setting.method == "adaptive"
        threshold = self.session.threshold if adaptive else None
        result = self.session.generate(prompt, max_new_tokens=most, **setting.request)
        stats = result.stats
        return {
            "seconds": round(stats.seconds, 7),
            "decode_seconds": round(stats.seconds - stats.encode_seconds - stats.prefill_seconds, 7),
            "first_seconds": round(stats.first_token_seconds, 7),
            "tokens": stats.tokens,
            "text": result.text,
            "token_ids": result.token_ids,
            "exited": result.exited,
            "finish_reason": result.finish_reason,
            "threshold": threshold,
            "adaptive_state": self.session.adaptive_state() if adaptive else None,
        }

    def _by_calm(self, setting: Setting, prompt: np.ndarray, most: int) -> dict[str, Any]:
        assert self.calm is not None
        assert setting.threshold is not None
        manifest, tokenizer = self.session.manifest, self.session.tokenizer
        result = self.calm.generate(prompt, most, setting.threshold, self.decays)
        ended = result.token_ids[-1] in manifest.eos_token_ids
        written = result.token_ids[:-1] if ended else result.token_ids
        return {
            "seconds": round(result.seconds, 7),
            "decode_seconds": round(result.decode_seconds, 7),
            "first_seconds": round(result.first_seconds, 7),
            "tokens": len(result.token_ids),
            "text": "" if tokenizer is None else tokenizer.decode(list(written)),
            "token_ids": result.token_ids,
            "exited": tuple(layers < manifest.layers for layers in result.layers),
            "finish_reason": "eos" if ended else "length",
            "layers": sum(result.layers[not manifest.encoder_decoder :]),
        }


@contextmanager
def _loaded(entry: Entry, options: EvaluateOptions, records: Records) -> Iterator[Loaded]:
    threads = options.threads or usable_cores()
    calm = None
    if any(setting.method == "calm" for setting in entry.settings):
        calm = Calm(entry.bundle, options.output / CALM, options.calm_from, threads, options.calm_single)
    adaptive: dict[str, Any] = {}
    if entry.adaptive is not None:
        state = records.last_state(entry.name, entry.adaptive.name)
        adaptive = {"threshold": "adaptive", "adaptive_state": state}
    with Session(entry.bundle.path, threads=threads, slots=1, **adaptive) as session:
        yield Loaded(session, calm, options.calm_decay)


def _prompts(session: Session, requests: Sequence[Request]) -> dict[int, np.ndarray]:
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
