from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Bundles, Case, _t5
from device_cases import LONGT5
from fake_device import Machine

from freeexport.checkpoints.checkpoint import CheckpointError
from freeexport.conversion import encoder_export
from freeexport.conversion.convert import convert
from freeexport.conversion.convert_options import ConvertOptions
from freeexport.verification.batches import QUICK
from freeexport.verification.greedy import TIE, compare_greedy
from freeexport.verification.verification import failure, verify
from graphs.errors import UnsupportedModelError
from graphs.widen import fp32_copy
from runtime import Bundle, Session
from tools.gpu.operators import check_bundle, load_table

pytestmark = pytest.mark.usefixtures("one_thread")

Directory = Callable[[Case], Path]
RADIUS = 7
# A global block that does not divide a local one: prompts are padded to a multiple of both.
LOCAL = _t5("longt5-local", (1, 2), model="LongT5", num_layers=1, local_radius=RADIUS, tie_word_embeddings=True)
GLOBAL = _t5(
    "longt5-global",
    (1, 2),
    model="LongT5",
    num_layers=2,
    encoder_attention_type="transient-global",
    local_radius=5,
    global_block_size=4,
)
LENGTHS = (1, RADIUS, RADIUS + 1, RADIUS + 2, 31, 90)


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 259, length).tolist() for length in LENGTHS]


def assert_converted(bundle: Path, model: Any, directory: Path) -> None:
    """Verified, and greedy ids are those of transformers for prompts shorter and longer than a block."""
    report = verify(Bundle.open(bundle, "full"), str(directory))
    assert report["passed"], failure(report)
    assert report["checks"][0]["tensor"] == "encoder hidden"
    with Session(bundle, slots=1, threads=1) as session:
        comparisons = list(compare_greedy(session, model, prompts(), new_tokens=24))
        texts = {tuple(session.generate(prompt, mode="full", max_new_tokens=24).token_ids) for prompt in prompts()}
    assert all(comparison.passed(TIE) for comparison in comparisons)
    assert len(texts) == len(LENGTHS)


@pytest.mark.parametrize("case", [LOCAL, pytest.param(GLOBAL, marks=pytest.mark.slow)], ids=lambda case: case.name)
def test_longt5_bundle_matches_transformers(
    case: Case, bundle: Bundles, checkpoint: Directory, source_model: Callable[[Case], Any]
) -> None:
    assert_converted(bundle(case), source_model(case), checkpoint(case))


def test_weights_of_an_exported_encoder_are_stored_once(bundle: Bundles, checkpoint: Directory) -> None:
    manifest = Bundle.open(bundle(LOCAL)).manifest
    stored = (checkpoint(LOCAL) / "model.safetensors").stat().st_size
    assert manifest.weight_bytes <= 1.05 * stored
    assert [copy.tensor for copy in manifest.copies] == ["shared.weight"]


@pytest.mark.slow
def test_exported_encoder_is_stored_in_fp16_and_declares_widened_bytes(bundle: Bundles, checkpoint: Directory) -> None:
    path = bundle(GLOBAL, precision="fp16")
    report = verify(Bundle.open(path, "full"), str(checkpoint(GLOBAL)))
    assert report["passed"], failure(report)
    manifest = Bundle.open(path).manifest
    assert manifest.weight_bytes <= 0.65 * (checkpoint(GLOBAL) / "model.safetensors").stat().st_size
    (widened,) = (copy for copy in manifest.copies if copy.tensor == "encoder")
    assert widened.bytes > 0


TARGETS = (
    {"precision": "fp16"},  # this project's kernels compute in fp32
    {"precision": "bf16", "target": "cuda"},
    pytest.param({"precision": "int8", "target": "tensorrt"}, marks=pytest.mark.slow),
)


@pytest.mark.parametrize("options", TARGETS, ids=lambda options: options.get("target", "cpu"))
def test_exported_encoder_is_verified_for_every_target(
    options: dict[str, Any], bundle: Bundles, checkpoint: Directory
) -> None:
    opened = Bundle.open(bundle(LONGT5, **options))
    report = verify(opened, str(checkpoint(LONGT5)), extent=QUICK)
    assert report["passed"], failure(report)
    assert opened.manifest.weight_bytes <= 0.65 * (checkpoint(LONGT5) / "model.safetensors").stat().st_size
    if opened.manifest.target == "cuda":
        assert check_bundle(opened.path, load_table()) == []


def test_fake_gpu_matches_the_cpu(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(bundle(LONGT5, precision="bf16", target="cuda"))
    options: dict[str, Any] = {"max_new_tokens": 12, "threshold": 0.5}
    with fp32_copy(opened, rounds=True) as copy, Session(copy.path, threads=1) as session:
        expected = [session.generate(prompt, **options).token_ids for prompt in prompts()]
    Machine(monkeypatch)
    with Session(opened.path, device="cuda:0", threads=1) as session:
        assert [session.generate(prompt, **options).token_ids for prompt in prompts()] == expected


@pytest.mark.slow
def test_every_node_of_a_global_encoder_has_a_cuda_kernel(bundle: Bundles) -> None:
    assert check_bundle(bundle(GLOBAL, target="cuda"), load_table()) == []


@pytest.mark.slow
def test_global_block_size_with_rounded_sums_is_refused(tmp_path: Path) -> None:
    """transformers counts blocks by adding 1 / size in float64, which a graph in float32 does not repeat for 3."""
    options = {"encoder_attention_type": "transient-global", "local_radius": 5, "global_block_size": 3}
    case = _t5("longt5-thirds", (1, 2), model="LongT5", num_layers=2, **options)
    case.build(tmp_path / "model")
    assert_refused(tmp_path, UnsupportedModelError, r"is wrong for prompts of .* differs by")


def test_encoder_that_cannot_be_exported_is_refused_with_the_reason(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("GuardOnDataDependentSymNode: u0\nlong trace")

    monkeypatch.setattr(encoder_export, "_export", fail)
    shutil.copytree(checkpoint(LOCAL), tmp_path / "model")
    assert_refused(tmp_path, UnsupportedModelError, r"cannot be exported: GuardOnDataDependentSymNode: u0; try")


@pytest.mark.parametrize(("damage", "reason"), [("missing", "has no tensor {}"), ("nan", "tensor {} holds NaN")])
def test_damaged_encoder_weights_are_refused_by_name(
    damage: str, reason: str, checkpoint: Directory, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoint(LOCAL), tmp_path / "model")
    name, file = "encoder.block.0.layer.0.LocalSelfAttention.k.weight", tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    if damage == "missing":
        del weights[name]
    else:
        weights[name][3, 3] = np.nan
    save_file(weights, file, metadata={"format": "pt"})
    assert_refused(tmp_path, CheckpointError, reason.format(name))


def assert_refused(directory: Path, error: type[Exception], match: str) -> None:
    """Converting `directory`/model fails, and leaves nothing."""
    with pytest.raises(error, match=match):
        convert(str(directory / "model"), directory / "out", ConvertOptions(1, verify="none", measure=False))
    assert [path.name for path in directory.iterdir()] == ["model"]
