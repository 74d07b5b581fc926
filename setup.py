"""Builds the library of our own operators where there is a C++ compiler. All else stands in pyproject.toml.

FREEEXPORT_KERNELS=require makes a library that cannot be built an error, =skip builds none. For another processor than
this one CXX names a compiler for it, and _PYTHON_HOST_PLATFORM the platform (`nox -s wheels`).
"""

from __future__ import annotations

import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "runtime.kernels.libfreeexport_kernels"
SOURCE = Path("runtime", "kernels", "source")
# The same bits everywhere: no multiplication and addition may become one operation unless the source says so.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
]
_AVX2, _AVX512 = "-mavx2 -mfma -mf16c", "-mavx512f -mavx512bw -mavx512dq -mavx512vl"
_AMX = f"{_AVX2} {_AVX512} -mavx512vnni -mavx512vbmi -mavx512bf16 -mamx-tile -mamx-bf16 -mprfchw"
# Of the files that are compiled for other instructions than the processor's first, by its name.
INSTRUCTIONS = {
    "x86_64": {
        "avx2": _AVX2,
        "avx2_vnni": f"{_AVX2} -mavxvnni",
        "avx512": f"{_AVX2} {_AVX512}",
        "avx512_vnni": f"{_AVX2} {_AVX512} -mavx512vnni",
        "amx": _AMX,
        "amx_attention": _AMX,
    },
    "aarch64": {"neon": "-march=armv8-a+dotprod", "neon_i8mm": "-march=armv8-a+i8mm"},
}


# pip shows it with -v; `freeexport doctor` and `convert` say the same later.
WITHOUT = (
    "warning: freeexport's kernels are not built ({error}), so quantized bundles will run with ONNX Runtime's slower "
    "ones; install a C++ compiler (Debian: apt-get install g++), then freeexport again"
)


def processor() -> str:
    """Which the library is built for."""
    return sysconfig.get_platform().rpartition("-")[2]


def sources(built_for: str) -> dict[str, list[str]]:
    """The files of a library, with the flags of each."""
    given = INSTRUCTIONS.get(built_for, {})
    left_out = {"check_ort_api"}.union(*INSTRUCTIONS.values()) - set(given)
    files = [path for path in sorted(SOURCE.glob("*.cpp")) if path.stem not in left_out]
    return {str(path): FLAGS + given.get(path.stem, "").split() for path in files}


def extensions() -> list[Extension]:
    wish = os.environ.get("FREEEXPORT_KERNELS", "")
    if wish not in ("", "require", "skip"):
        raise SystemExit(f"FREEEXPORT_KERNELS is {wish!r}; choose require or skip, or unset it")
    if wish == "skip" or not sys.platform.startswith("linux"):
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
    """A plain shared library, which Python does not import, each file with its own instructions."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Exception as error:  # no compiler, or one that fails; setuptools goes on where the library is optional
            print(WITHOUT.format(error=str(error).splitlines()[0]), file=sys.stderr)
            raise

    def _build(self, ext: Extension) -> None:
        def compiled(file: tuple[str, list[str]]) -> list[str]:
            objects: list[str] = self.compiler.compile(
                [file[0]], output_dir=self.build_temp, extra_postargs=file[1]
            )
            return objects

        (Path(self.build_temp) / SOURCE).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [
                name for names in pool.map(compiled, sources(processor()).items()) for name in names
            ]
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(
            objects,
            target,
            libraries=["m"],
            extra_preargs=["-Wl,--as-needed,-z,defs"],
            target_lang="c++",
        )


class Wheel(bdist_wheel):
    """For every Python 3, and with the library for one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        built = [Path(path) for path in self.get_finalized_command("build_ext").get_outputs()]
        platform_tag = super().get_tag()[2] if any(path.exists() for path in built) else "any"
        return "py3", "none", platform_tag


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
