from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from freeexport.system.machine import detect_machine, multiplies_bfloat16, read_cpuinfo

X86 = "processor\t: 0\nmodel name\t: Some CPU: 3 GHz\nflags\t\t: fpu avx2 avx512_vnni avx512vl\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0c\n"


@pytest.mark.parametrize(
    ("text", "model", "features", "bfloat16"),
    [
        (X86, "Some CPU: 3 GHz", ("avx2", "avx512_vnni"), False),
        (ARM, "", ("asimd", "asimddp"), False),
        ("flags\t: avx2 avx512_bf16\n", "", ("avx2", "avx512_bf16"), True),
        ("flags\t: amx_bf16\n", "", ("amx_bf16",), True),
    ],
)
def test_processor_model_and_features_are_read(
    text: str, model: str, features: tuple[str, ...], bfloat16: bool, tmp_path: Path
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(text)
    assert read_cpuinfo(tmp_path) == (model, features)
    assert multiplies_bfloat16(tmp_path) is bfloat16


def test_system_without_proc_is_described(tmp_path: Path) -> None:
    machine = detect_machine(tmp_path)
    assert machine.cpu
    assert machine.memory > 0
    assert (machine.features, machine.cpu_quota, machine.memory_limit) == ((), None, None)
    assert not multiplies_bfloat16(tmp_path)


_FAULTS = """
import ctypes, resource, sys
from freeexport.system.machine import keep_freed_memory

if sys.argv[1] != "never":
    keep_freed_memory()
if sys.argv[1] == "no more":
    keep_freed_memory(False)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def use():
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_freed_large_block_is_reused_without_page_faults() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < faults("never") / 4
    assert faults("no more") > 4 * faults("keep")
