"""The machine as decoding sees it: processor, the share of it that this process may use, and memory."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

from runtime.machine import usable_cores

# Instruction sets that decide which matrix kernels ONNX Runtime picks, by their names in /proc/cpuinfo.
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")

_ROOT = Path("/")


@dataclass(frozen=True)
class Machine:
    """Counts of processors, and memory in bytes. None means that the system does not tell, or sets no limit.

    `threads` are logical processors of the machine, `affinity` those that this process may run on, and `cpu_quota`
    how many of them its control group may keep busy. `usable_cores` is how many threads a session starts by default.
    """

    cpu: str
    features: tuple[str, ...]
    cores: int | None
    threads: int | None
    affinity: tuple[int, ...] | None
    cpu_quota: float | None
    usable_cores: int
    memory: int
    memory_available: int
    memory_limit: int | None


def detect_machine(root: Path = _ROOT) -> Machine:
    """Read the machine; never fails for want of /proc or /sys, which are looked up under `root`."""
    cpu, features = read_cpuinfo(root)
    memory = psutil.virtual_memory()
    return Machine(
        cpu=cpu or platform.processor() or platform.machine() or "unknown",
        features=features,
        cores=psutil.cpu_count(logical=False),
        threads=psutil.cpu_count(logical=True),
        affinity=tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else None,
        cpu_quota=read_cpu_quota(root),
        usable_cores=usable_cores(),
        memory=memory.total,
        memory_available=memory.available,
        memory_limit=read_memory_limit(root),
    )


def read_cpuinfo(root: Path = _ROOT) -> tuple[str, tuple[str, ...]]:
    """The model name ("" where unknown) and the known FEATURES of the first processor in /proc/cpuinfo."""
    model, flags = "", set[str]()
    for line in _read(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = model or value.strip()
        elif name.strip() in ("flags", "Features"):
            flags = flags or set(value.split())
    return model, tuple(feature for feature in FEATURES if feature in flags)


def read_cpu_quota(root: Path = _ROOT) -> float | None:
    """Processors that the control group, or any group around it, may keep busy; None without a limit."""
    quotas = [_cpu_max(_read(group / "cpu.max")) for group in _groups(root, "")]
    for group in _groups(root, "cpu"):  # version 1
        quotas.append(_cpu_max(_read(group / "cpu.cfs_quota_us") + " " + _read(group / "cpu.cfs_period_us")))
    return min((quota for quota in quotas if quota is not None), default=None)


def read_memory_limit(root: Path = _ROOT) -> int | None:
    """Bytes of memory that the control group, or any group around it, may use; None without a limit."""
    texts = [_read(group / "memory.max") for group in _groups(root, "")]
    texts += [_read(group / "memory.limit_in_bytes") for group in _groups(root, "memory")]
    # Version 1 writes "no limit" as the largest page-aligned 64-bit number.
    limits = [int(text) for text in texts if text.strip().isdigit() and int(text) < 1 << 60]
    return min(limits, default=None)


def _groups(root: Path, controller: str) -> list[Path]:
    """Directories of this process's control group and of those around it; `controller` "" is version 2."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = (*line.split(":", 2), "", "")[:3]
        if controller in names.split(","):
            base = root / "sys/fs/cgroup" / controller
            group = base / path.lstrip("/")
            # In a container the path may be the host's, which does not exist inside: the base is then the own group.
            return [base, *(folder for folder in (group, *group.parents) if base in folder.parents)]
    return []


def _cpu_max(text: str) -> float | None:
    """Processors from "quota period" in microseconds; "max" or a negative quota is no limit."""
    fields = text.split()
    if len(fields) != 2 or not all(field.isdigit() for field in fields) or int(fields[1]) == 0:
        return None
    return int(fields[0]) / int(fields[1])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
