"""llama.cpp's own server, for comparison: compiled for this machine, once, from the source in llama-cpp-python.

`python -m llama_cpp.server`, of that package, decodes one request at a time; this one has continuous batching.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from freeexport.checkpoints.packaged_models import smollm2
from freeexport.system.output_directory import output_directory
from freeexport.system.progress import progress
from runtime import EngineError
from runtime.machine.user_cache import user_cache

SERVER, QUANTIZE, MODEL = "llama-server", "llama-quantize", "q8_0.gguf"
FLAGS = ("GGML_NATIVE=ON", "LLAMA_USE_PREBUILT_UI=OFF", "LLAMA_OPENSSL=OFF", "BUILD_SHARED_LIBS=OFF")
# Positions of a slot: what the load asks for fits.
CONTEXT = 512


def binaries() -> Path:
    """The folder with both programs. Raises EngineError where they cannot be compiled."""
    place = user_cache("peers", SERVER)
    if not (place / SERVER).is_file():
        with progress(f"compiling {SERVER}"), output_directory(place, SERVER, overwrite=True, sync=False) as partial:
            compile_into(partial)
    return place


def compile_into(folder: Path) -> None:
    with TemporaryDirectory() as work:
        source, build = Path(work, "source"), Path(work, "build")
        options = ["--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", work]
        call([sys.executable, "-m", "pip", "download", *options, "llama-cpp-python>=0.3.30"])
        (archive,) = Path(work).glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(source, filter="data")
        (llama,) = source.glob("*/vendor/llama.cpp")
        call(["cmake", "-S", llama, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *(f"-D{flag}" for flag in FLAGS)])
        jobs = str(len(os.sched_getaffinity(0)))
        call(["cmake", "--build", build, "--parallel", jobs, "--target", SERVER, "--target", QUANTIZE])
        for name in (QUANTIZE, SERVER):
            shutil.copy2(build / "bin" / name, folder)


def call(command: Sequence[str | Path]) -> None:
    try:
        subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise EngineError(f"{command[0]} is not installed; run: pip install {command[0]}") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or error.stdout.strip() or "no output").splitlines()[-1]
        raise EngineError(f"{command[0]} {command[1]} failed: {last[:300]}") from None


def free_port() -> int:
    """For a program that does not choose one itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def llama_served(threads: int, slots: int) -> Iterator[str]:
    """The address of a server of SmolLM2 in q8_0."""
    programs = binaries()
    model = programs / MODEL
    if not model.exists():
        call([programs / QUANTIZE, "--allow-requantize", smollm2(), model, "Q8_0"])
    port = free_port()
    command = [str(programs / SERVER), "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--threads", str(threads), "--threads-batch", str(threads), "--parallel", str(slots)]
    # Without its cache of ended prompts, to which it copies each by default.
    command += ["--ctx-size", str(slots * CONTEXT), "--cache-ram", "0"]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not ready(url):
                if process.poll() is not None:
                    raise EngineError(f"{' '.join(command)} ended with {process.returncode}; run it to see why")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
