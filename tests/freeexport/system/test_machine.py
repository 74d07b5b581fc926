from __future__ import annotations

from pathlib import Path

import pytest

from freeexport.system.machine import detect_machine, multiplies_bfloat16, read_cpuinfo


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


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx2 avx512f avx512_vnni", False), ("avx2 avx512_bf16", True), ("amx_bf16 amx_int8", True), ("", False)],
)
def test_bfloat16_is_multiplied_only_with_instructions_for_it(flags: str, expected: bool, tmp_path: Path) -> None:
    assert multiplies_bfloat16(write(tmp_path, {"proc/cpuinfo": f"flags\t: {flags}\n"})) is expected


def test_a_system_without_proc_is_described_all_the_same(tmp_path: Path) -> None:
    machine = detect_machine(tmp_path)
    assert machine.cpu
    assert machine.memory > 0
    assert (machine.features, machine.cpu_quota, machine.memory_limit) == ((), None, None)
    assert not multiplies_bfloat16(tmp_path)
