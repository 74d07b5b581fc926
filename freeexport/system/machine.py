"""The machine as decoding sees it: processor, the share of it that this process may use, and memory."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from runtime import kernels
from runtime.machine.machine import ROOT, cpu_quota, memory_limit, usable_cores

# Instruction sets that multiply bfloat16 (the last one's processors are Arm's), by their names in /proc/cpuinfo.
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
# Instruction sets that decide which matrix kernels ONNX Runtime and torch pick.
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

# For mallopt(3): M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_MAX.
_KEPT = {-1: 2**31 - 1, -2: 64 << 20, -4: 0}
_USUAL = {-1: 128 << 10, -2: 128 << 10, -4: 65536}


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


def detect_machine(root: Path = ROOT) -> Machine:
    """Read the machine; never fails for want of /proc or /sys, which are looked up under `root`."""
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
    """The instructions of our kernels here, as `runtime.kernels` names them; "" where there are none."""
    return "" if kernels.missing() else kernels.instructions()


def read_cpuinfo(root: Path = ROOT) -> tuple[str, tuple[str, ...]]:
    """The model name ("" where unknown) and the known FEATURES of the first processor in /proc/cpuinfo."""
    model, flags = "", set[str]()
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
    """Whether the processor has instructions for it; without them torch's bfloat16 products are slow."""
    return any(feature in BFLOAT16 for feature in read_cpuinfo(root)[1])


def keep_freed_memory(keep: bool = True) -> bool:
    """Keep what this process frees, for it to use again without the system's zeroed pages: a fifth of a step on a CPU.
    What is kept is in pieces, so that a process grows by up to a half; `keep=False` goes back to the usual.

    False, and nothing changes, without glibc.
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
