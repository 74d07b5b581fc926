from __future__ import annotations

from pathlib import Path

import pytest

from freeexport.machine import detect_machine, read_cpu_quota, read_cpuinfo, read_memory_limit


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_cpu_model_and_features_of_x86(tmp_path: Path) -> None:
    text = "processor\t: 0\nmodel name\t: Some CPU: 3 GHz\nflags\t\t: fpu avx2 avx512_vnni avx512vl\n\nprocessor\t: 1\n"
    assert read_cpuinfo(write(tmp_path, {"proc/cpuinfo": text})) == ("Some CPU: 3 GHz", ("avx2", "avx512_vnni"))


def test_features_of_arm(tmp_path: Path) -> None:
    text = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0c\n"
    assert read_cpuinfo(write(tmp_path, {"proc/cpuinfo": text})) == ("", ("asimd", "asimddp"))


def test_a_system_without_proc_is_described_all_the_same(tmp_path: Path) -> None:
    machine = detect_machine(tmp_path)
    assert machine.cpu
    assert machine.memory > 0
    assert (machine.features, machine.cpu_quota, machine.memory_limit) == ((), None, None)


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
def test_cpu_quota_is_the_smallest_around_the_process(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    assert read_cpu_quota(write(tmp_path, {"proc/self/cgroup": "0::/a/b\n", **files})) == quota


def test_cpu_quota_and_memory_limit_of_version_1(tmp_path: Path) -> None:
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
    assert (read_cpu_quota(root), read_memory_limit(root)) == (3.0, 1 << 30)


def test_memory_limit(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}
    assert read_memory_limit(write(tmp_path, files)) is None
    assert read_memory_limit(write(tmp_path, {"sys/fs/cgroup/memory.max": "2000000\n"})) == 2_000_000
