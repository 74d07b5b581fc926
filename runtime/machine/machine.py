"""Resources of this machine that the process may use.

Cores and memory as limited by the kernel and control groups (cgroup versions 1 and 2), costs
measured on this machine, the user's cache directory, and memory pages.
"""

from __future__ import annotations

import contextlib
import ctypes
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
    """Return the physical cores that affinity and cgroup quota allow, at least 1."""
    if not hasattr(os, "sched_getaffinity"):  # Windows and macOS
        import psutil  # not needed on Linux

        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    cpus = sorted(os.sched_getaffinity(0))
    cores = {
        (_topology(cpu, "physical_package_id"), _topology(cpu, "core_id") or f"cpu{cpu}")
        for cpu in cpus
    }
    quota = cpu_quota()
    return max(1, len(cores) if quota is None else min(len(cores), math.floor(quota)))


def host(threads: int) -> Host:
    """Return this machine's description for cost records, with `threads` per engine call."""
    onnxruntime = ""
    with contextlib.suppress(ImportError, AttributeError):  # reported when an engine is loaded
        import onnxruntime as ort

        onnxruntime = str(ort.__version__)
    return Host(_processor(), usable_cores(), threads, onnxruntime)


def costs_here(manifest: Manifest, threads: int) -> Costs | None:
    """Return the bundle's costs if they were measured on this idle machine with `threads` per
    engine call.

    Otherwise None: costs of another machine do not apply.
    """
    costs = manifest.costs
    if costs is None or costs.host is None or not costs.trusted:
        return None
    return costs if costs.host == host(threads) else None


def _processor() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_memory() -> int:
    """Return the bytes that can be allocated without swapping."""
    left = memory_left()
    available = _available_here()
    return available if left is None else min(available, left)


def _available_here() -> int:
    """Return the available bytes of the whole machine."""
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    import psutil  # not needed on Linux

    return int(psutil.virtual_memory().available)


def _topology(cpu: int, name: str) -> str:
    return _read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/{name}")).strip()


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return the processors that the control group and its parents allow. None without a limit."""
    quotas = [_cpu_max(_read(group / "cpu.max")) for group in _groups(root, "")]
    for group in _groups(root, "cpu"):  # version 1
        quota = _read(group / "cpu.cfs_quota_us")
        period = _read(group / "cpu.cfs_period_us")
        quotas.append(_cpu_max(f"{quota} {period}"))
    return min((quota for quota in quotas if quota is not None), default=None)


def memory_limit(root: Path = ROOT) -> int | None:
    """Return the memory limit of the control group and its parents, in bytes.

    None without a limit.
    """
    return min((limit for limit, _ in _memory(root)), default=None)


def memory_left(root: Path = ROOT) -> int | None:
    """Return the bytes left in the tightest of these groups. None without a limit."""
    return min((max(0, limit - used) for limit, used in _memory(root)), default=None)


def _memory(root: Path) -> list[tuple[int, int]]:
    """Return limit and use of each group that has a limit, in bytes."""
    pairs = [(group / "memory.max", group / "memory.current") for group in _groups(root, "")]
    version_1 = _groups(root, "memory")
    pairs += [
        (group / "memory.limit_in_bytes", group / "memory.usage_in_bytes") for group in version_1
    ]
    limits = []
    for limit, used in ((_read(limit).strip(), _read(used).strip()) for limit, used in pairs):
        # Version 1 writes "no limit" as the largest page-aligned 64-bit number.
        if limit.isdigit() and int(limit) < 1 << 60:
            limits.append((int(limit), int(used) if used.isdigit() else 0))
    return limits


def _groups(root: Path, controller: str) -> list[Path]:
    """Return the directories of the process's control group and its parents.

    `controller` is empty for version 2.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = (*line.split(":", 2), "", "")[:3]
        if controller in names.split(","):
            base = root / "sys/fs/cgroup" / controller
            group = base / path.lstrip("/")
            # In a container the path may be the host's and not exist. The base is then the group.
            return [base, *(folder for folder in (group, *group.parents) if base in folder.parents)]
    return []


def _cpu_max(text: str) -> float | None:
    """Parse "quota period" in microseconds as processors. None for "max" or a negative quota."""
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
    """Return a path under `$XDG_CACHE_HOME/freeexport`, by default ~/.cache/freeexport.

    Nothing is created.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification ignores relative paths.
    root = Path(home) if home and os.path.isabs(home) else Path.home() / ".cache"
    return root.joinpath("freeexport", *parts)


# From the kernel's uapi/asm-generic/mman-common.h, since Linux 5.14.
_MADV_POPULATE_READ = 22
# Size in bytes from which numpy requests pages of 2 MB.
LARGE = 1 << 22


def read_in_large_pages(path: Path) -> None:
    """Read the part of a file that is not in memory into pages of 2 MiB.

    Needs a file system with large pages (ext4 since Linux 6.16, XFS, btrfs). Does nothing
    elsewhere. Pages already in memory are unchanged. Releases the GIL.

    A file that was just written, or read piecewise, has small scattered pages, across which the
    processor does not prefetch. Decoding from memory-mapped weights is up to a third faster with
    large pages (docs/precision.md).
    """
    if not sys.platform.startswith("linux"):
        return
    # Errors are reported by the code that needs the file.
    with (
        contextlib.suppress(OSError, ValueError),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        mapped.madvise(mmap.MADV_HUGEPAGE)
        _read_mapped(np.frombuffer(mapped, np.uint8), writable=os.access(path, os.W_OK))


def _read_mapped(content: np.ndarray, writable: bool) -> None:
    """Read the part of a mapped file that is not in memory.

    Args:
        content: The mapped file, uint8 [n].
        writable: The process may write the file. Otherwise mincore reports every page as resident.
    """
    libc = ctypes.CDLL(None)  # the methods of mmap would keep the GIL while the disk is read
    start = ctypes.c_void_p(content.ctypes.data)
    size = ctypes.c_size_t(content.size)
    if writable:
        pages = np.zeros(-(-content.size // mmap.PAGESIZE), np.uint8)
        failed = libc.mincore(start, size, ctypes.c_void_p(pages.ctypes.data))
        # The rest takes as long as loading the engines, even if all is in memory.
        if not failed and (pages & 1).all():
            return
    libc.madvise(start, size, _MADV_POPULATE_READ)


def write_back(path: Path) -> None:
    """Write a file to disk and drop it from the page cache. Mapped pages stay."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError), path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def lazy_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return zeros, in memory that is not resident until written.

    With pages of 2 MB, the first row written to a KV cache would make its whole slot resident. This
    takes as long as hundreds of tokens, for memory that short sequences never need.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < LARGE or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # kernels without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)
