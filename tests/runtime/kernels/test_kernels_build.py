"""The wheel, with the library of our own operators and without."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LIBRARY = "runtime/kernels/libfreeexport_kernels.so"

pytest.importorskip("setuptools")


def build(tmp_path, **environment):
    """A wheel of `runtime` alone, which is quicker to write: its path, or None, and what was printed."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "runtime", source / "runtime", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    inherited = {name: value for name, value in os.environ.items() if name != "FREEEXPORT_KERNELS"}
    command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
    done = subprocess.run(
        command, cwd=source, env={**inherited, **environment}, capture_output=True, text=True, timeout=200
    )
    return next(iter(source.glob("dist/*.whl")), None), done.returncode, done.stdout + done.stderr


def files(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_without_a_compiler_the_wheel_is_for_any_platform(tmp_path):
    wheel, code, printed = build(tmp_path, CC="false", CXX="false")
    assert code == 0, printed
    assert wheel.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in files(wheel)
    assert "warning: freeexport's kernels are not built (" in printed


def test_without_a_compiler_a_library_that_is_required_is_an_error(tmp_path):
    wheel, code, printed = build(tmp_path, CC="false", CXX="false", FREEEXPORT_KERNELS="require")
    assert wheel is None
    assert code != 0
    assert "'false'" in printed


def test_a_wish_that_is_unknown_is_an_error(tmp_path):
    _, code, printed = build(tmp_path, FREEEXPORT_KERNELS="yes")
    assert code != 0
    assert "FREEEXPORT_KERNELS is 'yes'; choose require or skip" in printed


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or not sys.platform.startswith("linux"), reason="no C++ compiler")
def test_with_a_compiler_the_wheel_is_for_this_platform_and_every_python(tmp_path):
    wheel, code, printed = build(tmp_path, FREEEXPORT_KERNELS="require")
    assert code == 0, printed
    assert "-py3-none-linux_" in wheel.name
    assert [name for name in files(wheel) if name.startswith("runtime/kernels/")] == [
        "runtime/kernels/__init__.py",
        LIBRARY,
    ]
