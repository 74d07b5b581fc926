"""Which CUDA and cuDNN the installed onnxruntime-gpu was built for, and whether driver and packages here fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from runtime.cuda.driver import dotted

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
    """What to print; nothing where the wheel is for the CPU."""
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
    """What the wheel's own file says. Imports nothing of it."""
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
