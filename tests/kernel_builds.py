"""Builds the library of custom operators with the compiler and flags of a test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def objects(folder: Path, compiler: Sequence[str], processor: str, *extra: str, **replaced: str) -> list[str]:
    """Compile every file of the library into `folder`, and return the object files.

    Args:
        folder: Output folder.
        compiler: Command of the compiler.
        processor: Processor to build for.
        extra: Additional flags, after all others.
        replaced: Flags by name of the source file, instead of those in setup.py.
    """
    sys.path.insert(0, str(ROOT))
    import setup

    def compiled(source: str, flags: list[str]) -> str:
        name = Path(source).stem
        flags = setup.FLAGS + replaced[name].split() if name in replaced else flags
        made = str(folder / f"{name}.o")
        run(*compiler, *position, *flags, *extra, "-c", str(ROOT / source), "-o", made)
        return made

    with chdir(ROOT):
        files = setup.sources(processor)
    position = [] if any("windows" in part for part in compiler) else ["-fPIC"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, files, files.values()))


def check_program(folder: Path, compiler: Sequence[str], processor: str, *extra: str, **replaced: str) -> Path:
    """Build kernel_check.cpp with the library as a static program, and return its path."""
    source = [f"-I{ROOT / 'runtime/engines/kernels/source'}", str(ROOT / "tests/kernel_check.cpp")]
    files = objects(folder, compiler, processor, *extra, **replaced)
    program = folder / "kernel_check.exe"  # wine runs no other names
    run(*compiler, "-std=c++17", "-O2", "-ffp-contract=off", *extra, *source, *files, "-static", "-o", str(program))
    return program


def run(*command: str) -> str:
    """Run a program and return its output. If it fails, raise AssertionError with everything it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout
