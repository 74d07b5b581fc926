"""Trainings, bundles and measurements of the comparison, by its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from freeexport.evaluate.settings import Setting, settings_of
from runtime.bundle.manifest import Manifest
from tools.paper.compare_options import CompareOptions, PaperRow
from tools.paper.eager import EARLY

# Methods with a setting for each fixed threshold. FREE has another for the calibrated one.
FIXED = ("published", "eager-free", "calm", "calm-single", "rollback")
# Methods of FREE, whose bundles are calibrated.
CALIBRATED = ("published", "rollback")
# Rows of the main measurement, with their recipe and methods.
MAIN: dict[PaperRow, tuple[str, tuple[str, ...]]] = {
    "full": ("full", ()),
    "eager": ("full", ("eager",)),
    "free": ("free", ("published",)),
    "adaptive": ("free", ("adaptive",)),
    "rollback": ("free", ("rollback",)),
    "lossless": ("free", ("lossless",)),
    "copying": ("free", ("calm-single", "eager-free")),
    "static": ("static", ("static",)),
    "calm": ("static", ("calm",)),
    "calm-single": ("calm-single", ("calm-single",)),
}
# Methods that row eager-exits adds to others.
EAGER_EXITS: dict[PaperRow, str] = {"static": "eager-static", "free": "eager-free"}
MAIN_TABLE = "main"
SAMPLES = "samples"


@dataclass(frozen=True)
class PaperTraining:
    """A checkpoint to train.

    Attributes:
        exit_layer: Exit layer that it is trained for.
    """

    recipe: str
    exit_layer: int

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.exit_layer}"


@dataclass(frozen=True)
class Contestant:
    """A bundle in a measurement.

    Attributes:
        training: Its checkpoint.
        depth: Exit layer of the bundle.
        methods: Methods to measure besides full.
    """

    training: PaperTraining
    depth: int
    methods: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the bundle."""
        own = self.training.name
        return own if self.depth == self.training.exit_layer else f"{own}-at-{self.depth}"

    @property
    def calibrated(self) -> bool:
        return any(method in CALIBRATED for method in self.methods)


@dataclass(frozen=True)
class Measurement:
    """Bundles that are measured together, interleaved.

    Attributes:
        name: Name of its directory, and of its table: main, static, mapping, depth, samples or
            lora. A name may have a part after a slash.
        contestants: The bundles. The first is the one that others are compared with.
    """

    name: str
    contestants: tuple[Contestant, ...]


def measurements_of(options: CompareOptions) -> list[Measurement]:
    """List the measurements of all rows.

    Methods of one table are interleaved in one measurement. Variants of the ablations have one
    each, with the full model of the same weights, so that few bundles are in memory at once.
    """
    layer = options.exit_layer
    rows = options.rows
    free = "free" if options.leftover == "reuse" else "free-drop"

    def variant(name: str, recipe: str, trained: int, depth: int, *methods: str) -> Measurement:
        return Measurement(name, (Contestant(PaperTraining(recipe, trained), depth, methods),))

    methods: dict[str, list[str]] = {"full": []}
    for row, (recipe, listed) in MAIN.items():
        if row in rows:
            named = methods.setdefault(free if recipe == "free" else recipe, [])
            named += listed
            named += [EAGER_EXITS[row]] if row in EAGER_EXITS and "eager-exits" in rows else []
    if "eager-exits" in rows or any(
        method in EARLY for named in methods.values() for method in named
    ):
        methods["full"].append("eager-full")
    found = []
    if any(row in rows for row in MAIN):
        contestants = (
            Contestant(PaperTraining(recipe, layer), layer, tuple(dict.fromkeys(named)))
            for recipe, named in methods.items()
        )
        found.append(Measurement(MAIN_TABLE, tuple(contestants)))
    if "static" in rows:
        found += [
            variant(f"static/{depth}", "static", layer, depth, "static")
            for depth in options.static_depths
            if depth != layer
        ]
    if "mapping" in rows:
        found += [
            variant(f"mapping/{recipe}", recipe, layer, layer, "published")
            for recipe in ("free-kd-unif", "free-kd-last", free)
        ]
    if "depth" in rows:
        found += [
            variant(f"depth/{depth}", free, depth, depth, "published")
            for depth in sorted({*options.depths, layer})
        ]
    if "samples" in rows:
        found.append(variant(SAMPLES, free, layer, layer, "published"))
    if "lora" in rows:
        found.append(variant("lora", "free-lora", layer, layer, "published"))
    return found


def trainings_of(measurements: Sequence[Measurement]) -> list[PaperTraining]:
    """List the checkpoints of measurements, each once."""
    every = (one.training for each in measurements for one in each.contestants)
    return list(dict.fromkeys(every))


def bundles_of(measurements: Sequence[Measurement]) -> dict[str, Contestant]:
    """Return the bundles of measurements by name, calibrated ones if any measurement needs that."""
    found: dict[str, Contestant] = {}
    for one in (one for each in measurements for one in each.contestants):
        if one.name not in found or one.calibrated:
            found[one.name] = one
    return found


def settings(
    contestant: Contestant, thresholds: Sequence[float], manifest: Manifest
) -> tuple[Setting, ...]:
    """List the settings of a bundle, full first.

    Rollback is left out if the calibration has no limit for it, because no token exits.
    """
    found = [Setting("full")]
    for method in contestant.methods:
        if method == "published":
            found += settings_of(("published",), thresholds, manifest)
        elif method == "rollback" and manifest.rollback_threshold is None:
            continue
        elif method in FIXED:
            found += [Setting(method, threshold) for threshold in thresholds]
        else:
            found.append(Setting(method))
    return tuple(found)
