"""Files for containers and clusters name what there is, and the steps of the Dockerfile work in a plain environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from running_server import eventually
from starlette.routing import Route

from freeexport.commands.serve import command
from freeexport.serving.prometheus import GAUGES, PREFIX
from freeexport.serving.routes import application
from freeexport.serving.server import listen
from freeexport.serving.service import ServerOptions, Service

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))


def documents() -> list[dict[str, Any]]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def within(node: Any, name: str) -> list[Any]:
    """Every value below this name, at any depth."""
    if isinstance(node, list):
        return [found for part in node for found in within(part, name)]
    if not isinstance(node, dict):
        return []
    return [found for key, part in node.items() for found in ([part] if key == name else within(part, name))]


def paths() -> set[str]:
    routes = application(Service(ServerOptions([ROOT]), print)).routes
    return {route.path for route in routes if isinstance(route, Route)}


def test_image_installs_existing_extras_and_copies_the_build_files() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (named,) = re.findall(r"install --no-cache-dir --no-compile '\.\[(.*)\]'", DOCKERFILE)
    assert set(named.split(",")) <= set(extras)
    copied = [
        name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()
    ]
    assert {"pyproject.toml", "setup.py", "MANIFEST.in", "runtime", "graphs", "freeexport"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    (healthy,) = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", DOCKERFILE)
    assert healthy in paths()


def test_documents_name_existing_paths_options_and_metrics() -> None:
    for document in documents():
        assert {"apiVersion", "kind", "metadata"} <= set(document)
        assert document["metadata"]["name"] == "freeexport"
    probes = [probe["path"] for probe in within(documents(), "httpGet")]
    assert len(probes) == 5
    assert set(probes) <= paths()
    known = {name for option in command.params for name in option.opts}
    arguments = within(documents(), "args")
    assert len(arguments) == 2
    assert {part for given in arguments for part in given if part.startswith("--")} <= known
    (grace,) = within(documents(), "terminationGracePeriodSeconds")
    first = next(given for given in arguments if "--shutdown-timeout" in given)
    assert grace > float(first[first.index("--shutdown-timeout") + 1]) + 5
    (metric,) = within(documents(), "metric")
    assert metric["name"].removeprefix(PREFIX) in GAUGES


def step(pattern: str) -> str:
    (found,) = re.findall(pattern, DOCKERFILE, re.MULTILINE)
    return str(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_dockerfile_steps_build_a_healthy_server_that_writes_nothing(chat: Path, tmp_path: Path) -> None:
    source, venv = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    for names, target in re.findall(r"^COPY (?!--from)(.+) (\S+)$", DOCKERFILE, re.MULTILINE):
        for name in names.split():
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("*.so", "__pycache__", "build")
                shutil.copytree(ROOT / name, source / target, ignore=ignored)
            else:
                shutil.copy2(ROOT / name, source / target)
    # The bundle needs the kernels, whatever the variable of the build says here.
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "FREEEXPORT_KERNELS")
    plain = {name: value for name, value in os.environ.items() if name not in ours}
    install = step(r"^RUN (python -m venv .*)$").replace("/venv", str(venv))
    install = install.replace("python -m", f"{sys.executable} -m", 1)
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
