"""The machine as this process may use it: cores and memory, as the kernel and its control groups (cgroup versions 1 and
2) allow, the costs that were measured on it, the user's cache, and pages of memory."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle.costs import Costs, Host
from runtime.bundle.manifest import Manifest

ROOT = Path("/")


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
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping; None where the system does not say."""
    lines = _read(Path("/proc/meminfo")).splitlines()
    known = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    left = memory_left()
    return min([*known, *([] if left is None else [left])], default=None)


def _topology(cpu: int, name: str) -> str:
    return _read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/{name}")).strip()


def cpu_quota(root: Path = ROOT) -> float | None:
    """Processors that the control group, or any group around it, may keep busy; None without a limit."""
    quotas = [_cpu_max(_read(group / "cpu.max")) for group in _groups(root, "")]
    for group in _groups(root, "cpu"):  # version 1
        quotas.append(_cpu_max(_read(group / "cpu.cfs_quota_us") + " " + _read(group / "cpu.cfs_period_us")))
    return min((quota for quota in quotas if quota is not None), default=None)


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes of memory that the control group, or any group around it, may use; None without a limit."""
    return min((limit for limit, _ in _memory(root)), default=None)


def memory_left(root: Path = ROOT) -> int | None:
    """Bytes that the tightest of these groups may still take; None without a limit."""
    return min((max(0, limit - used) for limit, used in _memory(root)), default=None)


def _memory(root: Path) -> list[tuple[int, int]]:
    """Limit and use of each group that has a limit, in bytes."""
    pairs = [(group / "memory.max", group / "memory.current") for group in _groups(root, "")]
    version_1 = _groups(root, "memory")
    pairs += [(group / "memory.limit_in_bytes", group / "memory.usage_in_bytes") for group in version_1]
    found = []
    for limit, used in ((_read(limit).strip(), _read(used).strip()) for limit, used in pairs):
        # Version 1 writes "no limit" as the largest page-aligned 64-bit number.
        if limit.isdigit() and int(limit) < 1 << 60:
            found.append((int(limit), int(used) if used.isdigit() else 0))
    return found


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


def user_cache(*parts: str) -> Path:
    """A path under `$XDG_CACHE_HOME/freeexport`, by default ~/.cache/freeexport. Nothing is created."""
    home = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification: a relative path is to be ignored.
    root = Path(home) if home and os.path.isabs(home) else Path.home() / ".cache"
    return root.joinpath("freeexport", *parts)


# Of the kernel's uapi/asm-generic/mman-common.h, since Linux 5.14.
_MADV_POPULATE_READ = 22
# numpy asks for pages of 2 MB for arrays of this size and larger.
LARGE = 1 << 22


def read_in_large_pages(path: Path) -> None:
    """Read what of a file is not in memory, in pages of 2 MiB where the file system has them (ext4 since Linux 6.16,
    XFS, btrfs). What is in memory stays as it is. A system that cannot is left alone.

    Pages of a file that was written, or read a piece at a time, are small and scattered, which prefetching by the
    processor does not cross: weights that are read where a file is mapped decode up to a third faster from large ones
    (docs/precision.md).
    """
    if not sys.platform.startswith("linux"):
        return
    # Where the file cannot be read, who needs it says so.
    with (
        contextlib.suppress(OSError, ValueError),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        mapped.madvise(mmap.MADV_HUGEPAGE)
        mapped.madvise(_MADV_POPULATE_READ)


def write_back(path: Path) -> None:
    """Write a file to its disk and take it from memory, so that it is read anew. Pages that a process has mapped
    stay."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError), path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def lazy_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros, as numpy's. In pages of 2 MB a row written to a KV cache would bring in its slot as a whole, which takes
    as long as hundreds of tokens, and memory that a short sequence never needs."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < LARGE or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that has no huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)
