"""What the control groups around this process (cgroup versions 1 and 2) leave of the machine."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/")


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
