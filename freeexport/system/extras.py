"""Optional dependencies: the packages of each extra, and how to install them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib import metadata

PURPOSES: dict[str, str] = {
    "cpu": "decode on the CPU",
    "gpu": "decode on an NVIDIA GPU",
    "tensorrt": "build and run TensorRT engines (NVIDIA GPU)",
    "convert": "convert and verify checkpoints",
    "train": "train checkpoints for early exit",
    "serve": "serve bundles over HTTP",
    "grammar": "constrain outputs: JSON schemas, regular expressions, tool calls",
    "hub": "load bundles and exits from the Hugging Face hub",
    "audio": "read speech from FLAC, Ogg and MP3 files and WAV files of floats",
    "m4a": "read speech from M4A files",
    "calibrate": "calibrate the exit threshold",
    "metrics": "compute metrics during calibration",
    "evaluate": "evaluate methods on a task",
    "demo": "run the demo",
    "docs": "build the documentation as a site",
    "optimum": "export encoders without a native builder (pins transformers 4.57)",
    "all": "run every command on a CPU",
}
# Extras that each verb needs, in addition to a wheel of ONNX Runtime.
NEEDED: dict[str, tuple[str, ...]] = {
    "fit": ("train", "evaluate", "calibrate"),
    "train": ("train",),
    "convert": ("convert",),
    "exits": ("convert",),
    "verify": ("convert",),
    "calibrate": ("calibrate", "metrics"),
    "generate": (),
    "serve": ("serve",),
    "inspect": (),
    "evaluate": ("evaluate",),
    "demo": ("demo",),
    "doctor": (),
}
# Distributions whose name differs from the name they are imported by.
_DISTRIBUTIONS = {
    "rouge_score": "rouge-score",
    "google": "protobuf",
    "optimum": "optimum-onnx",
    "cuda": "cuda-python",
    "prometheus_client": "prometheus-client",
}
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[([\w,-]+)\])?.*;\s*extra\s*==\s*[\"']([\w-]+)[\"']")


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution, or None if it is not installed. Imports nothing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@cache
def extras() -> dict[str, tuple[str, ...]]:
    """Return the packages of each extra, as declared by the installed distribution."""
    try:
        declared = [
            match
            for line in metadata.requires("freeexport") or ()
            if (match := _REQUIREMENT.match(line))
        ]
    except metadata.PackageNotFoundError:  # a source tree that was not installed
        return {}
    names: dict[str, list[str]] = {extra: [] for extra in PURPOSES}
    inner: dict[str, list[str]] = {}
    for name, own, extra in (match.groups() for match in declared):
        if name == "freeexport":
            inner.setdefault(extra, []).extend(own.split(","))
        elif extra in names:
            names[extra].append(name)

    def packages(extra: str) -> list[str]:
        return names[extra] + [name for other in inner.get(extra, ()) for name in packages(other)]

    return {extra: tuple(dict.fromkeys(packages(extra))) for extra in names}


def missing_of(
    extra: str, version_of: Callable[[str], str | None] = installed_version
) -> tuple[str, ...]:
    """Return the packages of an extra that are not installed.

    Either wheel of ONNX Runtime satisfies "cpu". With the CPU's wheel alone, "gpu" lacks nothing:
    the wheel for GPUs would overwrite it.
    """
    has_cpu_wheel = version_of("onnxruntime") is not None
    has_gpu_wheel = version_of("onnxruntime-gpu") is not None
    if extra == "cpu" and (has_cpu_wheel or has_gpu_wheel):
        return ()
    if extra == "gpu" and has_cpu_wheel and not has_gpu_wheel:
        return ()
    return tuple(name for name in extras().get(extra, ()) if not version_of(name))


def distribution_of(module: str) -> str:
    """Return the name of the distribution that provides a module."""
    top = module.partition(".")[0]
    return _DISTRIBUTIONS.get(top, top)


def how_to_install(module: str, verb: str | None = None) -> str:
    """Return a line with the packages missing for `verb` and one command to install them.

    `module` is the module that was not found.
    """
    package = distribution_of(module)
    wanted = (*NEEDED.get(verb or "", ()), *extras())
    extra = next((name for name in wanted if package in extras().get(name, ())), None)
    first = [package]
    if extra is None:  # a package that another one needs
        extra = next((name for name in NEEDED.get(verb or "", ()) if missing_of(name)), None)
        first = []
    if extra is None:
        return f"{package} is not installed; run: {install_command()}"
    # Every verb that opens a session needs a wheel of ONNX Runtime.
    all_of = [extra] if extra in ("cpu", "gpu") or not missing_of("cpu") else ["cpu", extra]
    others = {name for each in all_of for name in missing_of(each)} - {package}
    listed = ", ".join([*first, *sorted(others)])
    several = len(first) + len(others) > 1
    return f"{listed} {'are' if several else 'is'} not installed; run: {install_command(*all_of)}"


def install_command(*extras: str) -> str:
    """Return the shell command that installs the distribution with the given extras."""
    return f"pip install 'freeexport[{','.join(extras)}]'" if extras else "pip install freeexport"
