"""Builds the library of custom operators if a C++ compiler is available.

All other metadata is in pyproject.toml. FREEEXPORT_KERNELS=require fails if the library cannot be
built, and FREEEXPORT_KERNELS=skip does not build it. The compiler is g++ or clang++ (CXX names
another one), and on Windows the clang of PyPI's `ziglang`, because the sources use extensions that
MSVC lacks. To cross-compile, set CXX to the compiler and _PYTHON_HOST_PLATFORM to the platform (see
`nox -s wheels`).
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NAME = "runtime.engines.kernels.libfreeexport_kernels"
SOURCE = Path("runtime", "engines", "kernels", "source")
# Results must have the same bits on all processors, so multiplication and addition are fused only
# where the source does.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
]
_AVX2 = "-mavx2 -mfma -mf16c"
_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl"
_AMX = f"{_AVX2} {_AVX512} -mavx512vnni -mavx512vbmi -mavx512bf16 -mamx-tile -mamx-bf16 -mprfchw"
# By processor: flags of the files that need more than its baseline instructions.
INSTRUCTIONS = {
    "x86_64": {
        "avx2": _AVX2,
        "avx2_vnni": f"{_AVX2} -mavxvnni",
        "avx512": f"{_AVX2} {_AVX512}",
        "avx512_vnni": f"{_AVX2} {_AVX512} -mavx512vnni",
        "avx512_bf16": f"{_AVX2} {_AVX512} -mavx512vnni -mavx512bf16",
        "amx": _AMX,
        "amx_attention": _AMX,
    },
    # zig knows no -march for this processor.
    "aarch64": {"neon": "-mcpu=generic+dotprod", "neon_i8mm": "-mcpu=generic+i8mm"},
}


# pip shows this only with -v. `freeexport doctor` and `convert` warn as well.
WITHOUT = (
    "warning: freeexport's kernels are not built ({error}), so quantized bundles will run with "
    "ONNX Runtime's slower ones; install a C++ compiler (Debian: apt-get install g++), then "
    "freeexport again"
)


# The kernels use headers of the C++ library only, and zig would compile the library for a minute.
# g++ knows this flag since version 13; on Linux `--as-needed` drops the library.
_ALONE = "-nostdlib++"
# By system, as in `sysconfig.get_platform()`: suffix of the library, and flags of the linker.
LINKED = {
    "linux": (".so", ["-shared", "-Wl,--as-needed,-z,defs"]),
    "macosx": (
        ".dylib",
        ["-shared", _ALONE, "-Wl,-install_name,@rpath/libfreeexport_kernels.dylib"],
    ),
    "win": (".dll", ["-shared", _ALONE]),
}
# Other names of processors in `sysconfig.get_platform()`.
PROCESSORS = {"arm64": "aarch64", "amd64": "x86_64"}


def system() -> str:
    """Return the system that the library is built for: linux, macosx or win."""
    return sysconfig.get_platform().partition("-")[0]


def processor() -> str:
    """Return the processor that the library is built for."""
    name = sysconfig.get_platform().rpartition("-")[2]
    if name == "universal2":  # Python for both processors of Macs
        name = platform.machine()
    return PROCESSORS.get(name, name)


def compiler() -> list[str]:
    """Return the command of the C++ compiler.

    Raises:
        FileNotFoundError: If there is none.
    """
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    if system() == "win":
        return [sys.executable, "-m", "ziglang", "c++", "-target", f"{processor()}-windows-gnu"]
    configured = shlex.split(sysconfig.get_config_var("CXX") or "")
    for command in (configured, ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            macs = ["-arch", processor().replace("aarch64", "arm64")]
            return [*command, *(macs if system() == "macosx" else [])]
    raise FileNotFoundError("no C++ compiler was found")


def sources(built_for: str) -> dict[str, list[str]]:
    """Return the source files for a processor, with the flags of each."""
    given = INSTRUCTIONS.get(built_for, {})
    left_out = {"check_ort_api"}.union(*INSTRUCTIONS.values()) - set(given)
    files = [path for path in sorted(SOURCE.glob("*.cpp")) if path.stem not in left_out]
    return {str(path): FLAGS + given.get(path.stem, "").split() for path in files}


def extensions() -> list[Extension]:
    """Return the extension with the library, if it is built.

    Raises:
        SystemExit: If FREEEXPORT_KERNELS is invalid.
    """
    wish = os.environ.get("FREEEXPORT_KERNELS", "")
    if wish not in ("", "require", "skip"):
        raise SystemExit(f"FREEEXPORT_KERNELS is {wish!r}; choose require or skip, or unset it")
    if wish == "skip" or system() not in LINKED:
        return []
    headers = [str(path) for path in sorted(SOURCE.glob("*.h"))]
    return [
        Extension(
            NAME,
            list(sources(processor())),
            depends=headers,
            language="c++",
            optional=wish != "require",
        )
    ]


class BuildLibrary(build_ext):
    """Builds a plain shared library that Python does not import, with flags for each file."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + LINKED[system()][0]

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Exception as error:
            print(WITHOUT.format(error=str(error).splitlines()[0]), file=sys.stderr)
            # setuptools continues after this error if the library is optional.
            raise CompileError(str(error)) from error

    def _build(self, ext: Extension) -> None:
        command = compiler()
        position = [] if system() == "win" else ["-fPIC"]
        flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)

        def compiled(source: str, own: list[str]) -> str:
            target = str(folder / f"{Path(source).stem}.o")
            run([*command, *flags, *position, *own, "-c", source, "-o", target])
            return target

        files = sources(processor())
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, files, files.values()))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # zig writes an import library and debug information beside a DLL. Wheels need neither.
        linked = folder / library.name
        ending = [*shlex.split(os.environ.get("LDFLAGS", "")), "-o", str(linked)]
        libraries = ["-lm"] if system() == "linux" else []
        run([*command, *objects, *LINKED[system()][1], *libraries, *ending])
        shutil.copy(linked, library)


def run(command: list[str]) -> None:
    """Run a compiler, which prints its errors.

    Raises:
        RuntimeError: If it fails.
    """
    code = subprocess.run(command).returncode
    if code != 0:
        raise RuntimeError(f"command {command[0]!r} failed with exit code {code}")


class Wheel(bdist_wheel):
    """Wheel for any Python 3. With the library, it is for one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        built = [Path(path) for path in self.get_finalized_command("build_ext").get_outputs()]
        if not any(path.exists() for path in built):
            return "py3", "none", "any"
        # The library is for one processor, even if this Python is for both of Macs.
        name = processor().replace("aarch64", "arm64")
        return "py3", "none", super().get_tag()[2].replace("universal2", name)


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
