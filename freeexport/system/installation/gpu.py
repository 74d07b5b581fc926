"""Finds the CUDA and cuDNN that onnxruntime-gpu was built for, and whether driver and packages here fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from runtime.cuda.driver import dotted
from runtime.errors import EngineError
from runtime.tensorrt.files import LEAST, import_tensorrt, version_numbers

WHEEL = "onnxruntime-gpu"
INFO = "build_and_package_info.py"


@dataclass(frozen=True)
class CudaVersions:
    """`wanted` is the CUDA version that the wheel says it was built for, and `cudnn` the major version of cuDNN that it
    asks for; `driver` the newest CUDA that the driver runs. None: not installed, or not known. `problems` say what does
    not fit, with what to do."""

    wanted: str | None
    cudnn: str | None = None
    driver: str | None = None
    bindings: str | None = None
    problems: tuple[str, ...] = ()


def check_cuda(
    version_of: Callable[[str], str | None],
    wanted: str | None = None,
    requires: list[str] | None = None,
    driver: Callable[[], int] | None = None,
) -> CudaVersions:
    """Look at what is installed; nothing without the wheel. The other arguments are, by default, what is here."""
    if version_of(WHEEL) is None:
        return CudaVersions(None)
    wanted = wanted or _built_for()
    requires = _requirements() if requires is None else requires
    cudnn = next((found[1] for line in requires if (found := re.match(r"nvidia-cudnn-cu\d+~=(\d+)", line))), None)
    bindings = version_of("cuda-bindings")
    number = (driver or _driver_version)()
    known = dotted(number) if number else None
    problems = []
    if wanted and number and number // 1000 < int(wanted.split(".")[0]):
        problems.append(
            f"{WHEEL} is built for CUDA {wanted}, and the driver runs up to {known}; install a newer driver"
        )
    if bindings is None:
        problems.append("a session on a GPU needs cuda-python; pip install 'freeexport[gpu]'")
    elif not number:
        problems.append("no NVIDIA driver is loaded here")
    if cudnn and wanted and not version_of(f"nvidia-cudnn-cu{wanted.split('.')[0]}"):
        problems.append(
            f"cuDNN {cudnn} is not among the packages; unless the system has it: pip install '{WHEEL}[cuda,cudnn]'"
        )
    return CudaVersions(wanted, cudnn, known, bindings, tuple(problems))


def cuda_rows(found: CudaVersions) -> list[tuple[str, str]]:
    """Lines to print; none where the wheel is for the CPU."""
    if found.wanted is None and not found.problems:
        return []
    rows = [
        (WHEEL, f"built for CUDA {found.wanted or 'unknown'}, cuDNN {found.cudnn or 'unknown'}"),
        ("driver", f"CUDA {found.driver}" if found.driver else "not known"),
        ("cuda-bindings", found.bindings or "not installed"),
    ]
    return rows + [("does not fit", problem) for problem in found.problems]


def _requirements() -> list[str]:
    with suppress(metadata.PackageNotFoundError):
        return metadata.requires(WHEEL) or []
    return []


def _built_for() -> str | None:
    """The requirements by the wheel's own file. Imports nothing of it."""
    spec = util.find_spec("onnxruntime")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        with suppress(OSError):
            found = re.search(r"cuda_version = '([\d.]+)'", (Path(place) / "capi" / INFO).read_text())
            if found:
                return found[1]
    return None


def _driver_version() -> int:
    """13000 for CUDA 13.0; 0 where there is no driver, or no cuda-python to ask."""
    with suppress(ImportError):
        from cuda.bindings import runtime

        failed, version = runtime.cudaDriverGetVersion()
        return 0 if int(failed) else int(version)
    return 0


PROVIDER = "libonnxruntime_providers_tensorrt.so"
_SONAME = re.compile(rb"libnvinfer\.so\.(\d+)")


@dataclass(frozen=True)
class TensorRT:
    """`version` is the installed one, None where there is none. `problem`: why engines cannot be built or run with it.
    `wanted` is the major version that ONNX Runtime's TensorRT provider loads, None where the installed wheel has none,
    and `provider_problem` why it does not find that. Problems are empty where there are none."""

    version: str | None
    problem: str = ""
    wanted: int | None = None
    provider_problem: str = ""


def check_tensorrt(version_of: Callable[[str], str | None], provider: Path | None = None) -> TensorRT:
    """Look at what is installed. `provider` is the library of ONNX Runtime's provider, by default the one here."""
    version, wanted = version_of("tensorrt"), provider_wants(provider or provider_library())
    if version is None:
        return TensorRT(None, wanted=wanted, provider_problem=_provider_problem(None, wanted))
    problem = ""
    try:
        version = str(import_tensorrt().__version__)
    except EngineError as error:
        problem = str(error)
    return TensorRT(version, problem, wanted, _provider_problem(version, wanted))


def provider_library() -> Path | None:
    """ONNX Runtime's library for TensorRT, where the installed wheel has one. Imports nothing."""
    found = util.find_spec("onnxruntime")
    folders = [] if found is None else [Path(place) for place in found.submodule_search_locations or ()]
    return next((path for folder in folders if (path := folder / "capi" / PROVIDER).is_file()), None)


def provider_wants(library: Path | None) -> int | None:
    """The major version of TensorRT that a provider's library is linked to."""
    found = None if library is None else _SONAME.search(library.read_bytes())
    return None if found is None else int(found[1])


def _provider_problem(version: str | None, wanted: int | None) -> str:
    if wanted is None or (version is not None and version_numbers(version)[:1] == (wanted,)):
        return ""
    least = f"{wanted}.{LEAST[1]}" if wanted == LEAST[0] else f"{wanted}"
    has = "none is installed" if version is None else f"{version} is installed"
    return f"it loads libnvinfer.so.{wanted}, and {has}; pip install 'tensorrt>={least},<{wanted + 1}'"


def tensorrt_rows(found: TensorRT) -> list[tuple[str, str]]:
    """Lines to print."""
    usable = found.problem or "can build engines, and run them on a GPU"
    rows = [("tensorrt", "not installed" if found.version is None else f"{found.version}: {usable}")]
    if found.wanted is not None:
        fits = found.provider_problem or f"libnvinfer.so.{found.wanted} fits"
        rows.append(("ONNX Runtime's provider", fits))
    return rows
