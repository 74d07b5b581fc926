"""A head that knows some tokens only: the others' logits, the index mapped back, the confidence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CASES, VOCAB_SIZE, Bundles, Case
from engine_cases import CONFIDENCES, log_softmax, pair_of, tokens

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.verification.engines import EnginePair
from graphs.engine_options import EngineOptions
from graphs.engines import EngineBuilder
from graphs.errors import GraphError
from graphs.families import describe
from graphs.weights import WeightFile
from runtime.bundle.bundle import sha256_of
from runtime.bundle.manifest import ConfidenceMeasure, File, Manifest, Precision
from runtime.text.sampler import UNKNOWN

BY_NAME = {case.name: case for case in CASES}
KNOWN = tuple(range(1, VOCAB_SIZE, 7))
Pair = Callable[..., EnginePair]


@pytest.fixture
def pair(checkpoint: Callable[[Case], Path], bundle: Bundles, tmp_path: Path) -> Pair:
    """A bundle's engines with a shallow engine that knows KNOWN only."""

    def build(case: Case, precision: Precision = "fp32", confidence: ConfidenceMeasure = "softmax") -> EnginePair:
        path = Path(shutil.copytree(bundle(case, 1, precision=precision, confidence=confidence), tmp_path / "copy"))
        source = open_checkpoint(str(checkpoint(case)))
        options = EngineOptions(1, 128, precision=precision, confidence=confidence, exit_tokens=KNOWN)
        (tmp_path / "new").mkdir()
        with WeightFile(tmp_path / "new" / "shallow.data") as weights:
            EngineBuilder(describe(source.config, source), options, source, weights, tmp_path / "new").shallow()
        for name in ("shallow.onnx", "shallow.data"):
            shutil.copy(tmp_path / "new" / name, path / name)
        (path / "freeexport.json").write_text(resized((path / "freeexport.json").read_text(), path))
        return pair_of(path, rows=1)

    return build


def resized(text: str, path: Path) -> str:
    """The manifest with the files of the shallow engine as they are now."""
    manifest = Manifest.from_json(text)
    names = ("shallow.onnx", "shallow.data")
    new = {name: File((path / name).stat().st_size, sha256_of(path / name)) for name in names}
    return replace(manifest, files={**manifest.files, **new}).to_json()


@pytest.mark.parametrize("name", ["t5-relu-tied", "llama-untied-many-eos"])
@pytest.mark.parametrize("measure", list(CONFIDENCES))
def test_token_and_confidence_are_those_of_the_known_logits(
    name: str, measure: ConfidenceMeasure, pair: Pair, bundle: Callable[..., Path]
) -> None:
    case = BY_NAME[name]
    ids, lengths = tokens(40)
    whole = pair_of(bundle(case, 1, confidence=measure), rows=1).shallow(ids, lengths)
    some = pair(case, confidence=measure).shallow(ids, lengths)
    known = np.array(KNOWN)
    np.testing.assert_allclose(some["logits"][:, known], whole["logits"][:, known], atol=1e-4)
    others = np.setdiff1d(np.arange(VOCAB_SIZE), known)
    assert (some["logits"][:, others] == UNKNOWN).all()
    np.testing.assert_array_equal(some["token"], known[whole["logits"][:, known].argmax(-1)])
    expected = CONFIDENCES[measure](np.exp(log_softmax(whole["logits"][:, known])))
    np.testing.assert_allclose(some["confidence"], expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(some["hidden"], whole["hidden"], atol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rounded_heads_know_them_too(precision: Precision, pair: Pair) -> None:
    outputs = pair(BY_NAME["llama-tied"], precision).shallow(*tokens(40))
    assert set(outputs["token"]) <= set(KNOWN)
    np.testing.assert_array_equal(outputs["token"], outputs["logits"].argmax(-1))


@pytest.mark.parametrize("known", [(1,), (2, 1), (1, 1), (-1, 2), (1, VOCAB_SIZE)])
def test_what_is_no_set_of_tokens_is_refused(known: tuple[int, ...], checkpoint: Callable[[Case], Path]) -> None:
    source = open_checkpoint(str(checkpoint(BY_NAME["llama-tied"])))
    description = describe(source.config, source)
    with pytest.raises(GraphError, match=f"2 to {VOCAB_SIZE} different tokens"):
        EngineOptions(1, 64, exit_tokens=known).check(description)
