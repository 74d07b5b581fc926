"""Instruction sets are found by what real processors say of themselves. A set that a processor lacks, or that its
system does not save, would end the process with an illegal instruction."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from kernel_builds import ROOT

SOURCE = ROOT / "runtime/engines/kernels/source"
pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64"
)
# Words of CPUID that were recorded on processors (InstLatx64), as in `Identity` of platform.h. The last is what the
# processor can save.
SAVED = {"none": 0, "sse": 0x3, "avx": 0x7, "avx512": 0xE7, "amx": 0x602E7}
RECORDED = {
    "Nehalem-EP": ("756e6547 bce3bd 0 0 0 0 0", "intel"),
    "Sandy Bridge-E": ("756e6547 1fbee3bf 0 0 9c000400 0 7", "intel"),
    "Haswell-EP": ("756e6547 7dfefbff 3fbb 0 0 0 7", "intel avx2"),
    "Skylake": ("756e6547 7ffafbbf 29c67af 0 0 0 1f", "intel avx2"),
    "Skylake Xeon": ("756e6547 7ffefbff d39ffffb 8 0 0 2ff", "intel avx2 avx512"),
    "Cascade Lake": ("756e6547 7ffefbff d39ffffb 808 bc000400 0 2ff", "intel avx2 avx512 avx512-vnni"),
    "Cannon Lake": ("756e6547 7ffafbbf f2bf67eb e 9c000000 0 2ff", "intel avx2 avx512"),
    "Ice Lake": ("756e6547 7ffafbbf f2bf27ef 40405f4e bc000410 0 2e7", "intel avx2 avx512 avx512-vnni"),
    # AVX-512 without BW, DQ and VL.
    "Knights Landing": ("756e6547 7ff8f39f 1c0d23ab 1 4000000 0 e7", "intel avx2"),
    "Jasper Lake": ("756e6547 4ff8ebbf 2394a2c3 18400124 fc000400 0 3", "intel"),
    "Alder Lake, AVX-512 on": (
        "756e6547 7ffafbff f3bfa7eb 98c07fee fc9cc510 401c30 2e7",
        "intel avx2 avx2-vnni avx512 avx512-vnni avx512-bf16",
    ),
    "Alder Lake-N": ("756e6547 7ffafbbf 239ca7eb 98c007ac fc184410 810 207", "intel avx2 avx2-vnni"),
    "Lunar Lake": ("756e6547 7ffafbff 239ca7eb 994027ac fc1cc430 44c009d7 207", "intel avx2 avx2-vnni"),
    "Sapphire Rapids": (
        "756e6547 7ffefbff f3bfbffb bb417fee ffdd4430 1c30 602e7",
        "intel avx2 avx2-vnni avx512 avx512-vnni avx512-bf16 amx",
    ),
    "Granite Rapids": (
        "756e6547 7ffefbff f3bfbffb bb417fee ffdd4430 40201d30 602e7",
        "intel avx2 avx2-vnni avx512 avx512-vnni avx512-bf16 amx",
    ),
    "Zen": ("68747541 7ed8320b 209c01a9 0 0 0 7", "other avx2"),
    "Zen 3, Milan": ("68747541 7eda320b 219c97a9 40068c 10 0 207", "other avx2"),
    "Zen 4, Genoa": ("68747541 7efa320b f1bf97a9 415fce 10000010 20 2e7", "other avx2 avx512 avx512-vnni avx512-bf16"),
    "Zen 5": (
        "68747541 7ed8320b f1bf97ab 19405fce 10000110 30 2e7",
        "zen5 avx2 avx2-vnni avx512 avx512-vnni avx512-bf16",
    ),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("processors") / "processor_check"
    sources = [ROOT / "tests/processor_check.cpp", SOURCE / "platform.cpp"]
    subprocess.run(["g++", "-std=c++17", f"-I{SOURCE}", *sources, "-o", made], check=True, timeout=100)
    return made


def found(lines: list[str], *command: str | Path) -> list[str]:
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


def test_processors_get_the_instruction_sets_they_support(program: Path) -> None:
    words, expected = zip(*RECORDED.values(), strict=True)
    *names, _ = found(list(words), program)
    assert dict(zip(RECORDED, names, strict=True)) == dict(zip(RECORDED, expected, strict=True))


def test_instructions_whose_registers_the_system_does_not_save_are_not_used(program: Path) -> None:
    words = RECORDED["Sapphire Rapids"][0].rpartition(" ")[0]
    *names, _ = found([f"{words} {saved:x}" for saved in SAVED.values()], program)
    assert names == [
        "intel",
        "intel",
        "intel avx2 avx2-vnni",
        "intel avx2 avx2-vnni avx512 avx512-vnni avx512-bf16",
        "intel avx2 avx2-vnni avx512 avx512-vnni avx512-bf16 amx",
    ]
    # A part of the registers is not enough, nor are tiles without the others.
    lacking = [0x6, 0x5, 0x67, 0xC7, 0x60007, 0x202E7, 0x402E7]
    *names, _ = found([f"{words} {saved:x}" for saved in lacking], program)
    assert [name.split()[-1] for name in names] == [
        "avx2-vnni",
        "intel",
        "avx2-vnni",
        "avx2-vnni",
        "avx2-vnni",
        "avx512-bf16",
        "avx512-bf16",
    ]


def test_hidden_cpuid_bits_disable_their_instructions(program: Path) -> None:
    whole = [int(word, 16) for word in RECORDED["Sapphire Rapids"][0].split()]
    # Index of the word and bit, and what remains.
    hidden = {
        (1, 28): "intel",  # AVX
        (1, 12): "intel",  # FMA
        (1, 29): "intel",  # F16C
        (2, 5): "intel",  # AVX2
        (2, 16): "intel avx2 avx2-vnni",  # AVX512F
        (2, 17): "intel avx2 avx2-vnni",  # DQ
        (2, 30): "intel avx2 avx2-vnni",  # BW
        (2, 31): "intel avx2 avx2-vnni",  # VL
        (3, 11): "intel avx2 avx2-vnni avx512",  # VNNI
        (3, 1): "intel avx2 avx2-vnni avx512 avx512-vnni avx512-bf16",  # VBMI
        (5, 5): "intel avx2 avx2-vnni avx512 avx512-vnni",  # BF16
        (4, 22): "intel avx2 avx2-vnni avx512 avx512-vnni avx512-bf16",  # AMX-BF16
        (4, 24): "intel avx2 avx2-vnni avx512 avx512-vnni avx512-bf16",  # AMX-TILE
        (5, 4): "intel avx2 avx512 avx512-vnni avx512-bf16 amx",  # AVX-VNNI
    }
    lines = []
    for index, bit in hidden:
        words = list(whole)
        words[index] &= ~(1 << bit)
        lines.append(" ".join(f"{word:x}" for word in words))
    *names, _ = found(lines, program)
    assert dict(zip(hidden, names, strict=True)) == hidden


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc")
def test_detected_features_match_linux(program: Path) -> None:
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    (name,) = found([], program)
    avx2 = {"avx2", "fma", "f16c"} <= flags
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    expected = {
        "avx2": avx2,
        "avx2-vnni": avx2 and "avx_vnni" in flags,
        "avx512": avx512,
        "avx512-vnni": avx512 and "avx512_vnni" in flags,
    }
    assert {key: key in name.split() for key in expected} == expected


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 (Debian: qemu-user)")
@pytest.mark.parametrize(
    ("model", "expected"),
    [("qemu64", "other"), ("Nehalem", "intel"), ("SandyBridge", "intel"), ("Haswell", "intel avx2")],
)
def test_features_of_an_emulated_processor_are_detected(model: str, expected: str, program: Path) -> None:
    assert found([], "qemu-x86_64", "-cpu", model, program) == [expected]
