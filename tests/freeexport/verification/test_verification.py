"""Verification that must fail: wrong weights in a bundle, another checkpoint, NaN, greedy ids that differ."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import BY_NAME, Bundles, Case
from command_line import invoke, succeed
from damaged_bundle import scale_weight
from safetensors.numpy import load_file, save_file

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.conversion.convert import convert
from freeexport.conversion.convert_options import ConvertOptions
from freeexport.verification.batches import FULL, QUICK, sample_ids
from freeexport.verification.checks import Check, greedy_line
from freeexport.verification.greedy import TIE, Comparison
from freeexport.verification.verification import VerificationError, failure, verify, verify_in_child, write_report
from runtime.bundle.bundle import VERIFICATION, Bundle
from runtime.bundle.manifest import MANIFEST

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA, T5 = BY_NAME["llama-tied"], BY_NAME["t5-relu-tied"]

# Of queries and keys; scores are the square of it larger.
PEAKY = 3.0

Checkpoint = Callable[[Case], Path]


def zero_middle(path: Path, engine: str, name: str) -> None:
    """Half of the quantized weights of a tensor are zero bytes."""
    tensors = onnx.load(path / f"{engine}.onnx", load_external_data=False).graph.initializer
    tensor = max((t for t in tensors if t.name.startswith(name)), key=lambda t: int(external(t)["length"]))
    start, length = int(external(tensor)["offset"]), int(external(tensor)["length"])
    content = bytearray((path / "weights.data").read_bytes())
    content[start + length // 4 : start + length // 4 + length // 2] = bytes(length // 2)
    (path / "weights.data").write_bytes(content)


def external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


@pytest.mark.parametrize(
    ("case", "engine", "weight", "where"),
    [
        (LLAMA, "shallow", "model.layers.0.mlp.down_proj", "prefill: shallow hidden"),
        (LLAMA, "deep", "model.layers.4.mlp.down_proj", "prefill: deep logits"),
        (LLAMA, "shallow", "model.norm", "prefill: shallow logits"),
        (T5, "encoder", "encoder.block.1.layer.1.DenseReluDense.wo", "encoder: encoder hidden"),
        (T5, "prologue", "decoder.block.3.layer.1.EncDecAttention.v", "prefill: deep logits"),
    ],
)
def test_wrong_weight_fails_at_the_first_affected_tensor(
    case: Case, engine: str, weight: str, where: str, copied: Bundles, checkpoint: Checkpoint
) -> None:
    path = copied(case, 2)
    scale_weight(path, engine, weight, 1.01)
    report = verify(Bundle.open(path), str(checkpoint(case)), extent=QUICK)
    assert not report["passed"]
    assert failure(report).startswith(f"{where} differs by ")
    if weight == "model.norm":  # without the checkpoint, the engines agree with themselves all the same
        assert verify(Bundle.open(path), None, extent=QUICK)["passed"]


def test_ill_conditioned_model_passes_and_its_wrong_weight_fails(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """T5 v1.0 with attention so peaky that fp32 itself is far from exact: scores 9 times as large."""
    peaky = Path(shutil.copytree(checkpoint(T5), tmp_path / "peaky"))
    tensors = load_file(peaky / "model.safetensors")
    for name in tensors:
        if name.endswith(("Attention.q.weight", "Attention.k.weight")):
            tensors[name] = tensors[name] * np.float32(PEAKY)
    save_file(tensors, peaky / "model.safetensors", metadata={"format": "pt"})
    options = ConvertOptions(2, capacity=128, encoder_capacity=128, verify="none", measure=False)
    convert(str(peaky), tmp_path / "out", options)
    bundle = Bundle.open(tmp_path / "out")
    report = verify(bundle, str(peaky))
    assert report["passed"], failure(report)
    far = [check for check in report["checks"] if check["error"] > 1e-4]
    assert {"deep logits"} <= {check["tensor"] for check in far if check["name"] == "prefill"}
    for check in far:
        if check["reference"] is not None:
            assert check["error"] <= check["tolerance"] == pytest.approx(4 * check["reference"])
    # What greedy decoding takes for a tie is what logits were just seen to be off by.
    deep = next(check for check in far if check["name"] == "prefill" and check["tensor"] == "deep logits")
    assert report["greedy"]["tie"] >= 2 * (deep["error"] + deep["reference"]) * deep["scale"] > TIE
    scale_weight(bundle.path, "deep", "decoder.block.3.layer.2.DenseReluDense.wo", 1.1)
    found = failure(verify(Bundle.open(bundle.path), str(peaky), extent=QUICK))
    assert found.startswith("prefill: deep logits differs by ")


@pytest.mark.parametrize(
    ("precision", "case"),
    [("int8", T5), ("int4", LLAMA)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_damaged_quantized_block_fails(precision: str, case: Case, copied: Bundles, checkpoint: Checkpoint) -> None:
    path = copied(case, 2, precision=precision)
    assert verify(Bundle.open(path), str(checkpoint(case)), extent=QUICK)["passed"]
    layer = case.layers - 1
    down = (
        f"model.layers.{layer}.mlp.down_proj" if case is LLAMA else f"decoder.block.{layer}.layer.2.DenseReluDense.wo"
    )
    zero_middle(path, "deep", down)
    report = verify(Bundle.open(path), str(checkpoint(case)), extent=QUICK)
    assert re.match("prefill: deep logits differs by |predictions diverge by ", failure(report)), report
    assert "convert with a higher --precision or --verify none" in failure(report)


def test_nan_weight_fails_even_without_the_checkpoint(copied: Bundles) -> None:
    path = copied(exit_layer=2)
    scale_weight(path, "deep", "model.layers.4.mlp.down_proj", math.nan)
    report = verify(Bundle.open(path), None, extent=QUICK)
    assert not report["passed"]
    assert {check["name"] for check in report["checks"] if not check["passed"]} >= {"stepping against prefill"}
    write_report(Bundle.open(path), report)
    written = json.loads((path / VERIFICATION).read_text())["checks"]
    assert None in [check["error"] for check in written]
    assert all(check["passed"] == before["passed"] for check, before in zip(written, report["checks"], strict=True))


def test_nan_and_differences_beyond_tolerance_fail_except_at_a_tie() -> None:
    assert [Check("a", "b", error, 1e-4).passed for error in (1e-4, 1.1e-4, math.nan)] == [True, False, False]
    compared = [Comparison(0, 64), *(Comparison(0, 64, 3, gap) for gap in (TIE / 2, TIE * 2, None))]
    assert [comparison.passed(TIE) for comparison in compared] == [True, True, False, False]


def test_differing_greedy_ids_fail(copied: Bundles, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    import freeexport.verification.greedy

    original = freeexport.verification.greedy.reference_ids

    def one_id_off(*arguments: Any, **options: Any) -> tuple[list[int], list[float]]:
        ids, gaps = original(*arguments, **options)
        return [*ids[:5], ids[5] ^ 1, *ids[6:]], [1.0] * len(gaps)

    monkeypatch.setattr(freeexport.verification.greedy, "reference_ids", one_id_off)
    report = verify(Bundle.open(copied(exit_layer=2)), str(checkpoint(LLAMA)), extent=QUICK)
    assert all(check["passed"] for check in report["checks"])
    assert not report["passed"]
    assert failure(report).startswith("greedy decoding: token ids of prompt 0 differ from position 5; convert with ")


def test_checkpoint_of_another_bundle_is_refused(copied: Bundles, checkpoint: Checkpoint) -> None:
    with pytest.raises(VerificationError, match=r"qwen2-tied is not the checkpoint .*made from \(llama-tied\)"):
        verify(Bundle.open(copied(exit_layer=2)), str(checkpoint(BY_NAME["qwen2-tied"])))


@pytest.mark.parametrize("name", ["m2m100", "t5-relu-tied", "llama-tied"])
def test_random_prompts_contain_no_padding(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Without a tokenizer prompts are random ids. transformers' M2M100 gives padding no position, wherever it is."""
    model, case = tmp_path / "model", BY_NAME[name]
    shutil.copytree(checkpoint(case), model, ignore=shutil.ignore_patterns("token*", "special*"))
    options = ConvertOptions(exit_layer=1, capacity=64, encoder_capacity=64, measure=False)
    assert convert(str(model), tmp_path / "bundle", options).verified
    opened = Bundle.open(tmp_path / "bundle")
    for padding in (None, 0, 1, 7, opened.manifest.vocab_size - 1):
        drawn = sample_ids(replace(opened, manifest=replace(opened.manifest, pad_token_id=padding)))
        assert padding not in {token for ids in drawn for token in ids}


def test_verify_writes_its_report_and_marks_the_bundle(copied: Bundles, checkpoint: Checkpoint) -> None:
    path = copied(exit_layer=2)
    result = succeed("verify", path, "--quick", "--against", checkpoint(LLAMA))
    assert re.search(
        r"prefill: deep logits differs by \S+ of its largest value, .*transformers itself is \S+ from", result.stdout
    )
    assert "greedy decoding" in result.stdout
    opened = Bundle.open(path, verify="full")
    assert opened.manifest.verified
    assert opened.verification is not None
    assert opened.verification["passed"]
    assert opened.verification["against"] == LLAMA.name
    # And takes the mark back where the engines are wrong.
    scale_weight(path, "deep", "model.layers.4.mlp.down_proj", 1.01)
    result = invoke("verify", path, "--quick", "--against", checkpoint(LLAMA))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: prefill: deep logits differs by ")
    opened = Bundle.open(path)
    assert not opened.manifest.verified
    assert opened.verification is not None
    assert not opened.verification["passed"]


def test_verify_without_a_checkpoint_checks_every_byte_and_changes_nothing(copied: Bundles) -> None:
    path = copied(exit_layer=2)
    before = (path / MANIFEST).read_bytes()
    result = succeed("verify", path, "--json")
    report = json.loads(result.stdout)
    assert (report["passed"], report["against"]) == (True, None)
    assert "greedy" not in report
    assert (path / MANIFEST).read_bytes() == before
    assert not (path / VERIFICATION).exists()
    content = bytearray((path / "weights.data").read_bytes())
    content[-1] ^= 1
    (path / "weights.data").write_bytes(content)
    result = invoke("verify", path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: weights.data differs from the original file")


def test_verification_is_skipped_with_a_warning_if_memory_is_short(
    copied: Bundles, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("freeexport.verification.verification.available_memory", lambda: 10**9)
    monkeypatch.setattr("freeexport.verification.verification.run_child", lambda *_: pytest.fail("started"))
    path, model = copied(exit_layer=2), str(checkpoint(LLAMA))
    assert not verify_in_child(path, model, open_checkpoint(model), Bundle.open(path).manifest, "quick")
    errors = capsys.readouterr().err
    assert "needs about 1.0 GB" in errors
    assert "warning: only 1.0 GB is available, so the bundle is not verified" in errors


def test_quick_verification_needs_memory_for_fewer_logits(
    copied: Bundles, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("freeexport.verification.verification.available_memory", lambda: 0)
    monkeypatch.setattr("freeexport.verification.verification.LOGITS", 10**7)
    path, model = copied(exit_layer=2), str(checkpoint(LLAMA))
    manifest = Bundle.open(path).manifest
    for extent in ("quick", "full"):
        assert not verify_in_child(path, model, open_checkpoint(model), manifest, extent)
    quick, full = map(float, re.findall(r"needs about ([\d.]+) GB", capsys.readouterr().err))
    more = (FULL.tokens - QUICK.tokens) * 10**7 * manifest.vocab_size / 1e9
    assert full - quick == pytest.approx(more, abs=0.2)


def test_quick_verification_runs_less_and_stops_at_its_time_limit(copied: Bundles, checkpoint: Checkpoint) -> None:
    bundle, model = Bundle.open(copied(exit_layer=2)), str(checkpoint(LLAMA))
    quick, full = (verify(bundle, model, extent=extent) for extent in (QUICK, FULL))
    assert quick["passed"]
    assert full["passed"]
    assert len(quick["checks"]) < len(full["checks"])
    assert (len(quick["greedy"]["prompts"]), quick["greedy"]["tokens"]) == (2, 16)
    assert quick["left_out"] == full["left_out"] == []
    late = verify(bundle, model, extent=replace(QUICK, seconds=0))
    assert late["passed"]
    assert late["left_out"] == ["stepping and sync passes", "1 prompts"]
    assert len(late["greedy"]["prompts"]) == 1  # at least one is always decoded
    assert {check["name"] for check in late["checks"]} == {"prefill"}


def test_differing_prompts_of_a_quantized_bundle_are_a_warning() -> None:
    def line(tie: float | None, *prompts: tuple[int | None, float | None]) -> tuple[bool, str]:
        return greedy_line({"tie": tie, "prompts": [{"first_difference": at, "gap": gap} for at, gap in prompts]})

    equal = "greedy decoding: ids of 1 of 2 prompts equal"
    assert line(None, (None, None)) == (True, "greedy decoding: ids of 1 of 1 prompts equal")
    assert line(0.1, (None, None), (3, 0.05)) == (True, f"{equal}, the others first differ at a tie")
    different = f"{equal}; the others first differ at token 4 (best logits 0.051 apart)"
    assert line(None, (3, 0.051), (None, None)) == (False, different)
