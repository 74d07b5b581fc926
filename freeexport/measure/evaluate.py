"""Evaluation: compares the quality and speed of decoding methods on a task."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from freeexport import __version__
from freeexport.checkpoints.examples import DataError, read_examples
from freeexport.costs.bytes import CALL_BYTES, calls_of, row_share
from freeexport.costs.verdict import Verdict
from freeexport.measure.plot import quality_speed
from freeexport.measure.quality import Row, curves_of, rows_of, verdicts
from freeexport.measure.settings import (
    CALM,
    WITHOUT_EXIT,
    Entry,
    EvaluateOptions,
    Key,
    Method,
    Record,
    Records,
    Setting,
    entries_of,
)
from freeexport.measure.sources import engines_hash, fitting_prompts, reference_of
from freeexport.measure.table import (
    Sheet,
    about,
    as_csv,
    environment,
    markdown,
    plus_minus,
    render,
    sheet,
)
from freeexport.measure.timing import interleave
from freeexport.system.jsonl import Request
from freeexport.system.load import OtherLoad, load_note
from freeexport.system.output import write_whole
from freeexport.system.page import save_figure
from freeexport.task_metrics import Metric, Reference, metric_of
from runtime import Session
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import Bundle, sha256_of
from runtime.bundle.manifest import MANIFEST
from runtime.machine.machine import usable_cores
from runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from freeexport.measure.calm import Calm

WARM_UP = 16  # tokens
# Share of outputs that reach the token limit above which a note is added.
MOST_CUT = 0.1
# Number of example lines on the page.
SHOWN = 12
# Fewest compared drafts at a position for which acceptance is shown.
LEAST_COMPARED = 20
# Fields that are recorded in the first round only.
_OUTPUTS = {"text", "token_ids", "exited", "finish_reason", "calls"}
_PREDICTED = (
    "speed a token by the byte model: weights and caches that engine calls read, "
    "{} more for each further row, and {:g} MB for a call"
)
_COMPARED_WITH_FULL = "no line has a target: outputs are compared with those of the full model"
FILES = "report.html, results.md, evaluation.json and .csv, curve.png and .svg"


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        options: Options of the evaluation.
        entries: Bundles with their settings.
        metrics: Metrics of the outputs.
        requests: Requests by line.
        references: References by line.
        records: Records by bundle and setting, then by line.
        report: All results, as written to JSON.
    """

    options: EvaluateOptions
    entries: list[Entry]
    metrics: list[Metric]
    requests: dict[int, Request]
    references: dict[int, Reference]
    records: Mapping[tuple[str, str], Mapping[int, Sequence[Record]]]
    report: dict[str, Any]

    @property
    def rows(self) -> list[Row]:
        rows: list[Row] = self.report["rows"]
        return rows


@dataclass(frozen=True)
class Story:
    """Content that turns an evaluation into a page about more.

    Attributes:
        title: Title of the page.
        verdict: Verdict above those of the evaluation.
        sheets: Tables about earlier steps.
    """

    title: str
    verdict: Verdict
    sheets: tuple[Sheet, ...]


def evaluate(options: EvaluateOptions) -> Evaluation:
    """Decode all requests without a record in `output`, and compare the settings.

    Raises:
        DataError: If the data cannot be used.
        MetricError: If a metric does not fit the data.
        BundleError: If a bundle cannot be opened.
        OptionError: If options do not fit together, or if `output` holds another run.
    """
    metrics = [metric_of(name) for name in options.metrics]
    entries = entries_of(options)
    requests = read_examples(options.data, options.samples)
    given = {request.line_number: reference_of(request) for request in requests}
    references = {line: reference for line, reference in given.items() if reference is not None}
    if references and len(references) < len(given):
        line = next(line for line, reference in given.items() if reference is None)
        raise DataError(
            f"{options.data}, line {line} has no 'target' and no 'references', "
            "which other lines have; give every line one, or none, "
            "to compare with what the full model writes"
        )
    without_targets = not references
    if references:
        for metric in metrics:  # raises before decoding if a metric does not fit
            metric.table(
                [reference.texts[0] for reference in references.values()], list(references.values())
            )
    threads = options.threads or usable_cores()
    records = Records(options.output, _run(options, entries, threads), options.overwrite)
    losses = _measure(entries, requests, options, threads, records)
    found = records.by_setting()
    made = environment()
    if without_targets:
        whole = found[entries[0].name, "full"]
        references = {line: Reference((turns[0].text,)) for line, turns in whole.items()}
    rows = rows_of(entries, found, references, metrics, made["machine"]["kernels"])
    report = {
        **made,
        "bundles": {entry.name: _about_bundle(entry.bundle) for entry in entries},
        "data": str(options.data),
        "data_sha256": sha256_of(options.data),
        "references": "full" if without_targets else "targets",
        "lines": rows[0]["lines"],
        "rounds": options.rounds,
        "max_new_tokens": options.max_new_tokens,
        "threads": threads,
        "quality": options.quality,
        "metrics": {metric.name: metric.signature for metric in metrics},
        "verdicts": verdicts(rows, metrics[0], options.quality),
        # Byte model: cost of a further row of a call as a share of the first row's.
        "row_shares": {
            entry.name: row_share(entry.bundle.manifest.precision, made["machine"]["kernels"])
            for entry in entries
        },
        "rows": rows,
        "curves": curves_of(rows, metrics[0].name, options.quality),
        "notes": [
            *_notes(entries, losses, rows, found),
            *([_COMPARED_WITH_FULL] if without_targets else []),
        ],
    }
    lines = {request.line_number: request for request in requests}
    return Evaluation(options, entries, metrics, lines, references, found, report)


def _about_bundle(bundle: Bundle) -> dict[str, Any]:
    """Return facts about the weights, engines and calibration of a bundle, for JSON."""
    facts = (
        "source",
        "source_sha256",
        "precision",
        "layers",
        "exit_layer",
        "threshold",
        "exit_trained",
        "kernels",
    )
    calibration = bundle.calibration
    rule = ("method", "target", "risk", "delta", "sequences", "max_pending")
    return {
        **{name: getattr(bundle.manifest, name) for name in facts},
        "manifest_sha256": sha256_of(bundle.path / MANIFEST),
        "calibration": None
        if calibration is None
        else {name: getattr(calibration, name) for name in rule},
    }


def _run(options: EvaluateOptions, entries: Sequence[Entry], threads: int) -> dict[str, Any]:
    """Return everything that outputs depend on.

    Metrics and rounds are left out, because changing them does not invalidate records.
    """
    manifests = {entry.name: entry.bundle.manifest for entry in entries}
    return {
        "bundles": {
            name: [engines_hash(manifest), manifest.threshold]
            for name, manifest in manifests.items()
        },
        "settings": {entry.name: [setting.name for setting in entry.settings] for entry in entries},
        "data": sha256_of(options.data),
        "samples": options.samples,
        "max_new_tokens": options.max_new_tokens,
        "calm": options.calm_from if options.calm_models else None,
        "threads": threads,
        "freeexport": __version__,
    }


def _measure(
    entries: Sequence[Entry],
    requests: Sequence[Request],
    options: EvaluateOptions,
    threads: int,
    records: Records,
) -> dict[str, str]:
    """Decode all requests without a record, each line in every setting of every bundle in turn.

    Returns:
        The training losses of the CALM checkpoints by bundle, "" if unknown.
    """
    load = OtherLoad()
    with ExitStack() as stack:
        decoders = [
            Decoder(entry, number, options, threads, records)
            for number, entry in enumerate(entries)
        ]
        for decoder in decoders:
            stack.enter_context(decoder.session)
        prompts = [
            {
                request.line_number: ids
                for request, ids in fitting_prompts(decoder.session, requests)
            }
            for decoder in decoders
        ]
        lines = [line for line in prompts[0] if all(line in each for each in prompts)]
        settings = [
            (number, setting) for number, entry in enumerate(entries) for setting in entry.settings
        ]

        def keys(turn: int, place: int) -> list[Key]:
            return [
                (entries[number].name, setting.name, lines[place], turn)
                for number, setting in settings
            ]

        def done(turn: int, place: int) -> bool:
            return records.has(keys(turn, place))

        def decode(which: tuple[int, Setting], line: int) -> dict[str, Any]:
            number, setting = which
            return decoders[number].decode(setting, prompts[number][line], options.max_new_tokens)

        if not all(
            done(turn, place) for turn in range(options.rounds) for place in range(len(lines))
        ):
            for number, setting in settings:
                if setting.method != "adaptive":  # would learn from the warm-up
                    decoders[number].decode(setting, prompts[number][lines[0]], WARM_UP)
        for turn in interleave(settings, lines, options.rounds, decode, 0, done, "evaluating"):
            kept = [
                {name: run[name] for name in run.keys() - (_OUTPUTS if turn.round else ())}
                for run in turn.runs
            ]
            busy = load.so_far()
            named = keys(turn.round, turn.prompt)
            records.add(
                [Record(*key, **run, busy=busy) for key, run in zip(named, kept, strict=True)]
            )
        pairs = zip(entries, decoders, strict=True)
        return {entry.name: decoder.loss for entry, decoder in pairs if decoder.loss is not None}


class Decoder:
    """Decodes the settings of one bundle, in its `session` or with CALM's engines.

    Args:
        entry: The bundle.
        number: Number of the bundle, from 0.
        options: Options of the evaluation.
        threads: Threads per engine call.
        records: Records of the run, which restore an adaptive session.
    """

    def __init__(
        self, entry: Entry, number: int, options: EvaluateOptions, threads: int, records: Records
    ) -> None:
        self._calm: dict[Method, Calm] = {}
        self.loss: str | None = None
        for method in (method for method in entry.methods if method in CALM):
            # Imports the graph builder, which other methods do not need.
            from freeexport.measure.calm import Calm, write_calm

            manifest = entry.bundle.manifest
            least = manifest.exit_layer if method == "calm-single" else options.calm_from
            directory = options.output / (f"calm-{least}-{number}" if number else f"calm-{least}")
            self.loss = write_calm(str(entry.calm_model), manifest, least, directory)
            same = [calm for calm in self._calm.values() if calm.least == least]
            self._calm[method] = same[0] if same else Calm(entry.bundle, directory, least, threads)
        adaptive: dict[str, Any] = {}
        if "adaptive" in entry.methods:
            adaptive = {
                "threshold": "adaptive",
                "adaptive_state": records.last_state(entry.name, "adaptive"),
            }
        self.session = Session(entry.bundle.path, threads=threads, slots=1, **adaptive)

    def decode(self, setting: Setting, prompt: np.ndarray, most: int) -> dict[str, Any]:
        """Decode a prompt, and return the fields of its record that depend on the output."""
        if setting.method in CALM:
            return self._by_calm(setting, prompt, most)
        adaptive = setting.method == "adaptive"
        lookup = setting.method == "lookup"
        mode = {"adaptive": "free", "static": "shallow", "lookup": "lossless"}.get(
            setting.method, setting.method
        )
        asked: dict[str, Any] = {"mode": mode, "drafts": "lookup" if lookup else None}
        if not adaptive:  # uses the session's threshold
            asked["threshold"] = setting.threshold
        threshold = self.session.threshold if adaptive else None
        result = self.session.generate(prompt, max_new_tokens=most, **asked)
        stats = result.stats
        return {
            "seconds": round(stats.seconds, 7),
            "decode_seconds": round(
                stats.seconds + stats.queue_seconds - stats.first_token_seconds, 7
            ),
            "first_seconds": round(stats.first_token_seconds, 7),
            "tokens": stats.tokens,
            "text": result.text,
            "token_ids": result.token_ids,
            "exited": result.exited,
            "finish_reason": result.finish_reason,
            "threshold": threshold,
            "adaptive_state": self.session.adaptive_state() if adaptive else None,
            "calls": calls_of(result, lookup),
        }

    def _by_calm(self, setting: Setting, prompt: np.ndarray, most: int) -> dict[str, Any]:
        assert setting.threshold is not None
        manifest = self.session.manifest
        tokenizer = self.session.tokenizer
        single = setting.method == "calm-single"
        decays = setting.method == "calm-decay"
        result = self._calm[setting.method].generate(
            prompt, most, setting.threshold, decays, single
        )
        ended = result.token_ids[-1] in manifest.eos_token_ids
        written = result.token_ids[:-1] if ended else result.token_ids
        return {
            "seconds": round(result.seconds, 7),
            "decode_seconds": round(result.seconds - result.first_seconds, 7),
            "first_seconds": round(result.first_seconds, 7),
            "tokens": len(result.token_ids),
            "text": "" if tokenizer is None else tokenizer.decode(list(written)),
            "token_ids": result.token_ids,
            "exited": tuple(layers < manifest.layers for layers in result.layers),
            "finish_reason": "eos" if ended else "length",
            "layers": sum(result.layers[0 if manifest.encoder_decoder else 1 :]),
        }


def _notes(
    entries: Sequence[Entry],
    losses: Mapping[str, str],
    rows: Sequence[Row],
    found: Mapping[tuple[str, str], Mapping[int, Sequence[Record]]],
) -> list[str]:
    """Return notes on methods without the training they need, and on doubtful results."""
    notes = []
    for entry in entries:
        manifest = entry.bundle.manifest
        loss = losses.get(entry.name)
        if loss not in (None, "weighted-ce") and {"calm", "calm-decay"} & set(entry.methods):
            notes.append(
                f"calm ran on a checkpoint that was trained with {loss or 'an unknown loss'}, "
                "not weighted-ce: exits after layers that no loss looked at show what such exits "
                "give, not what CALM can do"
            )
        methods = [method for method in entry.methods if method not in (*WITHOUT_EXIT, *CALM)]
        if methods and not manifest.exit_trained:
            known = (
                "was not trained"
                if manifest.exit_trained is False
                else "does not say whether it was trained"
            )
            notes.append(
                f"{entry.name} {known} for its exit after layer {manifest.exit_layer}: "
                f"its figures for {', '.join(methods)} show what such an exit gives, "
                "not what the methods can do"
            )
        if manifest.threshold >= NEVER_EXIT and {"free", "rollback"} & set(methods):
            notes.append(
                f"{entry.name} is not calibrated: free ran at the given thresholds only, "
                "rollback never exits"
            )
    busy = load_note(
        max(one.busy for lines in found.values() for turns in lines.values() for one in turns)
    )
    notes += [busy] if busy else []
    for row in rows:
        if row["method"] != "full":
            continue
        notes += [
            f"{name} gives the full model of {row['bundle']} 0: "
            "it does not fit these data, or this model; nothing is relative to that"
            for name, score in row["scores"].items()
            if not score["value"]
        ]
        if row["cut"] > MOST_CUT:
            cut = f"{row['cut']:.0%} of the outputs of {row['bundle']}"
            notes.append(f"{cut} were cut at the limit; raise --max-new-tokens")
    return notes


def settings_sheet(found: Evaluation) -> Sheet:
    """Return the table of settings. Columns with one value in all rows become facts."""

    def interval(row: Row, name: str) -> str:
        return f"{plus_minus(row[f'{name}_speed'], row[f'{name}_low'], row[f'{name}_high'], 2)}x"

    def of_first(show: Callable[[Row], str], row: Row) -> str:
        return "" if row["first_bundle"] is None else show(row["first_bundle"])

    columns: dict[str, Callable[[Row], str]] = {
        "bundle": lambda row: row["bundle"],
        "precision": lambda row: row["precision"],
        "setting": lambda row: row["setting"].replace(", calibrated", " *"),
    }
    for metric in found.metrics:
        share = "full" if len(found.metrics) == 1 else metric.shown
        columns[f"{metric.shown}#"] = partial(_value, metric)
        columns[f"% of {share}#"] = partial(_relative, metric)
        columns[f"{metric.shown}, % of first#"] = partial(of_first, partial(_relative, metric))
    columns |= {
        "exits#": lambda row: f"{row['exit_rate']:.0%}",
        "speed#": lambda row: interval(row, "request"),
        "of first#": partial(of_first, lambda row: interval(row, "request")),
        "tokens/s#": lambda row: f"{row['tokens_per_second']:.0f}",
        "spread#": lambda row: "" if row["spread"] is None else f"{row['spread']:.0%}",
        "layers#": lambda row: f"{row['layers']:.2f}",
        "a token#": lambda row: interval(row, "token"),
        "predicted#": lambda row: "" if row["predicted"] is None else f"{row['predicted']:.2f}x",
        "first token#": lambda row: f"{row['first_speed']:.2f}x",
        "same#": lambda row: f"{row['same']:.0%}",
    }
    title = (
        f"{found.options.data.name}, {found.report['lines']} lines, "
        f"{found.report['threads']} thread(s)"
    )
    return sheet(title, columns, found.rows, keep=("setting", "speed", "tokens/s"))


def _value(metric: Metric, row: Row) -> str:
    value: float = row["scores"][metric.name]["value"]
    return f"{100 * (1 - value):.2f}%" if metric.error else f"{value:.4f}"


def _relative(metric: Metric, row: Row) -> str:
    """Format the score relative to the full model's in percent. Empty for the full model."""
    kept, low, high = (row["scores"][metric.name][name] for name in ("relative", "low", "high"))
    if kept is None or row.get("method") == "full":
        return ""
    return plus_minus(100 * kept, *((None, None) if low is None else (100 * low, 100 * high)))


def narrow(shown: Sheet, metrics: Sequence[Metric]) -> Sheet:
    """Drop the least important columns until the table fits a terminal."""
    spare = ["first token", "layers", "same", "precision", "exits", "tokens/s", "of first"]
    others = (
        name
        for one in metrics[::-1]
        for name in (f"{one.shown}, % of first", one.shown, f"% of {one.shown}")
    )
    kept = (metrics[0].shown, f"% of {metrics[0].shown}")
    return shown.within(
        [*spare, *(name for name in others if name not in kept), "a token", "predicted", "spread"]
    )


def curves_sheet(found: Evaluation) -> Sheet:
    """Return the table of curves."""
    columns: dict[str, Callable[[Row], str]] = {
        "bundle": lambda curve: curve["bundle"],
        "method": lambda curve: curve["method"],
        f"fastest with {100 * found.options.quality:.4g} %": lambda curve: (
            curve["fastest"] or "none"
        ),
        "speed#": lambda curve: "" if curve["speed"] is None else f"{curve['speed']:.2f}x",
        "area#": lambda curve: "" if curve["area"] is None else f"{curve['area']:.3f}",
    }
    return sheet(
        f"Quality-speed curves by {found.metrics[0].label}", columns, found.report["curves"]
    )


def facts(found: Evaluation, shown: Sheet | None = None) -> list[tuple[str, str]]:
    """Describe the conditions of an evaluation and the meaning of its columns.

    Args:
        found: The evaluation.
        shown: Table whose columns are explained. Default: the table with all columns.
    """
    options = found.options
    rows = found.rows
    first = found.entries[0].name
    shares = ", ".join(
        f"{share:.0%}" for share in dict.fromkeys(found.report["row_shares"].values())
    )
    spreads = [row["spread"] for row in rows if row["spread"] is not None]
    whole = settings_sheet(found)
    hidden = set[str]() if shown is None else shown.hides(whole)
    drafted = [
        (
            f"drafts of {source}",
            f"{row['bundle']}, {row['setting']}: {', '.join(accepted)} % accepted at each position",
        )
        for row in rows
        for source, positions in row["drafts"].items()
        if (
            accepted := [
                f"{100 * share:.0f}" for share, compared in positions if compared >= LEAST_COMPARED
            ]
        )
    ]
    told = [
        *whole.facts,
        (
            "speed",
            "of whole requests, as a multiple of full's; "
            "± is half a 95 % interval of a paired bootstrap",
        ),
        *([("of first", f"as a multiple of full in {first}")] if len(found.entries) > 1 else []),
        *(
            [("predicted", _PREDICTED.format(shares, CALL_BYTES / 1e6))]
            if any(row["predicted"] for row in rows)
            else []
        ),
        *(
            [
                (
                    "rounds",
                    f"tokens/s of a setting differed by up to {max(spreads):.0%} between rounds",
                )
            ]
            if spreads
            else []
        ),
        *drafted,
        *[
            (metric.shown, f"errors: less is better; shares of full's are those of {metric.label}")
            for metric in found.metrics
            if metric.error
        ],
        *([("*", "the calibrated threshold")] if any(row["calibrated"] for row in rows) else []),
        *about(found.report, found.report["threads"]),
        (
            "decoding",
            f"greedy, at most {options.max_new_tokens} tokens; "
            f"the median of {options.rounds} round(s) a line",
        ),
        *[
            (f"metric {metric.name}", metric.signature)
            for metric in found.metrics
            if metric.signature
        ],
    ]
    return [(name, text) for name, text in told if name not in hidden]


def as_markdown(found: Evaluation, story: Story | None = None) -> str:
    """Format the verdicts, tables and facts as Markdown."""
    told = [*facts(found), *(("note", note) for note in found.report["notes"])]
    return "\n".join(
        [
            *([] if story is None else [f"# {story.title}\n", f"**{story.verdict}**\n"]),
            *(f"**{verdict}.**\n" for verdict in found.report["verdicts"]),
            *(markdown(settings_sheet(found)), "", markdown(curves_sheet(found)), ""),
            *(f"- {name}: {text}" for name, text in told),
            *(
                []
                if story is None
                else [f"\n## {sheet.title}\n\n{markdown(sheet)}" for sheet in story.sheets]
            ),
            "",
        ]
    )


def page(found: Evaluation, story: Story | None = None) -> str:
    """Render an evaluation as HTML, with its figure, its tables and example outputs."""
    from markupsafe import Markup

    picture = io.StringIO()
    quality_speed(
        found.rows, found.metrics[0].name, found.metrics[0].label, found.options.quality
    ).savefig(picture, format="svg")
    svg = picture.getvalue()
    processor = found.report["machine"]["processor"]
    caption = (
        "Quality by speed; bars are 95 % intervals of a paired bootstrap over lines, "
        "numbers are thresholds. Arrows stand for points below the picture."
    )
    return render(
        f"Evaluation on {found.options.data.name}" if story is None else story.title,
        f"{found.report['lines']} lines, {found.report['threads']} thread(s), {processor}",
        verdicts=[
            *([] if story is None else [story.verdict]),
            *({"text": text} for text in found.report["verdicts"]),
        ],
        notes=found.report["notes"],
        # matplotlib escapes all texts.
        figures=[(Markup(svg[svg.index("<svg") :]), caption)],
        sheets=[
            settings_sheet(found),
            curves_sheet(found),
            *([] if story is None else story.sheets),
        ],
        examples=examples(found),
        facts=facts(found),
    )


def examples(found: Evaluation) -> list[dict[str, Any]]:
    """Select lines across the data, with the outputs of one setting per bundle and method."""
    # Prefers the fastest setting that keeps the quality, then the calibrated one, then the last.
    best = {(curve["bundle"], curve["fastest"]) for curve in found.report["curves"]}
    rows = sorted(
        found.rows, key=lambda row: ((row["bundle"], row["setting"]) in best, row["calibrated"])
    )
    chosen = {(row["bundle"], row["method"]): row for row in rows}
    shown = [row for row in found.rows if row is chosen[row["bundle"], row["method"]]]
    bundles = {entry.name: entry.bundle for entry in found.entries}
    tokenizers = {
        name: Tokenizer.load(bundle.path, bundle.manifest.files) for name, bundle in bundles.items()
    }
    lines = list(found.records[shown[0]["bundle"], shown[0]["setting"]])
    made = []
    for line in lines[:: max(1, len(lines) // SHOWN)][:SHOWN]:
        outputs = []
        for row in shown:
            bundle = row["bundle"]
            setting = row["setting"]
            record = found.records[bundle, setting][line][0]
            texts = pieces(
                tokenizers[bundle], record.token_ids, set(bundles[bundle].manifest.eos_token_ids)
            )
            name = f"{setting}, {bundle}" if len(bundles) > 1 else setting
            outputs.append((name, list(zip(texts, record.exited, strict=True))))
        given = found.requests[line].input
        asked = given[-1]["content"] if isinstance(given, list) else str(given)
        reference = found.references[line].texts[0]
        made.append({"line": line, "input": asked, "reference": reference, "outputs": outputs})
    return made


def pieces(tokenizer: Tokenizer | None, token_ids: Sequence[int], ends: set[int]) -> list[str]:
    """Split a text into the part that each token adds. Without a tokenizer, return token ids."""
    if tokenizer is None:
        return [f"{token} " for token in token_ids]
    texts = []
    before = ""
    for count in range(1, len(token_ids) + 1):
        text = tokenizer.decode([token for token in token_ids[:count] if token not in ends])
        # A character of several tokens appears with its last token.
        shown = text.rstrip("�")
        texts.append(shown[len(before) :])
        before = shown if shown.startswith(before) else before
    return texts


def write(found: Evaluation, story: Story | None = None) -> None:
    """Write JSON, CSV, Markdown, figures and the HTML page beside the outputs.

    Requires matplotlib.

    Args:
        found: The evaluation.
        story: Further content of the pages.
    """
    out = found.options.output
    write_whole(out / "evaluation.json", json.dumps(found.report, indent=2) + "\n")
    write_whole(out / "evaluation.csv", as_csv(found.rows))
    write_whole(out / "results.md", as_markdown(found, story))
    figure = quality_speed(
        found.rows, found.metrics[0].name, found.metrics[0].label, found.options.quality
    )
    for name in ("curve.png", "curve.svg"):
        save_figure(figure, out / name)
    write_whole(out / "report.html", page(found, story))
