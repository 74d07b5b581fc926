"""Speed of bundles, for `freeexport evaluate` without metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from freeexport.checkpoints.examples import read_examples
from freeexport.costs.bytes import ByteModel
from freeexport.costs.measured import bandwidth_of
from freeexport.evaluate.evaluate import run_of
from freeexport.evaluate.measure import measure
from freeexport.evaluate.plot import speed_bars
from freeexport.evaluate.records import Lines, Records, busiest
from freeexport.evaluate.settings import Entry, EvaluateOptions, entries_of
from freeexport.evaluate.speed_rows import (
    add_roofline,
    row_names,
    speed_facts,
    speed_lines,
    speed_report,
    speed_rows,
    speed_sheet,
)
from freeexport.system.machine import kernel_instructions
from freeexport.system.output import write_whole
from freeexport.system.page import save_figure
from freeexport.system.progress import progress
from freeexport.system.sheet import as_csv, markdown
from runtime.bundle.bundle import Bundle
from runtime.errors import OptionError
from runtime.text.prompt import encode_prompt
from runtime.text.tokenizer import Tokenizer

SPEED_FILES = "results.md, evaluation.json and .csv, speed.png and .svg"
# Lengths of random prompts, for bundles whose tokenizer cannot encode the sample texts.
_LENGTHS = (37, 11, 24, 5)


def measure_speed(options: EvaluateOptions) -> dict[str, Any]:
    """Measure the speed of bundles of one checkpoint, and return the JSON report.

    Raises:
        FreeExportError: If bundles, data and options do not fit together.
    """
    entries = entries_of(options)
    first = entries[0].bundle
    check_comparable([entry.bundle for entry in entries])
    prompts = dict(enumerate(speed_prompts(first, options.data, options.samples), 1))
    records = Records(options.output, run_of(options, entries), options.overwrite)
    with progress("memory bandwidth"):
        bandwidth = bandwidth_of(options.count)
    measure(entries, options, records, lambda session: prompts)
    by_setting = records.by_setting()
    names = row_names(entries)
    found = {name: by_setting[key] for key, name in names.items()}
    reference = next(iter(found))
    precisions = {
        names[entry.name, setting.name]: entry.bundle.manifest.precision
        for entry in entries
        for setting in entry.settings
    }
    rows = speed_rows(found, precisions, reference)
    if options.device == "cpu":
        add_rooflines(rows, entries, found, bandwidth)
    facts = speed_facts(
        first.manifest,
        threads=options.count,
        device=options.device,
        prompts=len(prompts),
        tokens=options.max_new_tokens,
        rounds=options.rounds,
        choice=options.choice,
        reference=reference,
        busy=busiest(found.values()),
    )
    return speed_report(rows, facts, bandwidth, usable_names(entries))


def check_comparable(bundles: list[Bundle]) -> None:
    """Check that bundles are of one checkpoint and read text."""
    for bundle in bundles:
        manifest = bundle.manifest
        if manifest.speech is not None:
            raise OptionError(
                f"{bundle.path} reads speech, which has no sample texts; "
                "give recordings with --data, and score them with --metric"
            )
        if manifest.source_sha256 != bundles[0].manifest.source_sha256:
            raise OptionError(
                f"{bundle.path} is of another checkpoint ({manifest.source}) "
                f"than {bundles[0].path}: their tokens cannot be compared; measure each alone"
            )


def speed_prompts(bundle: Bundle, data: Path | None, limit: int) -> list[list[int]]:
    """Return the token ids of the first prompts of a JSONL file, or of the built-in sample texts.

    Args:
        data: JSONL file. Default: the sample texts, or random tokens if they cannot be encoded.
        limit: Most prompts.
    """
    manifest = bundle.manifest
    tokenizer = Tokenizer.load(bundle.path, manifest.files)
    longest = manifest.encoder_capacity or manifest.capacity // 2
    if data is not None:
        return [
            encode_prompt(one.text, tokenizer, manifest.vocab_size, longest).tolist()
            for one in read_examples(data, limit)
        ]
    texts = files("freeexport").joinpath("data/verify.txt").read_text(encoding="utf-8").splitlines()
    prompts = [] if tokenizer is None else [tokenizer.encode(text) for text in texts]
    if not prompts or max(map(max, prompts)) >= manifest.vocab_size:
        draw = np.random.default_rng(0)
        prompts = [draw.integers(0, manifest.vocab_size, size).tolist() for size in _LENGTHS]
    return [ids[:longest] for ids in prompts][:limit]


def usable_names(entries: list[Entry]) -> list[str]:
    """Return the names of the rows that users would choose, unlike the shallow decoder alone."""
    names = row_names(entries)
    return [
        names[entry.name, setting.name]
        for entry in entries
        for setting in entry.settings
        if setting.method != "static"
    ]


def add_rooflines(
    rows: Sequence[dict[str, Any]],
    entries: list[Entry],
    found: Mapping[str, Lines],
    bandwidth: float,
) -> None:
    """Add to the rows of bundles the share of the memory bandwidth that their decoding uses."""
    by_name = {row["name"]: row for row in rows}
    names = row_names(entries)
    for entry in entries:
        model = ByteModel(entry.bundle, kernel_instructions())
        for setting in entry.settings:
            name = names[entry.name, setting.name]
            add_roofline(by_name[name], model, found[name], bandwidth)


def write_speed(report: Mapping[str, Any], out: Path) -> None:
    """Write JSON, CSV, Markdown and figures to a directory. Requires matplotlib."""
    facts = "\n".join(f"- {text}" for text in speed_lines(report) if text)
    table = markdown(speed_sheet(report))
    verdict = f"**{report['verdict']}.**\n\n" if report["verdict"] else ""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "evaluation.json", json.dumps(report, indent=2) + "\n")
    write_whole(out / "evaluation.csv", as_csv(report["rows"]))
    write_whole(out / "results.md", f"{verdict}{table}\n\n{facts}\n")
    used = report["settings"]
    title = f"{used['model']}, {used['threads']} threads, batch {used['batch']}, {used['cpu']}"
    figure = speed_bars(title, report["rows"])
    for name in ("speed.png", "speed.svg"):
        save_figure(figure, out / name)
