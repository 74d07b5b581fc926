from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import BundleError
from runtime.sequence import read_defaults


def written(directory: Path, content: Any) -> Path:
    (directory / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def test_sampling_values_are_read_and_others_left(tmp_path: Path) -> None:
    content = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": None,
        "top_p": 0.9,
        "eos_token_id": 2,
        "max_length": 4096,
    }
    assert read_defaults(written(tmp_path, content)) == {"temperature": 0.6, "top_p": 0.9}


UNUSABLE = [
    {"temperature": 1e-38},
    {"temperature": 10**400},
    {"repetition_penalty": float("nan")},
    {"repetition_penalty": [1]},
    {"top_k": True},
    {"top_k": [0] * 20_000},
    '{"min_p": 1e999}',
    "[" * 100_000,
]


@pytest.mark.parametrize("content", [{"top_p": 3}, {"temperature": "hot"}, {"top_k": -1}, [1], "{", "\0", *UNUSABLE])
def test_a_file_that_cannot_be_used_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"generation_config\.json") as refused:
        read_defaults(written(tmp_path, content))
    assert len(str(refused.value)) < 600


def test_a_file_that_the_manifest_does_not_list_is_not_read(tmp_path: Path) -> None:
    assert read_defaults(written(tmp_path, {"temperature": 0.6}), {"deep.onnx": None}) == {}
