"""Bundles, settings and records of an evaluation. An interrupted run continues from its records."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from freeexport.costs.bytes import Calls
from freeexport.system.jsonl import append_lines, whole_lines
from freeexport.system.output import write_whole
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Manifest
from runtime.errors import OptionError

Method = Literal["full", "static", "free", "adaptive", "rollback", "lookup", "lossless"]
METHODS: tuple[Method, ...] = get_args(Method)
THRESHOLDS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
# Methods that run neither the shallow head nor the exit's own layers.
WITHOUT_EXIT: tuple[Method, ...] = ("full", "lookup")
RUN = "run.json"
OUTPUTS = "outputs.jsonl"


@dataclass(frozen=True)
class Setting:
    """One way to decode.

    Attributes:
        method: Method of decoding: a `Method`, or another decoder's whose records are compared.
        threshold: Threshold of free. Other methods choose their own.
        calibrated: The threshold is the bundle's calibrated one.
    """

    method: str
    threshold: float | None = None
    calibrated: bool = False

    @property
    def name(self) -> str:
        at = "" if self.threshold is None else f" {self.threshold:.4g}"
        return f"{self.method}{at}{', calibrated' if self.calibrated else ''}"


def settings_of(
    methods: Sequence[Method], thresholds: Sequence[float], manifest: Manifest
) -> list[Setting]:
    """List the settings of a bundle, full first.

    Free gets a setting per threshold, and one for the calibrated threshold.
    """
    found: list[Setting] = []
    for method in sorted(set(methods), key=METHODS.index):
        if method != "free":
            found.append(Setting(method))
            continue
        grid = {value: Setting(method, value) for value in thresholds}
        if manifest.threshold < NEVER_EXIT:
            grid[manifest.threshold] = Setting(method, manifest.threshold, calibrated=True)
        found.extend(grid[value] for value in sorted(grid))
    return found


def bundle_and_methods(text: str, methods: Sequence[Method]) -> tuple[Path, tuple[Method, ...]]:
    """Parse an argument `BUNDLE` or `BUNDLE=METHOD,METHOD`.

    Args:
        text: The argument.
        methods: Methods of a bundle that lists none.

    Returns:
        The path of the bundle and its methods.
    """
    path, equals, listed = text.rpartition("=")
    if equals and listed and set(listed.split(",")) <= set(METHODS):
        return Path(path), methods_of(listed)
    return Path(text), tuple(methods)


def methods_of(text: str) -> tuple[Method, ...]:
    """Parse comma-separated methods.

    Raises:
        OptionError: If a name is unknown.
    """
    known: dict[str, Method] = {name: name for name in METHODS}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise OptionError(f"--methods {name!r} is no method; choose from {', '.join(METHODS)}")
    return tuple(known[name] for name in names)


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of an evaluation.

    Attributes:
        bundles: Paths of bundles, each with its methods. The first must include full.
        data: JSONL file of prompts.
        output: Directory of results. A later run continues from its records.
        metrics: Names of metrics. Curves and verdicts use the first.
        thresholds: Thresholds of free.
        samples: Number of lines to read from the data.
        rounds: Repetitions of all requests. Times are medians over rounds.
        max_new_tokens: Most tokens to generate per line.
        threads: Threads per engine call. Default: all usable cores.
        quality: Share of the full model's quality that a winner must keep, in (0, 1].
        overwrite: Replace the results of another run.

    Raises:
        OptionError: If values are out of range or do not fit together.
    """

    bundles: tuple[tuple[Path, tuple[Method, ...]], ...]
    data: Path
    output: Path
    metrics: tuple[str, ...]
    thresholds: tuple[float, ...] = THRESHOLDS
    samples: int = 500
    rounds: int = 1
    max_new_tokens: int = 128
    threads: int | None = None
    quality: float = 0.99
    overwrite: bool = False

    def __post_init__(self) -> None:
        for value in self.thresholds:
            if not 0 <= value < NEVER_EXIT:
                raise OptionError(
                    f"--threshold {value:g} is out of range; choose one from 0 to below 1"
                )
        if not 0 < self.quality <= 1:
            raise OptionError(
                f"target quality is {self.quality!r}; choose a share above 0, up to 1"
            )
        if not self.bundles or "full" not in self.bundles[0][1]:
            raise OptionError(
                "the first bundle has no method full, which others are compared with; "
                "add it to --methods"
            )
        paths = [path.resolve() for path, _ in self.bundles]
        if len(set(paths)) < len(paths):
            raise OptionError(
                f"{max(paths, key=paths.count)} is named twice; name it once, with all its methods"
            )


@dataclass(frozen=True)
class Entry:
    """A bundle of an evaluation.

    Attributes:
        name: Name in tables.
        bundle: The bundle.
        settings: Settings to evaluate.
    """

    name: str
    bundle: Bundle
    settings: tuple[Setting, ...]

    @property
    def methods(self) -> list[str]:
        """Methods of the settings, in order."""
        return list(dict.fromkeys(setting.method for setting in self.settings))


def entries_of(options: EvaluateOptions) -> list[Entry]:
    """Open the bundles. Names are directory names, or whole paths if those are not distinct."""
    short = [path.resolve().name for path, _ in options.bundles]
    names = short if len(set(short)) == len(short) else [str(path) for path, _ in options.bundles]
    entries = []
    for name, (path, methods) in zip(names, options.bundles, strict=True):
        bundle = Bundle.open(path)
        settings = settings_of(methods, options.thresholds, bundle.manifest)
        entries.append(Entry(name, bundle, tuple(settings)))
    return entries


# Key of a record: bundle, setting, line of the data and round.
Key = tuple[str, str, int, int]


@dataclass(frozen=True)
class Record:
    """A decoded line. Text, tokens and calls are recorded in round 0 only.

    Attributes:
        bundle: Name of the bundle.
        setting: Name of the setting.
        line: Line of the data, from 1.
        round: Round, from 0.
        seconds: Seconds from the prompt to the last token.
        decode_seconds: Seconds after the first token.
        tokens: Number of generated tokens.
        busy: Cores that other processes used.
        text: Generated text.
        token_ids: Generated tokens.
        exited: One flag per token: did it exit?
        finish_reason: Reason for the end of the output.
        threshold: Threshold of an adaptive session before this request.
        layers: Total layers of all tokens that could exit. Default: computed from `exited`.
        adaptive_state: State of an adaptive session after this request.
        first_seconds: Seconds to the first token.
        calls: Engine calls. None if unknown.
    """

    bundle: str
    setting: str
    line: int
    round: int
    seconds: float
    decode_seconds: float
    tokens: int
    busy: float
    text: str = ""
    token_ids: tuple[int, ...] = ()
    exited: tuple[bool, ...] = ()
    finish_reason: str = ""
    threshold: float | None = None
    layers: int | None = None
    adaptive_state: Mapping[str, Any] | None = None
    first_seconds: float = 0.0
    calls: Calls | None = None

    @property
    def key(self) -> Key:
        return self.bundle, self.setting, self.line, self.round


class Records:
    """Records in a directory of results. Nothing is written or replaced before the first record.

    Args:
        output: The directory.
        run: Description of the run. Must equal that of the directory's file RUN.
        overwrite: Replace the records of another run.

    Raises:
        OptionError: If the directory holds another run and `overwrite` is False, or other files.
    """

    def __init__(self, output: Path, run: Mapping[str, Any], overwrite: bool = False) -> None:
        self._path = output / OUTPUTS
        self._run = run
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            if not (output / RUN).is_file():
                raise OptionError(
                    f"{output} exists and is not what evaluate writes (no {RUN}); "
                    "choose another --output"
                )
            try:
                before = json.loads((output / RUN).read_text(encoding="utf-8"))
            except ValueError:
                before = None
            before = before if isinstance(before, dict) else {}
            same = json.loads(json.dumps(run))
            names = sorted(name for name in {*before, *run} if before.get(name) != same.get(name))
            if names and not overwrite:
                raise OptionError(
                    f"{output} holds another run, with other {', '.join(names)}; "
                    "name another --output, or replace it with --overwrite"
                )
        self._begins = overwrite or not (output / RUN).exists()
        self._found = (
            {} if self._begins else {record.key: record for record in read_records(self._path)}
        )

    def has(self, keys: Iterable[Key]) -> bool:
        """Return True if all keys have a record."""
        return all(key in self._found for key in keys)

    def add(self, records: Sequence[Record]) -> None:
        """Append records to the file. The first call creates or replaces it."""
        if self._begins:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
            write_whole(
                self._path.with_name(RUN), json.dumps(self._run, indent=2, sort_keys=True) + "\n"
            )
            self._begins = False
        filled = (
            {name: value for name, value in asdict(one).items() if value not in (None, "", ())}
            for one in records
        )
        append_lines(self._path, filled)
        self._found.update({record.key: record for record in records})

    def last_state(self, bundle: str, setting: str) -> Mapping[str, Any] | None:
        """Return the state of an adaptive session in its last record. None without one."""
        states = [
            one.adaptive_state
            for one in self._found.values()
            if (one.bundle, one.setting) == (bundle, setting)
        ]
        return states[-1] if states else None

    def by_setting(self) -> dict[tuple[str, str], dict[int, list[Record]]]:
        """Group records by bundle and setting, then by line, with rounds in order."""
        found: dict[tuple[str, str], dict[int, list[Record]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for record in sorted(self._found.values(), key=lambda one: (one.line, one.round)):
            found[record.bundle, record.setting][record.line].append(record)
        return found


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file.

    Truncates a partial last line, which a killed run leaves behind.

    Raises:
        OptionError: If a line is not a record.
    """
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            found = json.loads(line)
            for name in ("token_ids", "exited"):
                found[name] = tuple(found.get(name, ()))
            if found.get("calls") is not None:
                found["calls"] = Calls.read(found["calls"])
            yield Record(**found)
        except (ValueError, TypeError, AttributeError, KeyError):
            raise OptionError(
                f"{path} line {number} is not what evaluate writes; remove it, or use --overwrite"
            ) from None
