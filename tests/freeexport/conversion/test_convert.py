"""`freeexport convert` as a command: what it writes, what it refuses, and what it leaves behind when it fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, LARGER, Bundles, Case
from click.testing import Result
from command_line import invoke, succeed
from handmade_bundle import write_bundle
from safetensors.numpy import load_file, save_file

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.special_tokens import known_ends
from freeexport.system.child import run_child
from freeexport.system.page import human_bytes
from freeexport.verification.verification import VerificationError, write_report
from graphs.families import supported_architectures
from graphs.weights import WeightFile
from runtime import Bundle, Session
from runtime.bundle.manifest import MANIFEST

ROOT = Path(__file__).parents[3]
LLAMA = BY_NAME["llama-tied"]
FAST = ("--verify", "none", "--capacity", "64")

Checkpoint = Callable[[Case], Path]
Change = Callable[[np.ndarray], np.ndarray]


def convert(model: Path, out: Path, *arguments: str, exit_layer: int = 1) -> Result:
    return invoke("convert", model, out, "--exit-layer", exit_layer, *arguments)


def failed(result: Result) -> str:
    """The one error line of a failed command."""
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "this is a bug" not in line
    return line


def digest(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def changed(checkpoint: Checkpoint, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a case's checkpoint with tensors replaced, or left out for None, and values of its configuration."""

    def build(case: Case, tensors: Mapping[str, Change | None] | None = None, **config: Any) -> Path:
        directory = Path(shutil.copytree(checkpoint(case), tmp_path / "changed"))
        stored = load_file(directory / "model.safetensors")
        for name, change in (tensors or {}).items():
            array = stored.pop(name)
            if change is not None:
                stored[name] = np.ascontiguousarray(change(array), np.float32)
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        return directory

    return build


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty directory for OUT: nothing but OUT may ever stay in it."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


# What is written


def test_verified_bundle_is_labelled_and_generates(
    checkpoint: Checkpoint, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freeexport.verification.verification.run_child", run_child)  # in a process of its own
    result = convert(checkpoint(LLAMA), place / "out", "--capacity", "128", exit_layer=2)
    assert result.exit_code == 0, result.stderr
    assert "verified: yes" in result.stdout
    assert "exit after layer 2 of 5" in result.stdout
    bundle = Bundle.open(place / "out", verify="full")
    assert bundle.manifest.verified
    assert bundle.verification is not None
    assert bundle.verification["passed"]
    # There is no exit.json: what is said of the exit is what was seen of it, not what it would give if it had learned.
    seen = bundle.verification["exit"]["agreement"]
    assert seen["count"] > 20
    assert seen["low"] <= seen["value"] <= seen["high"]
    said = result.stdout.splitlines()[-1]
    assert said.startswith("does not pay: the exit after layer 2 of 5 is untrained")
    assert f"agree at {seen['value']:.1%} (95% interval" in said
    assert "Next: train it for the exit (freeexport train CHECKPOINT OUT), or use mode lossless" in said
    assert "the speed of" not in said
    assert "at 80 %" not in result.stdout
    assert bundle.manifest.exit_trained is False
    assert f"{human_bytes(bundle.manifest.kv_bytes_per_sequence)} per sequence" in result.stdout
    source = (checkpoint(LLAMA) / "model.safetensors").stat().st_size
    size = sum(file.size for file in bundle.manifest.files.values())
    assert f"size: {human_bytes(size)}, from {human_bytes(source)}" in result.stdout
    assert os.listdir(place) == ["out"]
    with Session(place / "out") as session:
        assert session.generate("Hello", max_new_tokens=4).stats.tokens == 4


def test_defaults_come_from_the_model_and_json_prints_the_manifest(checkpoint: Checkpoint, place: Path) -> None:
    arguments = ["convert", str(checkpoint(LLAMA)), str(place / "out"), "--verify", "none", "--json"]
    result = succeed(*arguments, "--confidence", "entropy")
    assert "note: exit after layer 2 of 5, a third of them, as llama-tied has no exit.json; --exit-" in result.stderr
    assert result.stdout == (place / "out" / MANIFEST).read_text()
    manifest = json.loads(result.stdout)
    wanted = {"exit_layer": 2, "capacity": 512, "max_pending": 16, "confidence": "entropy", "verified": False,
              "precision": "fp32", "dialect": "ort", "threshold": 1.0}  # fmt: skip
    assert {name: manifest[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--build",), "--build requires --target tensorrt"),
        ((), "is already a bundle; give a checkpoint, or omit OUT and give --build"),
    ],
)
def test_build_option_requires_tensorrt_and_a_bundle_is_not_a_checkpoint(
    arguments: tuple[str, ...], message: str, bundle: Bundles, checkpoint: Checkpoint, place: Path
) -> None:
    model = checkpoint(LLAMA) if arguments else bundle(LLAMA)
    result = convert(model, place / "out", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert invoke("convert", model).exit_code == 2


def test_converting_twice_gives_the_same_bytes(checkpoint: Checkpoint, bundle: Bundles, place: Path) -> None:
    assert convert(checkpoint(LLAMA), place / "out", "--verify", "none", "--capacity", "128").exit_code == 0
    assert digest(place / "out") == digest(bundle(LLAMA))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("case", LARGER, ids=lambda case: case.name)
def test_weights_are_stored_once(case: Case, precision: str, checkpoint: Checkpoint, bundle: Bundles) -> None:
    path = bundle(case, precision=precision)
    tensors = load_file(checkpoint(case) / "model.safetensors")
    needed = sum(tensor.size * (4 if precision == "fp32" else 2) for tensor in tensors.values())
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    assert 0.99 * needed < sizes["weights.data"] < 1.05 * needed
    assert sum(sizes.values()) - sizes["weights.data"] < 300_000
    assert Bundle.open(path).manifest.weight_bytes <= sizes["weights.data"]


# Checkpoints that are refused


def ending_in(number: float) -> Change:
    return lambda array: np.append(array.reshape(-1)[:-1], number).reshape(array.shape)


UP = "model.layers.2.mlp.up_proj.weight"
BIAS = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
KEYS, NORM = "model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.q_norm.weight"
OF_T5 = "encoder.final_layer_norm.weight"


@pytest.mark.parametrize(
    ("case", "name", "change", "message"),
    [
        ("llama-tied", UP, ending_in(np.nan), f"tensor {UP} holds NaN or infinity"),
        ("t5-relu-tied", "shared.weight", ending_in(np.nan), "tensor shared.weight holds NaN or infinity"),
        ("llama-tied", UP, None, f"has no tensor {UP}"),
        ("llama-untied-many-eos", "lm_head.weight", None, "has no tensor lm_head.weight"),
        ("t5-relu-tied", BIAS, None, f"has no tensor {BIAS}"),
        ("llama-tied", UP, lambda a: a[:, :-1], f"weight {UP} is [96, 63], the configuration says [96, 64]"),
        ("llama-tied", KEYS, lambda a: a[:-16], f"weight {KEYS} is [48, 64], the configuration says [64, 64]"),
        ("qwen3", NORM, lambda a: a[:-1], f"weight {NORM} is [15], the configuration says [16]"),
        ("t5-relu-tied", OF_T5, lambda a: a[:-1], f"weight {OF_T5} is [31], the configuration says [32]"),
    ],
)
def test_invalid_tensor_is_refused_by_name(
    case: str, name: str, change: Change | None, message: str, changed: Callable[..., Path], place: Path
) -> None:
    assert message in failed(convert(changed(BY_NAME[case], {name: change}), place / "out", *FAST))
    assert os.listdir(place) == []


def test_weight_beyond_fp16_is_refused_by_name(changed: Callable[..., Path], place: Path) -> None:
    arguments = (*FAST, "--precision", "fp16", "--kernels", "onnxruntime")
    line = failed(convert(changed(LLAMA, {UP: ending_in(1e6)}), place / "out", *arguments))
    assert UP in line
    assert "--precision fp32" in line
    assert os.listdir(place) == []


def test_weight_beyond_fp16_is_stored_in_fp32_for_our_kernels(
    changed: Callable[..., Path], checkpoint: Checkpoint, place: Path
) -> None:
    sizes = []
    for model in (checkpoint(LLAMA), changed(LLAMA, {UP: ending_in(1e6)})):
        out = place / str(len(sizes))
        assert convert(model, out, *FAST, "--precision", "fp16").exit_code == 0
        sizes.append((out / "weights.data").stat().st_size)
    assert sizes[1] - sizes[0] == 2 * 96 * 64


def test_unsupported_architecture_is_refused_with_the_supported_ones(changed: Callable[..., Path], place: Path) -> None:
    line = failed(convert(changed(LLAMA, model_type="bert", architectures=["Other"]), place / "out", *FAST))
    assert "'bert' is not supported" in line
    assert all(name in line for name in supported_architectures())
    assert os.listdir(place) == []


def test_end_tokens_beyond_the_vocabulary_are_ignored(changed: Callable[..., Path]) -> None:
    model = changed(LLAMA)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 288, 999, -1]}))
    assert known_ends(open_checkpoint(str(model)), 288) == (2,)


HEADS_OF_8 = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}


def test_heads_without_a_fused_kernel_select_the_standard_dialect_with_a_note(
    changed: Callable[..., Path], place: Path
) -> None:
    result = convert(changed(LLAMA, **HEADS_OF_8), place / "out", *FAST)
    assert result.exit_code == 0, result.stderr
    assert "dialect: standard, as ONNX Runtime's fused attention has no kernel for heads of size 8" in result.stdout
    assert Bundle.open(place / "out").manifest.dialect == "standard"
    with Session(place / "out") as session:
        assert session.generate("Hello", max_new_tokens=3, ignore_eos=True).stats.tokens == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--dialect", "ort"),
            "8 values of each head are rotated, and the ort dialect's operator needs a multiple of 16",
        ),
        (
            ("--precision", "int8"),
            "precision int8 needs operators of ONNX Runtime, but 8 values of each head are rotated",
        ),
    ],
)
def test_options_that_require_a_fused_kernel_are_refused_for_other_head_sizes(
    arguments: tuple[str, ...], message: str, changed: Callable[..., Path], place: Path
) -> None:
    assert message in failed(convert(changed(LLAMA, **HEADS_OF_8), place / "out", *FAST, *arguments))
    assert os.listdir(place) == []


@pytest.fixture
def no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object) -> None:
        pytest.fail("a weight was read")

    monkeypatch.setattr("freeexport.checkpoints.checkpoint.Checkpoint.read", read)
    monkeypatch.setattr("freeexport.checkpoints.checkpoint._digest", read)
    monkeypatch.setattr("freeexport.conversion.convert.write_tokenizer", read)


@pytest.mark.usefixtures("no_weights_are_read")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--exit-layer", "0"), "exit layer 0 is out of range"),
        (("--exit-layer", "5"), "choose --exit-layer, from 1 to 4"),
        (("--capacity", "0"), "capacity 0 is out of range; choose 1 to 512"),
        (("--capacity", "513"), "capacity 513 is out of range; choose 1 to 512"),
        (("--encoder-capacity", "0"), "encoder capacity 0 is out of range"),
        (("--head", "int4"), "--head int4 has no effect; choose --precision int8 or int4 or mixed"),
        (("--precision", "int8", "--dialect", "standard"), "choose --dialect ort"),
        (("--target", "cuda", "--precision", "mixed"), "target cuda has no precision mixed"),
        (("--kv-cache", "int8"), "--kv-cache int8 needs freeexport's own kernels"),
        (("--kv-cache", "int8", "--target", "cuda"), "not precision fp16 of target cuda"),
        (("--kv-cache", "int8", "--precision", "int8", "--kernels", "onnxruntime"), "kernels of onnxruntime"),
        (("--activations", "int16"), "--activations int16 needs freeexport's own kernels"),
        (("--activations", "int16", "--target", "cuda"), "not precision fp16 of target cuda"),
        (("--activations", "int16", "--precision", "int8", "--kernels", "onnxruntime"), "kernels of onnxruntime"),
        (("--calibration", "nowhere"), "--calibration nowhere: there is no such file; name another"),
        (
            ("--quantization-data", "nowhere", "--precision", "int4"),
            "--quantization-data nowhere: there is no such file; name another",
        ),
    ],
)
def test_invalid_option_is_refused_before_any_work(
    arguments: tuple[str, ...], message: str, checkpoint: Checkpoint, place: Path
) -> None:
    assert message in failed(convert(checkpoint(LLAMA), place / "out", *arguments))
    assert os.listdir(place) == []


@pytest.mark.usefixtures("no_weights_are_read")
@pytest.mark.parametrize("option", ["--kv-cache int8", "--activations int16"])
def test_kernel_option_without_the_library_says_what_to_install(
    option: str, checkpoint: Checkpoint, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "freeexport.conversion.convert_options.missing", lambda: "the kernels are not built; install g++"
    )
    line = failed(convert(checkpoint(LLAMA), place / "out", "--precision", "int8", *option.split()))
    assert f"{option}: the kernels are not built; install g++; or leave it out" in line
    assert os.listdir(place) == []


@pytest.mark.usefixtures("no_weights_are_read")
def test_model_without_a_start_token_is_refused_before_any_work(
    changed: Callable[..., Path], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = changed(BY_NAME["t5-relu-tied"])
    monkeypatch.setattr("freeexport.checkpoints.checkpoint._generation_config", lambda *_: {})
    (model / "generation_config.json").write_text("{}")
    assert "names no decoder_start_token_id" in failed(convert(model, place / "out"))
    assert os.listdir(place) == []


def test_existing_output_is_refused_before_opening_the_model(bundle: Bundles, place: Path) -> None:
    shutil.copytree(bundle(LLAMA), place / "out")
    assert "--overwrite" in failed(convert(place / "no-model", place / "out", *FAST))
    (place / "file").write_text("x")
    for arguments in ((), ("--overwrite",)):
        line = failed(convert(place / "no-model", place / "file", *FAST, *arguments))
        assert "exists and was not written by this command" in line


def test_full_disk_gives_a_one_line_error_and_keeps_the_old_bundle(
    bundle: Bundles, checkpoint: Checkpoint, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(bundle(LLAMA), place / "out"))
    before = digest(place)
    write, written = WeightFile._write, 0

    def full(*arguments: Any) -> Any:
        nonlocal written
        written += 1
        if written > 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(WeightFile, "_write", full)
    assert "disk full" in failed(convert(checkpoint(LLAMA), out, *FAST, "--overwrite"))
    assert digest(place) == before
    assert os.listdir(place) == ["out"]


def not_completed(*_: object, **__: object) -> bool:
    """A verification that could not be done."""
    raise VerificationError("prefill: deep logits differs")


def refused(directory: Path, *_: object, **__: object) -> bool:
    """A verification that found a fault."""
    write_report(Bundle.open(directory), {"passed": False, "checks": []})
    raise VerificationError("prefill: deep logits differs")


def test_bundle_that_fails_verification_is_kept_separately_with_its_report(
    checkpoint: Checkpoint, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a bundle whose weights were damaged just before."""
    from damaged_bundle import scale_weight

    from freeexport.verification import verification

    def damaged(module: str, command: str, directory: str, *arguments: str) -> str:
        scale_weight(Path(directory), "deep", "model.layers.4.mlp.down_proj", 1.01)
        return run_child(module, command, directory, *arguments)

    run_child = verification.run_child
    monkeypatch.setattr(verification, "run_child", damaged)
    result = convert(checkpoint(LLAMA), place / "out", "--capacity", "64")
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"error: prefill: deep logits differs by \S+ of its largest value, the limit is 2.00e-05; "
        r"transformers itself is \S+ from float64; convert with --dialect standard or --verify none; "
        r"kept as \S+/out.unverified, with the figures in verification.json",
        line,
    )
    assert os.listdir(place) == ["out.unverified"]
    kept = Bundle.open(place / "out.unverified", verify="full")
    assert not kept.manifest.verified
    assert kept.verification is not None
    assert not kept.verification["passed"]
    assert any(not check["passed"] for check in kept.verification["checks"])
    with Session(place / "out.unverified") as session:
        assert session.generate("Hello", max_new_tokens=3, ignore_eos=True).stats.tokens == 3


def test_failed_bundle_replaces_an_earlier_failed_one_and_not_the_output(
    bundle: Bundles, checkpoint: Checkpoint, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle(LLAMA), place / "out")
    before = digest(place / "out")
    monkeypatch.setattr("freeexport.conversion.convert.verify_in_child", refused)
    for exit_layer in (2, 3):
        line = failed(convert(checkpoint(LLAMA), place / "out", "--overwrite", exit_layer=exit_layer))
        assert f"kept as {place / 'out.unverified'}" in line
        assert Bundle.open(place / "out.unverified", verify="full").manifest.exit_layer == exit_layer
    assert sorted(os.listdir(place)) == ["out", "out.unverified"]
    assert digest(place / "out") == before
    monkeypatch.setattr("freeexport.conversion.convert.verify_in_child", not_completed)
    assert "kept" not in failed(convert(checkpoint(LLAMA), place / "other"))
    assert sorted(os.listdir(place)) == ["out", "out.unverified"]


@pytest.mark.usefixtures("no_weights_are_read")
def test_path_of_failed_bundles_is_not_overwritten_if_it_holds_something_else(
    checkpoint: Checkpoint, place: Path
) -> None:
    other = write_bundle(place / "out.unverified", verified=True)
    before = digest(other)
    assert f"{other} holds a verified bundle" in failed(convert(checkpoint(LLAMA), place / "out"))
    assert digest(other) == before
    (other / MANIFEST).unlink()
    assert f"{other} exists and was not written by this command" in failed(convert(checkpoint(LLAMA), place / "out"))
    assert os.listdir(place) == ["out.unverified"]


SLOW_CONVERT = """
import signal, sys, time
# A shell that starts this in the background may have it ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
from graphs.weights import WeightFile
write = WeightFile._write
def slow(*arguments):
    time.sleep(0.2)
    return write(*arguments)
WeightFile._write = slow
from freeexport.cli import main
main(sys.argv[1:])
"""


def test_interrupted_conversion_leaves_the_old_bundle_unchanged(
    bundle: Bundles, checkpoint: Checkpoint, place: Path
) -> None:
    """Interrupted in the middle of writing weights."""
    shutil.copytree(bundle(LLAMA), place / "out")
    before = digest(place / "out")
    arguments = ["convert", str(checkpoint(LLAMA)), str(place / "out"), "--exit-layer", "2", "--overwrite", *FAST]
    command = [sys.executable, "-c", SLOW_CONVERT, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        deadline = time.monotonic() + 60
        while not (place / ".out.partial" / "weights.data").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in errors
    assert os.listdir(place) == ["out"]
    assert digest(place / "out") == before
