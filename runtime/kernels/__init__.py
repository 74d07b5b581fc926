"""Our own operators for ONNX Runtime: where their library stands, whether it can be used here, and how.

It is built from `source` when the project is installed where there is a C++ compiler (docs/precision.md).
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from runtime.errors import EngineError

logger = logging.getLogger(__name__)

# The domain of the operators in a graph; the version of operators and weights, which source/version.h has too.
DOMAIN = "freeexport"
VERSION = 7
LIBRARY = Path(__file__).with_name("libfreeexport_kernels.so")
_warned: dict[str, object] = {}
BUILD = "install a C++ compiler (Debian: apt-get install g++), then freeexport again"


def register(options: Any, needed: int = VERSION) -> None:
    """Let a session with these options of ONNX Runtime use the operators, which must be of version `needed` or later.
    EngineError where they cannot be had."""
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
    except Exception as error:  # of a class that only ONNX Runtime names
        raise EngineError(str(error).splitlines()[0].rpartition("freeexport: ")[2]) from error


def instructions() -> str:
    """The instruction set that the kernels use here, by the processor or FREEEXPORT_INSTRUCTIONS: scalar, avx2,
    avx2-vnni, avx512, avx512-vnni, amx, neon or neon-i8mm; or scalar-bf16, which only the variable chooses. EngineError
    where there is none."""
    problem = ctypes.c_char_p()
    name: bytes | None = _library(LIBRARY).freeexport_instructions(ctypes.byref(problem))
    if name is None:
        raise EngineError((problem.value or b"").decode())
    return name.decode()


def supported(name: str) -> bool:
    """Whether the kernels have instructions of this name, and this processor, too."""
    return missing() is None and _library(LIBRARY).freeexport_supports(name.encode()) == 1


@contextmanager
def reading_prompt(reads: bool = True) -> Iterator[None]:
    """Say whether engine calls of this thread read a prompt. Where `prompt_differs`, its rows are multiplied with
    quantized weights in bfloat16: a row's bits still depend on the row alone, but are not those of other calls."""
    try:
        library = _library(LIBRARY)
    except EngineError:  # which no engine of this process uses
        yield
        return
    before = library.freeexport_read_prompt(int(reads))
    try:
        yield
    finally:
        library.freeexport_read_prompt(before)


def prompt_differs() -> bool:
    """Whether a token gets other bits where it is read with a prompt than where it is generated: with the instructions
    `amx`, and `scalar-bf16`, which imitates them for tests. EngineError where there are no operators."""
    return bool(_library(LIBRARY).freeexport_prompt_differs())


def spread_logits() -> Callable[[int], int]:
    """A function that says whether engine calls of this thread give an exit's logits of the whole vocabulary, as they
    do until told otherwise, and returns what was so before. EngineError where there are no operators."""
    _library(LIBRARY)
    # Unlike CDLL it keeps the interpreter's lock, which other threads could else take twice in every call.
    found: Callable[[int], int] = ctypes.PyDLL(str(LIBRARY)).freeexport_spread_logits
    return found


def missing() -> str | None:
    """Why the operators cannot be used here, and what to do; None where they can."""
    try:
        instructions()
    except EngineError as error:
        return str(error)
    return None


def kernels_of(needed: int | None) -> str:
    """Name the operators that multiply with a bundle's quantized weights, for a person; `needed` is what its manifest
    says."""
    problem = missing()
    if needed is not None:
        return f"freeexport's own, version {needed}, " + (
            f"with {instructions()} here" if problem is None else problem
        )
    slower = "" if problem is None else f", which are slower; {problem}"
    return f"ONNX Runtime's{slower}"


def _warn_once(message: str) -> None:
    one = object()
    if _warned.setdefault(message, one) is one:  # of engines that are loaded at the same time, too
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
    if not hasattr(library, "freeexport_prompt_differs"):
        raise EngineError(f"{path} was built from older sources; install freeexport again")
    return library
