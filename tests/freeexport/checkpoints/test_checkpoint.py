from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from freeexport.checkpoints.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from freeexport.checkpoints.transformers_model import greedy_ids, reference_model
from graphs.errors import UnsupportedModelError

LLAMA = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}


def llama(**changes: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes}))


def t5(**changes: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**{**T5, **changes}))


def write_config(directory: Path, **values: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA, **values}))
    return directory


def with_tensors(directory: Path, **tensors: np.ndarray) -> Path:
    write_config(directory)
    save_file(tensors, directory / "model.safetensors")
    return directory


def assert_equals_model(checkpoint: Checkpoint, model: transformers.PreTrainedModel) -> None:
    state = model.state_dict()
    names = list(checkpoint.names())
    assert names
    # What a checkpoint leaves out is tied to something that it holds.
    stored = {state[name].data_ptr() for name in names}
    assert all(tensor.data_ptr() in stored for tensor in state.values())
    for name in names:
        array = checkpoint.read(name)
        assert array.dtype == np.float32
        assert array.flags.owndata or array.base is not None
        assert array.shape == checkpoint.shape(name)
        assert np.array_equal(array, state[name].float().numpy()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_safetensors_match_the_saved_model(tmp_path: Path, dtype: torch.dtype, sharded: bool) -> None:
    model = llama().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="4KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() is sharded
    checkpoint = open_checkpoint(str(tmp_path))
    assert_equals_model(checkpoint, model)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in model.state_dict().values())


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_files_match_the_saved_model(tmp_path: Path, sharded: bool) -> None:
    model = t5(tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    if sharded:
        shards = {name: f"pytorch_model-{index % 2}.bin" for index, name in enumerate(state)}
        for shard in set(shards.values()):
            torch.save({name: state[name] for name in state if shards[name] == shard}, tmp_path / shard)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(str(tmp_path))
    assert set(checkpoint.names()) == set(state)
    assert_equals_model(checkpoint, model)
    if not sharded:
        assert checkpoint.nbytes == sum(parameter.nbytes for parameter in model.parameters())


def test_config_has_defaults_and_no_local_path(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(with_tensors(tmp_path, a=np.zeros(1, np.float32))))
    assert checkpoint.config["rms_norm_eps"] == 1e-6
    assert checkpoint.config.get("rope_parameters", checkpoint.config)["rope_theta"] == 10000.0
    assert str(tmp_path) not in json.dumps(checkpoint.config)
    assert (checkpoint.name, checkpoint.architecture) == (tmp_path.name, "llama")


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (None, {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}),
        ({"eos_token_id": [3, 4]}, {"eos_token_id": [3, 4], "decoder_start_token_id": 0}),
        ({"decoder_start_token_id": 2}, {"decoder_start_token_id": 2}),
    ],
)
def test_generation_config_is_read_or_derived(tmp_path: Path, stored: Any, expected: dict[str, Any]) -> None:
    t5().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    if stored is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    assert open_checkpoint(str(tmp_path)).generation_config == expected


def test_sha256_changes_with_config_and_with_weights(tmp_path: Path) -> None:
    hashes = set()
    for value, theta in ((0, 1e4), (1, 1e4), (1, 2e4), (1, 2e4)):
        with_tensors(tmp_path, a=np.full(4, value, np.float32))
        write_config(tmp_path, rope_theta=theta)
        hashes.add(open_checkpoint(str(tmp_path)).sha256)
    assert len(hashes) == 3


@pytest.mark.parametrize("make", [llama, t5])
def test_reference_model_is_float32(tmp_path: Path, make: Any) -> None:
    make().to(torch.bfloat16).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    model = reference_model(checkpoint)
    assert not model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert_equals_model(checkpoint, model)


def test_missing_checkpoints_and_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "a.txt").write_text("")
    for model, part in {
        str(tmp_path / "none" / "at" / "all"): "does not exist",
        str(tmp_path / "none.gguf"): "does not exist",
        str(tmp_path / "a.txt"): "not GGUF",
        str(tmp_path): "no config.json",
        "no-such-owner/no-such-model": "cannot be had from the hub: offline, or wrong name",
    }.items():
        with pytest.raises(CheckpointError, match=part) as caught:
            open_checkpoint(model)
        assert "\n" not in str(caught.value)


def test_a_hub_name_is_resolved_from_the_cache_and_weights_are_fetched_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(*_: Any, allow_patterns: list[str], **__: Any) -> str:
        asked.append([pattern for pattern in allow_patterns if "model" in pattern and pattern != "*.model"])
        return str(tmp_path)

    with_tensors(tmp_path, a=np.zeros(1, np.float32))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_checkpoint("owner/model").name == "owner/model"
    assert asked == [[], ["model*.safetensors"]]
    write_config(tmp_path, model_type="gemma3")
    asked.clear()
    with pytest.raises(UnsupportedModelError, match="owner/model: architecture 'gemma3' is not supported"):
        open_checkpoint("owner/model")
    assert asked == [[]]


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        # The first reason, whatever else is wrong: there are no weights, and they would be quantised.
        ('{"model_type": "nonesuch", "quantization_config": {}}', "architecture 'nonesuch' is not supported"),
        ("{}", "architecture 'None' is not supported"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "stored quantised"),
    ],
)
def test_unusable_config_is_refused(tmp_path: Path, config: str, part: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=part):
        open_checkpoint(str(tmp_path))


def test_quantized_weights_are_refused_by_tensor_name(tmp_path: Path) -> None:
    held = {"a.weight": np.zeros((2, 2), np.int8), "a.weight_scale": np.ones(2, np.float32)}
    with pytest.raises(CheckpointError, match=r"stored quantised, as its tensor a\.weight_scale says; give the orig"):
        open_checkpoint(str(with_tensors(tmp_path, **held)))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", 10**12), ("head_dim", 10**9), ("rms_norm_eps", float("nan"))],
)
def test_out_of_range_configuration_is_refused_before_reading_weights(tmp_path: Path, name: str, value: float) -> None:
    with_tensors(tmp_path, a=np.zeros(1, np.float32))
    write_config(tmp_path, model_type="qwen3", **{name: value})
    with pytest.raises(UnsupportedModelError, match=f"{name} is {value} in the configuration; it must be a "):
        open_checkpoint(str(tmp_path))


def write_safetensors(path: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(start: int, stop: int, *shape: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "header",
    [
        pytest.param({"a": entry(0, 36, 9)}, id="beyond the end"),
        pytest.param({"a": entry(0, 4, 1), "b": entry(0, 8, 2)}, id="overlap"),
        pytest.param({"a": entry(4, 8, 1)}, id="hole"),
        pytest.param({"a": entry(0, 8, -2)}, id="negative shape"),
        pytest.param({"a": entry(0, 8, 1 << 62, 8)}, id="product beyond 64 bits"),
        pytest.param({"a": entry(0, 8, 2, dtype="F33")}, id="unknown type"),
        pytest.param([], id="no object"),
    ],
)
def test_invalid_safetensors_header_is_refused(tmp_path: Path, header: Any) -> None:
    write_config(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file") as caught:
        open_checkpoint(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_8_bit_types_are_read_and_an_unsupported_type_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    values = torch.tensor([[1.5, -2.0, 0.0625], [0.0, 448.0, -0.25]])
    tensors = {name: values.to(getattr(torch, name)) for name in ("float8_e4m3fn", "float8_e5m2")}
    save_torch_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.nbytes == 12
    for name, tensor in tensors.items():
        assert np.array_equal(checkpoint.read(name), tensor.float().numpy())
    write_safetensors(tmp_path / "model.safetensors", {"a": entry(0, 8, 1, dtype="C64")}, bytes(8))
    with pytest.raises(CheckpointError, match="C64, which is not supported"):
        open_checkpoint(str(tmp_path)).read("a")


@pytest.mark.parametrize(
    ("weight_map", "part"),
    [
        ({"a": "gone.safetensors"}, r"names the shard gone\.safetensors, which is missing"),
        ({"a": "../x.safetensors"}, "outside its directory"),
        ({"b": "x.safetensors"}, r"places b in x\.safetensors, which lacks it"),
        ({}, "no weight_map"),
    ],
)
def test_invalid_index_is_refused(tmp_path: Path, weight_map: dict[str, str], part: str) -> None:
    write_config(tmp_path)
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=part):
        open_checkpoint(str(tmp_path))


def test_unreadable_torch_file_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path) / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    cut = path.read_bytes()[:-100]
    for content, reason in (
        (cut, "cannot be read as PyTorch weights"),
        ([torch.zeros(1)], "holds list"),
        ({"a": Path("code")}, "cannot be read as PyTorch weights"),  # nothing but plain data is unpickled
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(CheckpointError, match=reason):
            open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_missing_or_non_finite_tensor_is_named(tmp_path: Path, value: float) -> None:
    array = np.zeros((3, 4), np.float32)
    array[1, 2] = value
    checkpoint = open_checkpoint(str(with_tensors(tmp_path, good=np.zeros(2, np.float32), bad=array)))
    assert checkpoint.read("good").sum() == 0
    with pytest.raises(CheckpointError, match="tensor bad holds NaN or infinity"):
        checkpoint.read("bad")
    assert "good" in checkpoint
    assert "none" not in checkpoint
    for method in (checkpoint.read, checkpoint.shape):
        with pytest.raises(CheckpointError, match="no tensor none;"):
            method("none")


def test_greedy_decoding_does_not_change_warning_filters(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    (found,) = greedy_ids(model, open_checkpoint(str(tmp_path)), [np.array([3, 4])], 2)
    assert 1 <= len(found) <= 2
    assert "past_key_values" not in str(warnings.filters)
