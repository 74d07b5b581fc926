"""GGUF files: weights as transformers reads them, and what hostile headers come to."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from gguf_model import write_gguf
from test_checkpoint import assert_equals_model

from freeexport.checkpoints.checkpoint import CheckpointError, open_checkpoint
from freeexport.checkpoints.gguf import GGUFFile
from freeexport.checkpoints.gguf_header import Header
from freeexport.checkpoints.gguf_transformers import quick_reader
from freeexport.checkpoints.transformers_model import reference_model
from graphs.errors import UnsupportedModelError
from runtime.errors import FreeExportError


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "t5", "gemma2", "gemma3", "phi3", "gpt2"])
def test_gguf_tensors_match_transformers(tmp_path: Path, architecture: str) -> None:
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", architecture)))
    # Not `reference_model`: transformers takes every T5 of a GGUF to be gated, whatever its configuration says.
    loader = transformers.AutoModelForSeq2SeqLM if architecture == "t5" else transformers.AutoModelForCausalLM
    model = loader.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    tied |= {"lm_head.weight"} if architecture in ("gpt2", "gemma2") else set()
    assert set(checkpoint.names()) == set(model.state_dict()) - tied
    assert_equals_model(checkpoint, model)


def test_gguf_is_described_like_a_directory_and_its_model_can_be_saved(tmp_path: Path) -> None:
    source = open_checkpoint(str(write_gguf(tmp_path / "tiny.gguf")))
    assert (source.name, source.architecture) == ("tiny.gguf", "llama")
    assert (source.config["num_key_value_heads"], source.config["tie_word_embeddings"]) == (2, False)
    assert source.shape("model.layers.1.self_attn.k_proj.weight") == (32, 64)
    assert 0.8 < source.nbytes / (tmp_path / "tiny.gguf").stat().st_size < 1
    reference_model(source).save_pretrained(tmp_path / "out")
    saved = open_checkpoint(str(tmp_path / "out"))
    assert "quantization_config" not in saved.config
    assert_equals_model(saved, reference_model(source))


def test_a_damaged_gguf_is_refused(tmp_path: Path) -> None:
    data = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    for keep in (0, 3, 10, 100, len(data) // 2, len(data) - 1):
        path = tmp_path / "cut.gguf"
        path.write_bytes(data[:keep])
        with pytest.raises(CheckpointError, match="not a complete GGUF file"):
            open_checkpoint(str(path))


def number(value: int, width: int = 8) -> bytes:
    return value.to_bytes(width, "little")


def text(value: bytes) -> bytes:
    return number(len(value)) + value


def header(*parts: bytes, tensors: int = 0, fields: int = 0, version: int = 3) -> bytes:
    return b"".join([b"GGUF", number(version, 4), number(tensors), number(fields), *parts])


def tensor(*dimensions: int, name: bytes = b"x", kind: int = 0, at: int = 0) -> bytes:
    sizes = b"".join(map(number, dimensions))
    return text(name) + number(len(dimensions), 4) + sizes + number(kind, 4) + number(at)


U8, U32, F32, TEXT, ARRAY = (number(kind, 4) for kind in (0, 4, 6, 8, 9))
X, TOKENS, ALIGNMENT = text(b"x"), text(b"tokenizer.ggml.tokens"), text(b"general.alignment")
MANY = 500_000


@pytest.mark.parametrize(
    ("content", "part"),
    [
        pytest.param(header(tensors=1 << 62), "it has 4611686018427387904 tensors; at most 65536", id="tensors"),
        pytest.param(header(fields=1 << 40), "it has 1099511627776 fields; at most 4096", id="fields"),
        pytest.param(header(X, U8, b"\1", X, U8, b"\1", fields=2), "name 'x' twice", id="key twice"),
        pytest.param(header(X, ARRAY, U8, number(1 << 40), fields=1), "1099511627776 items in x", id="items"),
        pytest.param(header(X, number(255, 4), bytes(8), fields=1), "a field has the type 255", id="type of field"),
        pytest.param(header(ALIGNMENT, U32, number(0, 4), fields=1), "general.alignment is '0'", id="no alignment"),
        pytest.param(header(ALIGNMENT, U32, number(1 << 31, 4), fields=1), "alignment is '2147483648'", id="2 GiB"),
        pytest.param(
            header(tensor(4, 0), bytes(64), tensors=1), "tensor 'x' has the shape [0, 4]", id="zero dimension"
        ),
        pytest.param(
            header(tensor(1 << 62, 8), tensors=1), "tensor 'x' has 147573952589676412928 bytes", id="overflow"
        ),
        pytest.param(header(tensor(4, kind=999), bytes(64), tensors=1), "tensor 'x' has the type 999", id="kind"),
        pytest.param(header(tensor(4, at=1 << 63), bytes(64), tensors=1), "which the file has not", id="offset"),
        pytest.param(header(tensor(4), tensor(4), bytes(64), tensors=2), "tensor 'x' is there twice", id="twice"),
        pytest.param(
            header(TOKENS, ARRAY, TEXT, number(MANY), bytes(8 * MANY), fields=1),
            "most of the 500000 texts of tokenizer.ggml.tokens are empty",
            id="half a million empty texts",
        ),
        pytest.param(
            header(X, ARRAY, U8, number(1 << 22), bytes(1 << 22), fields=1),
            "4194304 items in x; at most 4096",
            id="four million bytes",
        ),
    ],
)
def test_header_that_exceeds_the_file_is_refused_quickly(tmp_path: Path, content: bytes, part: str) -> None:
    path, begin = tmp_path / "bad.gguf", time.process_time()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.gguf is not a complete GGUF file") as caught:
        Header(path)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.process_time() - begin < 5  # one took 72 s and another 121 s


def test_unsupported_architecture_is_reported_before_other_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the vocabulary is read, which takes transformers a minute, or the weights, which are damaged."""
    fields = (text(b"general.architecture"), TEXT, text(b"falcon"), TOKENS, ARRAY, TEXT, number(1 << 60))
    content = header(*fields, fields=2, tensors=9)
    (tmp_path / "falcon.gguf").write_bytes(content + bytes(300))
    monkeypatch.setattr("freeexport.checkpoints.checkpoint._config", None)
    with pytest.raises(
        UnsupportedModelError, match="'falcon' is not supported; supported GGUF architectures are gemma2"
    ):
        open_checkpoint(str(tmp_path / "falcon.gguf"))


def test_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "whole.gguf").read_bytes()
    tokens = TOKENS + ARRAY + TEXT + number(33) + 33 * text(b"a")
    fields = int.from_bytes(content[16:24], "little")
    begin = next(at for at in range(24, len(content)) if content[at : at + 10] == b"token_embd") - 8
    filled = content[:16] + number(fields + 1) + content[24:begin] + tokens + content[begin:]
    before, after = (-(len(part) % 32) for part in (content, filled))
    (tmp_path / "more.gguf").write_bytes(filled + bytes(64 + after - before))
    with pytest.raises(CheckpointError, match="tokens has 33 items, and the embedding 32 rows"):
        GGUFFile(tmp_path / "more.gguf")


def test_special_tokens_are_those_of_the_file(tmp_path: Path) -> None:
    for end in (3, 77):
        writer = gguf.GGUFWriter(tmp_path / f"{end}.gguf", "llama")
        writer.add_token_list(["", "<s>", "</s>", "é"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(end)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert GGUFFile(tmp_path / "3.gguf").has_tokenizer
    assert GGUFFile(tmp_path / "3.gguf").special_tokens() == {"bos_token": "<s>", "eos_token": "é"}
    with pytest.raises(CheckpointError, match="eos_token_id is '77'; it must be a whole number from 0 to 3"):
        GGUFFile(tmp_path / "77.gguf").special_tokens()


@pytest.mark.parametrize("order", list(gguf.GGUFEndian))
def test_fast_reader_matches_the_gguf_package(tmp_path: Path, order: gguf.GGUFEndian) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama", endianess=order)
    writer.add_token_list(["", "<s>", "é"])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_token_types([1, 3, 1])
    writer.add_bool("last", True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    usual = gguf.GGUFReader(tmp_path / "a.gguf")
    with quick_reader({"gguf_file": "a.gguf"}):
        quick = gguf.GGUFReader(tmp_path / "a.gguf")
        assert type(quick) is not type(usual)
    assert gguf.GGUFReader is type(usual)

    def read(reader: gguf.GGUFReader) -> dict[str, object]:
        return {
            name: (field.types, [bytes(field.parts[n]) for n in field.data]) for name, field in reader.fields.items()
        }

    assert read(quick) == read(usual)
    assert quick.data_offset == usual.data_offset


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("block_count", 1 << 31, "llama.block_count is '2147483648'; it must be a whole number from 1 to 1024"),
        ("attention.head_count", 0, "llama.attention.head_count is '0'; it must be a whole number from 1 to 1024"),
        ("attention.layer_norm_rms_epsilon", -1.0, "rms_norm_eps is -1.0 in the configuration"),
        (
            "embedding_length",
            1 << 30,
            "embedding_length is '1073741824'; it must be a whole number from 1 to 131072",
        ),
    ],
)
def test_out_of_range_gguf_metadata_is_refused(tmp_path: Path, key: str, value: float, part: str) -> None:
    content = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    name = f"llama.{key}".encode()
    at = content.index(name) + len(name) + 4
    new = struct.pack("<f" if isinstance(value, float) else "<I", value)
    (tmp_path / "tiny.gguf").write_bytes(content[:at] + new + content[at + 4 :])
    with pytest.raises(FreeExportError) as caught:
        open_checkpoint(str(tmp_path / "tiny.gguf"))
    assert part in str(caught.value)
