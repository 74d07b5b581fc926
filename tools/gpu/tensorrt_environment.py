"""Set up TensorRT builds on a machine without a GPU, for the tests marked `tensorrt`.

    eval "$(python tools/gpu/tensorrt_environment.py .tensorrt)"
    python -m pytest -m tensorrt

The package onnxruntime-ep-nv-tensorrt-rtx-cu13 contains NVIDIA's TensorRT-RTX library and ONNX
parser, which build engines ahead of time without a device. NVIDIA's Python bindings,
tensorrt-cu13-bindings, load them under the names that they were linked to. The engines are only for
these tests. The libraries are under NVIDIA's licence and stay in DIR. Needs gcc and 0.5 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = ("onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0", "tensorrt-cu13-bindings==11.4.0.106")
LIBRARIES = {
    "libnvinfer.so.11": "libtensorrt_rtx.so.1.*",
    "libnvonnxparser.so.11": "libtensorrt_onnxparser_rtx.so.1.*",
}
# TensorRT-RTX has no plugins, but the bindings need the function that registers them.
PLUGINS = "int initLibNvInferPlugins(void *logger, const char *name) { return 1; }\n"
PACKAGE = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"


def set_up(directory: Path) -> None:
    """Install what the bindings need into `directory`, which is complete or does not exist."""
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    install += ["--target", str(partial), *PACKAGES]
    subprocess.run(install, check=True, stdout=sys.stderr)
    libraries = partial / "lib"
    libraries.mkdir()
    for name, pattern in LIBRARIES.items():
        (library,) = partial.glob(f"onnxruntime_ep_nv_tensorrt_rtx/{pattern}")
        (libraries / name).symlink_to(Path("..") / library.relative_to(partial))
    plugins = libraries / "libnvinfer_plugin.so.11"
    arguments = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{plugins.name}"]
    arguments += ["-x", "c", "-", "-o", str(plugins)]
    subprocess.run(arguments, input=PLUGINS, text=True, check=True)
    (partial / "tensorrt").mkdir()
    (partial / "tensorrt" / "__init__.py").write_text(PACKAGE)
    partial.rename(directory)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="directory to set up, if it does not exist"
    )
    parser.add_argument(
        "--plain", action="store_true", help="print assignments for `env` instead of a shell"
    )
    arguments = parser.parse_args()
    directory = arguments.directory.resolve()
    if not directory.exists():
        if shutil.which("gcc") is None:
            sys.exit("error: gcc is not installed; install it, it compiles one function")
        try:
            set_up(directory)
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: {error.cmd[0]} failed with code {error.returncode}; see its message")
    paths = (("LD_LIBRARY_PATH", directory / "lib"), ("PYTHONPATH", directory))
    values = [f"{name}={path}:{os.environ.get(name, '')}" for name, path in paths]
    print(" ".join(values if arguments.plain else ["export", *map(shlex.quote, values)]))


if __name__ == "__main__":
    main()
