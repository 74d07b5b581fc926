"""Whisper with random weights: token ids against transformers' generate, exits and drafts under the rules of speech,
windows and segments, and the interfaces for audio."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from checkpoints import BY_NAME
from command_line import invoke, succeed
from running_server import running
from sounds import sound, wav
from transformers import AutoTokenizer
from whisper_case import (
    CAPACITY,
    END,
    FIRST,
    LAYERS,
    POSITIONS,
    START,
    SUPPRESSED,
    VOCABULARY,
    write_whisper,
)  # fmt: skip

from freeexport.calibrate.sources import fitting_prompts
from freeexport.calibrate.traces import trace_of
from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.examples import DataError, encode, read_examples, text_format
from freeexport.conversion.convert import convert
from freeexport.conversion.convert_options import ConvertOptions
from freeexport.conversion.own_outputs import own_outputs
from freeexport.costs.measured import ReplaySession
from freeexport.fit import fit_plan, recipe
from freeexport.fit.fit_options import FitOptions
from freeexport.fit.recipe import fit, planned
from freeexport.training.train import train
from freeexport.training.training_options import TrainingOptions
from freeexport.verification.batches import QUICK
from freeexport.verification.verification import failure, verify
from graphs.families import describe
from runtime import Bundle, OptionError, PromptError, Session
from runtime.bundle.manifest import ExitInput
from runtime.engines.kernels import VERSION, missing
from runtime.engines.onnx import OnnxEngine
from runtime.speech.audio import log_mel, window
from runtime.speech.rules import Rules
from runtime.speech.windows import SpeechPrompt, Transcriber
from runtime.text.tokenizer import Tokenizer

SOUND = sound(0.9)
# Random weights say nothing likely.
RAW: dict[str, Any] = {"logprob_threshold": None, "compression_ratio_threshold": None, "no_speech_threshold": None}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whisper(tmp_path_factory.mktemp("speech") / "whisper")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(checkpoint, tmp_path_factory.mktemp("bundle") / "speech", 1)


@pytest.fixture(scope="module")
def session(bundle: Path) -> Iterator[Session]:
    with Session(bundle, threads=1, slots=2) as session:
        yield session


def converted(checkpoint: Path, out: Path, exit_layer: int | None, **options: Any) -> Path:
    convert(str(checkpoint), out, ConvertOptions(exit_layer=exit_layer, verify="none", measure=False, **options))
    return out


@pytest.mark.parametrize(("exit_layer", "dialect"), [(1, "ort"), (LAYERS - 1, "standard")])
def test_tokens_match_transformers(checkpoint: Path, exit_layer: int, dialect: Any, tmp_path: Path) -> None:
    import torch
    from checkpoints import load

    model = load(checkpoint)
    features = torch.from_numpy(window(log_mel(SOUND, 80), 0, 2 * POSITIONS))
    with Session(converted(checkpoint, tmp_path / "b", exit_layer, dialect=dialect), threads=1) as session:
        cases = ("de", "transcribe", False), ("fr", "translate", True), (None, "transcribe", True)
        for language, task, timestamps in cases:
            given = {name: value for name, value in (("language", language), ("task", task)) if value}
            theirs = model.generate(features, num_beams=1, do_sample=False, return_timestamps=timestamps,
                                    max_new_tokens=20, **given)  # fmt: skip
            wanted = [token for token in theirs[0].tolist() if token != END]
            for mode in ("full", "lossless"):
                drafts = {"threshold": 0.1, "drafts": "exit"} if mode == "lossless" else {}
                options: dict[str, Any] = {"max_new_tokens": 20, "timestamps": timestamps, **drafts, **given, **RAW}
                ours = [token.id for token in session.stream(SOUND, mode=mode, **options) if token.id != END]
                # transformers goes on in another window behind the last pair of timestamps.
                pairs = [n for n in range(1, len(ours)) if timestamps and min(ours[n - 1 : n + 1]) >= FIRST]
                count = pairs[-1] + 1 if pairs else len(ours)
                assert count > 3
                assert (wanted if timestamps else wanted[-count:])[:count] == ours[:count]


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_encoder_attention_over_a_window_matches_transformers(tmp_path: Path) -> None:
    import torch
    from checkpoints import load

    model = load(write_whisper(tmp_path / "whisper", heads=2))
    features = np.stack([window(log_mel(part, 80), 0, 2 * POSITIONS)[0] for part in (SOUND, SOUND[4000:])])
    with torch.no_grad():
        theirs = model.model.encoder(torch.from_numpy(features)).last_hidden_state.numpy()
    path = converted(tmp_path / "whisper", tmp_path / "b", 1, precision="int8", kernels="freeexport")
    nodes = onnx.load(path / "encoder.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "EncoderAttention" for node in nodes) == 2
    ours = OnnxEngine(path / "encoder.onnx", 1, kernels=VERSION).run(["hidden"], {"features": features})[0]
    # By weights and activations in 8 bits. 0.042 without the convolutions.
    assert np.abs(ours - theirs).max() < 0.12 * np.abs(theirs).max()


@pytest.mark.parametrize("asked", [("cuda", "fp32"), ("cuda", "int8"), ("tensorrt", "fp16")], ids=str)
def test_gpu_graphs_match_cpu_graphs(
    checkpoint: Path, session: Session, asked: tuple[Any, Any], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"mode": "lossless", "threshold": 0.1, "drafts": "exit", "language": "de", **RAW}
    path = converted(checkpoint, tmp_path / "b", 1, target=asked[0], precision=asked[1])
    with Session(path, threads=1) as other:
        assert other.generate(SOUND, **options).token_ids == session.generate(SOUND, **options).token_ids
    for file in path.glob("*.onnx"):
        nodes = onnx.load(file, load_external_data=False).graph.node
        assert {node.domain for node in nodes} <= ({"", "com.microsoft"} if asked[1] == "int8" else {""})


def test_exits_obey_the_token_rules(session: Session) -> None:
    for timestamps in (False, True):
        result = session.generate(SOUND, mode="free", threshold=0.0, timestamps=timestamps, language="en", **RAW)
        rules = Rules(session.manifest.speech, (END,), timestamps)  # type: ignore[arg-type]
        assert result.stats.exits > 3
        assert rules.allows(np.zeros(0, np.int64), result.token_ids) == len(result.token_ids)


def test_timestamp_rules_limit_the_next_token(session: Session) -> None:
    assert session.manifest.speech is not None
    rules = Rules(session.manifest.speech, (END,), timestamps=True)

    def best(*written: int, likely: int = 3) -> set[int]:
        scores = np.zeros(VOCABULARY, np.float32)
        scores[likely] = 20  # likelier than all timestamps together
        masked = rules.mask(scores, np.array(written, np.int64))
        return set(np.flatnonzero(masked > -np.inf).tolist())

    assert best() == set(range(FIRST, FIRST + 11))
    after_first = best(FIRST + 5)
    assert min(after_first) == 0
    assert max(after_first) < FIRST
    assert END in after_first
    assert not after_first & {*SUPPRESSED, FIRST - 1}
    assert {token for token in best(FIRST + 5, 3) if token >= FIRST} == set(range(FIRST + 6, VOCABULARY))
    ended = best(FIRST + 5, 3, FIRST + 9, likely=END)
    assert END in ended
    assert min(ended) == END
    assert FIRST + 9 in ended
    assert FIRST + 8 not in ended
    # Timestamps that are likelier together win.
    assert min(best(FIRST + 5, 3, likely=FIRST + 7)) == FIRST + 6


def test_long_audio_is_cut_at_segment_ends(session: Session) -> None:
    """A window's last whole segment ends where the next window begins; a silent one has no text."""
    asked: list[tuple[int, ...]] = []
    answers = iter([
        (FIRST, 3, FIRST + 10, FIRST + 10, 4, FIRST + 30, FIRST + 30, 5),
        (FIRST, 6, FIRST + 40, END),
        (FIRST, 7, END),
    ])  # fmt: skip

    def decode(prompt: SpeechPrompt, options: Any) -> Any:
        asked.append(prompt.prefix)
        result = session.generate(prompt, mode="full", max_new_tokens=1)
        object.__setattr__(result, "token_ids", next(answers))
        object.__setattr__(result, "logprobs", (-0.1,))
        object.__setattr__(result, "finish_reason", "eos")
        return result

    from runtime import SpeechOptions

    options = SpeechOptions(language="en", condition_on_previous=True)
    result = Transcriber(session.manifest, None, CAPACITY).transcribe(sound(1.9), options, decode)
    assert result.segments is not None
    assert [(round(each.start, 2), round(each.end, 2)) for each in result.segments] == [
        (0.0, 0.2), (0.2, 0.6), (0.6, 1.4), (1.6, 1.9),
    ]  # fmt: skip
    assert asked[0] == (START, 202, 206)
    assert asked[1] == (208, *(FIRST, 3, FIRST + 10, FIRST + 10, 4, FIRST + 30, FIRST + 30, 5), START, 202, 206)


def test_deadline_holds_while_a_long_file_is_read(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    path.write_bytes(wav(np.zeros(1, np.float32), 48000, channels=2))
    os.truncate(path, 2 * 2 * 48000 * 3600)
    with path.open("r+b") as file:  # the length, as what writes to a pipe has it
        file.seek(40)
        file.write(b"\xf0\xff\xff\xff")
    began = time.process_time()
    result = session.generate(path, deadline=0.05)
    assert (result.finish_reason, result.text, result.token_ids) == ("deadline", "", ())
    assert time.process_time() - began < 4  # 0.4 on an idle machine; reading the whole hour takes 11


def test_unlikely_text_is_decoded_again_at_a_higher_temperature_and_silence_is_skipped(session: Session) -> None:
    result = session.generate(sound(1.9), language="en", seed=1, fallback_temperatures=(0.5, 9.0), max_new_tokens=8)
    assert result.segments is not None
    assert {segment.temperature for segment in result.segments} <= {0.0, 0.5, 9.0}
    warm = session.generate(SOUND, language="en", seed=1, logprob_threshold=-1e-6, no_speech_threshold=1.0,
                            fallback_temperatures=(2.0,), timestamps=True)  # fmt: skip
    assert [segment.temperature for segment in warm.segments or ()] == [2.0] * len(warm.segments or ())
    silent = session.generate(SOUND, language="en", logprob_threshold=-1e-6, no_speech_threshold=0.0, timestamps=True)
    assert silent.segments == ()
    assert silent.token_ids


@pytest.mark.parametrize(
    ("audio", "options", "error", "message"),
    [
        (SOUND, {"language": "xx"}, OptionError, "language is 'xx'; choose de, en, fr"),
        (SOUND, {"task": "summarize"}, OptionError, "task is 'summarize'"),
        (SOUND, {"num_beams": 2}, OptionError, "num_beams is not supported for speech"),
        (SOUND, {"regex": "a"}, OptionError, "regex is not supported for speech"),
        (SOUND, {"initial_prompt": "a"}, OptionError, "the session has no tokenizer"),
        (SOUND, {"fallback_temperatures": (0.0,)}, OptionError, "fallback_temperatures is (0.0,)"),
        ([1, 2, 3], {}, PromptError, "pass float samples"),
        ("missing.wav", {}, PromptError, "missing.wav cannot be read"),
    ],
)
def test_invalid_requests_are_refused_in_one_line(
    session: Session, audio: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=r"^[^\n]*$") as caught:
        session.generate(audio, **options)
    assert message in str(caught.value)


def test_stream_is_limited_to_one_window(session: Session) -> None:
    options: dict[str, Any] = {"language": "de", "mode": "full", **RAW}
    tokens = [token.id for token in session.stream(SOUND, **options)]
    assert tokens == list(session.generate(SOUND, **options).token_ids)
    with pytest.raises(PromptError, match=r"the audio has 1\.9 s"):
        session.stream(sound(1.9), language="de")


def test_command_line_reads_audio(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(wav(SOUND))
    asked = ["generate", str(bundle), "--audio", str(path), "-o", "language=de", "-o", "timestamps=true", "--json"]
    done = succeed(*asked)
    assert json.loads(done.stdout.splitlines()[-1])["language"] == "de"
    refused = invoke("generate", bundle, "text")
    assert refused.exit_code == 1
    assert "reads speech; give --audio FILE" in refused.output


def test_server_answers_the_official_client(bundle: Path) -> None:
    import openai

    with running(bundle, names=("w",)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        asked: dict[str, Any] = {"model": "w", "file": ("a.wav", wav(SOUND)), "language": "de", "temperature": 0}
        assert client.audio.transcriptions.create(**asked).text == ""  # the bundle has no tokenizer
        whole = client.audio.transcriptions.create(response_format="verbose_json", **asked)
        assert (whole.language, whole.duration) == ("de", 0.9)
        assert client.audio.transcriptions.create(response_format="vtt", **asked).startswith("WEBVTT")
        for given, message in (
            ({"language": "xx"}, "language is 'xx'"),
            ({"file": b"none"}, "no WAV file"),
            ({"stream": True, "response_format": "text"}, "stream is given with response_format 'text'; use json"),
            ({"timestamp_granularities": ["word"]}, "is given with response_format 'json'; use verbose_json"),
            ({"timestamp_granularities": ["line"], "response_format": "verbose_json"}, "has 'line'; choose segment"),
            ({"timestamp_granularities": ["word"], "response_format": "verbose_json"}, "the session has no tokenizer"),
        ):
            with pytest.raises(openai.BadRequestError, match=message):
                client.audio.transcriptions.create(**{**asked, **given})
        for place, value in ((34, b"\x28\x00"), (34, b"\xff\xff"), (16, b"\xff\xff\xff\x7f"), (40, bytes(4))):
            whole = wav(SOUND)
            broken = whole[:place] + value + whole[place + len(value) :]
            with pytest.raises(openai.BadRequestError) as refused:
                client.audio.transcriptions.create(**{**asked, "file": broken})
            with pytest.raises(PromptError), Session(bundle, threads=1) as session:
                session.generate(broken)
            assert refused.value.code == "invalid_prompt"


def test_upload_that_crashes_its_decoder_does_not_end_the_server(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "soundfile.py").write_text("import ctypes; ctypes.string_at(0)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with running(bundle, names=("w",)) as server:
        for content, expected in ((b"fLaC" + bytes(100), 400), (wav(SOUND), 200)) * 2:
            form = {"data": {"language": "de"}, "files": {"file": content}}
            answer = httpx.post(f"{server.url}/v1/audio/transcriptions", timeout=60, **form)
            assert answer.status_code == expected, answer.text
            assert expected == 200 or "makes its decoder crash" in answer.text


def test_server_limits_apply_to_audio(bundle: Path) -> None:
    import openai

    asked: dict[str, Any] = {"model": "w", "language": "de"}
    with running(bundle, names=("w",), deadline=0.05, max_body=10_000_000) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=2)
        with pytest.raises(openai.InternalServerError, match=r"0\.05 s expired before the transcription was complete"):
            client.audio.transcriptions.create(file=wav(np.zeros(4_000_000, np.float32), 44_100), **asked)
        assert len(server.log) == 1
        with pytest.raises(openai.APIStatusError, match="larger than 10000000 bytes"):
            client.audio.transcriptions.create(file=bytes(11_000_000), **asked)


@pytest.fixture(scope="module")
def spoken(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkpoint with a tokenizer, and `lines.jsonl` beside WAV files."""
    directory = tmp_path_factory.mktemp("spoken")
    shutil.copytree(checkpoint, directory / "model")
    (directory / "text").mkdir()
    BY_NAME["llama-tied"].build(directory / "text")
    AutoTokenizer.from_pretrained(directory / "text").save_pretrained(directory / "model")
    names = [f"{number}.wav" for number in range(6)]
    for number, name in enumerate(names):
        (directory / name).write_bytes(wav(sound(0.4 + number / 10)))
    lines = [json.dumps({"audio": name, "language": "de", "target": "abba"}) for name in names]
    (directory / "lines.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def test_bundle_is_verified_on_recordings(spoken: Path, tmp_path: Path) -> None:
    bundle, data = converted(spoken / "model", tmp_path / "b", 1, precision="int8"), spoken / "lines.jsonl"
    report = verify(Bundle.open(bundle), str(spoken / "model"), data, QUICK)
    assert report["passed"], failure(report)
    target = Tokenizer.load(bundle).encode(" abba", special=False)  # type: ignore[union-attr]
    assert report["quality"]["tokens"] == 6 * len(target)
    (spoken / "text.jsonl").write_text(json.dumps({"input": "a", "target": "b"}) + "\n")
    with pytest.raises(DataError, match="line 1: it has 'input', and the model reads speech"):
        verify(Bundle.open(bundle), str(spoken / "model"), spoken / "text.jsonl", QUICK)


@pytest.mark.slow
def test_fit_makes_a_bundle_from_recordings(spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(module: str, *arguments: str, **shown: Any) -> str:
        done = succeed(*arguments)
        return done.stdout

    monkeypatch.setattr(recipe, "run_child", here)
    monkeypatch.setattr(fit_plan, "bandwidth_of", lambda threads: 1e9)
    monkeypatch.setattr(fit_plan, "training_speed", lambda *given, **options: {"step": 0.01, "tokens_per_second": 1e5})
    draw, lines = np.random.default_rng(0), list[str]()
    for number in range(312):
        said = "".join(draw.choice(list("abcdef"), 6))
        lines.append(json.dumps({"audio": f"{number % 6}.wav", "language": "de", "target": said}))
    (data := spoken / "many.jsonl").write_text("\n".join(lines) + "\n")
    options = FitOptions(str(spoken / "model"), tmp_path / "out", data, "wer", 100.0, quality=None, threads=1)
    made = planned(options, keep=True)
    assert made.training is not None
    assert made.texts is not None
    decoder = LAYERS * (6 * 32 * 32 + 2 * 32 * 40) + VOCABULARY * 32
    encoder = 2 * (4 * 32 * 32 + 2 * 32 * 48)
    assert made.texts.read == pytest.approx(POSITIONS / 8 * encoder / decoder)
    assert "a request" in fit(options, made).text
    with Session(options.out, threads=1) as session:
        assert session.generate(SOUND, language="de", **RAW).token_ids


@pytest.mark.parametrize("exit_input", ["state", "feature"])
def test_exit_is_trained_on_the_transcripts_of_the_model(
    exit_input: ExitInput, spoken: Path, session: Session, tmp_path: Path
) -> None:
    data, out, own = spoken / "lines.jsonl", tmp_path / "out", tmp_path / "own"
    options = TrainingOptions(data, 1, validation=data, self_distill=own, max_new_tokens=12, tune="exit",
                              exit_head_layers=1, exit_input=exit_input, exit_vocab=250, steps=3)  # fmt: skip
    asked: dict[str, Any] = {"language": "de", "max_new_tokens": 12, **RAW}

    def transcripts(checkpoint: Any, recordings: Any, new_tokens: int, directory: Path) -> Iterator[Any]:
        in_8_bits = dict(own_outputs(str(spoken / "model"), checkpoint, recordings, new_tokens, directory))
        assert sorted(in_8_bits) == list(range(6))
        assert all(0 < len(ids) <= new_tokens for ids in in_8_bits.values())
        for number, recording in enumerate(recordings):
            ids = session.generate(recording.path, mode="full", **asked).token_ids
            yield number, np.array(ids, np.int32)

    trained = train(str(spoken / "model"), out, options, transcripts)
    first = 6 / sum(len(json.loads(line)["target_ids"]) for line in (own / "outputs.jsonl").read_text().splitlines())
    # What decoding suppresses, training does, but at first tokens, which never exit.
    assert trained.metrics["eval_deep_accuracy"] >= 1 - first
    # Engines agree at the tokens at which the exit does that reads the frozen teacher's records.
    agreement = trained.metrics["eval_agreement"]
    bundle = converted(out, tmp_path / "bundle", None, precision="fp32")
    with ReplaySession(bundle, threads=1) as replaying:
        traces = [trace_of(replaying, 1, one, 12) for _, one in fitting_prompts(replaying, read_examples(data))]
        # Of an exit with a feature the trace has first tokens after a sync pass, and training measures the second.
        agrees = np.concatenate([trace.agrees for trace in traces]).mean()
        assert agrees == pytest.approx(agreement, abs=0.2 if exit_input == "feature" else None)
        for path in (spoken / f"{number}.wav" for number in range(6)):
            lossless = replaying.generate(path, mode="lossless", threshold=0.0, drafts="exit", **asked)
            assert lossless.token_ids == session.generate(path, mode="full", **asked).token_ids
    given = ["--data", str(data), "--max-new-tokens", "12", "--metric", "wer", "--methods", "full,lossless"]
    for verb in (["evaluate", str(bundle), *given, "--output", str(tmp_path / "results")],
                 ["generate", str(bundle), "--input", str(data), "-o", "language=de"]):  # fmt: skip
        done = succeed(*verb)
    assert [Path(json.loads(line)["audio"]).name for line in done.stdout.splitlines()][-1] == "5.wav"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"audio": "none.wav"}, "line 2: .*none.wav cannot be read"),
        ({"audio": "lines.jsonl"}, "line 2: .*lines.jsonl is no WAV file"),
        ({"audio": "empty.wav"}, "line 2: .*empty.wav is empty"),
        ({"audio": "slow.wav"}, "line 2: .*slow.wav has 3000 samples a second"),
        ({"audio": "long.wav"}, r"line 2: .*long.wav has 1\.5 s, and the model reads windows of 1 s"),
        ({"audio": "0.wav", "language": "xx"}, "line 2: 'language' is 'xx'"),
        ({"audio": "0.wav", "language": 3}, "line 2: 'language' is int"),
        ({"audio": "0.wav", "input": "a"}, "line 2: both 'input' and 'audio' are given"),
        ({"audio": 3}, "line 2: 'audio' is 3"),
        ({"input": "a"}, "line 2: it has 'input', and the model reads speech"),
    ],
)
def test_line_of_speech_data_is_validated_before_use(spoken: Path, line: dict[str, Any], message: str) -> None:
    for name, content in (("empty", wav(SOUND[:0])), ("slow", wav(SOUND, 3000)), ("long", wav(sound(1.5)))):
        (spoken / f"{name}.wav").write_bytes(content)
    data = spoken / "broken.jsonl"
    data.write_text("".join(json.dumps({"target": "a", **each}) + "\n" for each in ({"audio": "0.wav"}, line)))
    opened = open_checkpoint(str(spoken / "model"))
    with pytest.raises(DataError, match=message):
        encode(read_examples(data), text_format(opened, describe(opened.config, opened), 40), data)


def test_commands_without_speech_support_refuse_speech_in_one_line(spoken: Path, bundle: Path, tmp_path: Path) -> None:
    data, model, text = (str(spoken / name) for name in ("lines.jsonl", "model", "text"))
    (spoken / "text.jsonl").write_text('{"input": "a", "target": "b"}\n')
    rounded = ("--exit-layer", "1", "--precision", "int4")
    for asked, message in (
        (["evaluate", str(bundle), "--data", data], "speech"),
        (["calibrate", str(bundle), "--data", str(spoken / "text.jsonl")], "the bundle reads speech; give 'audio'"),
        (
            ["train", text, str(tmp_path / "out"), "--exit-layer", "1", "--data", data],
            "'audio' is given, but the model accepts only text",
        ),
        (["train", model, str(tmp_path / "out"), "--exit-layer", "1", "--truncate", "--data", data], "--truncate cuts"),
        (
            ["convert", model, str(tmp_path / "out"), *rounded, "--quantization-data", data],
            "--quantization-data rounds weights for text",
        ),
    ):
        done = invoke(*asked)
        assert done.exit_code == 1, done.output
        assert message in done.output.strip().splitlines()[-1]
