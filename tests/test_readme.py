"""Every command and program that the documentation says to run, runs."""

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

import pytest
from checkpoints import CASES, Case
from click.testing import CliRunner

from freeexport.cli import main

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"<!-- run -->\n```(\w*)\n(.*?)```", re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[Case], Path]) -> Path:
    case = next(case for case in CASES if case.layers > 3)
    shutil.copytree(checkpoint(case), tmp_path / "path" / "to" / "checkpoint")
    lines = [json.dumps({"input": f"Once upon a time, {number}"}) for number in range(20)]
    (tmp_path / "calibration.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_and_the_program_of_the_readme_run_in_order(workplace: Path) -> None:
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {language for language, _ in blocks} == {"", "python"}
    for language, text in blocks:
        if language == "python":
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            continue
        for line in text.strip().splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "freeexport"
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 0, f"{line}\n{result.output}"


def test_every_make_target_of_the_readme_exists() -> None:
    targets = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
