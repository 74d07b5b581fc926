"""Checkpoints of others, altered at random: each is read, or refused by an error of the project's own."""

from __future__ import annotations

import copy
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, Case
from fuzz import fuzz, mutated_bytes
from gguf_model import write_gguf
from hypothesis import strategies as st
from safetensors.numpy import save

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.gguf import GGUFFile
from freeexport.checkpoints.weight_files import SafetensorsFile
from freeexport.system.jsonl import BrokenLine, InputLine, read_requests
from graphs.families import describe
from runtime.errors import FreeExportError

pytestmark = pytest.mark.hypothesis


@pytest.fixture
def place(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        # A new file each time: one that is mapped must not change.
        path = tmp_path / "altered.gguf"
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return path

    return write


def altered(content: bytes, header: int) -> st.SearchStrategy[bytes]:
    """Mostly within the first `header` bytes."""
    within = mutated_bytes(content[:header]).map(lambda changed: changed + content[header:])
    return st.one_of(within, within, mutated_bytes(content))


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_altered_gguf_files_are_read_or_refused(
    architecture: str, tmp_path: Path, place: Callable[[bytes], Path]
) -> None:
    content = write_gguf(tmp_path / "whole.gguf", architecture).read_bytes()

    def read(example: bytes) -> None:
        file = GGUFFile(place(example))
        assert file.nbytes >= 0
        file.special_tokens()
        for name, shape in file.shapes.items():
            assert file.read(name).shape == shape

    fuzz(altered(content, content.index(b"blk.1")), FreeExportError)(read)()


def test_altered_gguf_checkpoints_open_or_are_refused(tmp_path: Path, place: Callable[[bytes], Path]) -> None:
    content = write_gguf(tmp_path / "whole.gguf").read_bytes()

    def read(example: bytes) -> None:
        checkpoint = open_checkpoint(str(place(example)))
        describe(checkpoint.config, checkpoint)

    fuzz(altered(content, content.index(b"token_embd")), FreeExportError, examples=50)(read)()


def test_altered_safetensors_are_read_or_refused(place: Callable[[bytes], Path]) -> None:
    tensors = {f"layer.{index}": np.ones((index, 3), np.float32) for index in range(4)}
    content = save({**tensors, "half": np.ones(5, np.float16), "whole": np.ones((2, 2), np.int64)})
    (length,) = struct.unpack_from("<Q", content)

    def read(example: bytes) -> None:
        file = SafetensorsFile(place(example))
        assert 0 <= file.nbytes <= len(example)
        for name, shape in file.shapes.items():
            assert file.read(name).shape == shape

    def with_header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    headers = mutated_bytes(content[8 : 8 + length]).map(with_header)
    fuzz(altered(content, 8 + length) | headers, FreeExportError)(read)()


def test_altered_jsonl_lines_are_read_or_reported(place: Callable[[bytes], Path]) -> None:
    chat = [{"role": "user", "content": "hi"}]
    records: list[Any] = [{"input": "é", "target": "b", "id": 1}, {"input": chat, "id": "x"}, {"text": "a"}, [1e9]]
    content = "\n".join(json.dumps(record) for record in records).encode()

    def read(example: bytes) -> None:
        for line in read_requests(place(example)):
            assert isinstance(line, InputLine) or (isinstance(line, BrokenLine) and line.reason)

    fuzz(mutated_bytes(content) | st.binary(max_size=200), FreeExportError)(read)()


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


@pytest.mark.parametrize("name", ["llama-tied", "t5-deep-decoder"])
def test_altered_configurations_are_described_or_refused(
    name: str, checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    source = checkpoint(BY_NAME[name])
    whole = json.loads((source / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    keys = st.sampled_from(sorted({*whole, "head_dim", "layer_types", "num_key_value_heads", "max_window_layers"}))
    changes = st.dictionaries(keys, VALUES, min_size=1, max_size=3)
    rope = st.fixed_dictionaries({"rope_parameters": ROPE}) | st.fixed_dictionaries({"rope_scaling": ROPE | VALUES})
    sliding = st.fixed_dictionaries({"model_type": st.just("qwen3"), "layer_types": VALUES, "sliding_window": VALUES})

    def read(change: dict[str, Any]) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**copy.deepcopy(whole), **change}))
        opened = open_checkpoint(str(tmp_path))
        describe(opened.config, opened)

    fuzz(changes | rope | sliding, FreeExportError)(read)()
