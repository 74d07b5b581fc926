"""How many sequences a calibration needs: thresholds from random subsets of the set, and what they do on other texts.

    python -m tools.quality.calibration_size BUNDLE calibration.jsonl test.jsonl --metric per \\
        --plot docs/calibration_size.png

The calibration set is decoded once. Each subset's threshold is then applied to the test set, decoded in mode free: how
many tokens exit, and how much of the full model's metric is kept. Nothing is timed, so the machine need not be idle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np

from freeexport.calibration.calibrate import check_enough, collect
from freeexport.calibration.choose import choose
from freeexport.calibration.metrics import Metric
from freeexport.calibration.open_source import open_source
from freeexport.calibration.options import CalibrateOptions
from freeexport.checkpoints.examples import read_examples
from freeexport.system.output_file import check_writable, write_whole
from freeexport.system.page import print_page, table
from freeexport.system.plot import save_figure
from freeexport.traces.simulate import replay
from freeexport.traces.trace import Traces
from runtime.bundle.beta_mixture import NEVER_EXIT
from runtime.errors import CalibrationError
from tools.data.splits import run

SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)
# A threshold's fourth digit changes no exit rate that can be seen, and texts are decoded once for each threshold.
DIGITS = 3
COLUMNS = ("share", "sequences#", "tokens#", "threshold#", "tokens that exit#", "exits that agree#", "quality kept#",
           "worst#", "refused#")  # fmt: skip


@dataclass(frozen=True)
class Subset:
    """A part of the calibration set, and what its threshold does on the test set; None where it was too small for the
    method. `quality`: of the metric, as a share of the full model's."""

    share: float
    sequences: int
    tokens: int
    threshold: float | None = None
    exit_rate: float | None = None
    agreement: float | None = None
    quality: float | None = None


def measure(
    bundle: Path,
    calibration: Path,
    test: Path,
    options: CalibrateOptions,
    metric: Metric,
    test_samples: int,
    repeats: int,
    cache_to: Path,
    threads: int | None = None,
) -> list[Subset]:
    """Subsets of each of SHARES, `repeats` of each but of the whole. Traces are kept in the directory `cache_to`."""
    with open_source(str(bundle), options, threads) as source:
        most = options.max_new_tokens
        files = [cache_to / f"{bundle.name}.{path.stem}.traces.jsonl" for path in (calibration, test)]
        known = collect(source, calibration, read_examples(calibration, options.samples), files[0], most)
        requests = read_examples(test, test_samples)
        unseen = collect(source, test, requests, files[1], most)
        outputs = source.outputs(requests, most)
        pending = source.facts.max_pending

        @cache
        def kept(threshold: float) -> float:
            return outputs.kept(metric, threshold) if threshold < NEVER_EXIT else 1.0

        return [_judged(one, share, options, unseen, pending, kept) for share, one in subsets(known, repeats)]


def subsets(traces: Traces, repeats: int) -> list[tuple[float, Traces]]:
    """Sequences drawn without replacement, the same at each call."""
    count, random = len(traces.sequences), np.random.default_rng(0)
    found = []
    for share in SHARES:
        for _ in range(repeats if share < 1 else 1):
            drawn = random.permutation(count)[: max(1, round(share * count))]
            found.append((share, Traces.of([traces.sequences[place] for place in drawn])))
    return found


def _judged(
    subset: Traces,
    share: float,
    options: CalibrateOptions,
    unseen: Traces,
    max_pending: int,
    kept: Callable[[float], float],
) -> Subset:
    sizes = share, len(subset.sequences), subset.tokens
    try:
        check_enough(subset, options)
        threshold = round(choose(subset, options, None).threshold, DIGITS)
    except CalibrationError:
        return Subset(*sizes)
    done = replay(unseen, threshold, max_pending)
    return Subset(*sizes, threshold, done.exit_rate, done.agreement, kept(threshold))


def rows(found: Sequence[Subset]) -> list[tuple[str, ...]]:
    """A row a share: medians, and in brackets the least and the most."""
    lines = []
    for share in SHARES:
        alike = [one for one in found if one.share == share]
        good = [one for one in alike if one.threshold is not None]
        quality = [one.quality for one in good if one.quality is not None]
        lines.append(
            (
                f"{share:.0%}",
                str(alike[0].sequences),
                f"{np.median([one.tokens for one in alike]):.0f}",
                _range([one.threshold for one in good], ".3f"),
                _range([one.exit_rate for one in good], ".1%"),
                _range([one.agreement for one in good], ".2%"),
                "" if not quality else f"{np.median(quality):.2%}",
                "" if not quality else f"{min(quality):.2%}",
                f"{len(alike) - len(good)} of {len(alike)}",
            )
        )
    return lines


def _range(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    middle = f"{np.median(known):{form}}"
    return middle if len(known) == 1 else f"{middle} ({min(known):{form}} to {max(known):{form}})"


def plot(found: Sequence[Subset], path: Path, title: str) -> None:
    """Thresholds, exits and quality against the number of sequences. Replaces `path`, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {"threshold": "threshold", "exit_rate": "tokens that exit", "quality": "quality kept of the full model's"}
    for axes, (name, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        good = [one for one in found if one.threshold is not None]
        counts = sorted({one.sequences for one in good})
        values = [[getattr(one, name) for one in good if one.sequences == count] for count in counts]
        axes.scatter([one.sequences for one in good], [getattr(one, name) for one in good], s=10, alpha=0.4)
        axes.plot(counts, [float(np.median(several)) for several in values], color="tab:blue")
        axes.set(xscale="log", xlabel="sequences calibrated on", ylabel=label)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
    figure.suptitle(title, fontsize="medium")
    save_figure(figure, path)


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("calibration", type=click.Path(path_type=Path))
@click.argument("test", type=click.Path(path_type=Path))
@click.option("--samples", type=click.IntRange(2), default=1000, show_default=True, help="Lines of the whole set.")
@click.option("--test-samples", type=click.IntRange(1), default=200, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True, help="Subsets of each size.")
@click.option("--method", type=click.Choice(["bmm", "risk"]), default="bmm", show_default=True)
@click.option("--target", type=float, default=CalibrateOptions.target, show_default=True)
@click.option("--risk", type=float, default=CalibrateOptions.risk, show_default=True)
@click.option("--metric", type=click.Choice(get_args(Metric)), default="exact", show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(2), default=CalibrateOptions.max_new_tokens, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="[default: one per physical core]")
@click.option("--traces", type=click.Path(path_type=Path, file_okay=False), default=".", help="Where traces are kept.")
@click.option("--save", type=click.Path(path_type=Path), help="Every subset, as JSON.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="A picture, as PNG.")
def command(
    bundle: Path,
    calibration: Path,
    test: Path,
    test_samples: int,
    repeats: int,
    metric: Metric,
    threads: int | None,
    traces: Path,
    save: Path | None,
    picture: Path | None,
    **options: Any,
) -> None:
    check_writable(save, "--save")
    check_writable(picture, "--plot")
    # The metric judges thresholds; the methods choose them by tokens.
    given = CalibrateOptions(**options)
    found = measure(bundle, calibration, test, given, metric, test_samples, repeats, traces, threads)
    if save is not None:
        write_whole(save, json.dumps([asdict(one) for one in found], indent=2) + "\n")
    wanted = f"P(agree | confidence) of {given.target:g}" if given.method == "bmm" else f"a risk of {given.risk:g}"
    title = f"thresholds for {wanted}, from parts of {given.samples} sequences; {metric} on {test_samples} others"
    if picture is not None:
        plot(found, picture, title)
    print_page([table(title, COLUMNS, rows(found))])


if __name__ == "__main__":
    run(command)
