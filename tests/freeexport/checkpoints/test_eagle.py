"""EAGLE-3 heads that are refused, each in one line before any work, and how their layout is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, EIGHT_LAYERS, Case
from eagle_case import eagle_config, eagle_tensors, write_eagle

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.eagle import apply_eagle_head, read_eagle_head
from freeexport.checkpoints.ready_made import open_source
from freeexport.checkpoints.weight_files import CheckpointError
from freeexport.conversion.convert import convert
from freeexport.conversion.convert_options import ConvertOptions
from graphs.eagle_head import tapped_layers
from graphs.errors import GraphError
from runtime.bundle.manifest import Manifest
from runtime.errors import FreeExportError

EYE = np.eye(64, dtype=np.float32)


def resized(tensors: dict[str, np.ndarray], **changes: tuple[int, ...]) -> None:
    for name, shape in changes.items():
        tensors[name.replace("__", ".")] = np.zeros(shape, np.float32)


def offset(tensors: dict[str, np.ndarray], value: int) -> None:
    tensors["d2t"] = np.full(120, value)


def swapped(tensors: dict[str, np.ndarray]) -> None:
    tensors["d2t"][:2] = [1, -1]


def forgets(name: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.pop(name)


def another(name: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.__setitem__(name, value)


TAPS = "eagle_aux_hidden_state_layer_ids"
REFUSED: tuple[tuple[dict[str, Any], Callable[[dict[str, np.ndarray]], Any] | None, str], ...] = (
    ({"hidden_size": 128}, None, "its hidden_size is 128, and the model's is 64; name a head of this model"),
    ({"target_hidden_size": 32}, None, "its target_hidden_size is 32, and the model's is 64"),
    ({"vocab_size": 999}, None, "its vocab_size is 999, and the model's is 288"),
    ({"num_key_value_heads": 4}, None, "its num_key_value_heads is 4, and the model's is 2"),
    ({"head_dim": 32}, None, "its head_dim is 32, and the model's is 16"),
    ({TAPS: [2, 4, 8]}, None, r"after layers \[2, 4, 8\], which must be three in ascending order, from 1 to 7"),
    ({TAPS: "all"}, None, "after layers all, which must be three"),
    ({"eagle_config": {TAPS: [5, 3, 1]}}, None, r"after layers \[6, 4, 2\], which must be three in ascending order"),
    ({}, lambda tensors: offset(tensors, 500), "its d2t names token 500, and the model has tokens 0 to 287"),
    ({}, lambda tensors: offset(tensors, -1), "its d2t names token -1"),
    ({}, swapped, "an exit vocabulary is 2 to 288 different tokens of the model, in ascending order"),
    ({}, another("d2t", np.zeros(7, np.int64)), r"its d2t is \[7\], and its lm_head has 120 rows"),
    ({}, another("t2d", np.ones(288, bool)), "its t2d marks other tokens than its d2t names"),
    ({}, forgets("d2t"), "its lm_head has 120 rows and no d2t, and the model has 288 tokens"),
    ({}, lambda tensors: resized(tensors, fc__weight=(64, 64)), r"weight fc.weight is \[64, 64\], the configuration"),
    ({}, another("embed_tokens.weight", np.ones((288, 64), np.float32)), "its embed_tokens differs by "),
    ({}, another("embed_tokens.weight", EYE), r"its embed_tokens is \[64, 64\], of another vocabulary or size"),
    ({"rope_scaling": {"rope_type": "odd"}}, None, "rope scaling 'odd' is not supported"),
    ({"hidden_act": "odd"}, None, "hidden_act 'odd' is not supported"),
    ({"hidden_size": "big"}, None, "hidden_size is 'big' in the configuration"),
    ({"rms_norm_eps": None}, None, "rms_norm_eps is missing in the configuration"),
    ({"norm_before_residual": True}, None, r"begins with the normed feature \(norm_before_residual\)"),
    ({"num_hidden_layers": 3}, None, "it has 3 layers, not 1"),
    ({"model_type": "deepseek_v3"}, None, "its model_type is 'deepseek_v3', not 'llama'"),
    ({}, forgets("midlayer.hidden_norm.weight"), "it has no midlayer.hidden_norm.weight"),
    ({}, another("fc_norm.weight", EYE), "it has also fc_norm.weight"),
)  # fmt: skip


@pytest.mark.parametrize(("config", "change", "reason"), REFUSED, ids=[case[2][:40] for case in REFUSED])
def test_mismatched_head_is_refused_in_one_line(
    config: dict[str, Any],
    change: Callable[[dict[str, np.ndarray]], Any] | None,
    reason: str,
    tmp_path: Path,
    checkpoint: Callable[[Case], Path],
) -> None:
    tensors = eagle_tensors()
    if change is not None:
        change(tensors)
    head = write_eagle(tmp_path / "head", {**eagle_config(), **config}, tensors)
    with pytest.raises(CheckpointError, match=rf"^[^\n]*{reason}[^\n]*$"):
        convert(str(checkpoint(EIGHT_LAYERS)), tmp_path / "out", ConvertOptions(exit=str(head)))
    assert not (tmp_path / "out").exists()


def test_pickles_and_incomplete_directories_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "head"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(eagle_config()))
    with pytest.raises(CheckpointError, match=r"has no weights; save its tensors with safetensors"):
        read_eagle_head(directory)
    torch.save({"fc.weight": torch.eye(4)}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has only pytorch_model.bin, a pickle, which is not read; save"):
        read_eagle_head(directory)
    (directory / "model.safetensors").write_bytes(b"\x80" * 100)
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        read_eagle_head(directory)
    (directory / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_eagle_head(directory)
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        read_eagle_head(tmp_path)


@pytest.mark.parametrize("name", ["t5-relu-tied", "granite"])
def test_other_families_are_refused(name: str, tmp_path: Path, checkpoint: Callable[[Case], Path]) -> None:
    head = read_eagle_head(write_eagle(tmp_path / "head"))
    with pytest.raises(CheckpointError, match="EAGLE-3 heads are read for models like Llama"):
        apply_eagle_head(open_checkpoint(str(checkpoint(BY_NAME[name]))), head)


def test_gpu_targets_and_other_exit_layers_are_refused(tmp_path: Path, checkpoint: Callable[[Case], Path]) -> None:
    head = str(write_eagle(tmp_path / "head"))
    for options, reason in (
        ({"target": "cuda"}, "target cuda does not support EAGLE-3 heads; choose --target cpu"),
        ({"exit_layer": 2}, "exit after layer 0, not 2"),
    ):
        with pytest.raises(FreeExportError, match=reason):
            convert(str(checkpoint(EIGHT_LAYERS)), tmp_path / "out", ConvertOptions(exit=head, **options))


def test_tapped_layers_are_counted_as_in_vllm_and_sglang() -> None:
    assert tapped_layers({}, 32) == (2, 16, 29)
    assert tapped_layers({TAPS: [3, 9, 20]}, 32) == (3, 9, 20)
    assert tapped_layers({"eagle_config": {TAPS: [1, 15, 28]}}, 32) == (2, 16, 29)
    with pytest.raises(GraphError, match=r"after layers \(2, 3, 3\)"):
        tapped_layers({}, 6)


def test_bundle_names_its_head_and_refuses_another(
    tmp_path: Path, checkpoint: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(checkpoint(EIGHT_LAYERS))
    head = write_eagle(tmp_path / "head")
    convert(model, tmp_path / "out", ConvertOptions(exit=str(head), capacity=64, verify="none", measure=False))
    manifest = Manifest.from_json((tmp_path / "out" / "freeexport.json").read_text())
    assert manifest.ready_made_exit is not None
    assert (manifest.ready_made_exit.name, manifest.ready_made_exit.file) == ("head", "head")
    assert open_source(model, manifest, str(head)).sha256 == manifest.source_sha256
    monkeypatch.chdir(tmp_path)
    assert open_source(model, manifest).sha256 == manifest.source_sha256
    other = write_eagle(tmp_path / "other", {**eagle_config(), "rope_theta": 10000.0})
    with pytest.raises(CheckpointError, match="another version of exit head"):
        open_source(model, manifest, str(other))
