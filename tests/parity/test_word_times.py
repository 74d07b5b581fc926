"""Times of words: cross-attention and time warping against transformers, words of a text, and results."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, load
from running_server import eventually, running
from sounds import sound, wav
from transformers import AutoTokenizer
from whisper_case import CAPACITY, POSITIONS, START, write_whisper

from freeexport.conversion.convert import convert
from freeexport.conversion.convert_options import ConvertOptions
from graphs.errors import GraphError
from runtime import Bundle, OptionError, PromptError, Session, SpeechOptions, Word
from runtime.engines.kernels import missing
from runtime.engines.onnx import OnnxEngine
from runtime.engines.runner import Encoder
from runtime.speech.alignment import Aligner
from runtime.speech.audio import log_mel, window
from runtime.speech.windows import Transcriber
from runtime.speech.words import Span, first_columns, spans_of, timed, token_starts

SOUND = sound(0.9)
# Random weights say nothing likely.
RAW: dict[str, Any] = {"logprob_threshold": None, "compression_ratio_threshold": None, "no_speech_threshold": None}
HEADS = [[0, 1], [2, 3], [2, 0]]
ENGINES = ("encoder", "prologue", "shallow", "deep")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper with alignment heads and a tokenizer."""
    path = write_whisper(tmp_path_factory.mktemp("words") / "whisper")
    (text := path.parent / "text").mkdir()
    BY_NAME["llama-tied"].build(text)
    AutoTokenizer.from_pretrained(text).save_pretrained(path)
    content = json.loads((path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    # A space among the tokens that the model writes.
    vocabulary["Ġ"], vocabulary["e"] = vocabulary["e"], vocabulary["Ġ"]
    (path / "tokenizer.json").write_text(json.dumps(content))
    return with_heads(path, HEADS)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(checkpoint, tmp_path_factory.mktemp("bundle") / "words")


@pytest.fixture(scope="module")
def session(bundle: Path) -> Iterator[Session]:
    with Session(bundle, threads=1, slots=2) as session:
        yield session


def with_heads(checkpoint: Path, heads: Any) -> Path:
    file = checkpoint / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alignment_heads": heads}))
    return checkpoint


def converted(checkpoint: Path, out: Path, exit_layer: int = 1, **options: Any) -> Path:
    convert(str(checkpoint), out, ConvertOptions(exit_layer=exit_layer, verify="none", measure=False, **options))
    return out


@pytest.mark.parametrize("options", [{}, {"dialect": "standard", "exit_layer": 2}, {"precision": "int8"}], ids=str)
def test_token_times_match_transformers(
    options: dict[str, Any], checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    import torch

    opened = Bundle.open(converted(checkpoint, tmp_path / "b", **options) if options else bundle)
    kernels = opened.manifest.kernels
    encoder, prologue, shallow, deep = (OnnxEngine(opened.engine(name), 1, kernels=kernels) for name in ENGINES)
    features = window(log_mel(SOUND, 80), 0, 2 * POSITIONS)
    prefix = [START, 203, 206, 210]
    tokens = np.random.default_rng(3).integers(0, 199, 24).tolist()
    cross = Encoder(encoder, prologue).run(features)
    found = Aligner(opened.manifest, shallow, deep).weights([*prefix, *tokens], cross)

    model = load(checkpoint)
    model.set_attn_implementation("eager")
    read = torch.tensor([[*prefix, *tokens]])
    with torch.no_grad():
        theirs = model(torch.from_numpy(features), decoder_input_ids=read, output_attentions=True)
    wanted = np.stack([theirs.cross_attentions[layer][0, head].numpy() for layer, head in HEADS])
    exact = "precision" not in options
    np.testing.assert_allclose(found, wanted, atol=1e-5 if exact else 0.15)

    class Outputs(dict[str, Any]):
        sequences = read
        cross_attentions = (theirs.cross_attentions,)

    for frames in (2 * POSITIONS, 61):
        given = {"num_frames": torch.tensor([frames]), "num_input_ids": len(prefix) - 1}
        seconds = model._extract_token_timestamps(Outputs(), HEADS, **given)[0, len(prefix) - 1 : -1]
        ours = token_starts((found if exact else wanted)[:, len(prefix) - 1 :, : frames // 2]) * 0.02
        assert len(ours) == len(tokens) + 1
        np.testing.assert_allclose(ours, seconds.numpy(), atol=0.0201)


@pytest.mark.skipif(missing() is not None, reason="needs our kernels")
def test_int8_cache_gives_nearly_the_attention_weights_of_a_float16_cache(tmp_path: Path) -> None:
    path = with_heads(write_whisper(tmp_path / "whisper", heads=2), [[0, 1], [2, 0]])
    features = window(log_mel(SOUND, 80), 0, 2 * POSITIONS)
    found = []
    for name, options in (("halves", {}), ("eights", {"kv_cache": "int8"})):
        opened = Bundle.open(converted(path, tmp_path / name, precision="int8", **options))
        engines = [OnnxEngine(opened.engine(engine), 1, kernels=12) for engine in ENGINES]
        aligner = Aligner(opened.manifest, *engines[2:])
        found.append(aligner.weights([START, 203, 206, 210, 9, 8, 7], Encoder(*engines[:2]).run(features)))
    assert found[0].shape == (2, 7, POSITIONS)
    assert 0 < np.abs(found[0] - found[1]).max() < 0.05


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (7, 40), (40, 7), (30, 100)], ids=str)
def test_alignment_path_matches_plain_loops(shape: tuple[int, int]) -> None:
    rows, columns = shape
    costs = np.random.default_rng(rows).normal(size=shape).round(1)  # with ties
    sums = np.full((rows + 1, columns + 1), np.inf)
    sums[0, 0] = 0
    for row in range(rows):
        for column in range(columns):
            sums[row + 1, column + 1] = costs[row, column] + min(
                sums[row, column], sums[row, column + 1], sums[row + 1, column]
            )
    first = first_columns(costs)
    assert first[0] == 0
    assert (np.diff(first) >= 0).all()
    # Between the first columns of two rows the path follows the upper row, and may step to both at once.
    total = 0.0
    for row in range(rows):
        last = columns - 1 if row == rows - 1 else first[row + 1]
        ends = [last] if row == rows - 1 else [last, last - 1]
        parts = [costs[row, first[row] : end + 1].sum() for end in ends if end >= first[row]]
        total += min(parts)
    assert total == pytest.approx(sums[-1, -1])


def test_punctuation_is_part_of_words_but_not_of_their_times() -> None:
    class Letters:
        """Each token is one of these texts."""

        byte_level = True
        texts = (" The", " do", "g", ",", " (", "a", " b", ")", ".", " 犬", "は", "。")

        def bytes_of(self, token: int) -> bytes:
            return self.texts[token].encode()

    letters: Any = Letters()
    assert spans_of(range(9), letters, "en") == [
        Span(" The", 0, 1), Span(" dog,", 1, 3), Span(" (a", 5, 6), Span(" b).", 6, 7),
    ]  # fmt: skip
    assert [span.text for span in spans_of(range(9, 12), letters, "ja")] == [" 犬", "は。"]
    assert spans_of([8, 8], letters, "en") == [Span("..", 0, 2)]
    assert spans_of([], letters, "en") == []


def test_word_beside_a_pause_excludes_the_pause() -> None:
    spans = [Span(f" {n}", n, n + 1) for n in range(4)]
    spans[2] = Span(" 2.", 2, 3)
    words = timed(spans, np.array([0.0, 5.0, 5.2, 9.0, 9.2]), np.array([0.5, 1.0, 1.0, 0.25]))
    assert words == [
        Word(" 0", 3.6, 5.0, 0.5), Word(" 1", 5.0, 5.2, 1.0), Word(" 2.", 5.2, 6.6, 1.0), Word(" 3", 9.0, 9.2, 0.25),
    ]  # fmt: skip


@pytest.mark.parametrize("seconds", [0.9, 1.9])
def test_words_of_a_result_are_those_of_its_segments(session: Session, seconds: float) -> None:
    options: dict[str, Any] = {"language": "de", "mode": "full", "max_new_tokens": 16, **RAW}
    result = session.generate(sound(seconds), word_timestamps=True, **options)
    plain = session.generate(sound(seconds), **options)
    assert (result.text, result.token_ids) == (plain.text, plain.token_ids)
    assert result.segments
    words = [word for segment in result.segments for word in segment.words or ()]
    assert len(words) > 1
    for segment in result.segments:
        assert segment.words is not None
        assert "".join(word.text for word in segment.words) == segment.text
    times = [time for word in words for time in (word.start, word.end)]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= seconds + 0.02
    assert all(0 < word.probability <= 1 for word in words)


def test_window_full_of_tokens_has_words_up_to_its_end(session: Session) -> None:
    """The prefix without timestamps has one token more than that of decoding, so the last ones have no row."""
    options: dict[str, Any] = {"language": "de", "mode": "full", "word_timestamps": True, **RAW}
    result = session.generate(SOUND, sequence_bias={(200,): -100.0}, **options)
    assert len(result.token_ids) == CAPACITY - 3
    assert result.segments is not None
    assert "".join(word.text for word in result.segments[0].words or ()) == result.text


def test_word_times_are_refused_in_one_line_without_timestamp_data(
    session: Session, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="word_timestamps is True, and a stream of tokens has no times"):
        session.stream(SOUND, word_timestamps=True)
    manifest = session.manifest
    assert manifest.speech is not None
    older = replace(manifest, speech=replace(manifest.speech, alignment_heads=()))
    asked = SpeechOptions(word_timestamps=True, language="de")
    with pytest.raises(OptionError, match=r"no alignment heads; convert the checkpoint again, for a CPU$"):
        Transcriber(older, session.tokenizer, CAPACITY).check(asked)
    with pytest.raises(OptionError, match=r"the session has no tokenizer; omit it$"):
        Transcriber(manifest, None, CAPACITY).check(asked)
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    for heads in ([[3, 0]], [[0]], [], 5):
        with pytest.raises(GraphError, match=r"alignment_heads .* give pairs of a layer below 3 and a head below 4$"):
            converted(with_heads(broken, heads), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_transcript_is_streamed_by_segment(session: Session) -> None:
    options: dict[str, Any] = {"language": "de", "mode": "full", "max_new_tokens": 16, "word_timestamps": True, **RAW}
    whole = session.generate(sound(1.9), **options)
    stream = session.transcribe(sound(1.9), **options)
    assert stream.result is None
    first = next(stream)
    assert stream.result is None
    assert (first, *stream) == whole.segments
    assert stream.result is not None
    assert (stream.result.text, stream.result.segments) == (whole.text, whole.segments)
    cancel = threading.Event()
    left = session.transcribe(sound(1.9), cancel=cancel, **options)
    next(left)
    cancel.set()
    assert list(left) == []
    assert left.result is not None
    assert left.result.finish_reason == "cancelled"
    with pytest.raises(OptionError, match="language is 'xx'"):
        session.transcribe(SOUND, language="xx")
    with pytest.raises(PromptError, match=r"missing.wav cannot be read"):
        next(session.transcribe("missing.wav", language="de"))


def test_official_client_receives_words_and_events(
    bundle: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openai

    monkeypatch.setattr("secrets.randbits", lambda bits: 7)
    options: dict[str, Any] = {"language": "de", "temperature": 1.0}  # which needs no other temperatures

    with running(bundle, names=("w",)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        asked: dict[str, Any] = {"model": "w", "file": ("a.wav", wav(sound(1.9))), **options}
        chosen: list[tuple[Any, bool]] = [(["word"], False), (["word", "segment"], True), (["segment"], True)]
        for given, segments in chosen:
            verbose = client.audio.transcriptions.create(
                response_format="verbose_json", timestamp_granularities=given, **asked
            )
            assert (verbose.segments is not None) == segments
            if "word" not in given:
                assert verbose.words is None
                continue
            wanted = session.generate(wav(sound(1.9)), timestamps=True, word_timestamps=True, **options)
            words = [word for segment in wanted.segments or () for word in segment.words or ()]
            assert [(word.word, word.start, word.end) for word in verbose.words] == [
                (word.text.strip(), word.start, word.end) for word in words
            ]
        *deltas, done = client.audio.transcriptions.create(stream=True, **asked)
        text = client.audio.transcriptions.create(**asked).text
        assert (done.type, done.text) == ("transcript.text.done", text)
        assert {delta.type for delta in deltas} == {"transcript.text.delta"}
        assert "".join(delta.delta for delta in deltas).strip() == text
        with pytest.raises(openai.BadRequestError, match="no WAV file"):
            client.audio.transcriptions.create(stream=True, **{**asked, "file": b"none"})
        assert eventually(lambda: len(server.log) == 6)
        assert [line["status"] for line in server.log] == [200] * 5 + [400]


def test_deadline_ends_a_stream_with_an_error(bundle: Path) -> None:
    import openai

    with running(bundle, names=("w",), deadline=0.2, slots=1) as server:
        session = server.service.sessions["w"]
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        with session.decoder(session.listen(SOUND, "de")):  # the only slot
            events = client.audio.transcriptions.create(
                model="w", file=("a.wav", wav(SOUND)), language="de", stream=True
            )
            with pytest.raises(openai.APIError, match=r"the server's limit of 0\.2 s expired before"):
                list(events)
        assert eventually(lambda: len(server.log) == 1)
        assert server.log[0]["status"] == 504
