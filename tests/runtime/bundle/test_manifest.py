from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from manifest_case import MANIFEST

from runtime.bundle.manifest import HASH, SCHEMA_MINOR, SCHEMA_VERSION, Manifest, _hash
from runtime.errors import BundleError


def signed(**changes: Any) -> str:
    """The manifest as JSON with fields changed (REMOVED: left out), and its hash made to fit."""
    content = json.loads(MANIFEST.to_json())
    content.pop(HASH)
    content.update(changes)
    content = {name: value for name, value in content.items() if value is not REMOVED}
    return json.dumps({**content, HASH: _hash(content)})


REMOVED = object()


def refusal(text: str) -> str:
    with pytest.raises(BundleError) as refused:
        Manifest.from_json(text, "freeexport.json")
    message = str(refused.value)
    assert message.startswith("freeexport.json")
    assert "\n" not in message
    return message


def test_what_is_written_is_read_back() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    assert Manifest.from_json(signed()) == MANIFEST


def test_fields_with_defaults_may_be_left_out() -> None:
    read = Manifest.from_json(signed(versions=REMOVED, copies=REMOVED, costs=REMOVED))
    assert read == replace(MANIFEST, versions={}, copies=(), costs=None)


def test_a_manifest_without_a_threshold_of_rollback_is_read() -> None:
    assert Manifest.from_json(signed(rollback_threshold=REMOVED)).rollback_threshold is None
    assert Manifest.from_json(signed(rollback_threshold=3)).rollback_threshold == 3.0


def test_a_whole_number_is_a_threshold() -> None:
    assert Manifest.from_json(signed(threshold=1)).threshold == 1.0


@given(data=st.data())
def test_one_flipped_bit_is_noticed_or_changes_nothing(data: st.DataObject) -> None:
    content = bytearray(MANIFEST.to_json().encode())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 6))
    with suppress(BundleError):
        assert Manifest.from_json(content.decode()) == MANIFEST


@pytest.mark.parametrize("text", ["", "{", "nonsense", '{"layers": 3', "\0", "[" * 100_000])
def test_text_that_is_not_json_is_refused(text: str) -> None:
    assert "not JSON" in refusal(text)


@pytest.mark.parametrize(("text", "name"), [("[]", "list"), ("3", "int"), ("null", "NoneType"), ('"a"', "str")])
def test_json_that_is_not_an_object_is_refused(text: str, name: str) -> None:
    assert f"holds {name}" in refusal(text)


def test_a_change_without_the_hash_is_refused() -> None:
    assert "altered" in refusal(MANIFEST.to_json().replace('"threshold": 0.75', '"threshold": 0.7'))
    assert "altered" in refusal(json.dumps({"schema_version": SCHEMA_VERSION}))


def test_a_newer_schema_asks_for_an_upgrade_whatever_else_it_holds() -> None:
    for text in (signed(schema_version=SCHEMA_VERSION + 1, novelty=1), '{"schema_version": 99}'):
        message = refusal(text)
        assert "upgrade" in message
        assert f"up to {SCHEMA_VERSION}" in message


@pytest.mark.parametrize("name", [field.name for field in fields(Manifest)])
def test_a_field_of_the_wrong_type_is_refused_by_name(name: str) -> None:
    value = getattr(MANIFEST, name)
    wrong: list[Any] = [[["x"]], {"x": {"y": 1}}]
    wrong += [5, True] if isinstance(value, (str, dict, tuple)) else ["5"]
    wrong += [None] if value is not None and name not in ("bos_token_id", "costs") else []
    wrong += [1] if isinstance(value, bool) else []
    wrong += [2.5, True] if type(value) is int else []
    for item in wrong:
        assert name in refusal(signed(**{name: item}))


@pytest.mark.parametrize("name", ["layers", "files", "threshold", "pad_token_id"])
def test_a_missing_field_is_refused_by_name(name: str) -> None:
    assert f"lacks {name}" in refusal(signed(**{name: REMOVED}))


def test_an_unknown_field_is_refused_by_name() -> None:
    assert "unknown fields surprise" in refusal(signed(surprise=1))
    assert "unknown fields mode" in refusal(signed(files={"a": {"size": 1, "sha256": "", "mode": 2}}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schema_version", 0),
        ("schema_minor", -1),
        ("costs", {"shallow": 1.0, "shallow_without_head": 1.0, "deep": {}}),
        ("costs", {"shallow": 1.0, "shallow_without_head": 1.0, "deep": {"2": 1.0}}),
        ("costs", {"shallow": 1.0, "shallow_without_head": 0.0, "deep": {"1": 1.0}}),
        ("costs", {"shallow": 1.0, "shallow_without_head": 1.0, "deep": {"one": 1.0}}),
        ("costs", {"shallow": 1.0, "shallow_without_head": 1.0, "deep": {"1": 1.0}, "busy": -1.0}),
        ("layers", 1),
        ("layers", 10**6),
        ("hidden_size", 10**9),
        ("vocab_size", 10**9),
        ("heads", 10**9),
        ("kv_heads", 10**9),
        ("head_dim", 10**9),
        ("capacity", 10**12),
        ("max_pending", 10**12),
        ("encoder_capacity", 10**12),
        ("weight_bytes", 10**18),
        ("weight_bytes", -1),
        ("decoder_start_token_id", 288),
        ("decoder_start_token_id", -1),
        ("exit_layer", 0),
        ("exit_layer", 5),
        ("capacity", 0),
        ("max_pending", 0),
        ("encoder_capacity", -1),
        ("threshold", 1.5),
        ("threshold", -0.5),
        ("threshold", float("nan")),
        ("rollback_threshold", -0.5),
        ("rollback_threshold", float("inf")),
        ("rollback_threshold", float("nan")),
        ("eos_token_ids", [288]),
        ("eos_token_ids", [-1]),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    assert name in refusal(signed(**{name: value}))


def test_what_is_too_much_is_refused_before_it_is_looked_at() -> None:
    many = {str(index): {"size": 1, "sha256": "00" * 32} for index in range(10_001)}
    assert "files has 10001 entries, at most 10000" in refusal(signed(files=many))
    assert "eos_token_ids has 10001 entries" in refusal(signed(eos_token_ids=[2] * 10_001))


@pytest.mark.parametrize("file", [{"size": -1, "sha256": "00" * 32}, {"size": 10**18, "sha256": "00" * 32},
                                  {"size": 1, "sha256": "00"}, {"size": 1, "sha256": "GG" * 32}])  # fmt: skip
def test_a_file_of_no_possible_size_or_hash_is_refused(file: dict[str, Any]) -> None:
    message = refusal(signed(files={"deep.onnx": file}))
    assert "deep.onnx" in message
    assert "out of range" in message


@pytest.mark.parametrize("name", ["./x", "a//b", "a/./b", "a/", "a\nb", "\u202ea"])
def test_a_file_has_one_plain_name(name: str) -> None:
    assert "no plain file name" in refusal(signed(files={name: {"size": 1, "sha256": "00" * 32}}))


def test_precision_and_quantization_go_together() -> None:
    assert "no quantization with precision 'int8'" in refusal(signed(precision="int8"))
    assert "a quantization with precision 'fp32'" in refusal(signed(quantization={}))


def test_what_older_manifests_say_of_quantization_is_read_or_passed_over() -> None:
    older = signed(precision="int8", quantization={"int8_range": "reduced", "exact_rows": True})
    quantization = Manifest.from_json(older).quantization
    assert quantization is not None
    assert quantization.int8_range == "reduced"


@pytest.mark.parametrize(
    ("value", "reason"),
    [(10**99, "threshold = 1e+99 is out of range"), (10**400, "an integer of 401 digits"), (1e999, "threshold is inf")],
)
def test_a_number_that_is_too_large_is_refused(value: float, reason: str) -> None:
    assert reason in refusal(signed(threshold=value))


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "heads", "kv_heads", "head_dim"])
def test_sizes_are_positive(name: str) -> None:
    assert "out of range" in refusal(signed(**{name: 0}))


def test_an_encoder_decoder_needs_a_start_token() -> None:
    assert "decoder_start_token_id" in refusal(signed(encoder_capacity=64))
    assert Manifest.from_json(signed(encoder_capacity=64, decoder_start_token_id=0)).encoder_decoder


@pytest.mark.parametrize("path", ["../x", "/etc/hostname", "a/../../x", "..", "", "a\\..\\x", "a\0b"])
def test_a_path_that_leaves_the_bundle_is_refused(path: str) -> None:
    assert f"names {path!r}" in refusal(signed(files={path: {"size": 1, "sha256": "00" * 32}}))


def test_a_file_in_a_folder_of_the_bundle_is_in_it() -> None:
    read = Manifest.from_json(signed(files={"tensorrt/deep.plan": {"size": 1, "sha256": "00" * 32}}))
    assert set(read.files) == {"tensorrt/deep.plan"}


def test_layers_are_split_at_the_exit() -> None:
    assert list(MANIFEST.shallow_layers) == [0, 1]
    assert list(MANIFEST.deep_layers) == [2, 3, 4]


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_bytes_of_the_kv_cache(precision: Any, size: int) -> None:
    manifest = replace(MANIFEST, precision=precision)
    assert manifest.kv_bytes_per_token == 2 * 5 * 2 * 16 * size
    assert manifest.kv_bytes_per_sequence == manifest.kv_bytes_per_token * 108
    with_encoder = replace(manifest, encoder_capacity=50)
    assert with_encoder.kv_bytes_per_sequence == manifest.kv_bytes_per_token * 158


def test_fields_of_a_newer_minor_version_are_skipped() -> None:
    files = {name: {"size": file.size, "sha256": file.sha256, "mode": 2} for name, file in MANIFEST.files.items()}
    assert Manifest.from_json(signed(schema_minor=SCHEMA_MINOR + 1, surprise={"a": [1]}, files=files)) == MANIFEST
    # What is known must fit all the same.
    assert "lacks layers" in refusal(signed(schema_minor=SCHEMA_MINOR + 1, layers=REMOVED))
    assert "upgrade freeexport" in refusal(signed(schema_minor=SCHEMA_MINOR + 1, dialect="new"))
