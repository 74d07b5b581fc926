"""What this process may use of the machine: cores and memory, as the kernel and its cgroup allow."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from pathlib import Path

from runtime.bundle.costs import Costs, Host
from runtime.bundle.manifest import Manifest
from runtime.errors import EngineError
from runtime.machine.cgroup import cpu_quota, memory_left

_CPUINFO = "/proc/cpuinfo"
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/{}"


def usable_cores() -> int:
    """Physical cores this process may run on, at least 1: its affinity, less a cgroup's quota."""
    try:
        cpus = sorted(os.sched_getaffinity(0))
    except AttributeError:
        return max(1, (os.cpu_count() or 1) // 2)
    cores = {(_topology(cpu, "physical_package_id"), _topology(cpu, "core_id") or f"cpu{cpu}") for cpu in cpus}
    quota = cpu_quota()
    return max(1, len(cores) if quota is None else min(len(cores), math.floor(quota)))


def host(threads: int) -> Host:
    """This machine as costs name it, where an engine call takes so many threads."""
    onnxruntime = ""
    with contextlib.suppress(ImportError, AttributeError):  # who loads an engine says what is wrong
        import onnxruntime as ort

        onnxruntime = str(ort.__version__)
    return Host(_processor(), usable_cores(), threads, onnxruntime)


def costs_here(manifest: Manifest, threads: int) -> Costs | None:
    """The bundle's costs where they were measured on this machine, idle, with as many threads of an engine call; else
    None: what another machine takes says little of this one."""
    costs = manifest.costs
    if costs is None or costs.host is None or not costs.trusted:
        return None
    return costs if costs.host == host(threads) else None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path(_CPUINFO).read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> frozenset[str]:
    """What the first processor can, in the kernel's words; empty where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path(_CPUINFO).read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping; None where the system does not say."""
    limits = [_meminfo(), memory_left()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _topology(cpu: int, name: str) -> str | None:
    return _first_line(Path(_TOPOLOGY.format(cpu, name)))


def _meminfo() -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text().split("\n")[0].strip()
    except OSError:
        return None


def check_saturation(manifest: Manifest) -> None:
    """EngineError where products of an older bundle's 8-bit weights saturate here: ONNX Runtime adds pairs of them in
    16 bits on x86 processors without 8-bit dot products, where weights by output channel have the full range."""
    found, flags = manifest.quantization, cpu_features()
    if found is None or manifest.target != "cpu" or found.int8_range != "full" or "avx2" not in flags:
        return
    if any(engine.linears == "int8" for engine in found.engines) and not flags & {"avx512_vnni", "avx_vnni"}:
        raise EngineError(
            "this bundle's 8-bit weights need a processor with 8-bit dot products (VNNI), which this one lacks; "
            "convert the checkpoint again"
        )
