from __future__ import annotations

from pathlib import Path

import pytest

from runtime.machine import machine
from runtime.machine.machine import available_memory, cpu_quota, memory_left, memory_limit


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"sys/fs/cgroup/cpu.max": "400000 100000\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 4.0),
        ({"sys/fs/cgroup/cpu.max": "400000 100000\n", "sys/fs/cgroup/a/cpu.max": "200000 100000\n"}, 2.0),
        ({"sys/fs/cgroup/cpu.max": "nonsense\n"}, None),
        ({}, None),
    ],
)
def test_cpu_quota_is_the_smallest_of_all_parent_groups(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    assert cpu_quota(write(tmp_path, {"proc/self/cgroup": "0::/a/b\n", **files})) == quota


def test_cpu_quota_and_memory_limit_are_read_from_cgroup_v1(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:memory:/job\n4:cpu,cpuacct:/job\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "300000\n",
        "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1073741824\n",
    }
    root = write(tmp_path, files)
    assert (cpu_quota(root), memory_limit(root)) == (3.0, 1 << 30)


def test_memory_left_is_that_of_the_tightest_group(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": "1000\n",
        "sys/fs/cgroup/a/memory.current": "900\n",
        "sys/fs/cgroup/a/b/memory.max": "500\n",
        "sys/fs/cgroup/a/b/memory.current": "100\n",
    }
    assert memory_left(write(tmp_path, files)) == 100
    assert memory_left(tmp_path / "elsewhere") is None


def test_available_memory_is_the_smaller_of_machine_and_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: "MemFree: 1 kB\nMemAvailable:   3 kB\nSwapFree: 9 kB\n")
    monkeypatch.setattr(machine, "memory_left", lambda: None)
    assert available_memory() == 3 * 1024
    monkeypatch.setattr(machine, "memory_left", lambda: 1000)
    assert available_memory() == 1000
