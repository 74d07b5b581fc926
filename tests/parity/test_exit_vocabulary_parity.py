"""An exit that was trained with a vocabulary: tokens, confidences and modes against transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import PROMPTS, Bundles, Case
from click.testing import CliRunner
from exit_layer_case import EXIT_LAYER
from exit_vocabulary_case import KNOWN, model_with_vocabulary, with_exit_vocabulary
from reference import assert_same_tokens, replay, separating_threshold

from freeexport.calibrate.threshold import fit_mixture
from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.commands.inspect import command as inspect
from freeexport.training.exit_modules import Exit, KnownTokens, trained_exit
from freeexport.verification.batches import QUICK
from freeexport.verification.verification import verify
from runtime import Session
from runtime.adaptation.label_statistics import _sums
from runtime.bundle.bundle import Bundle

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 18
LLAMA, TIED_T5, T5 = map(with_exit_vocabulary, ("llama-tied", "t5-relu-tied", "t5-gated-untied"))
LAYERS = with_exit_vocabulary("llama-untied-many-eos", layers=True)
T5_LAYERS = with_exit_vocabulary("t5-relu-tied", layers=True)
OWN_KERNELS = {"precision": "int8", "kernels": "freeexport"}
EXACT: tuple[tuple[Case, dict[str, Any]], ...] = (
    (LLAMA, {}),
    (LLAMA, {"dialect": "standard"}),
    (TIED_T5, {}),
    (T5, {"dialect": "standard"}),
    (LAYERS, {}),
    (T5_LAYERS, {}),
    (T5_LAYERS, {"dialect": "standard"}),
)
Directory = Callable[[Case], Path]


@pytest.mark.parametrize(("case", "options"), EXACT, ids=lambda value: getattr(value, "name", value))
def test_exits_match_the_reference_and_never_emit_the_class_of_other_tokens(
    case: Case, options: dict[str, Any], bundle: Bundles, checkpoint: Directory
) -> None:
    model, others, exits = model_with_vocabulary(checkpoint(case)), 0, 0
    with Session(bundle(case, EXIT_LAYER, **options), slots=1, threads=1) as session:
        for prompt in PROMPTS:
            full = session.generate(prompt, mode="full", max_new_tokens=TOKENS, ignore_eos=True)
            assert_same_tokens(full, replay(model, prompt, full.token_ids, EXIT_LAYER, 1.0, mode="full"))
            guide = replay(model, prompt, full.token_ids, EXIT_LAYER, 1.0)
            others += guide.confidence.count(0.0)
            threshold = separating_threshold(guide, 0.6)
            ours = session.generate(
                prompt, mode="free", drafts="exit", threshold=threshold, max_new_tokens=TOKENS, ignore_eos=True
            )
            reference = replay(model, prompt, ours.token_ids, EXIT_LAYER, threshold)
            if assert_same_tokens(ours, reference) is None:
                assert ours.stats.sync_sizes == Counter(reference.sync_sizes)
            exits += sum(ours.exited)
            assert {token for token, exited in zip(ours.token_ids, ours.exited, strict=True) if exited} <= set(KNOWN)
            lossless = session.generate(prompt, mode="lossless", threshold=0.0, max_new_tokens=TOKENS, ignore_eos=True)
            assert lossless.token_ids == full.token_ids
            shallow = session.generate(prompt, mode="shallow", max_new_tokens=TOKENS, ignore_eos=True)
            assert {token for token, exited in zip(shallow.token_ids, shallow.exited, strict=True) if exited} <= set(
                KNOWN
            )
    assert others
    assert exits


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (T5, {"dialect": "standard"}),
        (T5_LAYERS, OWN_KERNELS),
        (T5_LAYERS, {"precision": "int4", "kernels": "onnxruntime"}),
        (LAYERS, {"target": "cuda", "precision": "bf16"}),
        (LLAMA, OWN_KERNELS),
        (LLAMA, {"precision": "int4", "kernels": "onnxruntime", "confidence": "max-prob"}),
        (T5, {"precision": "fp16", "confidence": "entropy"}),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_verify_compares_confidences(
    case: Case, options: dict[str, Any], bundle: Bundles, checkpoint: Directory
) -> None:
    report = verify(Bundle.open(bundle(case, EXIT_LAYER, **options)), str(checkpoint(case)), extent=QUICK)
    assert report["passed"], report


def test_verify_rejects_a_different_class_of_other_tokens(
    bundle: Bundles, checkpoint: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*given: Any) -> tuple[Exit | None, KnownTokens | None]:
        own, known = trained_exit(*given)
        assert known is not None
        known.other.bias.data += 0.1
        return own, known

    monkeypatch.setattr("freeexport.training.exit_modules.trained_exit", other)
    report = verify(Bundle.open(bundle(LLAMA, EXIT_LAYER)), str(checkpoint(LLAMA)), extent=QUICK)
    assert {check["tensor"] for check in report["checks"] if not check["passed"]} == {"exit confidence"}


def test_inspect_shows_the_exit_vocabulary(bundle: Bundles, checkpoint: Directory) -> None:
    path = bundle(LLAMA, EXIT_LAYER)
    shown = CliRunner().invoke(inspect, [str(path)]).output
    assert f"{len(KNOWN)} of 288 tokens" in shown
    assert "trained with one class for all others" in " ".join(shown.split())
    assert open_checkpoint(str(checkpoint(LLAMA))).sha256 == Bundle.open(path).manifest.source_sha256


def test_tokens_that_cannot_exit_do_not_change_the_threshold() -> None:
    draw = np.random.default_rng(0)
    confidence = np.concatenate([draw.beta(5.0, 0.6, 400), draw.beta(1.2, 2.0, 200)])
    agrees = np.arange(600) < 400
    alone = fit_mixture(confidence, agrees, 0.9)
    assert 0 < alone.threshold < 1
    with_others = fit_mixture(np.append(confidence, np.zeros(300)), np.append(agrees, np.zeros(300, np.bool_)), 0.9)
    assert with_others.threshold == alone.threshold
    assert _sums([0.0, 0.5]) == _sums([0.5])
