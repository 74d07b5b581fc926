"""An exit that reads a feature: its engine, decoding and verification against our torch layers, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import PROMPTS, Bundles, Case, Model
from draft_plans import draft_exits
from exit_layer_case import with_feature
from reference import Run, confidence_of

from freeexport.verification.batches import Batch
from freeexport.verification.engines import EnginePair, encode_prompts
from runtime import GenerationResult, Session
from runtime.bundle.bundle import Bundle
from runtime.errors import FreeExportError

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, PENDING = 24, 5
EXITS = tuple(
    with_feature(*each)
    for each in (
        *(("llama-tied", 0), ("llama-tied", 2), ("qwen3", 1), ("mistral-window", 0)),
        *(("t5-relu-tied", 1), ("umt5", 0), ("marian", 0)),
        *(("llama-tied", 1, "fused"), ("marian", 0, "fused")),
    )
)
LLAMA_CASE, T5_CASE, LLAMA_AT_0, MARIAN_AT_0 = EXITS[1], EXITS[4], EXITS[0], EXITS[6]
LLAMA_FUSED, MARIAN_FUSED = EXITS[7:]
# Graphs for GPUs have the standard dialect.
GRAPHS = [(case, "ort") for case in EXITS]
GRAPHS += [(case, "standard") for case in (T5_CASE, LLAMA_AT_0, LLAMA_FUSED)]
each_graph = pytest.mark.parametrize(
    ("case", "dialect"), GRAPHS, ids=[f"{case.name}-{dialect}" for case, dialect in GRAPHS]
)


def opened(case: Case, bundle: Bundles, dialect: str = "ort", **options: Any) -> Session:
    path = bundle(case, case.exit_layers[0], dialect=dialect)
    return Session(path, **{"slots": 1, "threads": 1, **options})


class Slow(Run):
    """A model and its exit without caches.

    The exit reads everything anew at each token. The layers of the model read `expected` in one pass.

    Attributes:
        first: Token ids that the decoder reads first.
    """

    def __init__(self, model: Any, prompt: list[int], layer: int, expected: Sequence[int] = ()) -> None:
        super().__init__(model, prompt, layer)
        self.first = self.prompt[0].tolist()
        self.read_once = [*self.first, *expected]
        self.known: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.scale = model.config.d_model**-0.5 if getattr(model.config, "scale_decoder_outputs", False) else 1.0

    def layers(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the states after the exit layer [1, n, d], the features [1, n, f] and the logits [n, V]."""
        count = len(ids)
        if self.read_once[:count] != ids:
            return self._layers(ids)
        if self.known is None:
            self.known = self._layers(self.read_once)
        states, features, logits = self.known
        return states[:, :count], features[:, :count].clone(), logits[:count]

    @torch.no_grad()
    def _layers(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        name = "decoder_input_ids" if self.inputs else "input_ids"
        out = self.model(**self.inputs, **{name: torch.tensor([ids])}, output_hidden_states=True, use_cache=False)
        states = out.decoder_hidden_states if self.inputs else out.hidden_states
        features = states[-1]
        if self.model.own_exit.reads == "fused":
            deep = len(states) - 1 - self.exit_layer
            third, two_thirds = (states[self.exit_layer + count * deep // 3] for count in (1, 2))
            features = torch.cat([scaled(third), scaled(two_thirds), features], dim=-1)
        return states[self.exit_layer], features, self.never(out.logits[0])

    @torch.no_grad()
    def exit(self, states: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The input of the exit's head [n, d], and its logits [n, V]."""
        own = self.model.own_exit
        normed = own.norm(own(states, self.encoded(), features))[0]
        logits = self.model.get_output_embeddings()(normed * self.scale)
        return normed, self.never(logits + getattr(self.model, "final_logits_bias", 0.0))

    def never(self, logits: torch.Tensor) -> torch.Tensor:
        for (token,) in self.model.generation_config.bad_words_ids or ():
            logits[..., token] = float("-inf")
        return logits


def scaled(states: torch.Tensor) -> torch.Tensor:
    return states / (states.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def slow_free(slow: Slow, threshold: float) -> tuple[list[int], list[float]]:
    """Tokens and confidences of FREE: features are the deep decoder's up to the last sync pass, and the exit's own
    behind it. The prompt of a decoder-only model predicts the first token."""
    ids, confidences = list(slow.first), list[float]()
    begun, synced, stand_ins = len(ids), 0, dict[int, torch.Tensor]()
    if not slow.inputs:
        synced = len(ids)
        ids.append(int(slow.layers(ids)[2][-1].argmax()))
    while len(ids) < begun + TOKENS:
        states, features, deep = slow.layers(ids)
        for place in range(synced, len(ids) - 1):
            own = stand_ins[place]
            features[0, place] = own if features.shape == states.shape else torch.cat([scaled(own), scaled(own), own])
        normed, logits = slow.exit(states, features)
        stand_ins[len(ids) - 1] = normed[-1]
        confidences.append(confidence_of(logits[-1]))
        if confidences[-1] > threshold and len(ids) - synced < PENDING:
            ids.append(int(logits[-1].argmax()))
        else:
            synced = len(ids)
            ids.append(int(deep[-1].argmax()))
    return ids[begun:], confidences


@each_graph
def test_engine_matches_the_layers_in_torch(case: Case, dialect: str, bundle: Bundles, source_model: Model) -> None:
    layer, ids = case.exit_layers[0], list(PROMPTS[2])
    slow, converted = Slow(source_model(case), ids, layer), Bundle.open(bundle(case, layer, dialect=dialect))
    tokens, lengths = np.array([ids]), np.array([len(ids)], np.int32)
    prompts = {"prompts": tokens, "prompt_lengths": lengths} if slow.inputs else {}
    pair = EnginePair(converted, 1, 1, encode_prompts(converted, Batch(tokens, lengths, **prompts), 1)[0])
    found, place = [], 0
    for count in (30, 3, 1, 1, 1):
        shallow, _ = pair.both(np.array([ids[place : place + count]]), np.array([count], np.int32))
        found.append(shallow["logits"])
        place += count
    states, features, _ = slow.layers(ids[:place])
    _, wanted = slow.exit(states, features)
    # A token that is never said has -inf in torch, and a large bias in the graph. UMT5's random exit triples rounding.
    atol = 5e-4 if "umt5" in case.name else 2e-4
    np.testing.assert_allclose(np.concatenate(found).clip(-1e3), wanted.clamp(-1e3).numpy(), atol=atol, rtol=1e-4)


@each_graph
def test_mode_free_matches_the_step_by_step_reference(
    case: Case, dialect: str, bundle: Bundles, source_model: Model
) -> None:
    exits = 0
    with opened(case, bundle, dialect) as session:
        for prompt in PROMPTS:
            for threshold in (0.05, 0.2):
                options: dict[str, Any] = {"mode": "free", "drafts": "exit", "threshold": threshold}
                result = session.generate(
                    prompt, max_new_tokens=TOKENS, ignore_eos=True, max_pending=PENDING, **options
                )
                slow = Slow(source_model(case), list(prompt), case.exit_layers[0], result.token_ids)
                ids, confidences = slow_free(slow, threshold)
                assert list(result.token_ids) == ids
                decided = result.confidence[int(not slow.inputs) :]
                ours = [one for one in decided if one is not None]
                np.testing.assert_allclose(ours, confidences, atol=1e-3)
                exits += result.stats.exits
    assert exits > 20


@each_graph
def test_lossless_equals_full(case: Case, dialect: str, bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafts of the exit, of text, and plain steps among them, after which the exit catches up."""
    options: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}
    exits = 0
    with opened(case, bundle, dialect) as session:
        wanted = [session.generate(prompt, mode="full", **options).token_ids for prompt in PROMPTS]
        for prompt, full in zip(PROMPTS, wanted, strict=True):
            for more in ({}, {"drafts": "exit"}, {"drafts": "lookup"}, {"predicted_output": list(full)}):
                ours = session.generate(prompt, mode="lossless", threshold=0.1, **options, **more)
                assert ours.token_ids == full
        draft_exits(monkeypatch, plain_every=3)
        for prompt, full in zip(PROMPTS, wanted, strict=True):
            ours = session.generate(prompt, mode="lossless", threshold=0.02, **options)
            assert ours.token_ids == full
            exits += ours.stats.exits + ours.stats.rejected
    assert exits > 20


def assert_equal(one: GenerationResult, other: GenerationResult, mode: str) -> None:
    """Tokens are equal, and confidences, but of lossless: what it drafts depends on the time that calls take."""
    assert one.token_ids == other.token_ids
    if mode != "lossless":
        for mine, its in zip(one.confidence, other.confidence, strict=True):
            assert mine == (None if its is None else pytest.approx(its, abs=1e-3))


METHODS: tuple[dict[str, Any], ...] = (
    {"mode": "free", "drafts": "exit", "threshold": 0.1},
    {"mode": "free", "drafts": "exit", "threshold": 0.1, "max_pending": 3},
    {"mode": "rollback", "threshold": 0.05, "rollback_threshold": 3.0},
    {"mode": "lossless", "threshold": 0.05, "drafts": "exit"},
    {"mode": "shallow"},
    {"mode": "full", "output_confidence": True},
)


@pytest.mark.parametrize("options", METHODS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("case", [LLAMA_FUSED, T5_CASE, LLAMA_AT_0, MARIAN_FUSED], ids=lambda case: case.name)
def test_batches_match_single_requests(case: Case, options: dict[str, Any], bundle: Bundles) -> None:
    asked = {"max_new_tokens": TOKENS, "ignore_eos": True, **options}
    with opened(case, bundle) as session:
        single = [session.generate(prompt, **asked) for prompt in PROMPTS]
    with opened(case, bundle, slots=3) as session, ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda prompt: session.generate(prompt, **asked), [*PROMPTS, *PROMPTS]))
    for one, other in zip([*single, *single], together, strict=True):
        assert_equal(one, other, options["mode"])


def test_adaptive_threshold_works_with_a_feature_exit(bundle: Bundles) -> None:
    with opened(EXITS[1], bundle, threshold="adaptive") as session:
        for prompt in PROMPTS:
            result = session.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True)
            assert len(result.token_ids) == TOKENS


@pytest.mark.parametrize("mode", ["free", "lossless"])
@pytest.mark.parametrize("case", [LLAMA_FUSED, LLAMA_AT_0], ids=lambda case: case.name)
def test_cached_prefix_changes_no_output(case: Case, mode: str, bundle: Bundles) -> None:
    options: dict[str, Any] = {"mode": mode, "threshold": 0.1, "max_new_tokens": TOKENS, "ignore_eos": True}
    prompt = list(PROMPTS[2])
    with opened(case, bundle) as session:
        wanted = [session.generate(ids, **options) for ids in (prompt, [*prompt[:40], 7, 9])]
    with opened(case, bundle, prefix_cache_mb=8) as session:
        session.generate(prompt, **options)
        for ids, plain in zip((prompt, [*prompt[:40], 7, 9]), wanted, strict=True):
            again = session.generate(ids, **options)
            assert again.stats.cached_tokens >= 32
            assert_equal(again, plain, mode)


def test_stop_strings_and_several_samples_work_with_a_feature_exit(bundle: Bundles) -> None:
    with opened(EXITS[1], bundle) as session:
        text = session.generate("where is", threshold=0.1, max_new_tokens=TOKENS, ignore_eos=True).text
        stop = text[4:6]
        ended = session.generate("where is", threshold=0.1, max_new_tokens=TOKENS, ignore_eos=True, stop=[stop]).text
        assert ended == text[: text.index(stop)]
        asked: dict[str, Any] = {"threshold": 0.1, "max_new_tokens": 8, "do_sample": True, "seed": 3}
        assert len(session.generate_best("where is", 3, **asked)) == 3


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (LLAMA_AT_0, {"precision": "int8", "kernels": "freeexport"}),
        (LLAMA_FUSED, {}),
        (LLAMA_FUSED, {"precision": "int8", "kernels": "freeexport"}),
        (LLAMA_FUSED, {"precision": "int4", "kernels": "onnxruntime"}),
        (T5_CASE, {}),
        (MARIAN_AT_0, {"precision": "int4", "kernels": "onnxruntime"}),
    ],
    ids=lambda value: value.get("precision", "fp32") if isinstance(value, dict) else value.name,
)
def test_converted_exit_is_verified(
    case: Case, options: dict[str, Any], tmp_path: Path, checkpoint: Callable[[Case], Path]
) -> None:
    from freeexport.conversion.convert import convert
    from freeexport.conversion.convert_options import ConvertOptions

    manifest = convert(str(checkpoint(case)), tmp_path / "verified", ConvertOptions(capacity=64, **options))
    assert manifest.verified
    assert manifest.exit_input == ("fused" if case is LLAMA_FUSED else "feature")
    assert manifest.costs is not None
    assert manifest.costs.sound


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"exit_layer": 4}, "trained to exit after layer 0, not 4"),
    ],
)
def test_invalid_conversions_are_refused(
    options: dict[str, Any], reason: str, tmp_path: Path, checkpoint: Callable[[Case], Path]
) -> None:
    from freeexport.conversion.convert import convert
    from freeexport.conversion.convert_options import ConvertOptions

    with pytest.raises(FreeExportError, match=reason):
        convert(str(checkpoint(EXITS[0])), tmp_path / "out", ConvertOptions(**options))
