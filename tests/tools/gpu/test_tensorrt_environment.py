"""The environment of TensorRT without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu import tensorrt_environment


def test_failing_installation_ends_in_one_line_and_leaves_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **options: object) -> None:
        raise subprocess.CalledProcessError(3, command)

    monkeypatch.setattr(sys, "argv", ["tensorrt_environment", str(tmp_path / "made")])
    monkeypatch.setattr(tensorrt_environment.shutil, "which", lambda name: name)
    monkeypatch.setattr(tensorrt_environment.subprocess, "run", fail)
    with pytest.raises(SystemExit, match=r"^error: .*python.* failed with code 3; see its message$"):
        tensorrt_environment.main()
    assert not (tmp_path / "made").exists()
