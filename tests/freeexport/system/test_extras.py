"""The optional dependencies: what commands import is in the extras that they need, and pages install what they run."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from freeexport.cli import GROUPS
from freeexport.system.extras import NEEDED, distribution_of, extras, how_to_install

ROOT = Path(__file__).resolve().parents[3]
OURS = ("freeexport", "graphs", "runtime")
VERBS = [verb for group in GROUPS.values() for verb in group]
# Extras for an option or a device; without them a verb still works.
OPTIONAL = ("gpu", "tensorrt", "optimum", "grammar", "audio", "m4a", "metrics", "evaluate")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, but for type checkers."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def reached(module: str) -> dict[str, str]:
    """The distributions that a module and all that it imports of this project may import, and the module that does."""
    found: dict[str, str] = {}
    seen = set[Path]()
    pending = [(module, "")]
    while pending:
        name, importer = pending.pop()
        if name.partition(".")[0] not in OURS:
            if name.partition(".")[0] not in sys.stdlib_module_names:
                found.setdefault(distribution_of(name), importer)
            continue
        place = ROOT / name.replace(".", "/")
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file() and path not in seen:
                seen.add(path)
                pending += [(other, name) for other in imported(path)]
    return found


def normal(names: set[str] | tuple[str, ...] | list[str]) -> set[str]:
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def brought(*chosen: str) -> set[str]:
    """The distributions that extras bring, with those that freeexport and these name themselves."""
    first = set[str]()
    for line in metadata.requires("freeexport") or ():
        if "extra ==" not in line:
            first |= normal([re.split(r"[^\w.-]", line)[0]])
    for extra in chosen:
        first |= normal(extras()[extra])
    second = set[str]()
    for name in first:
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of a device that is not here
            continue
        second |= normal([re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line])
    return first | second


@pytest.mark.parametrize("verb", VERBS)
def test_imports_of_a_command_are_in_its_extras(verb: str) -> None:
    found = reached(f"freeexport.commands.{verb}")
    known = brought("cpu", *NEEDED[verb], *OPTIONAL)
    # A bundle is run without a checkpoint; only some options of these verbs read one.
    if not verb_needs_torch(verb):
        known |= brought("convert")
    assert {name: by for name, by in found.items() if normal([name]).isdisjoint(known)} == {}


def verb_needs_torch(verb: str) -> bool:
    return "torch" in {name for extra in NEEDED[verb] for name in extras()[extra]}


def test_every_command_declares_its_extras() -> None:
    assert list(NEEDED) == VERBS
    assert {extra for needed in NEEDED.values() for extra in needed} <= extras().keys()


def test_extra_all_is_enough_for_every_command() -> None:
    whole = set(extras()["all"])
    for extra in ("cpu", "grammar", *(extra for needed in NEEDED.values() for extra in needed)):
        assert set(extras()[extra]) <= whole, extra
    assert whole.isdisjoint({"onnxruntime-gpu", "tensorrt", "cuda-python"})


def test_every_extra_that_is_named_exists() -> None:
    """In pages, messages, recipes and the Makefile."""
    named = dict[str, str]()
    for path in [*PAGES, ROOT / "Makefile", *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*"),
                 *(path for name in (*OURS, "tools") for path in ROOT.glob(f"{name}/**/*.py"))]:  # fmt: skip
        if path.is_file():
            for listed in re.findall(r"(?:\.|\bfreeexport|\.whl\))\[([a-z,]+)\]", path.read_text(encoding="utf-8")):
                named |= dict.fromkeys(listed.split(","), path.name)
    assert {"all", "cpu", "grammar", "dev"} <= named.keys()
    assert {extra: path for extra, path in named.items() if extra not in (*extras(), "dev")} == {}


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem.startswith(("README", "tutorial"))])
def test_pages_install_what_their_commands_need(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    installed = [extra for listed in re.findall(r"pip install .*\[([a-z,]+)\]", text) for extra in listed.split(",")]
    packages = {name for extra in installed for name in extras()[extra]}
    lines = re.findall(r"^(?: {4})?freeexport ([a-z]+) ", text, re.MULTILINE)
    assert set(lines) <= NEEDED.keys()
    needed = {"cpu", *(extra for verb in lines for extra in NEEDED[verb])}
    if re.search(r"json_schema|response_format|\bregex=|grammar=", text):
        needed.add("grammar")
    # The paper's comparison is a tool, and runs verbs by itself.
    assert lines or page.stem == "tutorial-paper"
    assert {extra for extra in needed if not packages >= set(extras()[extra])} == set()


@pytest.mark.parametrize("verb", ["convert", "exits"])
def test_missing_transitive_package_names_the_extra_of_the_command(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra `convert`, the first import that fails is one of onnx_ir's packages."""
    monkeypatch.setattr("freeexport.system.extras.missing_of", lambda extra: ("onnx",) if extra == "convert" else ())
    assert how_to_install("ml_dtypes", verb) == "onnx is not installed; run: pip install 'freeexport[convert]'"
    assert how_to_install("unknown") == "unknown is not installed; run: pip install freeexport"
