from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from freeexport.system.child import ChildError, run_child

ROOT = Path(__file__).parents[3]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Modules that a child can run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "echo_module.py").write_text(
        "import sys\nif __name__ == '__main__':\n    print(sys.argv[1:], repr(sys.stdin.read()))\n"
    )
    (tmp_path / "failing_module.py").write_text(
        "from runtime.errors import FreeExportError\nprint('x' * 200_000)\nraise FreeExportError('no luck')\n"
    )
    (tmp_path / "counting_module.py").write_text(
        "import sys, time\nfrom freeexport.system import progress\nprogress.EVERY = 0.2\n"
        "with progress.progress('counting', 4) as advance:\n    advance(3)\n    time.sleep(1)\n"
        "print('warning: hot', file=sys.stderr)\n"
    )
    (tmp_path / "silent_module.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "waiting_module.py").write_text(
        "import os, sys, time\nwith open(sys.argv[1], 'w') as file:\n    file.write(f'{os.getpid()}\\n')\n"
        "time.sleep(60)\n"
    )
    return tmp_path


def test_failure_is_reported_as_its_error_line(modules: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for module, reason in (
        ("failing_module", "^no luck$"),
        ("silent_module", "silent_module exited with 3"),
        ("no_such_child", "No module named no_such_child"),
    ):
        with pytest.raises(ChildError, match=reason):
            run_child(module)
    with pytest.raises(ChildError, match=r"^no bundle at "):
        run_child("freeexport", "inspect", str(modules / "nowhere"))
    assert capfd.readouterr() == ("", "")


def test_progress_and_warnings_of_a_child_go_to_stderr(modules: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_child("counting_module") == ""
    *lines, last = capfd.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("counting: 3 of 4 (75%), ") for line in lines)
    assert last == "warning: hot"


def test_child_returns_its_output_and_survives_other_threads_of_its_parent(modules: Path) -> None:
    """Its own starter waits for it, but a thread that was there before ends."""
    outputs: list[str] = []
    waiter = threading.Thread(target=lambda: outputs.append(run_child("echo_module", "a", "--b")))
    starter = threading.Thread(target=waiter.start)
    starter.start()
    starter.join()
    waiter.join()
    assert outputs == ["['a', '--b'] ''\n"]


def running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_child_ends_when_its_parent_is_killed(modules: Path) -> None:
    place = modules / "process"
    script = f"from freeexport.system.child import run_child\nrun_child('waiting_module', {str(place)!r})\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(modules)])}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    until = time.monotonic() + 60
    while not (place.exists() and place.read_text().endswith("\n")):
        assert parent.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    child = int(place.read_text())
    assert running(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 20
    while running(child):
        assert time.monotonic() < until, "the child lives on"
        time.sleep(0.01)
