"""All commands and programs in the documentation run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import BY_NAME, CASES, Case
from command_line import invoke
from gguf_model import write_gguf
from running_server import command

import runtime.errors
from freeexport.checkpoints.exit_file import ExitFile, write_exit_file
from runtime.errors import FreeExportError
from tools.site_links import on_page_markdown

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Tutorials whose commands run here. That of the paper takes hours; tests/tools/paper/test_compare.py runs its command.
TUTORIALS = sorted(page for page in DOCS.glob("tutorial-*.md") if page.stem != "tutorial-paper")
# Pages whose links and names of files must exist. CHANGELOG.md also names what was removed.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(DOCS.rglob("*.md"))]
RUN = "<!-- run -->"
# A server, and requests to it.
SERVE = "<!-- serve -->"
# The README's model on the hub. A directory of this name stands in for it.
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(page: Path, mark: str = RUN) -> list[tuple[str, str]]:
    """Return language and text of each block below `mark`, in order."""
    text = page.read_text(encoding="utf-8")
    found: list[tuple[str, str]] = re.findall(re.escape(mark) + r"\n```(\w*)\n(.*?)```", text, re.DOTALL)
    return found


def test_examples_import_from_freeexport() -> None:
    named = {page.name for page in PAGES if re.search(r"^(from|import) runtime\b", page.read_text(), re.MULTILINE)}
    assert not named


def run_page(page: Path) -> None:
    """Run the marked blocks of a page in order, in the working directory."""
    for language, text in blocks(page, RUN):
        if language == "python":
            run_program([sys.executable, "-c", text])
            continue
        for line in text.replace("\\\n", " ").strip().splitlines():
            if line.startswith("freeexport "):
                run_verb(line)
            else:
                run_program(["bash", "-euc", line])


def run_program(arguments: list[str]) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    packages = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": packages}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments[-1]}\n{done.stderr}"


def run_verb(line: str) -> None:
    """Run a command in this process, so that torch is imported once. Supports `> FILE` at the end."""
    command, _, file = line.partition(" > ")
    arguments = shlex.split(command, comments=True)[1:]
    result = invoke(*arguments)
    assert result.exit_code == 0, f"{line}\n{result.output}"
    if file:
        Path(file).write_text(result.stdout, encoding="utf-8")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[Case], Path]) -> Path:
    case = next(case for case in CASES if case.layers > 3)
    model = tmp_path / "path" / "to" / "checkpoint"
    shutil.copytree(checkpoint(case), model)
    shutil.copytree(checkpoint(BY_NAME["llama-tied"]), tmp_path / HUB_MODEL)
    write_gguf(tmp_path / "model.gguf")
    # The exit is said to be trained, so that the checkpoint can be calibrated.
    write_exit_file(model, ExitFile(1, "0" * 64, "ce", "full"))
    lines = [json.dumps({"input": f"Once upon a time, {number}"}) for number in range(20)]
    (tmp_path / "calibration.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_and_the_program_of_the_readme_run_in_order(workplace: Path) -> None:
    assert {language for language, _ in blocks(ROOT / "README.md", RUN)} == {"", "python"}
    run_page(ROOT / "README.md")
    ((_, text),) = blocks(ROOT / "README.md", SERVE)
    serve, *requests = text.strip().splitlines()
    assert serve.startswith("freeexport serve ")
    assert requests
    arguments = shlex.split(serve.replace("--port 8000", "--port 0"))[2:]
    with command(*arguments) as (_, url, _):
        for request in requests:
            run_program(["bash", "-euc", request.replace("http://127.0.0.1:8000", url)])


def test_the_readme_shows_one_line_of_examples() -> None:
    ((_, text),) = re.findall(r"```(json)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert json.loads(text).keys() == {"input", "target"}


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_the_commands_and_programs_of_a_tutorial_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_every_command_and_program_of_a_tutorial_is_run() -> None:
    assert len(TUTORIALS) == 3
    for page in TUTORIALS:
        fences = re.findall(r"^```\w*\n", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(blocks(page, RUN)) == len(fences) / 2


def test_programs_comparing_modes_do_not_draft_from_earlier_outputs() -> None:
    programs = [
        text
        for page in [ROOT / "README.md", *DOCS.glob("*.md")]
        for text in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        if '"full"' in text and '"lossless"' in text
    ]
    assert programs
    assert all("draft_memory_mb=0" in text for text in programs)


def test_the_api_page_lists_every_error_of_the_runtime() -> None:
    listed = (DOCS / "api.md").read_text(encoding="utf-8").partition("## Errors")[2]
    for name, error in vars(runtime.errors).items():
        if isinstance(error, type) and issubclass(error, FreeExportError):
            assert f"- `{name}` (" in listed


def test_every_make_target_of_the_readme_exists() -> None:
    targets = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_documentation_link_has_a_target() -> None:
    for page in PAGES:
        for link, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name} links to {link}"
            assert not anchor or anchor in anchors(target), f"{page.name} links to {link}#{anchor}"


def test_the_site_shows_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    shown = re.findall(r"[\w/-]+\.md\b", navigation)
    assert sorted(shown) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_links_to_files_outside_the_site_point_to_the_repository() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="results/chat.md"))
    text = "[a](../data.md#x), [b](../../tools/pages.py) and [c](https://example.org)"
    linked = on_page_markdown(text, page, {"repo_url": "https://example.org/r"}, None)
    assert linked == text.replace("../../tools/pages.py", "https://example.org/r/blob/HEAD/tools/pages.py")
    assert on_page_markdown(text, page, {"repo_url": None}, None) == text.replace("[b](../../tools/pages.py)", "b")


def test_every_script_that_the_documentation_names_exists() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = [name.replace(".", "/") for name in re.findall(r"python -m (tools\.[\w.]*\w)", text)]
        modules = [f"{name}/__main__.py" if (ROOT / name).is_dir() else f"{name}.py" for name in named]
        paths = re.findall(r"\b((?:tools|tests|freeexport|graphs|runtime)/[\w/]*\w\.\w+)", text)
        missing = [name for name in [*modules, *paths] if not (ROOT / name).exists()]
        assert missing == [], page.name


def test_every_page_that_the_code_names_exists() -> None:
    for package in ("runtime", "graphs", "freeexport", "tools", "deploy"):
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in (".py", ".md", ".yaml") or path.name == "Dockerfile":
                named = re.findall(r"\bdocs/[a-z0-9/-]+\.md\b", path.read_text(encoding="utf-8"))
                missing = [name for name in named if not (ROOT / name).exists()]
                assert missing == [], path.relative_to(ROOT)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as on GitHub."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
