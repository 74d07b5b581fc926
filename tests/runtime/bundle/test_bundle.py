"""Damaged bundles: each kind of damage is refused, and the file is named."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, Bundles, Case
from command_line import succeed
from gguf_model import write_gguf
from safetensors.numpy import save_file

from runtime import Bundle, BundleError, CalibrationError, EngineError, Session
from runtime.bundle.bundle import VERIFICATION, sha256_of
from runtime.bundle.calibration import CALIBRATION, CALIBRATION_VERSION, Calibration
from runtime.bundle.manifest import HASH, MANIFEST, File, Manifest, _hash

FILES = {
    "t5-relu-tied": ("encoder.onnx", "prologue.onnx", "tokenizer.json"),
    "llama-tied": ("shallow.onnx", "deep.onnx", "weights.data", "tokenizer.json", "tokenizer_config.json",
                   "generation_config.json", "chat_template.jinja"),
}  # fmt: skip
each_file = pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])


def refusal(path: Path, **options: Any) -> str:
    """The message with which the bundle is refused; a session refuses it alike."""
    with pytest.raises(BundleError) as refused:
        Bundle.open(path, **options)
    with pytest.raises(BundleError) as session_refused:
        Session(path, **options)
    message = str(refused.value)
    assert str(session_refused.value) == message
    assert "\n" not in message
    return message


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """Change fields of a bundle's manifest and make its hash fit."""
    content = json.loads((path / MANIFEST).read_text())
    content.pop(HASH)
    content.update(changes)
    (path / MANIFEST).write_text(json.dumps({**content, HASH: _hash(content)}))


def files_of(path: Path) -> dict[str, Any]:
    files: dict[str, Any] = json.loads((path / MANIFEST).read_text())["files"]
    return files


def unlist(path: Path, file: str) -> None:
    rewrite_manifest(path, files={name: entry for name, entry in files_of(path).items() if name != file})


def test_bundle_contains_only_the_listed_files_and_the_manifest(bundle: Bundles) -> None:
    for name, files in FILES.items():
        opened = Bundle.open(bundle(BY_NAME[name]), verify="full")
        assert set(files) <= set(opened.manifest.files)
        assert {path.name for path in opened.path.iterdir()} == {MANIFEST, "README.md", *opened.manifest.files}


@each_file
def test_a_damaged_file_is_named(name: str, file: str, copied: Bundles) -> None:
    path = copied(name)
    content = (path / file).read_bytes()
    flipped = bytearray(content)
    flipped[np.random.default_rng(0).integers(len(content))] ^= 1
    (path / file).write_bytes(flipped)
    assert re.match(rf"{file} .*sha256", refusal(path, verify="full"))
    for changed in (content[:-1], content + b"\0"):
        (path / file).write_bytes(changed)
        assert refusal(path).startswith(f"{file} has {len(changed)} bytes, expected {len(content)}")
    (path / file).unlink()
    assert refusal(path).startswith(f"{file} is missing")
    (path / file).mkdir()
    assert refusal(path).startswith(f"{file} is missing")


def test_flipped_manifest_bytes_are_detected_or_harmless(copied: Bundles) -> None:
    path = copied()
    intact, content = Bundle.open(path), (path / MANIFEST).read_bytes()
    for place in range(0, len(content), 11):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        (path / MANIFEST).write_bytes(flipped)
        with suppress(BundleError):
            assert Bundle.open(path).manifest == intact.manifest


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/../../outside"])
def test_path_outside_the_bundle_is_refused_even_if_the_file_matches(name: str, copied: Bundles) -> None:
    path = copied()
    (path.parent / "outside").write_bytes(b"x")
    (path / "sub").mkdir()
    outside = {"size": 1, "sha256": sha256_of(path.parent / "outside")}
    rewrite_manifest(path, files={**files_of(path), name: outside})
    assert f"{name!r}, which is outside of the bundle" in refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", MANIFEST), (b"nonsense", "not JSON"), (b"[]", "holds list"), (b"\xff\xfe\0\0", "not text")],
)
def test_manifest_that_is_not_a_json_object_is_refused(content: bytes, message: str, copied: Bundles) -> None:
    path = copied()
    (path / MANIFEST).write_bytes(content)
    assert refusal(path).startswith(MANIFEST)
    assert message in refusal(path)


@pytest.mark.parametrize("file", ["encoder.onnx", "prologue.onnx", "shallow.onnx", "deep.onnx"])
def test_manifest_without_engines_is_refused(file: str, copied: Bundles) -> None:
    path = copied("t5-relu-tied")
    unlist(path, file)
    assert f"lists no {file}" in refusal(path)


def test_missing_bundle_error_says_how_to_make_one(tmp_path: Path) -> None:
    assert "freeexport convert" in refusal(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    assert refusal(tmp_path / "file") == (
        f"{tmp_path / 'file'} is not a bundle: it is a file; give a directory that freeexport convert wrote"
    )
    assert f"it has no {MANIFEST}; give a directory" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["checkpoint", "gguf", "folder of gguf", "adapter"])
def test_suggested_convert_command_makes_the_bundle(
    kind: str, checkpoint: Callable[[Case], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a model"
    if kind == "checkpoint":
        shutil.copytree(checkpoint(BY_NAME["llama-tied"]), path)
    elif kind == "adapter":
        path.mkdir()
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        lora = {f"{module}.lora_A.weight": np.ones((1, 64)), f"{module}.lora_B.weight": np.ones((64, 1))}
        save_file(lora, path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 1, "base_model_name_or_path": str(checkpoint(BY_NAME["llama-tied"]))}
        (path / "adapter_config.json").write_text(json.dumps(config))
    else:
        path.mkdir()
        model = write_gguf(path / "tiny.gguf")
        path = model if kind == "gguf" else path
    message = refusal(path)
    assert message.startswith(f"{path} is not a bundle but a checkpoint; ")
    command = shlex.split(message.partition("convert it with: freeexport ")[2])
    monkeypatch.chdir(tmp_path)
    succeed(*command, "--verify", "none", "--capacity", "64")
    assert Bundle.open("BUNDLE").manifest.layers


def test_unloadable_files_are_named(copied: Bundles) -> None:
    path = copied()
    content = (path / "deep.onnx").read_bytes()
    (path / "deep.onnx").write_bytes(content.replace(b"Gather", b"Gathes"))
    # The quick check looks at sizes only.
    with pytest.raises(EngineError, match=r"deep\.onnx cannot be loaded") as refused:
        Session(path)
    assert "\n" not in str(refused.value)
    (path / "deep.onnx").write_bytes(b"\xff" * len(content))
    assert "deep.onnx cannot be read (it is not an ONNX graph" in refusal(path)
    (path / "deep.onnx").write_bytes(content)
    (path / "tokenizer.json").write_text("{}".ljust((path / "tokenizer.json").stat().st_size))
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Session(path)


def test_bundle_hash_changes_with_any_file(copied: Bundles) -> None:
    path = copied()
    before = Bundle.open(path).sha256
    assert Bundle.open(path).sha256 == before
    rewrite_manifest(path, files={**files_of(path), "deep.onnx": {**files_of(path)["deep.onnx"], "sha256": "00" * 32}})
    assert Bundle.open(path).sha256 != before


def test_verification_status_is_read_from_the_report(copied: Bundles) -> None:
    path = copied()
    assert Bundle.open(path).verification is None
    (path / VERIFICATION).write_text('{"passed": true}')
    assert Bundle.open(path).verification == {"passed": True}
    for broken in ("{", "3", "[1]"):
        (path / VERIFICATION).write_text(broken)
        with pytest.raises(BundleError, match=r"verification\.json (cannot be read|holds) .*freeexport verify"):
            _ = Bundle.open(path).verification


@pytest.mark.parametrize("file", ["chat_template.jinja", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("verify", ["sizes", "full"])
def test_unlisted_file_is_not_read(file: str, verify: str, copied: Bundles) -> None:
    path = copied()
    unlist(path, file)
    (path / file).unlink()
    (path / file).symlink_to("/etc/passwd")
    with Session(path, verify=verify) as session:
        assert session.tokenizer is not None
        assert (session.tokenizer.chat_template is None) == (file == "chat_template.jinja")
        assert bool(session.tokenizer.special_tokens) == (file != "tokenizer_config.json")
        session.generate([5], max_new_tokens=1, do_sample=True, seed=1)


def test_unlisted_files_are_not_part_of_the_bundle(copied: Bundles) -> None:
    path = copied()
    unlist(path, "tokenizer.json")
    with Session(path) as session:
        assert session.tokenizer is None
    unlist(path, "weights.data")
    for verify in ("sizes", "full"):
        assert f"'weights.data', which {MANIFEST} does not list" in refusal(path, verify=verify)


@pytest.mark.parametrize("file", ["weights.data", "tokenizer.json", "deep.onnx", MANIFEST])
@pytest.mark.parametrize("inside", [False, True])
def test_link_in_place_of_a_file_is_refused(file: str, inside: bool, copied: Bundles) -> None:
    path = copied()
    (path.parent / "link").symlink_to(path)  # the directory itself may be one
    assert Bundle.open(path.parent / "link", verify="full").sha256 == Bundle.open(path).sha256
    target = (path if inside else path.parent) / "moved"
    (path / file).rename(target)
    (path / file).symlink_to(target)
    assert re.match(rf"{file} is a symbolic link, .*cp -rL", refusal(path))


@pytest.mark.parametrize("file", [MANIFEST, "tokenizer.json", "weights.data", "shallow.onnx"])
def test_named_pipe_is_refused_without_blocking(file: str, copied: Bundles) -> None:
    path = copied()
    (path / file).unlink()
    os.mkfifo(path / file)
    assert re.match(rf"{file} .*regular file", refusal(path, verify="full"))


def test_oversized_manifest_is_refused_before_reading(copied: Bundles) -> None:
    path = copied()
    with (path / MANIFEST).open("r+b") as file:
        file.truncate(1 << 40)
    assert f"{1 << 40} bytes, at most" in refusal(path)


def calibrate(path: Path, **changes: Any) -> Calibration:
    """Put a calibration into a bundle, of its own model but for the `changes`."""
    manifest = Bundle.open(path).manifest
    model = {name: getattr(manifest, name) for name in ("source_sha256", "vocab_size", "exit_layer", "confidence")}
    found = {"method": "bmm", "threshold": 0.8, "sequences": 10, "positions": 100, "agreement": 0.9}
    calibration = Calibration(**{"schema_version": CALIBRATION_VERSION, **model, **found, **changes})
    (path / CALIBRATION).write_text(calibration.to_json())
    written = File((path / CALIBRATION).stat().st_size, sha256_of(path / CALIBRATION))
    (path / MANIFEST).write_text(replace(manifest, files={**manifest.files, CALIBRATION: written}).to_json())
    return calibration


def test_calibration_belongs_to_the_bundle_and_its_model(copied: Bundles) -> None:
    path = copied()
    assert Bundle.open(path).calibration is None
    assert calibrate(path) == Bundle.open(path, verify="full").calibration
    calibrate(path, exit_layer=7)
    with pytest.raises(CalibrationError, match="exit layer 7, not 1"):
        _ = Bundle.open(path).calibration
    with (path / CALIBRATION).open("a") as file:
        file.write(" ")
    assert refusal(path).startswith(CALIBRATION)


def test_bundle_can_record_a_rollback_threshold(copied: Bundles) -> None:
    path = copied()
    rewrite_manifest(path, rollback_threshold=0.0)
    asked: dict[str, Any] = {"mode": "rollback", "threshold": 0.1, "max_new_tokens": 20, "ignore_eos": True}
    with Session(path) as session:
        always, never = session.generate([5, 9], **asked), session.generate([5, 9], rollback_threshold=1e9, **asked)
    assert always.stats.rejected > never.stats.rejected == 0


def test_bundle_can_be_in_any_directory(copied: Bundles, tmp_path: Path) -> None:
    path = copied().rename(tmp_path / "a name with spaces, [brackets] and ünï")
    with Session(path) as session:
        assert session.generate([5], max_new_tokens=2).token_ids
    assert isinstance(Bundle.open(str(path)).manifest, Manifest)
