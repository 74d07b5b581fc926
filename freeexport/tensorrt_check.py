"""Which TensorRT is installed, and what of it can be used: `freeexport build`, and ONNX Runtime's TensorRT provider."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from runtime.errors import EngineError
from runtime.tensorrt.library import LEAST, import_tensorrt, version_numbers

DISTRIBUTION = "tensorrt"
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
    version, wanted = version_of(DISTRIBUTION), provider_wants(provider or provider_library())
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
    """What to print."""
    usable = found.problem or "can build engines, and run them on a GPU"
    rows = [("tensorrt", "not installed" if found.version is None else f"{found.version}: {usable}")]
    if found.wanted is not None:
        fits = found.provider_problem or f"libnvinfer.so.{found.wanted} fits"
        rows.append(("ONNX Runtime's provider", fits))
    return rows
