"""An exit of transformer layers: engines, modes, batches and verification against transformers and our torch layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import PROMPTS, Bundles, Case, Model
from draft_plans import draft_exits
from exit_layer_case import EXIT_CASES, EXIT_LAYER, OWN_LAYERS, with_exit_layers
from reference import (
    Run,
    assert_same_tokens,
    replay,
)

from freeexport.verification.batches import Batch, pad
from freeexport.verification.engines import EnginePair, encode_prompts
from runtime import Session
from runtime.bundle.bundle import Bundle

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 18
TIED = EXIT_CASES[0]
each_case = pytest.mark.parametrize("case", EXIT_CASES, ids=lambda case: case.name)


@pytest.mark.parametrize(
    ("case", "dialect"),
    [
        *((case, dialect) for case in EXIT_CASES for dialect in ("ort", "standard")),
        (with_exit_layers("t5gemma"), "ort"),
        (with_exit_layers("t5gemma2"), "ort"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_shallow_logits_match_the_exit_layers_in_torch(
    case: Case, dialect: str, bundle: Bundles, source_model: Model
) -> None:
    opened = Bundle.open(bundle(case, EXIT_LAYER, dialect=dialect))
    assert opened.manifest.exit_layers == OWN_LAYERS
    start, prompt = opened.manifest.decoder_start_token_id, list(PROMPTS[2][:1])
    ids, prompts = np.array(PROMPTS[2]), list[np.ndarray]()
    if start is not None:
        ids, prompt = np.array([start, *PROMPTS[2]]), list(PROMPTS[0])
        prompts = list(pad([prompt]))
    pair = EnginePair(opened, 1, 1, encode_prompts(opened, Batch(*pad([ids.tolist()]), *prompts), 1)[0])
    # A prompt, three tokens in one call, and single ones.
    found, place = [], 0
    for count in (30, 3, 1, 1, 1):
        call = np.array([count], np.int32)
        out = pair.shallow(ids[None, place : place + count], call)
        found.append(out["logits"])
        pair.deep(out["hidden"], call)
        place += count
    wanted = Run(source_model(case), prompt, EXIT_LAYER).logits(ids[1:place].tolist())[0]
    # A suppressed token has the lowest logit, in torch none at all.
    ours, written = np.concatenate(found), np.isfinite(wanted.numpy())
    assert (ours[~written] < -1e4).all()
    np.testing.assert_allclose(ours[written], wanted.numpy()[written], atol=1e-4, rtol=1e-4)


@each_case
def test_lossless_equals_full_and_drafts_as_the_reference(
    case: Case, bundle: Bundles, source_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With drafts that are as long as there is room for, and, among them, plain steps that ask no head."""
    draft_exits(monkeypatch, plain_every=3)
    drafted, whole = 0, source_model(case)
    with Session(bundle(case, EXIT_LAYER), slots=1, threads=1) as session:
        for prompt in PROMPTS:
            options: dict[str, Any] = {"max_new_tokens": TOKENS, "ignore_eos": True}
            full = session.generate(prompt, mode="full", **options)
            ours = session.generate(prompt, mode="lossless", drafts="exit", threshold=0.1, **options)
            assert ours.token_ids == full.token_ids
            assert_same_tokens(full, replay(whole, prompt, full.token_ids, EXIT_LAYER, 1.0, mode="full"))
            drafted += ours.stats.rejected + ours.stats.exits
            # Every token that exited has the confidence of a sequence that was read as a whole.
            shallow = replay(whole, prompt, ours.token_ids, EXIT_LAYER, 1.0)
            for place, (mine, its) in enumerate(zip(ours.confidence, shallow.confidence, strict=True)):
                assert not place or mine is None or mine == pytest.approx(its, abs=1e-3)
    assert drafted


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "int8", "kernels": "freeexport"},
        {"precision": "int4", "kernels": "freeexport"},
        {"precision": "int8", "kernels": "onnxruntime"},
        {"precision": "int4", "kernels": "onnxruntime"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_quantized_engines_run_with_and_without_the_exit_layers(
    options: dict[str, Any], bundle: Bundles, source_model: Model
) -> None:
    ids = np.array(PROMPTS[2])
    with Session(bundle(TIED, EXIT_LAYER, **options), slots=1, threads=1) as session, session.decoder() as decoder:
        decoder.want_logits(True)
        decoder.prefill(ids[:30], head=True)
        said = [decoder.step(int(token), head=True).logits.copy() for token in ids[30:34]]  # type: ignore[union-attr]
        decoder.trim(0)
        decoder.prefill(ids[:30], head=False)
        assert [decoder.step(int(token), head=False).token for token in ids[30:34]] == [-1] * 4
    wanted = Run(source_model(TIED), ids[:31].tolist(), EXIT_LAYER).logits(ids[31:34].tolist())[0].numpy()
    off = np.linalg.norm(np.stack(said) - wanted) / np.linalg.norm(wanted)
    assert off < (0.1 if options["precision"] == "int8" else 0.5)


def test_mode_full_skips_the_exit_layers(bundle: Bundles) -> None:
    """Their cache stays as it was: nothing was written for rows that nobody asks about."""
    with Session(bundle(TIED, EXIT_LAYER), slots=1, threads=1) as session, session.decoder() as decoder:
        shallow = decoder.runners[0].cache
        own = [array for name, array in shallow.arrays.items() if name.startswith("exit.")]
        assert len(own) == 2 * OWN_LAYERS
        decoder.prefill(np.array(PROMPTS[0]), head=False)
        decoder.step(7, head=False)
        length = int(shallow.lengths[0])
        assert not any(array[0, :, :length].any() for array in own)
        decoder.trim(0)
        decoder.prefill(np.array(PROMPTS[0]), head=False, exits=True)
        assert all(array[0, :, : length - 1].any(axis=(0, 2)).all() for array in own)


def test_converted_exit_is_verified(tmp_path: Path, checkpoint: Callable[[Case], Path]) -> None:
    from freeexport.conversion.convert import convert
    from freeexport.conversion.convert_options import ConvertOptions

    manifest = convert(str(checkpoint(TIED)), tmp_path / "verified", ConvertOptions(capacity=64, measure=False))
    assert manifest.verified
