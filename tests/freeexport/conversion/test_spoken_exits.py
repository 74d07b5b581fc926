"""Ready-made exits of a speech model, whose samples have recordings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from sounds import sound, wav
from transformers import AutoTokenizer
from whisper_case import START, write_whisper

from freeexport.checkpoints import packed_exit
from freeexport.checkpoints.packed_exit import read_packed
from freeexport.checkpoints.packed_sounds import MAX_SECONDS, fields_of_sounds
from freeexport.checkpoints.ready_made import apply_exit
from freeexport.checkpoints.weight_files import CheckpointError
from freeexport.conversion.convert import convert
from freeexport.conversion.convert_options import ConvertOptions
from freeexport.costs import timing
from freeexport.training.train import train
from freeexport.training.training_options import TrainingOptions
from freeexport.verification.exit_agreement import agreement_of, open_with_exit
from runtime import Session
from runtime.speech.audio import RATE, read_audio
from tools.models import pack_exit

SECONDS = (0.4, 0.5, 0.6)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint, recordings, and `exit.safetensors`, packed with them. Tests must not write into it."""
    directory = tmp_path_factory.mktemp("whisper")
    write_whisper(directory / "model")
    (directory / "text").mkdir()
    BY_NAME["llama-tied"].build(directory / "text")
    AutoTokenizer.from_pretrained(directory / "text").save_pretrained(directory / "model")
    lines = []
    for number, seconds in enumerate(SECONDS):
        (directory / f"{number}.wav").write_bytes(wav(sound(seconds)))
        lines.append({"audio": f"{number}.wav", "language": "de", "target": "abba"})
    data = directory / "lines.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = TrainingOptions(
        data, 1, tune="exit", exit_head_layers=1, exit_input="fused", exit_vocab=250, steps=2, batch_tokens=128
    )
    train(str(directory / "model"), directory / "trained", options)
    facts = [word for name in ("model", "licence", "data", "recipe", "results") for word in (f"--{name}", name)]
    named = ["--samples", str(data), "--out", str(directory / "exit.safetensors")]
    done = CliRunner().invoke(pack_exit.command, [str(directory / "trained"), "spoken", *facts, *named])
    assert done.exit_code == 0, done.output
    return directory


def test_recordings_are_packed_with_the_models_transcripts(whisper: Path) -> None:
    packed = read_packed(whisper / "exit.safetensors")
    assert len(packed.sounds) == len(packed.about.samples) == len(SECONDS)
    assert packed.prompts is packed.sounds
    for number, (samples, answer) in enumerate(zip(packed.sounds, packed.about.samples, strict=True)):
        original = read_audio(whisper / f"{number}.wav")
        assert samples.dtype == np.float32
        np.testing.assert_allclose(samples, original, rtol=0.03, atol=2e-4)
        assert answer.prompt[0] == START
        assert answer.answer
    trained = apply_exit(open_with_exit(str(whisper / "model"), None), packed)
    found = agreement_of(trained, packed.about.samples, packed.sounds).value
    assert found == pytest.approx(packed.about.agreement, abs=0.1)  # measured before parameters were rounded


def test_audio_levels_are_monotonic_and_symmetric() -> None:
    ramp = np.linspace(-1, 1, 2001, dtype=np.float32)
    levels = fields_of_sounds([ramp])["sound.0"]
    assert (np.diff(levels.astype(int)) >= 0).all()
    assert (levels == -levels[::-1]).all()
    assert [levels[0], levels[1000], levels[-1]] == [-127, 0, 127]


def test_exit_is_applied_to_other_weights_if_its_predictions_agree(
    whisper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near = tmp_path / "near"
    shutil.copytree(whisper / "model", near)
    state = {name: tensor * (1 + 1e-6) for name, tensor in load_torch(near / "model.safetensors").items()}
    save_torch(state, near / "model.safetensors", metadata={"format": "pt"})
    path = whisper / "exit.safetensors"
    about = read_packed(path).about
    applied = open_with_exit(str(near), str(path))
    assert applied.ready_made is not None
    assert f"of {len(SECONDS)} samples, with its own {about.agreement:.1%}" in capsys.readouterr().err


def test_convert_measures_the_gain_on_recordings(
    whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "GAIN_ROUNDS", 1)
    monkeypatch.setattr(timing, "TOLERATED", 1e9)
    out = tmp_path / "bundle"
    options = ConvertOptions(precision="int8", exit=str(whisper / "exit.safetensors"), verify="none", measure=False)
    convert(str(whisper / "model"), out, options)
    gain = timing.exit_gain(out, read_packed(whisper / "exit.safetensors").prompts)
    assert gain is not None
    assert gain.prompts == len(SECONDS)
    with Session(out, threads=1) as session:
        asked: dict[str, Any] = {"language": "de", "fallback_temperatures": (), "max_new_tokens": 12}
        recording = whisper / "0.wav"
        full = session.generate(recording, mode="full", **asked).token_ids
        assert session.generate(recording, mode="lossless", drafts="exit", **asked).token_ids == full


def rewritten(path: Path, out: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Write the file of an exit with other tensors and a hash that is right."""
    with safe_open(path, "np") as file:
        about = json.loads(file.metadata()["freeexport_exit"])
    save_file(tensors, out)
    about["tensors_sha256"] = packed_exit._tensors_sha256(out)
    save_file(tensors, out, metadata={"freeexport_exit": json.dumps(about)})
    return out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sound.0": None}, "it has 2 recordings for 3 samples"),
        ({"sound.3": np.ones(9, np.int8)}, "it has 4 recordings for 3 samples"),
        ({"sound.1": None, "sound.x": np.ones(9, np.int8)}, "it has 3 recordings for 3 samples"),
        ({"sound.1": np.ones(9, np.float32)}, r"sound.1 is float32 \[9\], not int8"),
        ({"sound.1": np.ones((3, 3), np.int8)}, r"sound.1 is int8 \[3, 3\], not int8 of one dimension"),
        ({"sound.1": np.ones(0, np.int8)}, r"sound.1 is int8 \[0\]"),
        ({"sound.2": np.ones(MAX_SECONDS * RATE + 1, np.int8)}, r"a recording of 30\.0 s, at most 30"),
    ],
)
def test_damaged_recordings_are_refused(
    change: dict[str, np.ndarray | None], reason: str, whisper: Path, tmp_path: Path
) -> None:
    source = whisper / "exit.safetensors"
    tensors = {name: array for name, array in {**load_file(source), **change}.items() if array is not None}
    with pytest.raises(CheckpointError, match=reason) as raised:
        read_packed(rewritten(source, tmp_path / "damaged.safetensors", tensors))
    assert "\n" not in str(raised.value)


def test_speech_samples_require_recordings(whisper: Path, tmp_path: Path) -> None:
    source = whisper / "exit.safetensors"
    tensors = {name: array for name, array in load_file(source).items() if not name.startswith("sound.")}
    packed = read_packed(rewritten(source, tmp_path / "silent.safetensors", tensors))
    base = open_with_exit(str(whisper / "model"), None)
    with pytest.raises(CheckpointError, match="it has samples without recordings, for a whisper model"):
        apply_exit(base, packed)
