"""Files of others, altered at random: each is read, or refused by an error of the project's own, in little time.

Three seconds for each reader, or FREEEXPORT_FUZZ_SECONDS with other alterations every time.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CASES, Case
from gguf_model import write_gguf
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.gguf import GGUFFile
from freeexport.checkpoints.weight_files import SafetensorsFile
from freeexport.system.jsonl import BrokenLine, Request, read_requests
from graphs.families import describe
from runtime.errors import FreeExportError

SECONDS = float(os.environ.get("FREEEXPORT_FUZZ_SECONDS", "3"))
START = random.randrange(1 << 32) if "FREEEXPORT_FUZZ_SECONDS" in os.environ else 0
LONGEST = 20  # seconds of one file, on a busy machine

Alteration = Callable[[bytearray], None]
INTEGERS = (0, 1, 2, 7, 127, 255, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1)


def fuzz(strategy: st.SearchStrategy[Any], read: Callable[[Any], None], share: float = 1) -> None:
    """`read` of examples, for this share of a reader's time. FreeExportError is a fine end of it."""

    def check(example: Any) -> None:
        begin, message = time.monotonic(), ""
        try:
            read(example)
        except FreeExportError as error:
            message = str(error)
        assert "\n" not in message
        assert len(message) < 1000
        assert time.monotonic() - begin < LONGEST

    until, current = time.monotonic() + share * SECONDS, START
    options = settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    while time.monotonic() < until:
        seed(current)(options(given(strategy)(check)))()
        current += 1


@st.composite
def altered(draw: st.DrawFn, content: bytes, header: int) -> bytes:
    """Up to four changes of bytes or numbers, mostly within the first `header` bytes; then perhaps a cut."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        last = max(0, (min(header, len(result)) if draw(st.integers(0, 4)) else len(result)) - 1)
        at = draw(st.integers(0, last))
        kind = draw(st.sampled_from(("byte", "u32", "u64", "insert", "remove", "repeat", "cut")))
        if kind == "byte":
            result[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind in ("u32", "u64"):
            width = 4 if kind == "u32" else 8
            value = draw(st.sampled_from(INTEGERS)) & ((1 << 8 * width) - 1)
            result[at : at + width] = value.to_bytes(width, "little")
        elif kind == "insert":
            result[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "remove":
            del result[at : at + draw(st.integers(1, 16))]
        elif kind == "repeat":
            result[at:at] = result[at : at + draw(st.integers(1, 64))]
        else:
            del result[at:]
    return bytes(result)


@pytest.fixture
def place(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def write(name: str, content: bytes) -> Path:
        # A new file each time: one that is mapped must not change.
        path = tmp_path / name
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_gguf_files(architecture: str, tmp_path: Path, place: Callable[[str, bytes], Path]) -> None:
    content = write_gguf(tmp_path / "whole.gguf", architecture).read_bytes()

    def read(example: bytes) -> None:
        file = GGUFFile(place("altered.gguf", example))
        assert file.nbytes >= 0
        file.special_tokens()
        for name in file.names():
            assert file.read(name).shape == file.shape(name)

    fuzz(altered(content, content.index(b"blk.1")), read, 1 / 3)


def test_whole_gguf_checkpoints(tmp_path: Path, place: Callable[[str, bytes], Path]) -> None:
    content = write_gguf(tmp_path / "whole.gguf").read_bytes()

    def read(example: bytes) -> None:
        checkpoint = open_checkpoint(str(place("altered.gguf", example)))
        describe(checkpoint.config, checkpoint)

    fuzz(altered(content, content.index(b"token_embd")), read, 1 / 3)


def test_safetensors(place: Callable[[str, bytes], Path]) -> None:
    tensors = {f"layer.{index}": np.ones((index, 3), np.float32) for index in range(4)}
    content = save({**tensors, "half": np.ones(5, np.float16), "whole": np.ones((2, 2), np.int64)})
    (length,) = struct.unpack_from("<Q", content)

    def read(example: bytes) -> None:
        file = SafetensorsFile(place("altered.safetensors", example))
        assert 0 <= file.nbytes <= len(example)
        for name in file.names():
            assert file.read(name).shape == file.shape(name)

    def headers(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    fuzz(altered(content, 8 + length) | altered(content[8 : 8 + length], length).map(headers), read)


def test_jsonl(place: Callable[[str, bytes], Path]) -> None:
    chat = [{"role": "user", "content": "hi"}]
    records: list[Any] = [{"input": "é", "target": "b", "id": 1}, {"input": chat, "id": "x"}, {"text": "a"}, [1e9]]
    content = "\n".join(json.dumps(record) for record in records).encode()

    def read(example: bytes) -> None:
        for line in read_requests(place("altered.jsonl", example)):
            assert isinstance(line, Request) or (isinstance(line, BrokenLine) and line.reason)

    fuzz(altered(content, len(content)) | st.binary(max_size=200), read)


FUZZED = [case for case in CASES if case.name in ("llama-tied", "t5-deep-decoder")]
ODD = (
    *(None, True, False, 0, -1, 1, 2, 3, 1.5, -0.5, math.nan, math.inf, 1e300, 1 << 31, 10**12, 10**60),
    *("", "a", [], {}),
)
VALUES = st.sampled_from(ODD) | st.lists(st.sampled_from(ODD), max_size=3) | st.integers() | st.floats() | st.text()
ROPE = st.dictionaries(
    st.sampled_from(("rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "beta_fast")),
    VALUES | st.sampled_from(("linear", "yarn", "llama3", "default")),
    max_size=4,
)


@pytest.mark.parametrize("case", FUZZED, ids=lambda case: case.name)
def test_configurations(case: Case, checkpoint: Callable[[Case], Path], tmp_path: Path) -> None:
    whole = json.loads((checkpoint(case) / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(checkpoint(case) / "model.safetensors")
    keys = st.sampled_from(sorted({*whole, "head_dim", "layer_types", "num_key_value_heads", "max_window_layers"}))
    changes = st.dictionaries(keys, VALUES, min_size=1, max_size=3)
    rope = st.fixed_dictionaries({"rope_parameters": ROPE}) | st.fixed_dictionaries({"rope_scaling": ROPE | VALUES})
    sliding = st.fixed_dictionaries({"model_type": st.just("qwen3"), "layer_types": VALUES, "sliding_window": VALUES})

    def read(change: dict[str, Any]) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**copy.deepcopy(whole), **change}))
        opened = open_checkpoint(str(tmp_path))
        describe(opened.config, opened)

    fuzz(changes | rope | sliding, read, 1 / len(FUZZED))
