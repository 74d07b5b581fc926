"""The report of `doctor`: packages, machine, and what to install."""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from freeexport import __version__
from freeexport.system.installation.extras import PURPOSES, install_command, installed_version, missing_of
from freeexport.system.installation.gpu import CudaVersions, TensorRT, check_cuda, check_tensorrt
from freeexport.system.machine import Machine, detect_machine

# Distributions that all install the import package `onnxruntime`: of two, the later one overwrites the earlier one.
WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")

PACKAGES = ("numpy", "tokenizers", "jinja2", "torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors")

# The ONNX model y = x + x over float32[1] (opset 13), serialised once so that this probe does not need `onnx`.
_PROBE = bytes.fromhex(
    "08083a350a0e0a01780a017812017922034164641201675a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a00100d"
)

_NOT_LOADED = "it runs no operator here: its libraries or its device are missing"

VersionOf = Callable[[str], str | None]


@dataclass(frozen=True)
class Provider:
    """An execution provider compiled into the ONNX Runtime wheel; `problem` says why it is not usable, or is empty."""

    name: str
    usable: bool
    problem: str = ""


@dataclass(frozen=True)
class MissingExtra:
    """An extra of which some packages are not installed."""

    extra: str
    purpose: str
    packages: tuple[str, ...]
    command: str


@dataclass(frozen=True)
class Report:
    """All that doctor finds. `problems` are the reasons why decoding cannot work, each with what to do."""

    freeexport: str
    python: str
    platform: str
    wheels: dict[str, str]
    packages: dict[str, str | None]
    providers: tuple[Provider, ...]
    cuda: CudaVersions
    tensorrt: TensorRT
    machine: Machine
    kernels: str
    without_kernels: bool
    missing: tuple[MissingExtra, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def examine(version_of: VersionOf = installed_version) -> Report:
    """Look at this installation and machine. `version_of` tells the version of a distribution, or None."""
    wheels = {wheel: version for wheel in WHEELS if (version := version_of(wheel))}
    problems = wheel_problems(wheels)
    kernels, without_kernels = _own_kernels()
    providers: tuple[Provider, ...] = ()
    if not problems:
        providers, problems = probe_onnxruntime(next(iter(wheels)))
    return Report(
        freeexport=__version__,
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        platform=platform.platform(),
        wheels=wheels,
        packages={name: version_of(name) for name in PACKAGES},
        providers=providers,
        cuda=check_cuda(version_of),
        tensorrt=check_tensorrt(version_of),
        machine=detect_machine(),
        kernels=kernels,
        without_kernels=without_kernels,
        missing=missing_extras(version_of),
        problems=problems,
    )


def wheel_problems(wheels: Mapping[str, str]) -> tuple[str, ...]:
    """Why this set of installed ONNX Runtime wheels cannot work; empty for exactly one."""
    if not wheels:
        return (f"ONNX Runtime is not installed; run: {install_command('cpu')}  (on an NVIDIA GPU: [gpu])",)
    if len(wheels) > 1:
        # Removing one wheel leaves the other with files missing, so all of them have to go.
        remove = f"pip uninstall -y {' '.join(wheels)}"
        install = install_command("gpu" if "onnxruntime-gpu" in wheels else "cpu")
        return (f"{' and '.join(wheels)} overwrite each other; run: {remove} && {install}",)
    return ()


def probe_onnxruntime(wheel: str) -> tuple[tuple[Provider, ...], tuple[str, ...]]:
    """The providers compiled into the installed wheel, each tried; and why decoding cannot work, if so."""
    try:
        ort = importlib.import_module("onnxruntime")
        names = list(ort.get_available_providers())
    except Exception as error:  # a broken wheel fails in many ways: ImportError, AttributeError, OSError
        repair = f"pip install --force-reinstall --no-deps {wheel}"
        return (), (f"{wheel} is installed but does not load ({_first_line(error)}); run: {repair}",)
    providers = tuple(probe_provider(ort, name) for name in names)
    if not any(provider.usable for provider in providers):
        return providers, ("no execution provider of onnxruntime works here; see the list of providers",)
    return providers, ()


def probe_provider(ort: Any, name: str) -> Provider:
    """Run a one-node model on provider `name` and nothing else: ONNX Runtime alone would fall back to the CPU."""
    import numpy

    try:
        ort.set_default_logger_severity(4)  # a provider that fails to load writes pages to stderr
        options = ort.SessionOptions()
        if name != "CPUExecutionProvider":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        session = ort.InferenceSession(_PROBE, options, providers=[name], enable_fallback=0)
        if name not in session.get_providers():
            return Provider(name, False, _NOT_LOADED)
        (result,) = session.run(None, {"x": numpy.ones(1, numpy.float32)})
    except Exception as error:  # anything a provider's library raises means not usable
        return Provider(name, False, _NOT_LOADED if "fallback to CPU EP" in str(error) else _first_line(error))
    return Provider(name, True) if result[0] == 2.0 else Provider(name, False, f"computed 1 + 1 = {result[0]}")


def missing_extras(version_of: VersionOf = installed_version) -> tuple[MissingExtra, ...]:
    """Extras that are not fully installed."""
    return tuple(
        MissingExtra(extra, purpose, names, install_command(extra))
        for extra, purpose in PURPOSES.items()
        if (names := missing_of(extra, version_of))
    )


def report_as_dict(report: Report) -> dict[str, Any]:
    """The report as JSON-ready data, with `ok` added."""
    return {"ok": report.ok, **dataclasses.asdict(report)}


def _own_kernels() -> tuple[str, bool]:
    """The instructions that they use here, or why bundles run with ONNX Runtime's, which are slower; and whether that
    is so."""
    from runtime.kernels import instructions, missing

    problem = missing()
    if problem is None:
        return instructions(), False
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    why = "" if compiler else "; no C++ compiler is found here"
    return f"{problem}{why}; until then ONNX Runtime's slower ones are used", True


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
