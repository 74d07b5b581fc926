"""`freeexport convert --phrases`: a table of targets or a ready-made one, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from checkpoints import BY_NAME, Case
from click.testing import CliRunner
from command_line import error, invoke, succeed
from draft_plans import draft_candidates
from safetensors.numpy import load_file, save_file

from freeexport.checkpoints import phrase_file
from freeexport.checkpoints.phrase_file import read_phrase_file, ready_made_phrases
from runtime import Session
from runtime.decoding.phrases import PHRASES
from tools.models import pack_phrases

FAST = ("--verify", "none", "--capacity", "64", "--exit-layer", "1")


@pytest.mark.parametrize("name", ["llama-tied", "t5-relu-tied"])
def test_outputs_like_the_targets_are_drafted(
    name: str, checkpoint: Callable[[Case], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft_candidates(monkeypatch)
    model, plain, data, out = checkpoint(BY_NAME[name]), tmp_path / "plain", tmp_path / "data.jsonl", tmp_path / "out"
    succeed("convert", model, plain, *FAST)
    with Session(plain, threads=1) as session:
        wanted = session.generate("word 3 is", mode="full", max_new_tokens=24)
    data.write_text("".join(json.dumps({"input": "word", "target": wanted.text}) + "\n" for _ in range(3)))
    succeed("convert", model, out, *FAST, "--phrases", data)
    page = succeed("inspect", out).stdout
    assert "frequent phrases" in page
    assert "frequent phrases" not in succeed("inspect", plain).stdout
    with Session(out, threads=1, draft_memory_mb=0) as session:
        ours = session.generate("word 3 is", max_new_tokens=24)
    assert ours.token_ids == wanted.token_ids
    # Not all are right: a random model's text is encoded as other tokens than it came from.
    assert ours.stats.drafts["phrases"].proposed > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--phrases {data}: there is no such file, and no such table"),
        ('{"input": "a"}\n', "{data}, line 1: 'target' is missing; phrases are counted in targets; add them"),
        ("[1]\n", "{data}, line 1: "),
        ("", "{data} has no examples; give one JSON object"),
    ],
)
def test_data_without_targets_is_refused(
    content: str | None, message: str, checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    if content is not None:
        data.write_text(content)
    failed = invoke("convert", checkpoint(BY_NAME["llama-tied"]), out, *FAST, "--phrases", data)
    assert message.format(data=data) in error(failed)
    assert not out.exists()


# Ready-made tables

ABOUT = ("--model", "tiny", "--licence", "MIT", "--data", "Words.", "--results", "None.")


@pytest.fixture
def table(checkpoint: Callable[[Case], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table for the tokens of llama-tied, in place of those of the package."""
    for module in (phrase_file, pack_phrases):
        monkeypatch.setattr(module, "READY_MADE", tmp_path)
    bundle, outputs = tmp_path / "bundle", tmp_path / "outputs.jsonl"
    succeed("convert", checkpoint(BY_NAME["llama-tied"]), bundle, *FAST)
    outputs.write_text(json.dumps({"target": "word 3 is a word"}))
    packed = CliRunner().invoke(pack_phrases.main, ["tiny", str(outputs), "--bundle", str(bundle), *ABOUT])
    assert packed.exit_code == 0, packed.output
    return tmp_path / "tiny.safetensors"


def test_a_table_for_the_tokens_of_a_model_becomes_part_of_its_bundle(
    table: Path, checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    model = checkpoint(BY_NAME["llama-tied"])
    _, phrases = read_phrase_file(table)
    assert "with the frequent phrases tiny" in succeed("convert", model, tmp_path / "default", *FAST).stderr
    for name, chosen in (("name", "tiny"), ("file", str(table))):
        assert "note: with" not in succeed("convert", model, tmp_path / name, *FAST, "--phrases", chosen).stderr
    for name in ("default", "name", "file"):
        assert (np.load(tmp_path / name / PHRASES) == phrases).all()
    succeed("convert", model, tmp_path / "without", *FAST, "--phrases", "none")
    assert not (tmp_path / "without" / PHRASES).exists()


def test_a_table_for_other_tokens_is_refused(table: Path, checkpoint: Callable[[Case], Path], tmp_path: Path) -> None:
    model, out = checkpoint(BY_NAME["bart"]), tmp_path / "out"
    failed = invoke("convert", model, out, *FAST, "--phrases", "tiny")
    assert "--phrases tiny does not fit: its tokens are those of tiny, the model has others" in error(failed)
    assert not out.exists()
    assert "note: with" not in succeed("convert", model, out, *FAST).stderr


def test_exits_lists_tables_and_whether_they_fit(table: Path, checkpoint: Callable[[Case], Path]) -> None:
    fits = succeed("exits", checkpoint(BY_NAME["llama-tied"])).stdout
    assert "tiny: " in fits
    assert fits.rstrip().endswith("yes")
    (record,) = [each for each in json.loads(succeed("exits", "--json").stdout) if each["name"] == "tiny"]
    assert (record["model"], record["file"], record["licence"]) == ("tiny", str(table), "MIT")


def test_damaged_tables_are_refused(table: Path) -> None:
    about = json.dumps(asdict(read_phrase_file(table)[0]))
    tensors = load_file(table)
    for changed, metadata, message in (
        (tensors, {}, "has no table of phrases"),
        (tensors, {"freeexport_phrases": "{"}, "not JSON"),
        (tensors, {"freeexport_phrases": about.replace('"format": 1', '"format": 2')}, "upgrade freeexport"),
        ({"other": np.zeros(3)}, {"freeexport_phrases": about}, "it has no phrases.ngram"),
        ({**tensors, "phrases.token": tensors["phrases.token"] + 10**6}, {"freeexport_phrases": about}, "outside of"),
    ):
        save_file(changed, table, metadata=metadata)
        with pytest.raises(phrase_file.CheckpointError, match=message):
            read_phrase_file(table)
    table.write_bytes(table.read_bytes()[:40])
    with pytest.raises(phrase_file.CheckpointError, match="not a complete safetensors file"):
        read_phrase_file(table)


def test_tables_of_the_package_are_whole() -> None:
    for path in ready_made_phrases():
        about, phrases = read_phrase_file(path)
        assert about.name == path.stem
        assert len(phrases) > 10_000
