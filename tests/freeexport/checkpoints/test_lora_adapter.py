from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, Case
from safetensors.numpy import load_file, save_file

from freeexport.checkpoints.checkpoint import CheckpointError, open_checkpoint
from freeexport.checkpoints.lora_adapter import MergedWeights, adapter_weights
from freeexport.checkpoints.transformers_model import reference_model

LLAMA = BY_NAME["llama-tied"]
QUERY, VALUE = (f"model.layers.1.self_attn.{name}_proj" for name in ("q", "v"))


@pytest.fixture
def adapter(checkpoint: Callable[[Case], Path], tmp_path: Path) -> Path:
    """Rank 2 on two layers, all entries random."""
    base = open_checkpoint(str(checkpoint(LLAMA)))
    random, tensors = np.random.default_rng(0), {}
    for module in (QUERY, VALUE):
        outputs, inputs = base.shape(f"{module}.weight")
        tensors[f"base_model.model.{module}.lora_A.weight"] = random.normal(size=(2, inputs)).astype(np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = random.normal(size=(outputs, 2)).astype(np.float32)
    directory = tmp_path / "adapter"
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": 6, "r": 2, "base_model_name_or_path": str(checkpoint(LLAMA))}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def configure(adapter: Path, **change: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 3.0), (True, 6 / math.sqrt(2))])
def test_weights_are_merged_when_read(
    adapter: Path, checkpoint: Callable[[Case], Path], rslora: bool, scale: float
) -> None:
    configure(adapter, use_rslora=rslora)
    base, merged = open_checkpoint(str(checkpoint(LLAMA))), open_checkpoint(str(adapter))
    stored = load_file(adapter / "adapter_model.safetensors")
    assert merged.adapter == adapter
    assert set(merged.names()) == set(base.names())
    for name in base.names():
        module = name.removesuffix(".weight")
        expected = base.read(name)
        if module in (QUERY, VALUE):
            a, b = (stored[f"base_model.model.{module}.lora_{part}.weight"].astype(np.float64) for part in "AB")
            expected = expected + scale * (b @ a)
        assert np.allclose(merged.read(name), expected, atol=1e-5), name
        assert merged.shape(name) == base.shape(name)


def test_transposed_weights_are_merged_transposed(tmp_path: Path) -> None:
    class Base:
        def __contains__(self, name: object) -> bool:
            return name == "fc.weight"

        def shape(self, name: str) -> tuple[int, ...]:
            return (3, 4)  # [inputs, outputs]

        def read(self, name: str) -> np.ndarray:
            return np.zeros((3, 4), np.float32)

    a, b = np.arange(3, dtype=np.float32).reshape(1, 3), np.arange(4, dtype=np.float32).reshape(4, 1)
    tensors = {"base_model.model.fc.lora_A.weight": a, "base_model.model.fc.lora_B.weight": b}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    merged = MergedWeights(adapter_weights(tmp_path), {"lora_alpha": 2, "fan_in_fan_out": True}, Base())
    assert np.array_equal(merged.read("fc.weight"), 2 * np.outer(np.arange(3), np.arange(4)))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_reference_model_has_the_weights_merged_by_peft(
    name: str, checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    """GPT-2 stores its weights as [inputs, outputs]."""
    peft = pytest.importorskip("peft")
    base = reference_model(open_checkpoint(str(checkpoint(BY_NAME[name]))))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights="gaussian")
    adapted = peft.get_peft_model(base, config)
    for parameter in (parameter for parameter in adapted.parameters() if parameter.requires_grad):
        torch.nn.init.normal_(parameter)
    config.base_model_name_or_path = str(checkpoint(BY_NAME[name]))
    adapted.save_pretrained(str(tmp_path))
    wanted = adapted.merge_and_unload().state_dict()
    found = reference_model(open_checkpoint(str(tmp_path)))
    assert found.state_dict().keys() == wanted.keys()
    for key, value in found.state_dict().items():
        torch.testing.assert_close(value, wanted[key])
    assert all(parameter.requires_grad for parameter in found.parameters())


def test_hash_depends_on_base_adapter_and_settings(adapter: Path) -> None:
    hashes = {open_checkpoint(str(adapter)).sha256}
    configure(adapter, lora_alpha=7)
    hashes.add(open_checkpoint(str(adapter)).sha256)
    stored = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value * 2 for name, value in stored.items()}, adapter / "adapter_model.safetensors")
    hashes.add(open_checkpoint(str(adapter)).sha256)
    assert len(hashes) == 3


def test_base_can_be_in_a_sibling_directory(adapter: Path, checkpoint: Callable[[Case], Path]) -> None:
    shutil.copytree(checkpoint(LLAMA), adapter.parent / "base")
    configure(adapter, base_model_name_or_path="../base")
    assert open_checkpoint(str(adapter)).path.resolve() == (adapter.parent / "base").resolve()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "IA3"}, "adapters of type IA3"),
        ({"peft_type": None}, "adapters of type None"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is not supported"),
        ({"bias": "all"}, "trained biases"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "."}, "names itself"),
        ({"base_model_name_or_path": "no where/at/all"}, "does not exist"),
        ({"base_model_name_or_path": ["a"]}, "names no base_model_name_or_path"),
        ({"r": 0}, "r is '0'; a rank must be a whole number from 1"),
        ({"lora_alpha": math.nan}, "lora_alpha is 'nan'; it must be a number above 0"),
        ({"lora_alpha": math.inf}, "lora_alpha is 'inf'"),
        ({"lora_alpha": -1}, "lora_alpha is '-1'"),
        ({"lora_alpha": 10**90}, "lora_alpha is '10000"),
        ({"lora_alpha": "6"}, "lora_alpha is '6'"),
    ],
)
def test_unsupported_adapters_are_refused(adapter: Path, change: dict[str, Any], reason: str) -> None:
    configure(adapter, **change)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(str(adapter))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("base_model.model.absent.lora_A.weight", np.zeros((2, 3), np.float32), "only half of absent"),
        ("base_model.model.model.norm.weight", np.zeros(3, np.float32), "no LoRA of a linear layer"),
        (f"base_model.model.{QUERY}.lora_A.weight", np.zeros((2, 5), np.float32), "check its base"),
        (f"base_model.model.{QUERY}.lora_A.weight", np.zeros((3, 64), np.float32), "of one rank from 1; train"),
        (f"base_model.model.{QUERY}.lora_A.weight", np.zeros((0, 64), np.float32), "of one rank from 1; train"),
        (f"base_model.model.{QUERY}.lora_A.weight", np.zeros(64, np.float32), "of one rank from 1; train"),
    ],
)
def test_adapter_weights_of_wrong_shape_are_refused(adapter: Path, name: str, value: np.ndarray, reason: str) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {name: value}, path)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(str(adapter))


def test_adapter_of_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    configure(adapter, base_model_name_or_path=str(other))
    configure(other, base_model_name_or_path=str(adapter))
    for one in (adapter, other):
        with pytest.raises(CheckpointError, match="an adapter too; merge that into its own base"):
            open_checkpoint(str(one))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff" * 64, None])
def test_damaged_adapter_is_refused_in_one_line(adapter: Path, name: str, content: bytes | None) -> None:
    (adapter / name).unlink()
    if content is not None:
        (adapter / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read|is not a complete|has no") as caught:
        open_checkpoint(str(adapter))
    assert "\n" not in str(caught.value)


def test_adapter_that_makes_weights_infinite_is_refused_when_read(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: value * np.float32(1e30) for name, value in tensors.items()}, path)
    opened = open_checkpoint(str(adapter))
    with pytest.raises(CheckpointError, match="holds NaN or infinity"), np.errstate(over="ignore", invalid="ignore"):
        opened.read(f"{QUERY}.weight")
