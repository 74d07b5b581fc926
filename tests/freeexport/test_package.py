"""`from freeexport import Session` and the other public names of `runtime`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import freeexport
import runtime


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    root = Path(freeexport.__file__).resolve().parent.parent
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(root)])}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def test_freeexport_exports_every_public_name_of_runtime() -> None:
    assert freeexport.__all__ == runtime.__all__
    assert all(getattr(freeexport, name) is getattr(runtime, name) for name in runtime.__all__)
    assert set(runtime.__all__) < set(dir(freeexport))
    with pytest.raises(AttributeError, match="module 'freeexport' has no attribute 'session'"):
        freeexport.session  # noqa: B018


def test_heavy_packages_are_imported_on_first_use(tmp_path: Path) -> None:
    code = (
        "import sys, freeexport; print('runtime' in sys.modules, 'numpy' in sys.modules);"
        "from freeexport import Session; print(Session.__module__.startswith('runtime'), 'torch' in sys.modules)"
    )
    done = python(code, tmp_path)
    assert (done.stdout, done.stderr) == ("False False\nTrue False\n", "")


@pytest.mark.parametrize("file", ["runtime/__init__.py", "runtime/notes.txt", "runtime.py"])
def test_folder_that_shadows_the_package_is_named(file: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("")
    done = python("from freeexport import Session", tmp_path)
    if file.endswith(".txt"):
        # A folder without __init__.py gives way to a package further down the path.
        assert (done.returncode, done.stderr) == (0, "")
        return
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {tmp_path / file} hides the package runtime")
    assert "rename it" in last
