"""`convert --target`: what it decides, what it refuses, and that its graphs say what those for the CPU say."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME, PROMPTS, Bundles, Case
from command_line import invoke, succeed
from device_cases import EXITS

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.conversion.convert_options import ConvertOptions, engine_options
from freeexport.verification.batches import QUICK
from freeexport.verification.verification import failure, verify
from graphs.errors import GraphError
from graphs.families import describe
from runtime import Bundle, Session
from runtime.errors import CapacityError, EngineError

T5, LLAMA = BY_NAME["t5-relu-tied"], BY_NAME["llama-grouped-llama3-rope"]
MODELS = (
    *("t5-relu-tied", "llama-grouped-llama3-rope", "mistral-window", "bart", "marian", "m2m100", "smollm3", "granite"),
    *("phi3-longrope", "gemma2", "gemma3", "gpt2", "t5gemma", "t5gemma2"),
)

Checkpoint = Callable[[Case], Path]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("cpu", "ort", "fp32")),
        ({"dialect": "standard"}, ("cpu", "standard", "fp32")),
        ({"target": "cuda"}, ("cuda", "standard", "fp16")),
        ({"target": "cuda", "precision": "fp32"}, ("cuda", "standard", "fp32")),
        ({"target": "tensorrt"}, ("tensorrt", "standard", "fp16")),
        ({"target": "tensorrt", "precision": "bf16"}, ("tensorrt", "standard", "bf16")),
        ({"target": "tensorrt", "precision": "fp8"}, ("tensorrt", "standard", "fp8")),
        ({"target": "cuda", "precision": "int4"}, ("cuda", "standard", "int4")),
    ],
)
def test_target_decides_unspecified_options(options: dict[str, Any], expected: Any, checkpoint: Checkpoint) -> None:
    source = open_checkpoint(str(checkpoint(LLAMA)))
    engines = engine_options(describe(source.config, source), ConvertOptions(**options), 1)
    assert (engines.target, engines.dialect, engines.precision) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "cuda", "--dialect", "ort"), "target cuda needs dialect standard, not ort; leave --dialect out"),
        (("--target", "tensorrt", "--precision", "fp32"), "tensorrt has no precision fp32; choose --precision fp16 or"),
        (("--target", "cuda", "--precision", "fp8"), "target cuda has no precision fp8"),
        (("--target", "cuda", "--compute", "bf16"), "--compute bf16 is for weights that are quantized for a GPU"),
        (("--precision", "int8", "--compute", "fp16"), "not for precision int8 of target cpu"),
        (
            ("--target", "tensorrt", "--precision", "int8", "--compute", "fp32"),
            "target tensorrt does not compute in fp32; choose fp16 or bf16",
        ),
        (("--target", "cpu", "--precision", "bf16"), "target cpu has no precision bf16"),
    ],
)
def test_options_unsupported_by_a_target_are_refused(
    arguments: tuple[str, ...], message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    result = invoke("convert", checkpoint(LLAMA), tmp_path / "out", "--exit-layer", 1, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_bf16_is_verified_by_simulation_and_runs_on_no_cpu(checkpoint: Checkpoint, tmp_path: Path) -> None:
    arguments = ("--target", "tensorrt", "--precision", "bf16", "--exit-layer", 1, "--capacity", 128)
    succeed("convert", checkpoint(LLAMA), tmp_path / "out", *arguments)
    bundle = Bundle.open(tmp_path / "out")
    assert bundle.manifest.verified
    assert bundle.verification is not None
    assert bundle.verification["emulated"] == "bf16"
    with pytest.raises(EngineError, match="bf16 engines run on a GPU only"):
        Session(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_bf16_bundle_with_a_few_wrong_weights_fails_verification(
    bundle: Bundles, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = shutil.copytree(bundle(LLAMA, target="cuda", precision="int8", compute="bf16"), tmp_path / "bundle")
    report = verify(Bundle.open(path), str(checkpoint(LLAMA)), extent=QUICK)
    assert report["passed"], failure(report)
    weights = bytearray((path / "weights.data").read_bytes())
    middle = len(weights) // 2
    weights[middle : middle + 2048] = bytes(2048)
    (path / "weights.data").write_bytes(weights)
    assert "differs by" in failure(verify(Bundle.open(path), str(checkpoint(LLAMA)), extent=QUICK))


def test_capacity_of_a_tensorrt_bundle_is_fixed(bundle: Bundles) -> None:
    path = bundle(LLAMA, target="tensorrt")
    with pytest.raises(CapacityError, match="capacity 64 is not the 128 positions"):
        Session(path, capacity=64)
    Session(path, capacity=128).close()


def said(path: Path) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Token ids and exits on the prompts."""
    with Session(path, threads=1) as session:
        results = [session.generate(list(prompt), max_new_tokens=24, threshold=0.15) for prompt in PROMPTS]
    return [(result.token_ids, result.exited) for result in results]


@pytest.mark.parametrize("name", MODELS)
def test_targets_and_a_fixed_cache_change_no_token(name: str, bundle: Bundles) -> None:
    expected = said(bundle(BY_NAME[name]))
    assert said(bundle(BY_NAME[name], target="cuda", precision="fp32")) == expected
    assert 0 < sum(sum(exited) for _, exited in expected) < sum(len(ids) for ids, _ in expected)
    if name in ("gemma2", "t5gemma"):  # TensorRT parses no Attention with a softcap
        with pytest.raises(GraphError, match="tensorrt does not support attn_logit_softcapping"):
            bundle(BY_NAME[name], target="tensorrt")
    else:
        assert said(bundle(BY_NAME[name], target="tensorrt")) == said(bundle(BY_NAME[name], target="cuda"))


@pytest.mark.parametrize("case", [T5, LLAMA, *EXITS], ids=lambda case: case.name)
def test_tensorrt_bundle_is_verified_against_its_checkpoint(
    case: Case, bundle: Bundles, checkpoint: Checkpoint
) -> None:
    report = verify(Bundle.open(bundle(case, target="tensorrt")), str(checkpoint(case)), extent=QUICK)
    assert report["passed"], failure(report)
