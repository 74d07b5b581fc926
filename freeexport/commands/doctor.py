"""`freeexport doctor`: check the installation and the machine, and list what to install."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from freeexport import __version__
from freeexport.commands.verb_options import SectionedCommand
from freeexport.system.extras import PURPOSES, install_command, installed_version, missing_of
from freeexport.system.machine import detect_machine
from freeexport.system.page import human_bytes, pairs, print_page
from runtime.engines.cuda.attention import choose_attention
from runtime.engines.cuda.driver import dotted
from runtime.engines.kernels import instructions, missing
from runtime.engines.tensorrt.files import import_tensorrt
from runtime.errors import EngineError, first_line
from runtime.machine.device import CUDA_PROVIDER, Device

# Distributions that all install the import package `onnxruntime`. A later one overwrites an earlier
# one.
GPU_WHEEL = "onnxruntime-gpu"
WHEELS = ("onnxruntime", GPU_WHEEL, "onnxruntime-directml", "onnxruntime-openvino")
PACKAGES = (
    "numpy",
    "tokenizers",
    "jinja2",
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
)
# The ONNX model y = x + x over float32[1] (opset 13), serialized so that the probe does not need
# `onnx`.
_PROBE = bytes.fromhex(
    "08083a350a0e0a01780a017812017922034164641201675a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a00100d"
)
_NOT_LOADED = "cannot run operators here: libraries or device missing"

VersionOf = Callable[[str], str | None]


@click.command(cls=SectionedCommand)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Diagnose this installation and machine. Exits with code 1 if decoding cannot work.

    \b
    Example:
      freeexport doctor
    """
    report = examine()
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show(report)
    ctx.exit(0 if report["ok"] else 1)


def examine(version_of: VersionOf = installed_version) -> dict[str, Any]:
    """Examine the installation and the machine, and return JSON values.

    `problems` are the reasons why decoding cannot work, each with a remedy. `version_of` returns
    the version of a distribution, or None.
    """
    wheels = {wheel: version for wheel in WHEELS if (version := version_of(wheel))}
    providers = list[dict[str, Any]]()
    problems = wheel_problems(list(wheels))
    if not problems:
        providers, problems = probe_onnxruntime(next(iter(wheels)))
    why_not = missing()
    if why_not is not None:
        compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
        why_not += (
            f"{'' if compiler else '; no C++ compiler is found here'}; until then ONNX Runtime's "
            "slower ones are "
        )
        why_not += "used"
    return {
        "ok": not problems,
        "freeexport": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "wheels": wheels,
        "packages": {name: version_of(name) for name in PACKAGES},
        "providers": providers,
        "cuda": check_cuda(version_of) | {"attention": check_attention(providers)},
        "tensorrt": check_tensorrt(version_of),
        "machine": asdict(detect_machine()),
        "kernels": why_not or instructions(),
        "without_kernels": why_not is not None,
        "missing": [
            {
                "extra": extra,
                "purpose": purpose,
                "packages": names,
                "command": install_command(extra),
            }
            for extra, purpose in PURPOSES.items()
            if (names := missing_of(extra, version_of))
        ],
        "problems": problems,
    }


def wheel_problems(wheels: Sequence[str]) -> list[str]:
    """Return why this set of ONNX Runtime wheels cannot work. Exactly one wheel has no problems."""
    if not wheels:
        return [
            f"ONNX Runtime is not installed; run: {install_command('cpu')}  (on an NVIDIA GPU: "
            "[gpu])"
        ]
    if len(wheels) > 1:
        # Removing one wheel deletes files of the other, so all of them must be removed.
        remove = f"pip uninstall -y {' '.join(wheels)}"
        install = install_command("gpu" if GPU_WHEEL in wheels else "cpu")
        return [f"{' and '.join(wheels)} overwrite each other; run: {remove} && {install}"]
    return []


def probe_onnxruntime(wheel: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Try every provider compiled into the installed wheel.

    Returns the providers, and the reasons why decoding cannot work.
    """
    try:
        ort = importlib.import_module("onnxruntime")
        names = list(ort.get_available_providers())
    except Exception as error:  # a broken wheel raises ImportError, AttributeError or OSError
        repair = f"pip install --force-reinstall --no-deps {wheel}"
        return [], [f"{wheel} is installed but does not load ({first_line(error)}); run: {repair}"]
    problems = {name: provider_problem(ort, name) for name in names}
    providers = [
        {"name": name, "usable": not why, "problem": why} for name, why in problems.items()
    ]
    if all(problems.values()):
        return providers, [
            "no execution provider of onnxruntime works on this machine; see the list of providers"
        ]
    return providers, []


def provider_problem(ort: Any, name: str) -> str:
    """Run a one-node model on provider `name`, without fallback to the CPU.

    Returns the reason why it fails, or "".
    """
    import numpy

    try:
        ort.set_default_logger_severity(4)  # providers that fail to load are verbose
        options = ort.SessionOptions()
        if name != "CPUExecutionProvider":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        session = ort.InferenceSession(_PROBE, options, providers=[name], enable_fallback=0)
        if name not in session.get_providers():
            return _NOT_LOADED
        (result,) = session.run(None, {"x": numpy.ones(1, numpy.float32)})
    except Exception as error:  # any error means that the provider is not usable
        return _NOT_LOADED if "fallback to CPU EP" in str(error) else first_line(error)
    return "" if result[0] == 2.0 else f"computed 1 + 1 = {result[0]}"


def check_cuda(version_of: VersionOf) -> dict[str, Any]:
    """Check that onnxruntime-gpu, the driver and cuDNN fit together.

    Returns the CUDA version (`wanted`) and the major version of cuDNN that the wheel was built for,
    the newest CUDA version that the driver supports, and the problems with their remedies.
    """
    if version_of(GPU_WHEEL) is None:
        return {"wanted": None, "cudnn": None, "driver": None, "bindings": None, "problems": []}
    wanted = _built_for()
    requires = list[str]()
    with suppress(metadata.PackageNotFoundError):
        requires = metadata.requires(GPU_WHEEL) or []
    cudnn = next(
        (
            version[1]
            for line in requires
            if (version := re.match(r"nvidia-cudnn-cu\d+~=(\d+)", line))
        ),
        None,
    )
    bindings = version_of("cuda-bindings")
    number = _driver_version()
    known = dotted(number) if number else None
    problems = []
    if wanted and number and number // 1000 < int(wanted.split(".")[0]):
        problems.append(
            f"{GPU_WHEEL} requires CUDA {wanted}, but the driver supports up to {known}; install "
            "a newer driver"
        )
    if bindings is None:
        problems.append("GPU sessions require cuda-python; pip install 'freeexport[gpu]'")
    elif not number:
        problems.append("no NVIDIA driver is loaded")
    if cudnn and wanted and not version_of(f"nvidia-cudnn-cu{wanted.split('.')[0]}"):
        whole = f"pip install '{GPU_WHEEL}[cuda,cudnn]'"
        problems.append(
            f"cuDNN {cudnn} is not installed as a package; "
            f"unless it is installed on the system, run: {whole}"
        )
    return {
        "wanted": wanted,
        "cudnn": cudnn,
        "driver": known,
        "bindings": bindings,
        "problems": problems,
    }


def check_attention(providers: Sequence[dict[str, Any]]) -> str | None:
    """Return which of ONNX Runtime's attention kernels sessions on the first GPU use, in fp16.

    Returns the reason if they cannot use any, and None without a usable CUDA provider.
    """
    if not any(one["name"] == CUDA_PROVIDER and one["usable"] for one in providers):
        return None
    try:
        kernels = choose_attention(Device(0), "fp16", kv_heads=4, head_dim=64, rows=64)
    except EngineError as error:
        return str(error)
    return f"unfused, because fused: {kernels.problem}" if kernels.problem else "fused"


def _built_for() -> str | None:
    """Return the CUDA version that the wheel was built for, without importing it."""
    spec = importlib.util.find_spec("onnxruntime")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        with suppress(OSError):
            text = (Path(place) / "capi" / "build_and_package_info.py").read_text()
            if match := re.search(r"cuda_version = '([\d.]+)'", text):
                return match[1]
    return None


def _driver_version() -> int:
    """Return the CUDA version of the driver, 13000 for 13.0.

    Returns 0 if there is no driver, or cuda-python is not installed.
    """
    with suppress(ImportError):
        from cuda.bindings import runtime

        failed, version = runtime.cudaDriverGetVersion()
        return 0 if int(failed) else int(version)
    return 0


def check_tensorrt(version_of: VersionOf) -> dict[str, str | None]:
    """Return the installed version of TensorRT, and why it cannot build or run engines, or ""."""
    version = version_of("tensorrt")
    problem = ""
    if version is not None:
        try:
            version = str(import_tensorrt().__version__)
        except EngineError as error:
            problem = str(error)
    return {"version": version, "problem": problem}


def _show(report: dict[str, Any]) -> None:
    versions = {**report["wheels"], **report["packages"]}
    providers = [
        (one["name"], "usable" if one["usable"] else f"not usable: {one['problem']}")
        for one in report["providers"]
    ]
    tensorrt = report["tensorrt"]
    usable = (
        f"{tensorrt['version']}: "
        f"{tensorrt['problem'] or 'can build engines, and run them on a GPU'}"
    )
    print_page(
        [
            pairs(
                "Versions", [(name, report[name]) for name in ("freeexport", "python", "platform")]
            ),
            pairs(
                "Packages",
                [(name, version or "not installed") for name, version in versions.items()],
            ),
            pairs("Providers", providers),
            pairs("CUDA", _cuda_rows(report["cuda"]) if GPU_WHEEL in versions else []),
            pairs("TensorRT", [("tensorrt", usable if tensorrt["version"] else "not installed")]),
            pairs(
                "Machine",
                [*_machine_rows(report["machine"]), ("freeexport's kernels", report["kernels"])],
            ),
        ]
    )
    if report["without_kernels"]:
        click.echo(f"slow: {report['kernels']}")
    for one in report["missing"]:
        click.echo(f"optional, to {one['purpose']}: {one['command']}")
    for problem in report["problems"]:
        click.echo(f"problem: {problem}")
    if report["ok"]:
        click.echo("This installation can decode.")


def _cuda_rows(device: dict[str, Any]) -> list[tuple[str, str]]:
    built_for = (
        f"built for CUDA {device['wanted'] or 'unknown'}, cuDNN {device['cudnn'] or 'unknown'}"
    )
    driver = f"CUDA {device['driver']}" if device["driver"] else "not known"
    rows = [
        (GPU_WHEEL, built_for),
        ("driver", driver),
        ("cuda-bindings", device["bindings"] or "not installed"),
    ]
    if device.get("attention"):
        rows.append(("attention", device["attention"]))
    return rows + [("does not fit", problem) for problem in device["problems"]]


def _machine_rows(machine: dict[str, Any]) -> list[tuple[str, str]]:
    affinity = machine["affinity"]
    quota = machine["cpu_quota"]
    limit = machine["memory_limit"]
    memory = (
        f"{human_bytes(machine['memory'])}, {human_bytes(machine['memory_available'])} available"
    )
    return [
        ("processor", machine["cpu"]),
        ("features", " ".join(machine["features"]) or "none known"),
        ("cores, threads", f"{machine['cores'] or 'unknown'}, {machine['threads'] or 'unknown'}"),
        ("may run on", "all" if affinity is None else " ".join(map(str, affinity))),
        ("control group's limit", "none" if quota is None else f"{quota:g} processors"),
        ("threads of a session", str(machine["usable_cores"])),
        ("memory", memory),
        ("control group's memory", "none" if limit is None else human_bytes(limit)),
    ]
