"""The wheel, with the library of our own operators and without; and kernels for other processors, under an emulator:
the same bits as here."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from kernel_builds import check_program, run

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


@pytest.mark.parametrize(
    ("wish", "message"), [("require", "'false'"), ("yes", "FREEEXPORT_KERNELS is 'yes'; choose require or skip")]
)
def test_a_library_that_is_required_and_a_wish_that_is_unknown_are_errors(wish, message, tmp_path):
    wheel, code, printed = build(tmp_path, CC="false", CXX="false", FREEEXPORT_KERNELS=wish)
    assert (wheel, code != 0) == (None, True)
    assert message in printed


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


CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [program for program in ("g++", CROSS, QEMU) if shutil.which(program) is None]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (Debian: g++-aarch64-linux-gnu, qemu-user)")
def test_neon_gives_the_bits_of_plain_cpp_there_and_here(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    native = run(str(check_program(tmp_path / "here", "g++", platform.machine())))
    digest = native.split()[-1]
    assert len(digest) == 16
    program = str(check_program(tmp_path / "there", CROSS, "aarch64"))
    for processor, names in (("max", ("neon-i8mm", "neon")), ("cortex-a76", ("neon",)), ("cortex-a72", ())):
        text = run(QEMU, "-cpu", processor, program, *names)
        assert f"chosen {names[0] if names else 'scalar'}\n" in text
        assert f"digest {digest}\n" in text
    with pytest.raises(AssertionError, match="neon: is not to be had here"):
        run(QEMU, "-cpu", "cortex-a72", program, "neon")
