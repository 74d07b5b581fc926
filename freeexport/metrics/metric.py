"""A metric: statistics of each sequence, which add up, and the value of their sum. So every subset of sequences, and
every resample of a bootstrap, has its value without scoring a text again."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from freeexport.metrics.reference import Reference
from runtime.errors import FreeExportError, OptionError

Statistics = Callable[[str, Reference], Sequence[float]]
Value = Callable[[np.ndarray], float]

NAMES = (
    *("exact", "rouge-1", "rouge-2", "rouge-l", "rouge-lsum", "bleu", "chrf", "wer", "per", "word-acc"),
    *("squad-em", "squad-f1", "case-f1", "punct-f1"),
)


class MetricError(FreeExportError):
    """A metric does not fit the data."""


@dataclass(frozen=True)
class Metric:
    """`statistics`: of an output against its reference, k numbers; `value`: of their sum [k] over sequences, in [0, 1],
    1 is best; `single`: of one sequence, where that differs. `needs`: the place in the statistics that is 0 for all
    sequences where the metric does not fit, and why. `signature`: how it was computed."""

    name: str
    statistics: Statistics
    value: Value
    single: Value | None = None
    needs: tuple[int, str] | None = None
    signature: str = ""

    @property
    def label(self) -> str:
        """For a table: an error rate's says that 1 is best."""
        return f"1 - {self.name.upper()}" if self.name in ("wer", "per") else self.name

    def table(self, outputs: Sequence[str], references: Sequence[Reference]) -> np.ndarray:
        """Statistics float64 [n, k]. Raises MetricError where the metric does not fit the references."""
        rows = [self.statistics(text, reference) for text, reference in zip(outputs, references, strict=True)]
        found = np.array(rows, np.float64)
        if self.needs is not None and not found[:, self.needs[0]].any():
            raise MetricError(f"metric {self.name} does not fit these data: {self.needs[1]}; choose another --metric")
        return found

    def of(self, table: np.ndarray) -> float:
        """The value of all sequences of a table [n, k]."""
        return bounded(self.value(table.sum(axis=0)))


def bounded(value: float) -> float:
    return min(1.0, max(0.0, value))


def mean(sums: np.ndarray) -> float:
    """Of statistics (score, 1)."""
    return float(sums[0] / sums[1])


def less_errors(sums: np.ndarray) -> float:
    """1 less the rate of errors, of statistics (errors, units of the reference)."""
    return 1 - float(sums[0] / sums[1]) if sums[1] else float(sums[0] == 0)


def f1(sums: np.ndarray) -> float:
    """Of statistics (right ones, those of the output, those of the reference)."""
    both = float(sums[1] + sums[2])
    return 2 * float(sums[0]) / both if both else 1.0


def metric_of(name: str) -> Metric:
    """A metric by its name (NAMES), or `module:function`. Raises OptionError for names that are neither, and what
    importing its library raises: they are those of the extra `metrics`."""
    check_name(name)
    if ":" in name:
        return _called(name)
    if name in ("per", "word-acc", "case-f1", "punct-f1"):
        module = "phonemes" if name in ("per", "word-acc") else "restoration"
    else:
        module = "texts"
    found: Metric = importlib.import_module(f"freeexport.metrics.{module}").metric(name)
    return found


def check_name(name: str) -> None:
    """Raises OptionError for what cannot be a metric."""
    module, colon, function = name.partition(":")
    if name in NAMES or (colon and function.isidentifier() and all(map(str.isidentifier, module.split(".")))):
        return
    raise OptionError(f"{name!r} is no metric; choose from {', '.join(NAMES)}, or name a function as module:function")


def _called(name: str) -> Metric:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"--metric {name}: {error}; name a function that Python can import") from None

    def statistics(output: str, reference: Reference) -> Sequence[float]:
        try:
            score = float(max(function(output, text) for text in reference.texts))
        except Exception as error:
            raise MetricError(
                f"metric {name} failed with {type(error).__name__}: {error}; repair the function"
            ) from error
        if not (math.isfinite(score) and 0 <= score <= 1):
            raise MetricError(f"metric {name} gave {score}; it must return a number from 0 to 1")
        return score, 1

    return Metric(name, statistics, mean)


def scores(name: str, outputs: Sequence[str], references: Sequence[Reference]) -> np.ndarray:
    """Of each sequence alone: bool [n] for "exact", float64 [n] for the others. The same text scores 1, also where the
    metric is not made for it, and an empty one against text 0."""
    metric = metric_of(name)
    value = metric.single or metric.value

    def score(output: str, reference: Reference) -> float:
        if any(output.strip() == text.strip() for text in reference.texts):
            return 1.0
        if not output.strip() or not any(text.strip() for text in reference.texts):
            return 0.0
        return bounded(value(np.array(metric.statistics(output, reference), np.float64)))

    found = [score(*pair) for pair in zip(outputs, references, strict=True)]
    return np.array(found, np.bool_ if name == "exact" else np.float64)
