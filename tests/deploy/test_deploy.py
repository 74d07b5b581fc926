"""Files for containers and clusters name what there is. Docker and Kubernetes themselves are not run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.routing import Route

from freeexport.commands.serve import command
from freeexport.serving.routes import application
from freeexport.serving.service import ServerOptions, Service

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text(encoding="utf-8")
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


def test_the_image_installs_extras_that_exist_and_copies_what_the_build_needs() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (named,) = re.findall(r"install --no-cache-dir '\.\[(.*)\]'", DOCKERFILE)
    assert set(named.split(",")) <= set(extras)
    copied = [
        name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()
    ]
    assert {"pyproject.toml", "setup.py", "MANIFEST.in", "runtime", "graphs", "freeexport"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    (healthy,) = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", DOCKERFILE)
    assert healthy in paths()


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_document_has_a_kind_and_a_name(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        assert {"apiVersion", "kind", "metadata"} <= set(document)
        assert document["metadata"]["name"] == "freeexport"


def test_probes_ask_paths_that_there_are() -> None:
    probes = [probe["path"] for probe in within(documents(), "httpGet")]
    assert len(probes) == 5
    assert set(probes) <= paths()


def test_options_of_the_servers_exist_and_the_shutdown_fits_the_grace_period() -> None:
    known = {name for option in command.params for name in option.opts}
    arguments = within(documents(), "args")
    assert len(arguments) == 2
    assert {part for given in arguments for part in given if part.startswith("--")} <= known
    (grace,) = within(documents(), "terminationGracePeriodSeconds")
    first = next(given for given in arguments if "--shutdown-timeout" in given)
    assert grace > float(first[first.index("--shutdown-timeout") + 1]) + 5


def test_replicas_follow_a_metric_that_there_is() -> None:
    from freeexport.serving.metrics import GAUGES, PREFIX

    (metric,) = within(documents(), "metric")
    assert metric["name"].removeprefix(PREFIX) in GAUGES
