"""Manifests and calibrations: what is written is read back, and everything else is refused by the name of its field."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from manifest_case import CALIBRATED, MANIFEST

from runtime.bundle.calibration import (
    CALIBRATION_MINOR,
    CALIBRATION_VERSION,
    Calibration,
    check_calibration,
    read_calibration,
)
from runtime.bundle.manifest import HASH, SCHEMA_MINOR, SCHEMA_VERSION, Manifest, _hash
from runtime.errors import BundleError, CalibrationError

REMOVED = object()
both = pytest.mark.parametrize("valid", [MANIFEST, CALIBRATED], ids=["manifest", "calibration"])
COSTS = {"shallow": 1.0, "shallow_without_head": 1.0, "deep": {"1": 1.0}}
FILE = {"size": 1, "sha256": "00" * 32}


def changed(valid: Manifest | Calibration, **changes: Any) -> str:
    """As JSON with fields changed (REMOVED: left out), and a manifest's hash made to fit."""
    content = {**json.loads(valid.to_json()), **changes}
    content = {name: value for name, value in content.items() if value is not REMOVED and name != HASH}
    return json.dumps({**content, HASH: _hash(content)} if isinstance(valid, Manifest) else content)


def refused(valid: Manifest | Calibration, text: str) -> str:
    with pytest.raises(BundleError) as caught:
        type(valid).from_json(text)
    message = str(caught.value)
    assert message.startswith("freeexport.json" if isinstance(valid, Manifest) else "calibration.json")
    assert "\n" not in message
    return message


def refusal(valid: Manifest | Calibration = MANIFEST, **changes: Any) -> str:
    return refused(valid, changed(valid, **changes))


@both
def test_written_manifest_is_read_back(valid: Manifest | Calibration) -> None:
    assert type(valid).from_json(valid.to_json()) == type(valid).from_json(changed(valid)) == valid


def test_fields_with_defaults_are_optional() -> None:
    read = Manifest.from_json(changed(MANIFEST, versions=REMOVED, copies=REMOVED, costs=REMOVED, threshold=1))
    assert read == replace(MANIFEST, versions={}, copies=(), costs=None, threshold=1.0)
    optional = ("target", "risk", "delta", "rollback_threshold", "mixture", "table", "costs", "created_with")
    calibration = Calibration.from_json(changed(CALIBRATED, **dict.fromkeys(optional, REMOVED)))
    assert (calibration.mixture, calibration.table, calibration.costs) == (None, (), None)
    with pytest.raises(ValueError, match="JSON compliant"):
        replace(CALIBRATED, threshold=math.nan).to_json()


@given(data=st.data())
def test_single_bit_flip_is_detected_or_harmless(data: st.DataObject) -> None:
    content = bytearray(MANIFEST.to_json().encode())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 6))
    with suppress(BundleError):
        assert Manifest.from_json(content.decode()) == MANIFEST


@both
def test_non_object_is_refused(valid: Manifest | Calibration) -> None:
    for text in ("", "{", "nonsense", '{"layers": 3', "\0", "[" * 100_000):
        assert "not JSON" in refused(valid, text)
    for text, name in (("[]", "list"), ("3", "int"), ("null", "NoneType"), ('"a"', "str")):
        assert f"holds {name}" in refused(valid, text)


def test_change_without_updating_the_hash_is_refused() -> None:
    assert "altered" in refused(MANIFEST, MANIFEST.to_json().replace('"threshold": 0.75', '"threshold": 0.7'))
    assert "altered" in refused(MANIFEST, json.dumps({"schema_version": SCHEMA_VERSION}))


@pytest.mark.parametrize(
    ("valid", "version", "minor"),
    [(MANIFEST, SCHEMA_VERSION, SCHEMA_MINOR), (CALIBRATED, CALIBRATION_VERSION, CALIBRATION_MINOR)],
)
def test_newer_minor_version_is_read_and_another_major_version_refused(
    valid: Manifest | Calibration, version: int, minor: int
) -> None:
    message = refusal(valid, schema_version=version + 1, novelty=1)
    assert f"up to {version}; upgrade" in message
    refusal(valid, schema_version=version - 1)
    assert type(valid).from_json(changed(valid, schema_minor=minor + 1, novelty={"a": [1]})) == valid
    assert "lacks threshold" in refusal(valid, schema_minor=minor + 1, threshold=REMOVED)


@pytest.mark.parametrize(
    ("valid", "name"), [(valid, field.name) for valid in (MANIFEST, CALIBRATED) for field in fields(valid)]
)
def test_field_of_the_wrong_type_is_refused_by_name(valid: Manifest | Calibration, name: str) -> None:
    value = getattr(valid, name)
    wrong: list[Any] = [[["x"]]]
    if valid is MANIFEST:
        wrong += [{"x": {"y": 1}}]
        wrong += [5, True] if isinstance(value, (str, dict, tuple)) else ["5"]
        wrong += [None] if value is not None and name not in ("bos_token_id", "costs") else []
        wrong += [1] if isinstance(value, bool) else []
        wrong += [2.5, True] if type(value) is int else []
    for item in wrong:
        assert name in refusal(valid, **{name: item})


def test_missing_and_unknown_fields_are_refused_by_name() -> None:
    for name in ("layers", "files", "threshold", "pad_token_id"):
        assert f"lacks {name}" in refusal(**{name: REMOVED})
    assert "unknown fields surprise" in refusal(surprise=1)
    assert "unknown fields mode" in refusal(files={"a": {**FILE, "mode": 2}})
    row = {"threshold": 0.5, "exit_rate": 0.5, "speed": 2}
    assert "table[0] has unknown fields speed" in refusal(CALIBRATED, table=[row])


OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "schema_version": (0,),
    "schema_minor": (-1,),
    "costs": (
        {**COSTS, "deep": {}},
        {**COSTS, "deep": {"2": 1.0}},
        {**COSTS, "shallow_without_head": 0.0},
        {**COSTS, "deep": {"one": 1.0}},
        {**COSTS, "busy": -1.0},
    ),
    "layers": (1, 10**6),
    "exit_layer": (0, 5),
    "exit_layers": (-1,),
    "hidden_size": (0, 10**9),
    "vocab_size": (0, 10**9),
    "heads": (0, 10**9),
    "kv_heads": (0, 10**9),
    "head_dim": (0, 10**9),
    "capacity": (0, 10**12),
    "max_pending": (0, 10**12),
    "tuned_max_pending": (-1, 9),
    "encoder_capacity": (-1, 10**12),
    "weight_bytes": (-1, 10**18),
    "decoder_start_token_id": (-1, 288),
    "threshold": (1.5, -0.5, math.nan),
    "rollback_threshold": (-0.5, math.inf, math.nan),
    "eos_token_ids": ([288], [-1]),
    "files": tuple({"deep.onnx": FILE | wrong} for wrong in ({"size": -1}, {"size": 10**18}, {"sha256": "00"},
                                                             {"sha256": "GG" * 32})),
}  # fmt: skip
MIXTURE = {"agree": {"a": 1.0, "b": 1.0}, "disagree": {"a": 1.0, "b": 1.0}, "weight_agree": 0.5}
OUT_OF_RANGE_CALIBRATION: dict[str, tuple[Any, ...]] = {
    "schema_version": (0,),
    "schema_minor": (-1,),
    "vocab_size": (0, 1 << 60),
    "exit_layer": (-1,),
    "threshold": (1.5, math.nan),
    "sequences": (0, 10**90),
    "positions": (0, 10**90),
    "agreement": (-0.1,),
    "target": (2.0, math.inf),
    "risk": (-0.5,),
    "delta": (math.nan,),
    "rollback_threshold": (-1.0, math.inf, 1e300),
    "costs": ({**COSTS, "shallow": math.nan}, {**COSTS, "shallow": 1e300}),
    "max_pending": (10**9,),
    "mixture": (
        {**MIXTURE, "agree": {"a": 0.0, "b": 1.0}},
        {**MIXTURE, "agree": {"a": 1e308, "b": 1.0}},
        {**MIXTURE, "weight_agree": 1.0},
    ),
    "table": tuple([{"threshold": 0.5, "exit_rate": 0.5} | wrong] for wrong in
                   ({"exit_rate": 1.5}, {"measured_speedup": -1.0}, {"quality": math.nan})),
    "method": ("guess",),
    "confidence": ("feeling",),
}  # fmt: skip


@pytest.mark.parametrize(
    ("valid", "name", "values"),
    [(MANIFEST, *case) for case in OUT_OF_RANGE.items()]
    + [(CALIBRATED, *case) for case in OUT_OF_RANGE_CALIBRATION.items()],
)
def test_out_of_range_value_is_refused_by_name(
    valid: Manifest | Calibration, name: str, values: tuple[Any, ...]
) -> None:
    for value in values:
        assert name in refusal(valid, **{name: value})


@pytest.mark.parametrize(
    ("value", "reason"),
    [(10**99, "threshold = 1e+99 is out of range"), (10**400, "an integer of 401 digits"), (1e999, "threshold is inf")],
)
def test_a_number_that_is_too_large_is_refused(value: float, reason: str) -> None:
    assert reason in refusal(threshold=value)


def test_excess_entries_are_refused_before_they_are_parsed() -> None:
    many = {str(index): FILE for index in range(10_001)}
    assert "files has 10001 entries, at most 10000" in refusal(files=many)
    assert "eos_token_ids has 10001 entries" in refusal(eos_token_ids=[2] * 10_001)


@pytest.mark.parametrize("name", ["./x", "a//b", "a/./b", "a/", "a\nb", "\u202ea"])
def test_file_names_must_be_plain_and_unique(name: str) -> None:
    assert "not a plain file name" in refusal(files={name: FILE})


@pytest.mark.parametrize("path", ["../x", "/etc/hostname", "a/../../x", "..", "", "a\\..\\x", "a\0b"])
def test_a_path_that_leaves_the_bundle_is_refused(path: str) -> None:
    assert f"names {path!r}" in refusal(files={path: FILE})
    inside = Manifest.from_json(changed(MANIFEST, files={"tensorrt/deep.plan": FILE}))
    assert set(inside.files) == {"tensorrt/deep.plan"}


def test_precision_and_quantization_must_match() -> None:
    assert "no quantization with precision 'int8'" in refusal(precision="int8")
    assert "a quantization with precision 'fp32'" in refusal(quantization={})
    older = changed(MANIFEST, precision="int8", quantization={"int8_range": "reduced", "exact_rows": True})
    quantization = Manifest.from_json(older).quantization
    assert quantization is not None
    assert quantization.int8_range == "reduced"


def test_an_encoder_decoder_needs_a_start_token() -> None:
    assert "decoder_start_token_id" in refusal(encoder_capacity=64)
    assert Manifest.from_json(changed(MANIFEST, encoder_capacity=64, decoder_start_token_id=0)).encoder_decoder


def test_int8_cache_requires_a_decoder_with_our_operators() -> None:
    own: dict[str, Any] = {"precision": "int8", "quantization": {}, "kernels": 9, "kv_cache": "int8"}
    manifest = Manifest.from_json(changed(MANIFEST, **own))
    assert (manifest.cache_type, manifest.cache_width) == ("int8", 16 + 4)
    assert manifest.kv_bytes_per_token == 2 * 5 * 2 * 20
    assert "kv_cache = 'int8'" in refusal(**{**own, "kernels": None})
    encodes = {"encoder_capacity": 64, "decoder_start_token_id": 0}
    assert "kv_cache = 'int8'" in refusal(**own, **encodes)
    assert Manifest.from_json(changed(MANIFEST, **{**own, **encodes, "kernels": 12})).cache_width == 20
    assert "kv_cache is 'int4'" in refusal(**{**own, "kv_cache": "int4"})


def test_int16_activations_require_operators_that_support_them() -> None:
    own: dict[str, Any] = {"precision": "int8", "quantization": {}, "kernels": 10, "activations": "int16"}
    assert Manifest.from_json(changed(MANIFEST, **own)).activations == "int16"
    for kernels in (None, 9):
        assert "activations = 'int16' is out of range" in refusal(**{**own, "kernels": kernels})
    assert "activations is 'int4'" in refusal(**{**own, "activations": "int4"})


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_layers_are_split_at_the_exit_and_have_caches(precision: Any, size: int) -> None:
    manifest = replace(MANIFEST, precision=precision)
    assert (list(manifest.shallow_layers), list(manifest.deep_layers)) == ([0, 1], [2, 3, 4])
    assert manifest.kv_bytes_per_token == 2 * 5 * 2 * 16 * size
    assert manifest.kv_bytes_per_sequence == manifest.kv_bytes_per_token * 108
    assert replace(manifest, encoder_capacity=50).kv_bytes_per_sequence == manifest.kv_bytes_per_token * 158


def test_unreadable_calibration_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"calibration\.json cannot be read \(No such file"):
        read_calibration(tmp_path / "calibration.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CalibrationError, match="not text"):
        read_calibration(tmp_path / "binary")
    (tmp_path / "calibration.json").write_text(CALIBRATED.to_json())
    assert read_calibration(tmp_path / "calibration.json") == CALIBRATED


@pytest.mark.parametrize(
    ("position", "other", "reason"),
    [
        (0, "ab" * 31 + "cd", "model"),
        (1, 300, "vocabulary 288, not 300"),
        (2, 3, "exit layer 2, not 3"),
        (3, "entropy", "confidence measure 'softmax', not 'entropy'"),
    ],
)
def test_calibration_of_another_model_is_refused(position: int, other: Any, reason: str) -> None:
    model: list[Any] = ["ab" * 32, 288, 2, "softmax"]
    check_calibration(CALIBRATED, *model)
    model[position] = other
    with pytest.raises(CalibrationError, match=reason):
        check_calibration(CALIBRATED, *model)
