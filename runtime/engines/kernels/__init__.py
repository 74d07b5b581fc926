"""Our own operators for ONNX Runtime: their library, its availability, and its settings.

The library is built from `source` on installation if there is a C++ compiler (docs/precision.md).
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from runtime.errors import EngineError

logger = logging.getLogger(__name__)

# Domain of the operators in a graph, and version of operators and weights, as in source/version.h.
DOMAIN = "freeexport"
VERSION = 12
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
LIBRARY = Path(__file__).with_name(f"libfreeexport_kernels{_SUFFIX}")
_warned: dict[str, object] = {}
_COMPILER = {
    "darwin": "install a C++ compiler (xcode-select --install)",
    "win32": "install a C++ compiler (pip install ziglang)",
}
_GXX = "install a C++ compiler (Debian: apt-get install g++)"
BUILD = f"{_COMPILER.get(sys.platform, _GXX)}, then freeexport again"


def register(options: Any, needed: int = VERSION) -> None:
    """Register the operators with options of an ONNX Runtime session.

    Args:
        options: The session options.
        needed: Minimum version of the operators.

    Raises:
        EngineError: If they are not available.
    """
    name = instructions()
    if needed > VERSION:
        raise EngineError(
            f"version {needed} of freeexport's kernels is needed, {VERSION} is here; upgrade "
            "freeexport"
        )
    if name.startswith("scalar"):
        chosen = os.environ.get("FREEEXPORT_INSTRUCTIONS")
        why = (
            f"FREEEXPORT_INSTRUCTIONS is {name}"
            if chosen
            else "this processor has neither AVX2 nor NEON dot products"
        )
        _warn_once(f"{why}: freeexport's kernels run without vector instructions, slowly")
    try:
        options.register_custom_ops_library(str(LIBRARY))
    except Exception as error:  # an exception class that only ONNX Runtime defines
        raise EngineError(str(error).splitlines()[0].rpartition("freeexport: ")[2]) from error


def instructions() -> str:
    """Return the instruction set that the kernels use.

    It is chosen by processor, or by FREEEXPORT_INSTRUCTIONS: scalar, avx2, avx2-vnni, avx512,
    avx512-vnni, avx512-bf16, amx, neon or neon-i8mm. scalar-bf16 can only be chosen by the
    variable.

    Raises:
        EngineError: If the kernels are not available.
    """
    problem = ctypes.c_char_p()
    name: bytes | None = _library(LIBRARY).freeexport_instructions(ctypes.byref(problem))
    if name is None:
        raise EngineError((problem.value or b"").decode())
    return name.decode()


def supported(name: str) -> bool:
    """Return True if both the kernels and this processor support an instruction set."""
    return missing() is None and _library(LIBRARY).freeexport_supports(name.encode()) == 1


@contextmanager
def reading_prompt(reads: bool = True) -> Iterator[None]:
    """Context manager: mark engine calls of this thread as reading a prompt.

    A decoder's rows from the position `prompt_differs_from` on, and all rows of an encoder, are
    computed in bfloat16. A row's result still depends on that row only, but differs from other
    calls.
    """
    try:
        library = _library(LIBRARY)
    except EngineError:  # so no engine of this process uses them
        yield
        return
    before = library.freeexport_read_prompt(int(reads))
    try:
        yield
    finally:
        library.freeexport_read_prompt(before)


def prompt_differs_from() -> int | None:
    """Return the first position whose results may differ between reading a prompt and generating.

    This is 0 with `amx` and with `scalar-bf16`, which imitates it for tests, 1024 with
    `avx512-bf16`, and None with the others.

    Raises:
        EngineError: If the kernels are not available.
    """
    position: int = _library(LIBRARY).freeexport_prompt_differs_from()
    return None if position < 0 else position


def spread_logits() -> Callable[[int], int]:
    """Return a function that sets how this thread's engine calls return an exit's logits.

    With 1, the default, they cover the whole vocabulary. It returns the previous setting.

    Raises:
        EngineError: If the kernels are not available.
    """
    _library(LIBRARY)
    # Unlike CDLL, PyDLL keeps the GIL, which other threads could otherwise take twice per call.
    found: Callable[[int], int] = ctypes.PyDLL(str(LIBRARY)).freeexport_spread_logits
    return found


def missing() -> str | None:
    """Return why the operators are not available and what to do. None if they are."""
    try:
        instructions()
    except EngineError as error:
        return str(error)
    return None


def kernels_of(needed: int | None) -> str:
    """Return a readable name of the operators that run a bundle's quantized weights here.

    `needed` is the minimum version in its manifest.
    """
    problem = missing()
    if needed is None:
        slower = "" if problem is None else f", which are slower; {problem}"
        return f"ONNX Runtime's{slower}"
    if problem is not None:
        return f"freeexport's own; {problem}"
    newer = f"; version {needed} is needed, upgrade freeexport" if needed > VERSION else ""
    return f"freeexport's own, version {VERSION}, with {instructions()} here{newer}"


def _warn_once(message: str) -> None:
    one = object()
    if _warned.setdefault(message, one) is one:  # also if engines are loaded concurrently
        logger.warning(message)


@cache
def _library(path: Path) -> ctypes.CDLL:
    if not path.is_file():
        raise EngineError(
            f"freeexport's kernels are not built here ({path.name} is missing); {BUILD}"
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.freeexport_kernels_version()
        library.freeexport_instructions.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise EngineError(f"{path} cannot be loaded ({error}); {BUILD}") from None
    if version != VERSION:
        raise EngineError(
            f"{path} has version {version} of the kernels, not {VERSION}; install freeexport again"
        )
    if not hasattr(library, "freeexport_prompt_differs_from"):
        raise EngineError(f"{path} was built from older sources; install freeexport again")
    library.freeexport_prompt_differs_from.restype = ctypes.c_int64
    return library
