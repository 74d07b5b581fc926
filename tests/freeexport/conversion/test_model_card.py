"""The model card that `convert` writes, and bundles and exits that `hf upload` published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from checkpoints import BY_NAME, PROMPTS, Bundles, Case
from command_line import error, invoke, succeed
from hub_stand_in import TOKEN, HubStandIn, hub_stand_in

from freeexport.checkpoints.packed_exit import read_packed
from freeexport.checkpoints.ready_made import HUB_EXIT, READY_MADE, find_exit
from freeexport.conversion.model_card import CARD, model_card
from runtime import Bundle, Session
from runtime.bundle.manifest import MANIFEST, ReadyMadeExit

NAME = "ada/tiny"
CHAT = READY_MADE / "smollm2-chat.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    with hub_stand_in(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture
def llama(bundle: Bundles) -> Path:
    return bundle(BY_NAME["llama-tied"])


def upload(hub: HubStandIn, *arguments: object) -> None:
    """Run `hf upload`, as docs/hub.md has it."""
    subprocess.run(
        [Path(sys.executable).with_name("hf"), "upload", *map(str, arguments)],
        env=os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
        check=True,
        capture_output=True,
    )


def test_uploaded_bundle_is_loaded_by_its_name(hub: HubStandIn, llama: Path) -> None:
    upload(hub, NAME, llama, ".", "--private")
    repository = hub.repositories[NAME]
    commit = repository.branches["main"]
    assert repository.private
    assert repository.commits[commit].keys() >= {CARD, MANIFEST, *Bundle.open(llama).manifest.files}
    with Session(llama, threads=1) as session, Session.from_pretrained(NAME, threads=1, verify="full") as loaded:
        expected = session.generate(list(PROMPTS[0]), max_new_tokens=8).token_ids
        assert loaded.generate(list(PROMPTS[0]), max_new_tokens=8).token_ids == expected
    # Verbs take the name in place of a path.
    assert json.loads(succeed("inspect", NAME, "--json").stdout)["manifest"]["family"] == "llama"
    assert succeed("generate", f"{NAME}@{commit}", "hello", "--max-new-tokens", 2, "--threads", 1).stdout


def test_card_names_the_base_model_and_the_exit_and_has_a_program(llama: Path) -> None:
    text = (llama / CARD).read_text()
    manifest = Bundle.open(llama).manifest
    assert text == model_card(manifest)
    _, header, body = text.split("---\n", 2)
    expected = {"library_name": "freeexport", "pipeline_tag": "text-generation", "tags": ["onnx", "early-exit"]}
    assert yaml.safe_load(header) == expected
    for row in ("| base model | llama-tied |", "| precision | fp32, for cpu |", "| exit | after layer 1 of 5"):
        assert row in body
    compile(body.partition("```python\n")[2].partition("```")[0], "card", "exec")
    exit_file = ReadyMadeExit("chat", "0" * 64)
    other = model_card(replace(manifest, source="ada/base", ready_made_exit=exit_file, target="cuda", verified=True))
    assert yaml.safe_load(other.split("---\n", 2)[1]) == expected | {"base_model": "ada/base"}
    assert "| exit | after layer 1 of 5, the ready-made exit chat |" in other
    assert "| verified against the base | yes |" in other
    assert "pip install 'freeexport[gpu,hub]'" in other


def test_uploaded_exit_is_applied_by_its_name(
    hub: HubStandIn, checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    upload(hub, "ada/chat-exit", CHAT, HUB_EXIT)
    content = hub.repositories["ada/chat-exit"].commits[hub.repositories["ada/chat-exit"].branches["main"]][HUB_EXIT]
    assert content == CHAT.read_bytes()
    assert read_packed(find_exit("ada/chat-exit")).sha256 == read_packed(CHAT).sha256
    convert = ("convert", checkpoint(BY_NAME["llama-tied"]), tmp_path / "out", "--exit", "ada/chat-exit")
    assert "exit smollm2-chat does not fit: it is for models of other sizes" in error(invoke(*convert))
    hub.repositories["ada/chat-exit"].commit("main", {HUB_EXIT: content[:-1] + b"x"})
    assert "is damaged: its tensors have another sha256 than it names" in error(invoke(*convert))
    assert not (tmp_path / "out").exists()
