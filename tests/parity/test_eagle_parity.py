"""An EAGLE-3 head as an exit: its logits, drafts and decoding against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import EIGHT_LAYERS, PROMPTS, Case, Model
from draft_plans import draft_exits
from eagle_case import PlainEagle, eagle_config, eagle_tensors, write_eagle
from gguf_model import write_gguf
from reference import confidence_of

from freeexport.conversion.convert import convert
from freeexport.conversion.convert_options import ConvertOptions
from freeexport.verification.engines import EnginePair
from runtime import Session
from runtime.bundle.bundle import Bundle

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, PENDING = 24, 5
Convert = Callable[..., Path]


@pytest.fixture(scope="module")
def converted(checkpoint: Callable[[Case], Path], tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Convert the model with a head once per options."""
    directory = tmp_path_factory.mktemp("eagle")
    head = write_eagle(directory / "head")
    known: dict[Any, Path] = {}

    def build(**options: Any) -> Path:
        key = tuple(sorted(options.items()))
        if key not in known:
            known[key] = directory / f"bundle-{len(known)}"
            defaults: dict[str, Any] = {"capacity": 128, "verify": "none", "measure": False, "exit": str(head)}
            convert(str(checkpoint(EIGHT_LAYERS)), known[key], ConvertOptions(**{**defaults, **options}))
        return known[key]

    return build


@pytest.fixture(scope="module")
def plain(source_model: Model) -> PlainEagle:
    return PlainEagle(source_model(EIGHT_LAYERS), eagle_tensors())


def opened(path: Path, **options: Any) -> Session:
    return Session(path, **{"slots": 1, "threads": 1, **options})


@pytest.mark.parametrize("dialect", ["ort", "standard"])
@pytest.mark.parametrize("pieces", [(30, 3, 1, 1, 1), (1, 1, 7)])
def test_engine_matches_the_logits_of_the_head(
    dialect: str, pieces: tuple[int, ...], converted: Convert, plain: PlainEagle
) -> None:
    ids = list(PROMPTS[2])
    pair = EnginePair(Bundle.open(converted(dialect=dialect)), 1, 1)
    found, place = [], 0
    for count in pieces:
        shallow, _ = pair.both(np.array([ids[place : place + count]]), np.array([count], np.int32))
        found.append(shallow["logits"])
        place += count
    _, wanted = plain.head(ids[:place], plain.features(ids[:place])[0])
    logits = np.concatenate(found)
    np.testing.assert_allclose(logits[1:, plain.tokens], wanted.numpy(), atol=1e-4, rtol=1e-4)
    others = np.setdiff1d(np.arange(logits.shape[1]), plain.tokens)
    assert (logits[1:, others] < -1e4).all()


def plainly_free(
    plain: PlainEagle, prompt: list[int], threshold: float, expected: tuple[int, ...]
) -> tuple[list[int], list[float]]:
    """Tokens and confidences of FREE: features are the model's up to the last sync pass, then the head's own states.

    The model reads the `expected` tokens once. They must be those that are found.
    """
    ids, confidences = list(prompt), list[float]()
    synced, own = len(ids), dict[int, torch.Tensor]()
    true_features, deep = plain.features([*prompt, *expected])
    ids.append(int(deep[len(ids) - 1].argmax()))
    while len(ids) < len(prompt) + TOKENS:
        assert ids == [*prompt, *expected][: len(ids)]
        features = true_features.clone()
        for place in range(synced, len(ids) - 1):
            features[place] = own[place]
        states, logits = plain.head(ids, features)
        own[len(ids) - 1] = states[-1]
        confidences.append(confidence_of(logits[-1]))
        if confidences[-1] > threshold and len(ids) - synced < PENDING:
            ids.append(int(plain.tokens[logits[-1].argmax()]))
        else:
            synced = len(ids)
            ids.append(int(deep[len(ids) - 1].argmax()))
    return ids[len(prompt) :], confidences


@pytest.mark.parametrize("dialect", ["ort", pytest.param("standard", marks=pytest.mark.slow)])
def test_mode_free_matches_the_head_over_several_passes(dialect: str, converted: Convert, plain: PlainEagle) -> None:
    exits = 0
    with opened(converted(dialect=dialect)) as session:
        for prompt in PROMPTS:
            for threshold in (0.05, 0.2):
                result = session.generate(
                    prompt,
                    threshold=threshold,
                    drafts="exit",
                    max_new_tokens=TOKENS,
                    ignore_eos=True,
                    max_pending=PENDING,
                )
                ids, confidences = plainly_free(plain, list(prompt), threshold, result.token_ids)
                assert list(result.token_ids) == ids
                ours = [one for one in result.confidence[1:] if one is not None]
                np.testing.assert_allclose(ours, confidences, atol=1e-3)
                exits += result.stats.exits
    assert exits > 20


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "int8", "kernels": "freeexport"},
        {"precision": "int4", "kernels": "freeexport"},
    ],
    ids=lambda options: options.get("precision", "fp32"),
)
def test_lossless_equals_full(options: dict[str, Any], converted: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}
    exits = 0
    with opened(converted(**options)) as session:
        wanted = [session.generate(prompt, mode="full", **asked).token_ids for prompt in PROMPTS]
        for more in ({}, {"drafts": "lookup"}, {"predicted_output": list(wanted[0])}):
            ours = session.generate(PROMPTS[0], mode="lossless", threshold=0.1, **asked, **more)
            assert ours.token_ids == wanted[0]
        rolled = session.generate(PROMPTS[0], mode="rollback", threshold=0.05, rollback_threshold=3.0, **asked)
        assert len(rolled.token_ids) == 40
        draft_exits(monkeypatch, plain_every=3)
        for prompt, full in zip(PROMPTS, wanted, strict=True):
            ours = session.generate(prompt, mode="lossless", threshold=0.02, **asked)
            assert ours.token_ids == full
            exits += ours.stats.exits + ours.stats.rejected
    assert exits > 20


@pytest.mark.parametrize("mode", ["free", "lossless"])
def test_batches_and_cached_prefixes_change_no_output(mode: str, converted: Convert) -> None:
    asked: dict[str, Any] = {"max_new_tokens": TOKENS, "ignore_eos": True, "mode": mode, "threshold": 0.05}
    asked |= {"drafts": "exit"} if mode == "lossless" else {}
    path = converted(precision="int8", kernels="freeexport")
    prompts = [list(prompt) for prompt in PROMPTS] + [[*PROMPTS[2][:40], 7, 9]]
    with opened(path) as session:
        single = [session.generate(prompt, **asked) for prompt in prompts]
    with opened(path, slots=3, prefix_cache_mb=8) as session, ThreadPoolExecutor(4) as pool:
        first = list(pool.map(lambda prompt: session.generate(prompt, **asked), prompts))
        again = list(pool.map(lambda prompt: session.generate(prompt, **asked), prompts))
    assert again[2].stats.cached_tokens >= 32
    for one, *others in zip(single, first, again, strict=True):
        for other in others:
            assert other.token_ids == one.token_ids
            if mode == "free":  # the prefix and the batch do not change a bit of a row
                assert other.confidence == one.confidence


def test_one_token_prompt_has_no_head_prediction(converted: Convert) -> None:
    asked: dict[str, Any] = {"mode": "full", "output_confidence": True, "max_new_tokens": 3, "ignore_eos": True}
    with opened(converted()) as session:
        session.generate(PROMPTS[0], **asked)
        assert session.generate([35], **asked).confidence[0] in (None, 0.0)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"precision": "int8", "kernels": "freeexport"}, marks=pytest.mark.slow)],
    ids=lambda options: options.get("precision", "fp32"),
)
def test_converted_head_is_verified(
    options: dict[str, Any], tmp_path: Path, checkpoint: Callable[[Case], Path]
) -> None:
    head = write_eagle(tmp_path / "head")
    given = ConvertOptions(capacity=64, exit=str(head), **options)
    manifest = convert(str(checkpoint(EIGHT_LAYERS)), tmp_path / "verified", given)
    assert manifest.verified
    assert manifest.exit_input == "eagle3"
    assert (manifest.exit_layer, manifest.exit_layers) == (0, 1)
    assert manifest.exit_vocabulary is not None
    assert manifest.exit_vocabulary.size == 120
    assert manifest.costs is not None
    assert manifest.costs.sound


def test_head_with_the_full_vocabulary_converts_with_a_gguf_file(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "model.gguf", kind="Q4_0", layers=7)
    head = write_eagle(tmp_path / "head", eagle_config(32, 32), eagle_tensors(32, 32))
    given = ConvertOptions(precision="int4", exit=str(head), capacity=64, verify="none", measure=False)
    manifest = convert(str(model), tmp_path / "bundle", given)
    assert manifest.exit_vocabulary is None
    with opened(tmp_path / "bundle") as session:
        asked: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True}
        full = session.generate([3, 4, 5], mode="full", **asked)
        ours = session.generate([3, 4, 5], mode="lossless", drafts="exit", threshold=0.02, **asked)
        assert ours.token_ids == full.token_ids
