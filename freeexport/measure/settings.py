"""Settings of an evaluation: bundles, each with its methods of decoding and their thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from freeexport.metrics import check_name
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Manifest
from runtime.errors import OptionError

Method = Literal["full", "static", "calm", "calm-decay", "calm-single", "free", "adaptive", "rollback", "lossless"]
METHODS: tuple[Method, ...] = get_args(Method)
# CALM after any layer from --calm-from on, with a threshold that falls along a sequence, and after the bundle's exit
# layer alone: that differs from free by its copied states only.
CALM: tuple[Method, ...] = ("calm", "calm-decay", "calm-single")
THRESHOLDS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


@dataclass(frozen=True)
class Setting:
    """One way to decode. `threshold`: of free and CALM; the others decide it themselves."""

    method: Method
    threshold: float | None = None
    calibrated: bool = False

    @property
    def name(self) -> str:
        at = "" if self.threshold is None else f" {self.threshold:.4g}"
        return f"{self.method}{at}{', calibrated' if self.calibrated else ''}"

    @property
    def request(self) -> dict[str, Any]:
        """The options of a request, in a session whose own threshold is adaptive where that method is measured."""
        if self.method == "adaptive":
            return {"mode": "free"}
        return {"mode": "shallow" if self.method == "static" else self.method, "threshold": self.threshold}


def settings_of(methods: Sequence[Method], thresholds: Sequence[float], manifest: Manifest) -> list[Setting]:
    """List a bundle's settings, full first: free and CALM at each threshold, free also at the calibrated one."""
    found: list[Setting] = []
    for method in sorted(set(methods), key=METHODS.index):
        if method not in ("free", *CALM):
            found.append(Setting(method))
            continue
        grid = {value: Setting(method, value) for value in thresholds}
        if method == "free" and manifest.threshold < NEVER_EXIT:
            grid[manifest.threshold] = Setting(method, manifest.threshold, calibrated=True)
        found.extend(grid[value] for value in sorted(grid))
    return found


def bundle_and_methods(text: str, methods: Sequence[Method]) -> tuple[Path, tuple[Method, ...]]:
    """Read an argument `BUNDLE`, or `BUNDLE=METHOD,METHOD`, whose methods then stand in place of `methods`."""
    path, equals, listed = text.rpartition("=")
    if equals and listed and set(listed.split(",")) <= set(METHODS):
        return Path(path), methods_of(listed)
    return Path(text), tuple(methods)


def methods_of(text: str) -> tuple[Method, ...]:
    """Read names with commas between. Raises OptionError for one that is no method."""
    names = [name.strip() for name in text.split(",")]
    known: dict[str, Method] = {name: name for name in METHODS}
    for name in names:
        if name not in known:
            raise OptionError(f"--methods {name!r} is no method; choose from {', '.join(METHODS)}")
    return tuple(known[name] for name in names)


@dataclass(frozen=True)
class EvaluateOptions:
    """`bundles`: each with its methods. `metrics`: the first is that of curves. `rounds`: how often everything is
    decoded; the median of a line counts. `quality`: the share of the full model's that a winner must keep. `output`:
    the directory of results, which another run goes on with. `calm_model`: the checkpoint of the bundle that has
    methods of CALM, which may exit from layer `calm_from` on."""

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
    calm_model: str | None = None
    calm_from: int = 1

    def __post_init__(self) -> None:
        for name in self.metrics:
            check_name(name)
        for value in self.thresholds:
            if not 0 <= value < NEVER_EXIT:
                raise OptionError(f"--threshold {value:g} is out of range; choose one from 0 to below 1")
        for name in ("samples", "rounds", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)!r}; choose 1 or more")
        if not 0 < self.quality <= 1:
            raise OptionError(f"target quality is {self.quality!r}; choose a share above 0, up to 1")
        if not self.bundles or "full" not in self.bundles[0][1]:
            raise OptionError(
                "the first bundle has no method full, which others are compared with; add it to --methods"
            )
        calm = [path for path, methods in self.bundles if set(CALM) & set(methods)]
        if bool(calm) != (self.calm_model is not None):
            raise OptionError(
                "method calm needs --calm-model, the checkpoint of its bundle, and the option needs the method"
            )
        if len(calm) > 1:
            raise OptionError(
                f"method calm is for one bundle, not {len(calm)}; give each its methods as BUNDLE=METHODS"
            )
        paths = [path.resolve() for path, _ in self.bundles]
        if len(set(paths)) < len(paths):
            raise OptionError(f"{max(paths, key=paths.count)} is named twice; name it once, with all its methods")


@dataclass(frozen=True)
class Entry:
    """A bundle, its name in tables, and its settings."""

    name: str
    bundle: Bundle
    settings: tuple[Setting, ...]

    @property
    def methods(self) -> list[Method]:
        return list(dict.fromkeys(setting.method for setting in self.settings))


def entries_of(options: EvaluateOptions) -> list[Entry]:
    """Open the bundles, named by the last part of their paths, or by all of it where that is not enough."""
    opened = [(path, Bundle.open(path), methods) for path, methods in options.bundles]
    short = [path.resolve().name for path, _, _ in opened]
    names = short if len(set(short)) == len(short) else [str(path) for path, _, _ in opened]
    return [
        Entry(name, bundle, tuple(settings_of(methods, options.thresholds, bundle.manifest)))
        for name, (_, bundle, methods) in zip(names, opened, strict=True)
    ]
