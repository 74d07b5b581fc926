"""The steps of the Dockerfile in a plain virtual environment: what it copies, installs, starts and asks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running_server import eventually

from freeexport.serving.server import listen

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def step(pattern: str) -> str:
    (found,) = re.findall(pattern, DOCKERFILE, re.MULTILINE)
    return str(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_steps_of_the_dockerfile_make_a_server_that_is_healthy_and_writes_nothing(
    chat: Path, tmp_path: Path
) -> None:
    source, venv = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    for names, target in re.findall(r"^COPY (?!--from)(.+) (\S+)$", DOCKERFILE, re.MULTILINE):
        for name in names.split():
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("*.so", "__pycache__", "build")
                shutil.copytree(ROOT / name, source / target, ignore=ignored)
            else:
                shutil.copy2(ROOT / name, source / target)
    plain = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    install = (
        step(r"^RUN (python -m venv .*)$").replace("/venv", str(venv)).replace("python -m", f"{sys.executable} -m", 1)
    )
    subprocess.run(["bash", "-euc", install], cwd=source, env=plain, check=True, timeout=1500)
    shutil.rmtree(source)

    with listen("127.0.0.1", 0) as free:
        port = str(free.getsockname()[1])
    settings = dict(part.split("=", 1) for part in step(r"^ENV (.*)$").split())
    plain |= {**settings, "PATH": f"{venv}/bin:{os.environ['PATH']}", "HOME": str(tmp_path / "home")}
    command = json.loads(step(r"^ENTRYPOINT (.*)$")) + json.loads(step(r"^CMD (.*)$"))
    command = [{"/bundle": str(chat), "8000": port}.get(part, part) for part in command]
    healthy = [part.replace("8000", port) for part in json.loads(step(r"^HEALTHCHECK .* CMD (.*)$"))]
    before = {path: path.stat().st_mtime_ns for path in venv.rglob("*")}
    with subprocess.Popen(command, cwd=tmp_path, env=plain, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        try:
            assert eventually(lambda: subprocess.run(healthy, env=plain, capture_output=True).returncode == 0, 120)
        finally:
            server.send_signal(signal.SIGTERM if step(r"^STOPSIGNAL (\w+)$") == "SIGTERM" else signal.SIGKILL)
        assert server.wait(60) == 0
    assert {path: path.stat().st_mtime_ns for path in venv.rglob("*")} == before
    assert not (tmp_path / "home").exists()
