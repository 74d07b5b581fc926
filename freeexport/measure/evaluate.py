"""An evaluation: methods of decoding compared on a task, by quality and speed together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from freeexport import __version__
from freeexport.checkpoints.examples import DataError, read_examples
from freeexport.measure.prompts import engines_hash, fitting_prompts, reference_of, unknown_of_bundle
from freeexport.measure.quality import Curve, Row, curves_of, rows_of, verdicts
from freeexport.measure.records import Key, Record, Records, check_output
from freeexport.measure.settings import CALM, Entry, EvaluateOptions, Setting, entries_of
from freeexport.measure.table import TERMINAL, Sheet, about, environment, markdown, plus_minus, sheet
from freeexport.measure.timing import Energy, OtherLoad, interleave, load_note
from freeexport.metrics import Metric, Reference, metric_of
from freeexport.system.jsonl import Request
from runtime import Session
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import sha256_of
from runtime.machine.machine import usable_cores

# So many of the outputs may be cut by the limit of tokens before a note says so.
MOST_CUT = 0.1
# Kept of the first round only.
_OUTPUTS = ("text", "token_ids", "exited", "finish_reason")
FILES = "report.html, results.md, evaluation.json and .csv, curve.png and .svg"


@dataclass(frozen=True)
class Evaluation:
    """`rows` and `curves` of what was decoded; `records` by bundle and setting, then line; `verdicts` and `notes` are
    sentences that the user should read."""

    options: EvaluateOptions
    entries: list[Entry]
    metrics: list[Metric]
    rows: list[Row]
    curves: list[Curve]
    requests: dict[int, Request]
    references: dict[int, Reference]
    records: Mapping[tuple[str, str], Mapping[int, Sequence[Record]]]
    verdicts: list[str]
    notes: list[str]
    environment: dict[str, Any]
    threads: int


def evaluate(options: EvaluateOptions) -> Evaluation:
    """Decode what the directory `output` does not have yet, and compare. Raises DataError, MetricError, BundleError,
    OptionError."""
    metrics = [metric_of(name) for name in options.metrics]
    entries = entries_of(options)
    requests = read_examples(options.data, options.samples)
    references = _references(requests, options.data)
    for metric in metrics:  # before long work: does it fit?
        metric.table([reference.texts[0] for reference in references.values()], list(references.values()))
    run = _run(options, entries)
    check_output(options.output, run, options.overwrite)
    with Records(options.output, run, options.overwrite) as records:
        loss = _write_calm(options, entries)
        _measure(entries, requests, options, records)
        found = records.by_setting()
    rows = rows_of(entries, found, references, metrics)
    return Evaluation(
        options=options,
        entries=entries,
        metrics=metrics,
        rows=rows,
        curves=curves_of(rows, metrics[0].name, options.quality),
        requests={request.line_number: request for request in requests},
        references=references,
        records=found,
        verdicts=verdicts(rows, metrics[0], options.quality),
        notes=[*_trained(entries, loss), *_doubts(rows, found)],
        environment=environment(),
        threads=options.threads or usable_cores(),
    )


def _references(requests: Sequence[Request], data: Path) -> dict[int, Reference]:
    found = {}
    for request in requests:
        reference = reference_of(request)
        if reference is None:
            raise DataError(
                f"{data}, line {request.line_number} has no 'target' and no 'references' to compare with; give every "
                "line one"
            )
        found[request.line_number] = reference
    return found


def _run(options: EvaluateOptions, entries: Sequence[Entry]) -> dict[str, Any]:
    """Describe what outputs depend on. Metrics and rounds may change: nothing is decoded again for them."""
    return {
        "bundles": {
            entry.name: [engines_hash(entry.bundle.manifest), entry.bundle.manifest.threshold] for entry in entries
        },
        "settings": {entry.name: [setting.name for setting in entry.settings] for entry in entries},
        "data": sha256_of(options.data),
        "samples": options.samples,
        "max_new_tokens": options.max_new_tokens,
        "calm": options.calm_from if options.calm_model else None,
        "threads": options.threads or usable_cores(),
        "freeexport": __version__,
    }


def _write_calm(options: EvaluateOptions, entries: Sequence[Entry]) -> str | None:
    """Write the engines of CALM where they are needed; returns the loss that the model was trained with."""
    if options.calm_model is None:
        return None
    # The builder, which nothing else here needs.
    from freeexport.measure.calm import write_calm

    loss = ""
    entry = next(one for one in entries if set(CALM) & set(one.methods))
    for least in _calm_layers(entry, options):
        loss = write_calm(options.calm_model, entry.bundle.manifest, least, _calm_directory(options, least))
    return loss


def _calm_layers(entry: Entry, options: EvaluateOptions) -> set[int]:
    """The first layers after which CALM's methods may exit."""
    return {
        entry.bundle.manifest.exit_layer if method == "calm-single" else options.calm_from
        for method in entry.methods
        if method in CALM
    }


def _calm_directory(options: EvaluateOptions, least: int) -> Path:
    return options.output / f"calm-{least}"


def _measure(entries: Sequence[Entry], requests: Sequence[Request], options: EvaluateOptions, records: Records) -> None:
    """Decode what `records` does not have yet: each line in every setting of every bundle, in turn."""
    energy, load = Energy(), OtherLoad()
    with ExitStack() as stack:
        decoders = [stack.enter_context(_decoder(entry, options, records)) for entry in entries]
        prompts = [decoder.prompts(requests) for decoder in decoders]
        lines = [line for line in prompts[0] if all(line in each for each in prompts)]
        settings = [(number, setting) for number, entry in enumerate(entries) for setting in entry.settings]

        def keys(turn: int, line: int) -> list[Key]:
            return [Key(entries[number].name, setting.name, line, turn) for number, setting in settings]

        def done(turn: int, place: int) -> bool:
            return records.has(keys(turn, lines[place]))

        def decode(which: tuple[int, Setting], line: int) -> dict[str, Any]:
            number, setting = which
            before = energy.joules()
            decoded = decoders[number].decode(setting, prompts[number][line], options.max_new_tokens)
            after = energy.joules()
            return {**decoded, "joules": None if before is None or after is None else after - before}

        if not all(done(turn, place) for turn in range(options.rounds) for place in range(len(lines))):
            for number, setting in settings:
                if setting.method != "adaptive":  # which would learn from it
                    decoders[number].decode(setting, prompts[number][lines[0]], 16)
        for turn in interleave(settings, lines, options.rounds, decode, 0, done, "evaluating"):
            left_out = _OUTPUTS if turn.round else ()
            busy = load.so_far()
            records.add(
                [
                    Record(
                        **key._asdict(),
                        **{name: value for name, value in run.items() if name not in left_out},
                        busy=busy,
                    )
                    for key, run in zip(keys(turn.round, lines[turn.prompt]), turn.runs, strict=True)
                ]
            )


class Decoder:
    """Decodes a bundle's settings; `calm` by the first layer that may exit, where that is measured."""

    def __init__(self, session: Session, calm: Mapping[int, Any], calm_from: int) -> None:
        self._session, self._calm, self._calm_from = session, calm, calm_from

    def prompts(self, requests: Sequence[Request]) -> dict[int, np.ndarray]:
        """Token ids of the lines that fit."""
        unknown = unknown_of_bundle(self._session.bundle.path, self._session.manifest.files)
        return {request.line_number: ids for request, ids in fitting_prompts(self._session, requests, unknown)}

    def decode(self, setting: Setting, prompt: np.ndarray, most: int) -> dict[str, Any]:
        """Decode, and return the fields of a record that this gives."""
        if setting.method in CALM:
            return self._by_calm(setting, prompt, most)
        adaptive = setting.method == "adaptive"
        threshold = self._session.threshold if adaptive else None
        result = self._session.generate(prompt, max_new_tokens=most, **setting.request)
        stats = result.stats
        return {
            "seconds": round(stats.seconds, 7),
            "decode_seconds": round(stats.seconds + stats.queue_seconds - stats.first_token_seconds, 7),
            "first_seconds": round(stats.first_token_seconds, 7),
            "tokens": stats.tokens,
            "text": result.text,
            "token_ids": result.token_ids,
            "exited": result.exited,
            "finish_reason": result.finish_reason,
            "threshold": threshold,
            "adaptive_state": self._session.adaptive_state() if adaptive else None,
        }

    def _by_calm(self, setting: Setting, prompt: np.ndarray, most: int) -> dict[str, Any]:
        assert setting.threshold is not None
        manifest, tokenizer = self._session.manifest, self._session.tokenizer
        single = setting.method == "calm-single"
        calm = self._calm[manifest.exit_layer if single else self._calm_from]
        result = calm.generate(prompt, most, setting.threshold, setting.method == "calm-decay", single)
        ended = result.token_ids[-1] in manifest.eos_token_ids
        written = result.token_ids[:-1] if ended else result.token_ids
        counted = result.layers if manifest.encoder_decoder else result.layers[1:]
        return {
            "seconds": round(result.seconds, 7),
            "decode_seconds": round(result.decode_seconds, 7),
            "first_seconds": round(result.first_seconds, 7),
            "tokens": len(result.token_ids),
            "text": "" if tokenizer is None else tokenizer.decode(list(written)),
            "token_ids": result.token_ids,
            "exited": tuple(layers < manifest.layers for layers in result.layers),
            "finish_reason": "eos" if ended else "length",
            "layers": sum(counted),
        }


@contextmanager
def _decoder(entry: Entry, options: EvaluateOptions, records: Records) -> Iterator[Decoder]:
    threads = options.threads or usable_cores()
    calm = {}
    if set(CALM) & set(entry.methods):
        from freeexport.measure.calm import Calm

        for least in _calm_layers(entry, options):
            calm[least] = Calm(entry.bundle, _calm_directory(options, least), least, threads)
    adaptive: dict[str, Any] = {}
    if "adaptive" in entry.methods:
        adaptive = {"threshold": "adaptive", "adaptive_state": records.last_state(entry.name, "adaptive")}
    with Session(entry.bundle.path, threads=threads, slots=1, **adaptive) as session:
        yield Decoder(session, calm, options.calm_from)


def _trained(entries: Sequence[Entry], loss: str | None) -> list[str]:
    """Say what numbers mean where a method is not run on what it was trained for."""
    notes = []
    anywhere = any({"calm", "calm-decay"} & set(entry.methods) for entry in entries)
    if loss not in (None, "weighted-ce") and anywhere:
        notes.append(
            f"calm ran on a checkpoint that was trained with {loss or 'an unknown loss'}, not weighted-ce: exits after "
            "layers that no loss looked at show what such exits give, not what CALM can do"
        )
    for entry in entries:
        manifest = entry.bundle.manifest
        methods = [method for method in entry.methods if method not in ("full", *CALM)]
        if not methods:
            continue
        if not manifest.exit_trained:
            known = "was not trained" if manifest.exit_trained is False else "does not say whether it was trained"
            notes.append(
                f"{entry.name} {known} for its exit after layer {manifest.exit_layer}: its figures for "
                f"{', '.join(methods)} show what such an exit gives, not what the methods can do"
            )
        if manifest.threshold >= NEVER_EXIT and {"free", "rollback"} & set(methods):
            notes.append(f"{entry.name} is not calibrated: free ran at the given thresholds only, rollback never exits")
    return notes


def _doubts(rows: Sequence[Row], found: Mapping[tuple[str, str], Mapping[int, Sequence[Record]]]) -> list[str]:
    notes = []
    busy = load_note(max(one.busy for lines in found.values() for turns in lines.values() for one in turns))
    if busy:
        notes.append(busy)
    for row in rows:
        if row.method != "full":
            continue
        notes.extend(
            f"{name} gives the full model of {row.bundle} 0: it does not fit these data, or this model; nothing is "
            "relative to that"
            for name, score in row.scores.items()
            if not score.value
        )
        if row.cut > MOST_CUT:
            notes.append(f"{row.cut:.0%} of the outputs of {row.bundle} were cut at the limit; raise --max-new-tokens")
    return notes


def settings_sheet(found: Evaluation) -> Sheet:
    """The table of settings; what is the same in each row stands below it."""

    def value(name: str, row: Row) -> str:
        return f"{row.scores[name].value:.4f}"

    def relative(name: str, row: Row) -> str:
        score = row.scores[name]
        if score.relative is None or row.method == "full":
            return ""
        low, high = (None if one is None else 100 * one for one in (score.low, score.high))
        return plus_minus(100 * score.relative, low, high)

    columns: dict[str, Any] = {
        "bundle": lambda row: row.bundle,
        "precision": lambda row: row.precision,
        "setting": lambda row: row.setting.replace(", calibrated", " *"),
    }
    for metric in found.metrics:
        columns[f"{metric.label}#"] = lambda row, name=metric.name: value(name, row)
        columns[f"% of {'full' if len(found.metrics) == 1 else metric.label}#"] = lambda row, name=metric.name: (
            relative(name, row)
        )
    columns |= {
        "exits#": lambda row: f"{row.exit_rate:.0%}",
        "speed#": lambda row: f"{plus_minus(row.request_speed, row.request_low, row.request_high, 2)}x",
        "tokens/s#": lambda row: f"{row.tokens_per_second:.0f}",
        "spread#": lambda row: "" if row.spread is None else f"{row.spread:.0%}",
        "layers#": lambda row: f"{row.layers:.2f}",
        "a token#": lambda row: f"{row.token_speed:.2f}x",
        "first#": lambda row: f"{row.first_speed:.2f}x",
        "same#": lambda row: f"{row.same:.0%}",
        "mJ/token#": lambda row: "" if row.joules_per_token is None else f"{1e3 * row.joules_per_token:.3g}",
    }
    title = f"{found.options.data.name}, {found.rows[0].lines} lines, {found.threads} thread(s)"
    return sheet(title, columns, found.rows).compact(keep=["setting", "speed", "tokens/s"])


def narrow(shown: Sheet, metrics: Sequence[Metric]) -> Sheet:
    """Leave out what a terminal has no room for, the least important first: the files have every column."""
    spare = ["mJ/token", "first", "a token", "layers", "spread", "same", "precision", "exits", "tokens/s"]
    labels = [metric.label for metric in metrics]
    spare += [name for label in reversed(labels[1:]) for name in (label, f"% of {label}")]
    return shown.within(TERMINAL, spare)


def curves_sheet(found: Evaluation) -> Sheet:
    columns: dict[str, Any] = {
        "bundle": lambda curve: curve.bundle,
        "method": lambda curve: curve.method,
        f"fastest with {100 * found.options.quality:.4g} %": lambda curve: curve.fastest or "none",
        "speed#": lambda curve: "" if curve.speed is None else f"{curve.speed:.2f}x",
        "area#": lambda curve: "" if curve.area is None else f"{curve.area:.3f}",
    }
    return sheet(f"Quality-speed curves by {found.metrics[0].label}", columns, found.curves)


def facts(found: Evaluation) -> list[tuple[str, str]]:
    """Name what the figures depend on and what columns mean."""
    options = found.options
    return [
        *settings_sheet(found).facts,
        ("speed", "of whole requests, as a multiple of full's; ± is half a 95 % interval of a paired bootstrap"),
        *([("*", "the calibrated threshold")] if any(row.calibrated for row in found.rows) else []),
        *about(found.environment, found.threads),
        (
            "decoding",
            f"greedy, at most {options.max_new_tokens} tokens; the median of {options.rounds} round(s) a line",
        ),
        *[(f"metric {metric.name}", metric.signature) for metric in found.metrics if metric.signature],
    ]


def as_markdown(found: Evaluation) -> str:
    """The verdicts, tables and facts for a page of results."""
    items = "\n".join(f"- {name}: {text}" for name, text in [*facts(found), *(("note", one) for one in found.notes)])
    lead = "\n".join(f"**{one}.**\n" for one in found.verdicts)
    return "\n".join([lead, markdown(settings_sheet(found)), "", markdown(curves_sheet(found)), "", items]) + "\n"


def as_dict(found: Evaluation) -> dict[str, Any]:
    """Everything but the outputs, for JSON."""
    options = found.options
    return {
        **found.environment,
        "bundles": {
            entry.name: {
                name: getattr(entry.bundle.manifest, name)
                for name in ("source", "precision", "layers", "exit_layer", "threshold", "exit_trained", "kernels")
            }
            for entry in found.entries
        },
        "data": str(options.data),
        "lines": found.rows[0].lines,
        "rounds": options.rounds,
        "max_new_tokens": options.max_new_tokens,
        "threads": found.threads,
        "quality": options.quality,
        "metrics": {metric.name: metric.signature for metric in found.metrics},
        "verdicts": found.verdicts,
        "rows": [asdict(row) for row in found.rows],
        "curves": [asdict(curve) for curve in found.curves],
        "notes": found.notes,
    }
