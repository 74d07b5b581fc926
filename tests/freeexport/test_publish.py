"""Bundles and exits that are pushed to the hub, against a stand-in of its HTTP interface."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import BY_NAME, PROMPTS, Bundles, Case
from command_line import error, invoke, succeed
from hub_stand_in import HubStandIn, hub_stand_in

from freeexport.checkpoints.packed_exit import read_packed
from freeexport.checkpoints.ready_made import HUB_EXIT, READY_MADE, find_exit
from runtime import Bundle, Session
from runtime.bundle.manifest import MANIFEST

NAME = "ada/tiny"
CHAT = READY_MADE / "smollm2-chat.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    with hub_stand_in(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture
def llama(bundle: Bundles) -> Path:
    return bundle(BY_NAME["llama-tied"])


def test_a_pushed_bundle_is_loaded_by_its_name(hub: HubStandIn, llama: Path, copied: Bundles) -> None:
    path = copied()
    (path / "notes.txt").write_text("not listed in the manifest")
    result = succeed("push", path, NAME)
    repository = hub.repositories[NAME]
    commit = repository.branches["main"]
    assert result.stdout == f"{hub.url}/{NAME}/commit/{commit}\n"
    assert not repository.private
    manifest = Bundle.open(llama).manifest
    assert set(repository.commits[commit]) == {"README.md", MANIFEST, *manifest.files}
    with Session(llama, threads=1) as session, Session.from_pretrained(NAME, threads=1, verify="full") as loaded:
        expected = session.generate(list(PROMPTS[0]), max_new_tokens=8).token_ids
        assert loaded.generate(list(PROMPTS[0]), max_new_tokens=8).token_ids == expected
    # Verbs take the name in place of a path.
    shown = json.loads(succeed("inspect", NAME, "--json").stdout)
    assert shown["manifest"]["source"] == manifest.source
    assert succeed("generate", f"{NAME}@{commit}", "hello", "--max-new-tokens", 2, "--threads", 1).stdout


def test_a_card_says_what_the_bundle_is_and_how_to_use_it(hub: HubStandIn, llama: Path, tmp_path: Path) -> None:
    hub.add("ada/base", card(tmp_path / "base", "---\nlicense: mit\n---\n"))
    results = tmp_path / "results"
    results.mkdir()
    report = {"bundles": {"tiny": {"manifest_sha256": Bundle.open(llama).sha256}}}
    (results / "evaluation.json").write_text(json.dumps(report))
    (results / "results.md").write_text("| setting | speed |\n|---|---|\n| free | 2.00x |\n")
    options = ("--private", "--revision", "v2", "--base-model", "ada/base", "--results", results)
    for _ in range(2):  # the second finds the repository and the branch
        succeed("push", llama, NAME, *options)
    repository = hub.repositories[NAME]
    assert repository.private
    assert repository.commits[repository.branches["main"]] == {}
    files = repository.commits[repository.branches["v2"]]
    assert json.loads(files["evaluation.json"]) == report
    text = files["README.md"].decode()
    for part in (
        "base_model: ada/base\n",
        "library_name: freeexport\n",
        "license: mit\n",
        "pipeline_tag: text-generation\n",
        "\n# tiny\n",
        "| precision | fp32, for cpu |",
        "| exit | after layer 1 of 5",
        "| calibration | not calibrated: decoding is lossless by default |",
        f'with Session.from_pretrained("{NAME}", revision="v2") as session:\n',
        "## Results\n\n| setting | speed |",
    ):
        assert part in text, part
    code = text.partition("```python\n")[2].partition("```")[0]
    assert 2 <= len([line for line in code.splitlines() if line]) <= 5
    compile(code, "card", "exec")
    succeed("push", llama, NAME, "--license", "apache-2.0", "--base-model", "ada/base")
    assert "license: apache-2.0\n" in repository.commits[repository.branches["main"]]["README.md"].decode()


def card(directory: Path, text: str) -> Path:
    directory.mkdir()
    (directory / "README.md").write_text(text)
    return directory


def test_a_pushed_exit_is_applied_by_its_name(
    hub: HubStandIn, checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    succeed("push", CHAT, "ada/chat-exit")
    (files,) = (files for files in hub.repositories["ada/chat-exit"].commits.values() if files)
    assert files[HUB_EXIT] == CHAT.read_bytes()
    text = files["README.md"].decode()
    assert "license: apache-2.0\n" in text
    assert "--exit ada/chat-exit\n" in text
    assert read_packed(find_exit("ada/chat-exit")).sha256 == read_packed(CHAT).sha256
    model = checkpoint(BY_NAME["llama-tied"])
    line = error(invoke("convert", model, tmp_path / "out", "--exit", "ada/chat-exit"))
    assert line.startswith("error: exit smollm2-chat does not fit: it is for models of other sizes")
    hub.repositories["ada/chat-exit"].commit("main", {HUB_EXIT: files[HUB_EXIT][:-1] + b"x"})
    line = error(invoke("convert", model, tmp_path / "out", "--exit", "ada/chat-exit"))
    assert "is damaged: its tensors have another sha256 than it names" in line
    assert not (tmp_path / "out").exists()


def test_a_push_that_is_refused_is_one_line(
    hub: HubStandIn, llama: Path, copied: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    for target in ("tiny", "a/b/c", "ada/tiny@main"):
        assert "is not a repository of the hub; give owner/name" in error(invoke("push", llama, target))
    damaged = copied()
    (damaged / "weights.data").write_bytes(b"x" * (damaged / "weights.data").stat().st_size)
    assert "weights.data differs" in error(invoke("push", damaged, NAME))
    (tmp_path / "evaluation.json").write_text('{"bundles": {"other": {"manifest_sha256": "0"}}}')
    (tmp_path / "results.md").write_text("")
    line = error(invoke("push", llama, NAME, "--results", tmp_path))
    assert line == f"error: --results {tmp_path} are about other bundles (other); evaluate this one"
    line = error(invoke("push", llama, NAME, "--results", llama))
    assert "give the --output of freeexport evaluate" in line
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = error(invoke("push", llama, NAME))
    assert line == f"error: {NAME}: the push failed: the hub answers with status 401; log in: hf auth login"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is on" in error(invoke("push", llama, NAME))
    assert hub.repositories == {}
