"""What ONNX Runtime's CUDA provider makes of a bundle's graphs, seen without a device.

    python -m tools.gpu.provider BUNDLE --wheel onnxruntime_gpu-1.31.1-*.whl [--include /usr/local/cuda/include]

The provider of the wheel is loaded on libraries that have CUDA's names and do nothing
(tools/gpu/cuda_without_device.c). It places nodes, binds memory, puts kernels into streams and captures graphs as it
would, and no kernel runs. For each engine this says which nodes run on the CPU, and of a run with one token a row:
copies between host and device, copies as large as a cache, waits for the device; and whether a CUDA graph of it is
captured, and launched by one call without a wait. Needs gcc, binutils, a CUDA 13 toolkit's headers, and the wheel
(pip download onnxruntime-gpu==1.31.1).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import click

SOURCE = Path(__file__).with_name("cuda_without_device.c")
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
STREAM = "4096"
TYPES = {"tensor(float16)": 2, "tensor(bfloat16)": 2, "tensor(float)": 4, "tensor(int32)": 4, "tensor(int64)": 8}
ELEMENTS = {"tensor(float16)": 10, "tensor(bfloat16)": 16, "tensor(float)": 1, "tensor(int32)": 6, "tensor(int64)": 7}
SIZES = {"B": 1, "q": 1, "k": 1, "R": 1, "E": 32, "cache": 64}
# What may run on the CPU: shapes, which are known when a call is put into the stream.
SHAPES = {"Concat", "Slice", "Squeeze", "Unsqueeze", "Gather", "Cast", "Add", "Mul", "Sub"}


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--wheel", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--include", default="/usr/local/cuda/include", show_default=True)
@click.option("--child", is_flag=True, hidden=True)
def main(bundle: Path, wheel: Path, include: str, child: bool) -> None:
    if child:
        print(json.dumps({path.stem: look(path) for path in sorted(bundle.glob("*.onnx"))}), flush=True)
        os._exit(0)  # the provider cannot be unloaded from libraries like these
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
        build(place, include)
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": directory,
            "PYTHONPATH": os.pathsep.join([directory, str(Path.cwd())]),
            "CUDA_LOG": str(place / "log"),
        }
        command = [sys.executable, "-m", "tools.gpu.provider", str(bundle), "--wheel", str(wheel), "--child"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if result.returncode:
        raise click.ClickException(f"the provider does not run: {result.stderr.strip()[-600:]}")
    wrong = show(json.loads(result.stdout.splitlines()[-1]))
    sys.exit(1 if wrong else 0)


def build(place: Path, include: str) -> None:
    """Libraries with all that the provider wants of CUDA's."""
    provider = str(place / PROVIDER)
    needed = re.findall(r"\[(libcu[^\]]+)\]", subprocess.check_output(["readelf", "-d", provider], text=True))
    wanted: dict[str, list[str]] = {library: [] for library in needed}
    for line in subprocess.check_output(["nm", "-D", "--undefined-only", provider], text=True).splitlines():
        name, _, library = line.split()[-1].partition("@")
        if library in wanted:
            wanted[library].append(name)
        elif name.startswith("cu") and not library:
            wanted["libcuda.so.1"].append(name)
    wanted["libcudnn.so.9"] = ["cudnnCreate", "cudnnDestroy", "cudnnSetStream"]
    for library, names in wanted.items():
        source = SOURCE.read_text() if "cudart" in library else "#include <stdlib.h>\n"
        source += "".join(_function(name) for name in names if f" {name}(" not in source)
        versions = place / "versions"
        versions.write_text(f"{library} {{ global: {' '.join(name + ';' for name in names)} }};\n")
        command = ["gcc", "-w", "-shared", "-fPIC", "-x", "c", "-", f"-I{include}", f"-Wl,-soname,{library}"]
        if names and library != "libcuda.so.1":
            command.append(f"-Wl,--version-script={versions}")
        subprocess.run([*command, "-o", str(place / library)], input=source, text=True, check=True)


def _function(name: str) -> str:
    """Succeeds; what makes something gives an address, a question for algorithms one."""
    if name.startswith("cublas") and "Create" in name:
        return f"long {name}(void **made) {{ *made = malloc(64); return 0; }}\n"
    if name == "cublasLtMatmulAlgoGetHeuristic":
        arguments = "void *a, void *b, void *c, void *d, void *e, void *f, void *g, int n, void *r, int *found"
        return f"long {name}({arguments}) {{ *found = 1; return 0; }}\n"
    if "GetStatus" in name:
        return f'const char *{name}(int status) {{ return "none"; }}\n'
    return f'long {name}_(void) {{ return 0; }} __asm__(".globl {name}\\n.set {name},{name}_");\n'


def look(path: Path) -> dict[str, Any]:
    """What the provider does with one graph."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    captures = path.stem == "shallow"
    given = {"user_compute_stream": STREAM, "enable_cuda_graph": str(int(captures))}
    session = ort.InferenceSession(str(path), options, providers=[("CUDAExecutionProvider", given)])
    placed: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        placed.update(f"{part.ep_name.removesuffix('ExecutionProvider')} {node.op_type}" for node in part.get_nodes())
    binding, kept, cache = session.io_binding(), {}, 0
    for value in session.get_inputs():
        shape = [SIZES.get(size, size) for size in value.shape]
        kept[value.name] = np.zeros(int(np.prod(shape)) * TYPES[value.type], np.uint8)
        if value.name.startswith("past."):
            cache = kept[value.name].nbytes
        address = kept[value.name].ctypes.data
        binding.bind_input(value.name, "cuda", 0, ELEMENTS[value.type], shape, address)
    for value in session.get_outputs():
        shape = [SIZES.get(size, size) for size in value.shape]
        name = f"past.{value.name[8:]}" if value.name.startswith("present.") else value.name
        if name not in kept:
            kept[name] = np.zeros(max(1, int(np.prod(shape)) * TYPES[value.type]), np.uint8)
        binding.bind_output(value.name, "cuda", 0, ELEMENTS[value.type], shape, kept[name].ctypes.data)

    def run(graph: str) -> list[str]:
        before = len(_log())
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if captures:
            options.add_run_config_entry("gpu_graph_id", graph)
        session.run_with_iobinding(binding, options)
        return _log()[before:]

    run("-1")
    found = {"placed": dict(placed), "cache": cache, "run": run("-1")}
    if captures:
        run("1")
        found["replay"] = run("1")
    return found


def _log() -> list[str]:
    return Path(os.environ["CUDA_LOG"]).read_text().splitlines()


def show(engines: dict[str, Any]) -> bool:
    """Print it: whether anything is not as it should be."""
    wrong = False
    for name, found in engines.items():
        run = found["run"]
        on_cpu = {node.split()[1] for node in found["placed"] if node.startswith("CPU")}
        copies = [(int(size), kind) for size, kind in re.findall(r"(?m)^memcpy.* (\d+) kind (\d)", "\n".join(run))]
        counts = {
            "nodes on the device": sum(n for node, n in found["placed"].items() if node.startswith("CUDA")),
            "kernels": sum(line.startswith("kernel") for line in run),
            "copies between host and device": sum(kind != "3" for _, kind in copies),
            "copies of a cache": sum(size >= found["cache"] > 0 for size, _ in copies),
            "waits": sum("ynchronize" in line for line in run),
        }
        bad = {key: n for key, n in counts.items() if n and key.startswith(("copies", "waits"))}
        text = ", ".join(f"{n} {key}" for key, n in counts.items())
        click.echo(f"{name}: {text}; on the CPU: {', '.join(sorted(on_cpu)) or 'nothing'}")
        if "replay" in found:
            calls = [line.split()[0] for line in found["replay"]]
            click.echo(f"{name}: a captured run is {', '.join(calls)}")
            bad |= {} if calls == ["graphLaunch"] else {"graph": 1}
        if bad or not on_cpu <= SHAPES:
            wrong = True
            click.echo(f"{name}: NOT AS IT SHOULD BE: {bad or on_cpu - SHAPES}")
    return wrong


if __name__ == "__main__":
    main()
