"""Benchmark: measures the speed of bundles in several modes, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.resources import files
from operator import itemgetter
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import numpy as np

from freeexport.checkpoints.examples import read_examples
from freeexport.costs.bytes import token_bytes
from freeexport.measure.costs import bandwidth_of
from freeexport.measure.table import Sheet, environment, plus_minus, sheet
from freeexport.measure.timing import interleave, spread
from freeexport.system.load import load_note, other_load
from freeexport.system.page import human_bytes
from freeexport.system.progress import progress
from runtime import Session
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import Bundle
from runtime.errors import OptionError
from runtime.machine.device import Device, check_runnable
from runtime.machine.machine import usable_cores
from runtime.text.prompt import encode_prompt
from runtime.text.tokenizer import Tokenizer

SCHEMA = 1
MODES = ("free", "rollback", "lossless", "shallow")


@dataclass(frozen=True)
class BenchOptions:
    """Options of a benchmark. See `freeexport bench --help`.

    Raises:
        OptionError: If values are repeated or out of range.
    """

    bundles: tuple[Path, ...]
    data: Path | None = None
    samples: int = 4
    tokens: int = 64
    modes: tuple[str, ...] = ("free", "lossless")
    thresholds: tuple[float, ...] = ()
    drafts: tuple[str, ...] = ()
    rounds: int = 5
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        Device.parse(self.device)
        for name in ("bundles", "modes", "thresholds", "drafts"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise OptionError(
                    f"{max(values, key=values.count)} is named twice among {name}; name it once"
                )
        for threshold in self.thresholds:
            if not 0 <= threshold <= 1:
                raise OptionError(
                    f"--threshold {threshold:g} is out of range; choose one from 0 to 1"
                )

    @property
    def count(self) -> int:
        """Threads per session."""
        return self.threads or usable_cores()


@dataclass(frozen=True)
class BenchSetting:
    """One way to decode a bundle.

    Attributes:
        bundle: Number of the bundle.
        name: Name of the row.
        mode: Mode of decoding.
        threshold: Threshold. Default: the bundle's value.
        drafts: Source of drafts. Default: the session's choice.
    """

    bundle: int
    name: str
    mode: str
    threshold: float | None = None
    drafts: str | None = None

    @property
    def real(self) -> bool:
        """True for settings that a user would choose, unlike the shallow decoder."""
        return self.mode != "shallow"


@dataclass(frozen=True)
class Run:
    """A decoded prompt. Peers that are not bundles keep the defaults.

    Attributes:
        tokens: Generated tokens.
        times: Seconds from the request to each token.
        seconds: Seconds of the whole request.
        exit_rate: Share of tokens that exited.
        acceptance: Share of drafted tokens that were accepted.
        sync_sizes: Number of deep passes by their rows.
        overhead: Seconds outside the engines.
        peak_bytes: Peak resident memory of the process.
        predicted: Leading tokens that are the prompt's deep prediction.
    """

    tokens: tuple[int, ...]
    times: tuple[float, ...]
    seconds: float
    exit_rate: float = 0.0
    acceptance: float = 1.0
    sync_sizes: Mapping[int, int] = field(default_factory=dict)
    overhead: float = 0.0
    peak_bytes: int | None = None
    predicted: int = 1


def benchmark(options: BenchOptions) -> dict[str, Any]:
    """Run a benchmark and return its JSON report.

    Raises:
        FreeExportError: If bundles, data and options do not fit together.
    """
    bundles = [Bundle.open(path) for path in options.bundles]
    for bundle in bundles:
        if bundle.manifest.speech is not None:
            raise OptionError(
                f"{bundle.path} reads speech, which bench does not support yet; leave it out"
            )
        check_runnable(bundle.manifest, Device.parse(options.device))
        if bundle.manifest.source_sha256 != bundles[0].manifest.source_sha256:
            raise OptionError(
                f"{bundle.path} is of another checkpoint ({bundle.manifest.source}) "
                f"than {bundles[0].path}: their tokens cannot be compared; measure each alone"
            )
    prompts = bench_prompts(bundles[0], options.data, options.samples)
    settings = settings_of(options, bundles)
    with progress("memory bandwidth"):
        bandwidth = bandwidth_of(options.count)
    with ExitStack() as stack:
        sessions = [
            stack.enter_context(
                Session(
                    path,
                    threads=options.count,
                    slots=1,
                    device=options.device,
                    draft_memory_mb=0,
                )
            )
            for path in options.bundles
        ]

        def run(setting: BenchSetting, place: int) -> Run:
            return decode(sessions[setting.bundle], setting, prompts[place], options.tokens)

        with other_load() as load:
            turns = list(
                interleave(settings, range(len(prompts)), options.rounds, run, warm_up=len(prompts))
            )
    runs = {setting.name: [list[Run]() for _ in range(options.rounds)] for setting in settings}
    for turn in turns:
        for setting, done in zip(settings, turn.runs, strict=True):
            runs[setting.name][turn.round].append(done)
    precisions = {one.name: bundles[one.bundle].manifest.precision for one in settings}
    rows = rows_of(runs, precisions, [run.tokens for run in runs[settings[0].name][0]])
    if options.device == "cpu":
        for row, one in zip(rows, settings, strict=True):
            add_roofline(row, bundles[one.bundle], one.mode, prompts, options.tokens, bandwidth)
    facts = facts_of(bundles[0], options, len(prompts), settings[0].name, load.cores)
    return report(rows, facts, bandwidth, [one.name for one in settings if one.real])


def bench_prompts(bundle: Bundle, data: Path | None, limit: int) -> list[list[int]]:
    """Return the token ids of the first prompts of a JSONL file, or of the built-in sample texts.

    Args:
        bundle: Bundle with the tokenizer.
        data: JSONL file. Default: the sample texts, or random tokens if they cannot be encoded.
        limit: Most prompts.
    """
    manifest, tokenizer = bundle.manifest, Tokenizer.load(bundle.path, bundle.manifest.files)
    longest = manifest.encoder_capacity or manifest.capacity // 2
    if data is not None:
        examples = read_examples(data, limit)
        return [
            encode_prompt(one.text, tokenizer, manifest.vocab_size, longest).tolist()
            for one in examples
        ]
    texts = files("freeexport").joinpath("data/verify.txt").read_text(encoding="utf-8").splitlines()
    prompts = [] if tokenizer is None else [tokenizer.encode(text) for text in texts]
    if not prompts or max(map(max, prompts)) >= manifest.vocab_size:
        draw = np.random.default_rng(0)
        prompts = [draw.integers(0, manifest.vocab_size, size).tolist() for size in (37, 11, 24, 5)]
    return [ids[:longest] for ids in prompts][:limit]


def labels(bundles: Sequence[Bundle]) -> list[str]:
    """Return short distinct names of bundles: precisions, directory names or paths.

    A single bundle gets an empty name.
    """
    if len(bundles) == 1:
        return [""]
    kinds: list[list[str]] = [
        [bundle.manifest.precision for bundle in bundles],
        [bundle.path.name for bundle in bundles],
        [str(bundle.path) for bundle in bundles],
    ]
    return next((names for names in kinds if len(set(names)) == len(names)), kinds[-1])


def settings_of(options: BenchOptions, bundles: Sequence[Bundle]) -> list[BenchSetting]:
    """List the settings of each bundle: full, modes by threshold, shallow and drafts."""
    found: list[BenchSetting] = []
    for number, (bundle, label) in enumerate(zip(bundles, labels(bundles), strict=True)):
        calibrated = bundle.manifest.threshold
        thresholds = options.thresholds or ((calibrated,) if calibrated < NEVER_EXIT else ())

        def add(
            mode: str, text: str = "", number: int = number, label: str = label, **given: Any
        ) -> None:
            found.append(BenchSetting(number, f"{label} {mode}{text}".lstrip(), mode, **given))

        add("full")
        for threshold in thresholds:
            for mode in options.modes:
                if mode in ("free", "rollback") or (mode == "lossless" and options.thresholds):
                    add(mode, f", threshold {threshold:.4g}", threshold=threshold)
        if "lossless" in options.modes and not options.thresholds and not options.drafts:
            add("lossless")
        if "shallow" in options.modes:
            add("shallow")
        for source in options.drafts:
            add("lossless", f", drafts: {source}", drafts=source)
    return found


def decode(
    session: Session,
    setting: BenchSetting,
    prompt: Sequence[int],
    count: int,
    emit: Callable[[int], None] = lambda token: None,
) -> Run:
    """Decode a prompt.

    Args:
        session: Session of the setting.
        setting: How to decode.
        prompt: Token ids.
        count: Tokens to generate.
        emit: Called with each token.
    """
    options: dict[str, Any] = {"mode": setting.mode, "ignore_eos": True}
    if setting.threshold is not None:
        options["threshold"] = setting.threshold
    if setting.drafts is not None:
        options["drafts"] = setting.drafts
    tokens: list[int] = []
    times: list[float] = []
    began = perf_counter()
    stream = session.stream(list(prompt), max_new_tokens=count, **options)
    for token in stream:
        tokens.append(token.id)
        times.append(perf_counter() - began)
        emit(token.id)
    seconds = perf_counter() - began
    stats = stream.result.stats
    return Run(
        tuple(tokens),
        tuple(times),
        seconds,
        stats.exit_rate,
        stats.acceptance,
        dict(sorted(stats.sync_sizes.items())),
        stats.overhead_seconds,
        predicted=stats.predicted,
    )


def rows_of(
    runs: Mapping[str, Sequence[Sequence[Run]]],
    precisions: Mapping[str, str],
    reference: Sequence[Sequence[int]] | None,
    versions: Mapping[str, dict[str, str]] | None = None,
) -> list[dict[str, Any]]:
    """Compute a row per setting.

    Speeds are medians over rounds of all prompts together, from prompt to last token. Fields that
    need an explanation:

    - `spread`: Range of the speed over rounds as a share of the median.
    - `ratio`: Speed relative to the first row's in the same round.
    - `decode_per_second`: Speed without prompts and first tokens.
    - `agreement`: Share of tokens that equal the reference at the same place.
    - `first_difference`: Place of the first token that differs, as a median over the prompts with a
      difference. None if all tokens are equal.
    - `passes`: Deep passes per token.
    - `roofline`: Share of the memory bandwidth used, from `token_bytes`. See `add_roofline`.

    Args:
        runs: `runs[name][round][prompt]`.
        precisions: Precision by name.
        reference: Tokens of each prompt to compare with. None skips the comparison.
        versions: Versions of libraries by name.
    """
    rows: list[dict[str, Any]] = []
    base: list[float] = []
    for name, rounds in runs.items():
        speeds = [
            sum(len(run.tokens) for run in turn) / sum(run.seconds for run in turn)
            for turn in rounds
        ]
        decoding = [
            sum(len(run.times) - 1 for run in turn)
            / sum(run.times[-1] - run.times[0] for run in turn)
            for turn in rounds
        ]
        base = base or speeds
        ratios = [speed / first for speed, first in zip(speeds, base, strict=True)]
        done = [run for turn in rounds for run in turn]
        gaps = 1e3 * np.concatenate([np.diff(run.times) for run in done])
        agreement, difference = (
            (None, None) if reference is None else _agreement(rounds[0], reference)
        )
        outside = [1e6 * run.overhead / len(run.tokens) for run in done if run.sync_sizes]
        rows.append(
            {
                "name": name,
                "precision": precisions[name],
                "tokens_per_second": median(speeds),
                "spread": spread(speeds),
                "ratio": median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "decode_per_second": median(decoding),
                "first_token_ms": median(1e3 * run.times[0] for run in done),
                "token_ms": float(np.median(gaps)),
                "token_ms_95": float(np.percentile(gaps, 95)),
                "exit_rate": fmean(run.exit_rate for run in done),
                "acceptance": fmean(run.acceptance for run in done),
                "passes": _passes(done),
                "overhead_us": fmean(outside) if outside else None,
                "agreement": agreement,
                "first_difference": difference,
                "token_bytes": None,
                "roofline": None,
                "peak_bytes": max(
                    (run.peak_bytes for run in done if run.peak_bytes is not None), default=None
                ),
                "versions": (versions or {}).get(name, {}),
            }
        )
    return rows


def _passes(done: Sequence[Run]) -> float:
    """Return the deep passes per decided token. 1 if runs report neither passes nor exits."""
    passes = sum(sum(run.sync_sizes.values()) for run in done)
    if not passes and not any(run.exit_rate for run in done):
        return 1.0
    return passes / sum(len(run.tokens) - run.predicted for run in done)


def _agreement(
    runs: Sequence[Run], reference: Sequence[Sequence[int]]
) -> tuple[float, float | None]:
    same = [np.equal(run.tokens, tokens) for run, tokens in zip(runs, reference, strict=True)]
    places = [int(np.argmin(row)) for row in same if not row.all()]
    return float(np.concatenate(same).mean()), float(median(places)) if places else None


def add_roofline(
    row: dict[str, Any],
    bundle: Bundle,
    mode: str,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    bandwidth: float,
) -> None:
    """Add `token_bytes` and `roofline` to the row of a mode whose deep passes determine them."""
    if mode in ("full", "free"):
        prompt = round(fmean(map(len, prompts)))
        written = tokens / 2
        valid, encoded = (
            (written, prompt) if bundle.manifest.encoder_decoder else (prompt + written, 0.0)
        )
        row["token_bytes"] = token_bytes(bundle, valid, encoded, mode == "free", row["passes"])
        row["roofline"] = row["token_bytes"] * row["decode_per_second"] / bandwidth


def facts_of(
    bundle: Bundle, options: BenchOptions, prompts: int, reference: str | None, busy: float
) -> dict[str, Any]:
    """Return the conditions of a measurement.

    Args:
        bundle: The first bundle.
        options: Options of the benchmark.
        prompts: Number of prompts.
        reference: Name of the row that tokens were compared with.
        busy: Cores that other processes used.
    """
    manifest = bundle.manifest
    made = environment()
    machine = made["machine"]
    return {
        "freeexport": made["versions"]["freeexport"],
        "onnxruntime": made["versions"]["onnxruntime"],
        "made": made["made"],
        "model": manifest.source,
        "family": manifest.family,
        "exit_layer": f"{manifest.exit_layer} of {manifest.layers}",
        "threads": options.count,
        "device": options.device,
        "batch": 1,
        "prompts": prompts,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "decoding": "greedy, ends of sequence ignored",
        "compared_with": reference,
        "cpu": machine["processor"],
        "cpu_features": machine["features"],
        "cores": machine["cores"],
        "memory": machine["memory"],
        "busy": busy,
        "idle": not load_note(busy),
    }


def report(
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    bandwidth: float,
    real: Collection[str],
    failed: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Build the JSON report.

    Args:
        rows: Rows of `rows_of`.
        facts: Conditions, as returned by `facts_of`.
        bandwidth: Memory bandwidth in bytes per second.
        real: Names of the rows that may win.
        failed: Reasons why peers could not run, by name.
    """
    return {
        "schema": SCHEMA,
        "settings": dict(facts),
        "bandwidth": bandwidth,
        "rows": list(rows),
        "failed": dict(failed or {}),
        "verdict": verdict(rows, real),
    }


def verdict(rows: Sequence[Mapping[str, Any]], real: Collection[str]) -> str:
    """Name the fastest of the `real` rows that beats the first row in every round.

    Rows are ranked by their lowest ratio over rounds.
    """
    best = max(
        (row for row in rows[1:] if row["name"] in real), key=itemgetter("ratio_low"), default=None
    )
    if best is None:
        return ""
    if best["ratio_low"] <= 1:
        return f"nothing is faster than {rows[0]['name']} in every round"
    by = f"{best['ratio']:.2f}x ({best['ratio_low']:.2f} to {best['ratio_high']:.2f} by round)"
    same = (
        "" if best["agreement"] is None else f"; {best['agreement']:.0%} of its tokens are the same"
    )
    return f"{best['name']} is the fastest: {by} the speed of {rows[0]['name']}{same}"


def bench_sheet(found: Mapping[str, Any]) -> Sheet:
    """Return the table of a benchmark's report."""

    def differs(row: Mapping[str, Any]) -> str:
        place = row["first_difference"]
        return "" if row["agreement"] is None else "never" if place is None else f"at {place:.0f}"

    def ratio(row: Mapping[str, Any]) -> str:
        shown = row["ratio"]
        return (
            "-"
            if shown is None
            else f"{plus_minus(shown, row.get('ratio_low'), row.get('ratio_high'), 2)}x"
        )

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "setting": lambda row: row["name"],
        "precision": lambda row: row["precision"],
        "tokens/s#": lambda row: f"{row['tokens_per_second']:.1f}",
        "spread#": lambda row: share(row["spread"]),
        "ratio#": ratio,
        "first ms#": lambda row: f"{row['first_token_ms']:.0f}",
        "ms#": lambda row: f"{row['token_ms']:.1f}",
        "95 %#": lambda row: f"{row['token_ms_95']:.1f}",
        "memory#": lambda row: (
            "" if row.get("peak_bytes") is None else human_bytes(row["peak_bytes"])
        ),
        "same#": lambda row: share(row["agreement"]),
        "differs#": differs,
        "exits#": lambda row: share(row["exit_rate"] or None),
        "kept#": lambda row: (
            share(row["acceptance"]) if row["exit_rate"] or row["acceptance"] < 1 else ""
        ),
        "roofline#": lambda row: share(row["roofline"]),
    }
    return sheet(
        "",
        columns,
        found["rows"],
        ("setting", "tokens/s", "spread", "ratio", "first ms", "ms", "95 %", "same"),
    )


def narrow(shown: Sheet) -> Sheet:
    """Drop the least important columns until the table fits a terminal."""
    return shown.within(
        (
            "differs",
            "memory",
            "95 %",
            "first ms",
            "roofline",
            "precision",
            "ms",
            "kept",
            "exits",
            "same",
            "spread",
        )
    )


def facts_lines(found: Mapping[str, Any], shown: Sheet | None = None) -> list[str]:
    """Describe the conditions of a benchmark and the meaning of its columns.

    Args:
        found: Report of the benchmark.
        shown: Table whose columns are explained. Default: the table with all columns.
    """
    used = found["settings"]
    rows = found["rows"]
    whole = bench_sheet(found)
    hidden = set[str]() if shown is None else shown.hides(whole)
    lines = [f"{name}: {text}" for name, text in whole.facts]
    lines += [
        f"{used['model']}, exit after layer {used['exit_layer']}, {used['threads']} threads, "
        f"batch {used['batch']}, {used['prompts']} prompts, {used['tokens']} new tokens each, "
        f"{used['decoding']}, median of {used['rounds']} interleaved rounds",
        f"{used['cpu']}, {used['cores']} cores ({' '.join(used['cpu_features'])}), "
        f"{human_bytes(used['memory'])}; "
        f"{used['threads']} threads read {found['bandwidth'] / 1e9:.1f} GB/s",
    ]
    if used.get("device", "cpu") != "cpu":
        lines.append(f"the bundles ran on {used['device']}")
    if rows:
        lines.append(f"ratio: to {rows[0]['name']}, ± half the range over rounds")
    if used["compared_with"]:
        lines.append(f"same: tokens equal to those of {used['compared_with']} at the same place")
        if "differs" not in hidden:
            lines.append(
                "differs: the place of the first token that is not the same, "
                "the median over prompts"
            )
    versions = {name: used[name] for name in ("freeexport", "onnxruntime") if name in used}
    versions |= {name: version for row in rows for name, version in row["versions"].items()}
    lines.append(", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    if not used["idle"]:
        lines.append(load_note(used.get("busy", 1.0)))
    return lines
