"""Kernels for processors that this machine is not, under an emulator: the same bits as here."""

import platform
import shutil

import pytest
from kernel_builds import check_program, run

CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [program for program in ("g++", CROSS, QEMU) if shutil.which(program) is None]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (Debian: g++-aarch64-linux-gnu, qemu-user)")
def test_neon_gives_the_bits_of_plain_cpp_there_and_here(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    native = run(str(check_program(tmp_path / "here", "g++", platform.machine())))
    digest = native.split()[-1]
    assert len(digest) == 16
    program = str(check_program(tmp_path / "there", CROSS, "aarch64"))
    for processor, names in (("max", ("neon-i8mm", "neon")), ("cortex-a76", ("neon",)), ("cortex-a72", ())):
        text = run(QEMU, "-cpu", processor, program, *names)
        assert f"chosen {names[0] if names else 'scalar'}\n" in text
        assert f"digest {digest}\n" in text
    with pytest.raises(AssertionError, match="neon: is not to be had here"):
        run(QEMU, "-cpu", "cortex-a72", program, "neon")
