"""The wheel, with the library of our own operators and without; and kernels for other processors, under an emulator:
the same bits as here."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from kernel_builds import check_program, run
from kernel_cases import INSTRUCTIONS, here

ROOT = Path(__file__).resolve().parents[4]
LIBRARY = "runtime/engines/kernels/libfreeexport_kernels.so"

Distribution = pytest.importorskip("setuptools").Distribution


def build(tmp_path, **environment):
    """A wheel of `runtime` alone, which is quicker to write: its path, or None, and what was printed."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "runtime", source / "runtime", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    inherited = {name: value for name, value in os.environ.items() if name != "FREEEXPORT_KERNELS"}
    command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
    done = subprocess.run(
        command, cwd=source, env={**inherited, **environment}, capture_output=True, text=True, timeout=900
    )
    return next(iter(source.glob("dist/*.whl")), None), done.returncode, done.stdout + done.stderr


def files(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_built_without_a_compiler_is_for_any_platform(tmp_path):
    wheel, code, printed = build(tmp_path, CC="false", CXX="false")
    assert code == 0, printed
    assert wheel.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in files(wheel)
    assert "warning: freeexport's kernels are not built (" in printed


@pytest.mark.parametrize(
    ("wish", "message"), [("require", "'false'"), ("yes", "FREEEXPORT_KERNELS is 'yes'; choose require or skip")]
)
def test_required_kernels_without_a_compiler_and_unknown_settings_are_refused(wish, message, tmp_path):
    wheel, code, printed = build(tmp_path, CC="false", CXX="false", FREEEXPORT_KERNELS=wish)
    assert (wheel, code != 0) == (None, True)
    assert message in printed


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.skipif(shutil.which("g++") is None or not sys.platform.startswith("linux"), reason="no C++ compiler")
def test_wheel_built_with_a_compiler_is_for_this_platform_and_every_python(tmp_path):
    wheel, code, printed = build(tmp_path, FREEEXPORT_KERNELS="require")
    assert code == 0, printed
    assert "-py3-none-linux_" in wheel.name
    assert [name for name in files(wheel) if name.startswith("runtime/engines/kernels/")] == [
        "runtime/engines/kernels/__init__.py",
        LIBRARY,
    ]


@pytest.mark.parametrize(
    ("host", "system", "processor", "suffix"),
    [
        ("linux-aarch64", "linux", "aarch64", ".so"),
        ("win-amd64", "win", "x86_64", ".dll"),
        ("macosx-11.0-arm64", "macosx", "aarch64", ".dylib"),
        ("macosx-10.9-universal2", "macosx", platform.machine(), ".dylib"),
    ],
)
def test_systems_have_their_own_flags_and_files(host, system, processor, suffix, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import setup

    monkeypatch.setattr(setup.sysconfig, "get_platform", lambda: host)
    monkeypatch.chdir(ROOT)
    assert (setup.system(), setup.processor()) == (system, processor)
    names = {Path(source).stem for source in setup.sources(processor)}
    assert ("neon" in names, "amx" in names) == (processor == "aarch64", processor == "x86_64")
    commands = []

    def run_here(command):
        commands.append(command)
        made = Path(command[-1])
        made.write_bytes(b"")
        made.with_suffix(".pdb").write_bytes(b"")

    monkeypatch.setattr(setup, "run", run_here)
    monkeypatch.setenv("CXX", "cross c++ -target this")
    build = setup.BuildLibrary(Distribution())
    build.build_temp, build.build_lib = str(tmp_path / "temp"), str(tmp_path / "lib")
    (extension,) = setup.extensions()
    build._build(extension)
    *compiled, linked = commands
    assert len(compiled) == len(names)
    assert all(command[:4] == ["cross", "c++", "-target", "this"] for command in commands)
    assert all(("-fPIC" in command) == (system != "win") for command in compiled)
    # What else the linker writes is not installed.
    assert [path.name for path in (tmp_path / "lib").rglob("*.*")] == [f"libfreeexport_kernels{suffix}"]
    assert "-shared" in linked
    assert any("-z,defs" in flag for flag in linked) == (system == "linux")


def test_windows_builds_use_zig_and_mac_builds_one_architecture(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import setup

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(setup.sysconfig, "get_platform", lambda: "win-amd64")
    assert setup.compiler() == [sys.executable, "-m", "ziglang", "c++", "-target", "x86_64-windows-gnu"]
    monkeypatch.setattr(setup.sysconfig, "get_platform", lambda: "macosx-11.0-arm64")
    monkeypatch.setattr(setup.shutil, "which", lambda name: name)
    assert setup.compiler()[-2:] == ["-arch", "arm64"]
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"^no C\+\+ compiler was found$"):
        setup.compiler()


@pytest.fixture(scope="module")
def digest(tmp_path_factory):
    """Return the digest of kernel_check.cpp as g++ compiles it for this processor."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    found = run(str(check_program(tmp_path_factory.mktemp("here"), ["g++"], platform.machine()))).split()[-1]
    assert len(found) == 16
    return found


CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [program for program in (CROSS, QEMU) if shutil.which(program) is None]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (Debian: g++-aarch64-linux-gnu, qemu-user)")
def test_neon_is_bit_identical_to_plain_cpp_under_qemu_and_to_this_processor(digest, tmp_path):
    program = str(check_program(tmp_path, [CROSS], "aarch64"))
    for processor, names in (("max", ("neon-i8mm", "neon")), ("cortex-a76", ("neon",)), ("cortex-a72", ())):
        text = run(QEMU, "-cpu", processor, program, *names)
        assert f"chosen {names[0] if names else 'scalar'}\n" in text
        assert f"digest {digest}\n" in text
    with pytest.raises(AssertionError, match="neon: is not to be had here"):
        run(QEMU, "-cpu", "cortex-a72", program, "neon")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs ziglang")
@pytest.mark.parametrize(
    ("target", "runner"),
    [
        ("x86_64-linux-musl", []),
        ("aarch64-linux-musl", [QEMU, "-cpu", "max"]),
        ("x86_64-windows-gnu", ["wine"]),
    ],
)
def test_builds_for_other_systems_are_bit_identical_to_plain_cpp_here(target, runner, digest, tmp_path):
    processor = target.partition("-")[0]
    if (runner and shutil.which(runner[0]) is None) or (not runner and processor != platform.machine()):
        pytest.skip(f"needs {runner[0] if runner else processor}")
    program = check_program(tmp_path, [sys.executable, "-m", "ziglang", "c++", "-target", target], processor)
    names = ["neon-i8mm", "neon"] if processor == "aarch64" else [name for name in INSTRUCTIONS if here(name)]
    assert f"digest {digest}\n" in run(*runner, str(program), *names)
