"""The machine that decoding runs on: its processor and memory, and the limits of this process."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from runtime.engines import kernels
from runtime.machine.machine import ROOT, cpu_quota, memory_limit, usable_cores

# Instruction sets that multiply bfloat16, by their names in /proc/cpuinfo. The last one is Arm's.
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
# Instruction sets by which ONNX Runtime and torch select matrix kernels.
FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
    *BFLOAT16,
)

# Parameters of mallopt(3): M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_MAX.
_KEPT = {-1: 2**31 - 1, -2: 64 << 20, -4: 0}
_USUAL = {-1: 128 << 10, -2: 128 << 10, -4: 65536}


@dataclass(frozen=True)
class Machine:
    """Processors and memory of a machine. None means unknown, or no limit.

    Attributes:
        cpu: Name of the processor.
        features: Instruction sets that it has, of FEATURES.
        cores: Number of physical cores.
        threads: Number of logical processors.
        affinity: Logical processors that this process may run on.
        cpu_quota: Number of processors that its control group may use.
        usable_cores: Number of threads that a session starts by default.
        memory: Total memory in bytes.
        memory_available: Available memory in bytes.
        memory_limit: Memory limit of the control group in bytes.
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


def detect_machine(root: Path = ROOT) -> Machine:
    """Detect the machine.

    `root` is the directory that contains /proc and /sys, which may be missing.
    """
    cpu, features = read_cpuinfo(root)
    memory = psutil.virtual_memory()
    return Machine(
        cpu=cpu or platform.processor() or platform.machine() or "unknown",
        features=features,
        cores=psutil.cpu_count(logical=False),
        threads=psutil.cpu_count(logical=True),
        affinity=tuple(sorted(os.sched_getaffinity(0)))
        if hasattr(os, "sched_getaffinity")
        else None,
        cpu_quota=cpu_quota(root),
        usable_cores=usable_cores(),
        memory=memory.total,
        memory_available=memory.available,
        memory_limit=memory_limit(root),
    )


def kernel_instructions() -> str:
    """Return the instruction set that our kernels use here, or "" without kernels."""
    return "" if kernels.missing() else kernels.instructions()


def read_cpuinfo(root: Path = ROOT) -> tuple[str, tuple[str, ...]]:
    """Read the model name and the known FEATURES of the first processor in /proc/cpuinfo.

    The name is "" if unknown.
    """
    model = ""
    flags = set[str]()
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = model or value.strip()
        elif name.strip() in ("flags", "Features"):
            flags = flags or set(value.split())
    return model, tuple(feature for feature in FEATURES if feature in flags)


def multiplies_bfloat16(root: Path = ROOT) -> bool:
    """Return True if the processor has instructions for bfloat16.

    Without them torch's products are slow.
    """
    return any(feature in BFLOAT16 for feature in read_cpuinfo(root)[1])


def keep_freed_memory(keep: bool = True) -> bool:
    """Keep freed memory in this process for reuse.

    This saves zeroing new pages, a fifth of a training step on a CPU. Kept memory is fragmented, so
    a process grows by up to a half. `keep=False` restores the defaults of glibc.

    Returns False, without any effect, if the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        return False
    set_to = _KEPT if keep else _USUAL
    done = all(libc.mallopt(*pair) for pair in set_to.items())
    if not keep:
        libc.malloc_trim(0)
    return done
