"""Heads of an exit that know some tokens only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, VOCAB_SIZE, Bundles, Case
from engine_cases import CONFIDENCES, log_softmax, pair_of, tokens

from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.verification.batches import sample_batch
from freeexport.verification.engines import EnginePair, encode_prompts
from graphs.description import Description
from graphs.engine_options import EngineOptions
from graphs.engines import EngineBuilder
from graphs.errors import GraphError
from graphs.exit_head import check_tokens
from graphs.families import describe
from graphs.weights import WeightFile
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import ConfidenceMeasure, Kernels, Precision
from runtime.text.grammar import UNKNOWN

LLAMA = BY_NAME["llama-tied"]
KNOWN = tuple(range(1, VOCAB_SIZE, 7))
Pair = Callable[..., EnginePair]


@pytest.fixture
def pair(bundle: Bundles, tmp_path: Path) -> Pair:
    """A bundle's engines with another shallow engine."""

    def build(case: Case, description: Description, source: Any, **options: Any) -> EnginePair:
        opened = Bundle.open(bundle(case, 1, **options))
        path = Path(shutil.copytree(opened.path, tmp_path / "copy"))
        with WeightFile(path / "shallow.data") as weights:
            kernels: Kernels = "freeexport" if opened.manifest.kernels else "onnxruntime"
            engines = EngineOptions(1, 128, kernels=kernels, **options)
            EngineBuilder(description, engines, source, weights, path).shallow()
        changed = Bundle(path, opened.manifest, "")
        return EnginePair(changed, 1, 1, encode_prompts(changed, sample_batch(changed))[0])

    return build


def described(case: Case, checkpoint: Callable[[Case], Path]) -> tuple[Description, Checkpoint]:
    source = open_checkpoint(str(checkpoint(case)))
    return describe(source.config, source), source


def knowing(case: Case, checkpoint: Callable[[Case], Path]) -> tuple[Description, Checkpoint]:
    """The final head as that of the exit, which knows KNOWN."""
    found, source = described(case, checkpoint)
    exit_head = replace(found.decoder.head, tokens=KNOWN)
    return replace(found, decoder=replace(found.decoder, exit_head=exit_head)), source


@pytest.mark.parametrize("measure", list(CONFIDENCES))
def test_exit_vocabulary_head_gives_token_and_confidence_of_its_logits(
    measure: ConfidenceMeasure, pair: Pair, bundle: Bundles, checkpoint: Callable[[Case], Path]
) -> None:
    case, (ids, lengths) = BY_NAME["llama-untied-many-eos"], tokens(40)
    whole = pair_of(bundle(case, 1, confidence=measure), rows=1).shallow(ids, lengths)
    found = pair(case, *knowing(case, checkpoint), confidence=measure)
    some, known = found.shallow(ids, lengths), np.array(KNOWN)
    np.testing.assert_allclose(some["logits"][:, known], whole["logits"][:, known], atol=1e-4)
    assert (some["logits"][:, np.setdiff1d(np.arange(VOCAB_SIZE), known)] == UNKNOWN).all()
    np.testing.assert_array_equal(some["token"], known[whole["logits"][:, known].argmax(-1)])
    expected = CONFIDENCES[measure](np.exp(log_softmax(whole["logits"][:, known])))
    np.testing.assert_allclose(some["confidence"], expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(some["hidden"], whole["hidden"], atol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_exit_vocabulary_head_predicts_only_its_tokens(
    precision: Precision, pair: Pair, checkpoint: Callable[[Case], Path]
) -> None:
    found = pair(LLAMA, *knowing(LLAMA, checkpoint), precision=precision)
    outputs = found.shallow(*tokens(40))
    assert set(outputs["token"]) <= set(KNOWN)
    np.testing.assert_array_equal(outputs["token"], outputs["logits"].argmax(-1))


@pytest.mark.parametrize("known", [(1,), (2, 1), (1, 1), (-1, 2), (1, VOCAB_SIZE)])
def test_invalid_exit_vocabulary_is_refused(known: tuple[int, ...]) -> None:
    with pytest.raises(GraphError, match=f"2 to {VOCAB_SIZE} different tokens"):
        check_tokens(known, VOCAB_SIZE)
