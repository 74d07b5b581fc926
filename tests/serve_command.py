"""`freeexport serve` in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "onnx", "scipy")


@contextmanager
def command(*arguments: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, its address and what it said before it was ready. Its last line says what heavy it imported."""
    code = (
        "import sys, atexit; from freeexport.cli import main;"
        f"atexit.register(lambda: print('imported', *(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr));"
        f"main(['serve', *{list(arguments)!r}])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            said = list[str]()
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line)
                if line.startswith("serving"):
                    break
            found = re.search(r"http://\S+(?=/v1)", said[-1])
            assert found, said
            yield process, found.group(), said
        finally:
            process.kill()
