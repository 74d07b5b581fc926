"""Bundles, settings and options of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import Bundle
from runtime.bundle.hub import bundle_name
from runtime.bundle.manifest import Manifest
from runtime.errors import OptionError, shown
from runtime.machine.device import Device
from runtime.machine.machine import usable_cores
from runtime.options.generation_options import Drafts, GenerationOptions, Mode
from runtime.requests.load_engines import check_bundles

Method = Literal[
    "full",
    "static",
    "published",
    "free",
    "adaptive",
    "rollback",
    "lookup",
    "phrases",
    "exit-drafts",
    "lossless",
]
METHODS: tuple[Method, ...] = get_args(Method)
THRESHOLDS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
# Methods that run neither the shallow head nor the exit's own layers.
WITHOUT_EXIT: tuple[Method, ...] = ("full", "lookup", "phrases")
# Modes and sources of drafts of methods that are not named as their mode.
_MODES: dict[str, Mode] = {
    "static": "shallow",
    "published": "free",
    "adaptive": "free",
    "lookup": "lossless",
    "phrases": "lossless",
    "exit-drafts": "lossless",
}
# Mode "free" with drafts from the exit alone is FREE as published.
_DRAFTS: dict[str, Drafts] = {
    "published": "exit",
    "adaptive": "exit",
    "lookup": "lookup",
    "phrases": "phrases",
    "exit-drafts": "exit",
}
# Methods that are measured at several thresholds.
_WITH_THRESHOLD = ("published", "free")
# Options that have other defaults if speed alone is measured, where outputs are not scored.
SPEED_DEFAULTS: dict[str, Any] = {"samples": 4, "rounds": 5, "max_new_tokens": 64, "thresholds": ()}


@dataclass(frozen=True)
class Setting:
    """One way to decode.

    Attributes:
        method: Method of decoding: a `Method`, or another decoder's whose records are compared.
        threshold: Threshold of free and published. Other methods choose their own.
        calibrated: The threshold is the bundle's calibrated one.
    """

    method: str
    threshold: float | None = None
    calibrated: bool = False

    @property
    def name(self) -> str:
        at = "" if self.threshold is None else f" {self.threshold:.4g}"
        return f"{self.method}{at}{', calibrated' if self.calibrated else ''}"

    @property
    def options(self) -> dict[str, Any]:
        """Options of a request. An adaptive session chooses the threshold itself."""
        found: dict[str, Any] = {"mode": _MODES.get(self.method, self.method)}
        if self.method in _DRAFTS:
            found["drafts"] = _DRAFTS[self.method]
        if self.method != "adaptive":
            found["threshold"] = self.threshold
        return found


def settings_of(
    methods: Sequence[Method], thresholds: Sequence[float], manifest: Manifest
) -> list[Setting]:
    """List the settings of a bundle, full first.

    Free and published get a setting per threshold, and one for the calibrated threshold.
    """
    found: list[Setting] = []
    for method in sorted(set(methods), key=METHODS.index):
        if method not in _WITH_THRESHOLD:
            found.append(Setting(method))
            continue
        grid = {value: Setting(method, value) for value in thresholds}
        if manifest.threshold < NEVER_EXIT:
            grid[manifest.threshold] = Setting(method, manifest.threshold, calibrated=True)
        found.extend(grid[value] for value in sorted(grid))
    return found


def bundle_and_methods(text: str, methods: Sequence[Method]) -> tuple[Path, tuple[Method, ...]]:
    """Parse `BUNDLE=METHOD,METHOD`, or a `BUNDLE` with the default `methods`."""
    path, equals, listed = text.rpartition("=")
    if equals and listed and set(listed.split(",")) <= set(METHODS):
        return Path(path), methods_of(listed)
    return Path(text), tuple(methods)


def methods_of(text: str) -> tuple[Method, ...]:
    """Parse comma-separated methods."""
    known: dict[str, Method] = {name: name for name in METHODS}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise OptionError(
                f"--methods {shown(name)} is no method; choose from {', '.join(METHODS)}"
            )
    return tuple(known[name] for name in names)


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `freeexport evaluate`, which freeexport/commands/evaluate.py describes.

    Without `metrics`, speed alone is measured. `bundles` are paths with their methods, of which the
    first must include full.

    Raises:
        OptionError: If values are out of range or do not fit together.
    """

    bundles: tuple[tuple[Path, tuple[Method, ...]], ...]
    data: Path | None = None
    output: Path | None = None
    metrics: tuple[str, ...] = ()
    thresholds: tuple[float, ...] = THRESHOLDS
    samples: int = 500
    rounds: int = 1
    max_new_tokens: int = 128
    threads: int | None = None
    device: str = "cpu"
    quality: float = 0.99
    temperature: float = 0.0
    overwrite: bool = False

    def __post_init__(self) -> None:
        Device.parse(self.device)
        GenerationOptions(temperature=self.temperature)
        if self.metrics and (self.data is None or self.output is None):
            raise OptionError(
                "--metric scores outputs of a data file; give --data FILE and --output DIRECTORY, "
                "or leave --metric out to measure speed only"
            )
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

    @property
    def count(self) -> int:
        """Threads per engine call."""
        return self.threads or usable_cores()

    @property
    def choice(self) -> str:
        """How tokens are chosen, for tables."""
        if not self.temperature:
            return "greedy"
        return f"sampled at temperature {self.temperature:g}, each line with its number as seed"


@dataclass(frozen=True)
class Entry:
    """A bundle of an evaluation.

    Attributes:
        name: Name in tables.
    """

    name: str
    bundle: Bundle
    settings: tuple[Setting, ...]

    @property
    def methods(self) -> list[str]:
        """Methods of the settings, in order."""
        return list(dict.fromkeys(setting.method for setting in self.settings))


def entries_of(options: EvaluateOptions) -> list[Entry]:
    """Open the bundles. Names are directory names, or whole paths if those are not distinct.

    Raises:
        BundleError: If a bundle cannot be opened.
        EngineError: If a bundle cannot run on the device.
        DeviceError: If there is no such device.
        CapacityError: If the device has too little memory for all bundles.
    """
    short = [bundle_name(path) for path, _ in options.bundles]
    names = short if len(set(short)) == len(short) else [str(path) for path, _ in options.bundles]
    entries = []
    for name, (path, methods) in zip(names, options.bundles, strict=True):
        bundle = Bundle.open(path)
        settings = settings_of(methods, options.thresholds, bundle.manifest)
        entries.append(Entry(name, bundle, tuple(settings)))
    check_bundles([entry.bundle for entry in entries], Device.parse(options.device))
    return entries
