"""`train --exit-vocab`: which tokens, losses against numpy, every way of tuning, and the bundle that comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Case
from engine_cases import log_softmax
from training_case import LLAMA, T5, Runs, evaluated, frozen_exit, logged, run_options

from freeexport.checkpoints.checkpoint import CheckpointError, open_checkpoint
from freeexport.checkpoints.transformers_model import reference_model
from freeexport.conversion.convert import convert
from freeexport.conversion.convert_options import ConvertOptions
from freeexport.training.batches import Collator, described, examples
from freeexport.training.exit_modules import KnownTokens
from freeexport.training.exit_start import begin_other, chosen_tokens, observed
from freeexport.training.frozen import _log_chances
from freeexport.training.shallow_deep import ShallowDeep, SharedHead, exits_of
from freeexport.training.train import train
from freeexport.verification.batches import QUICK
from freeexport.verification.verification import verify
from graphs.families import describe
from runtime.bundle.bundle import Bundle
from runtime.errors import OptionError

Directory = Callable[[Case], Path]
RANDOM = np.random.default_rng(11)
TOKENS = (1, 4, 5, 9)


def folded(logits: np.ndarray, known: tuple[int, ...] = TOKENS) -> np.ndarray:
    """Logarithms of probabilities of the classes."""
    chances = np.exp(log_softmax(logits))
    others = np.delete(chances, known, axis=-1).sum(-1, keepdims=True)
    return np.log(np.concatenate([chances[:, known], others], axis=-1))


def test_classes_and_folded_predictions_match_numpy() -> None:
    known, deep = KnownTokens(TOKENS, 3), RANDOM.normal(size=(6, 12)) * 5
    assert known.classes(torch.arange(12)).tolist() == [4, 0, 4, 4, 1, 2, 4, 4, 4, 3, 4, 4]
    found = known.folded(torch.tensor(deep)).log_softmax(-1).numpy()
    np.testing.assert_allclose(found, folded(deep), atol=1e-9)
    chances = known.folded_chances(torch.tensor(deep).log_softmax(-1)).numpy()
    np.testing.assert_allclose(chances, folded(deep), atol=1e-9)
    # A tail of no probability is no fault.
    deep[:, TOKENS[0]] = 2000.0
    assert torch.isfinite(known.folded(torch.tensor(deep))).all()
    assert known.folded_chances(torch.tensor(deep).log_softmax(-1))[:, -1].allclose(torch.tensor(1e-6).double().log())


def test_class_of_other_tokens_never_exits_and_the_best_known_token_remains() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 0.0, 9.0], [0.0, 1.0, 8.0, 0.0, 2.0]])
    for measure in ("softmax", "max-prob", "entropy"):
        token, confidence = exits_of(logits, torch.tensor(TOKENS), measure)  # type: ignore[arg-type]
        assert token.tolist() == [4, 5]
        assert confidence[0] == 0.0
        assert confidence[1] > 0.9
    best, second = logits[1].softmax(-1).topk(2).values
    assert float(exits_of(logits, torch.tensor(TOKENS))[1][1]) == pytest.approx(float(best - second))


@pytest.mark.parametrize("frozen", [False, True])
def test_loss_matches_its_definition_over_the_classes(
    frozen: bool, checkpoint: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cross-entropy of both exits by depth, and the divergence of the folded deep prediction from the shallow one."""
    opened = open_checkpoint(str(checkpoint(LLAMA)))
    description = describe(opened.config, opened)
    tokens = tuple(range(60, 90, 2))
    known = KnownTokens(tokens, description.hidden_size)
    whole = ShallowDeep(reference_model(opened), description, 2, "logit-kd", 0.5, known=known).train()
    ids, labels = torch.tensor([[35, 60, 70, 81, 90]]), torch.tensor([[60, 71, 80, 90, 1]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        hidden = whole.hidden_states(labels, **batch)
        deep = whole.head(hidden[whole.layers]).double().numpy()
        normed = whole.head.normed(hidden[2])
    weight = np.concatenate([opened.read(description.decoder.head.weight)[list(tokens)], known.other.weight.detach()])
    bias = np.append(np.zeros(len(tokens)), float(known.other.bias.detach()))
    student, meant = log_softmax(normed.double().numpy() @ weight.T + bias), folded(deep, tokens)
    classes = [tokens.index(int(label)) if int(label) in tokens else len(tokens) for label in labels[0]]
    shallow_nats, deep_nats = -student[np.arange(5), classes], -log_softmax(deep)[np.arange(5), labels[0].numpy()]
    expected = (2 * shallow_nats.sum() + 5 * deep_nats.sum()) / 7
    expected += 0.5 * (np.exp(meant) * (meant - student)).sum()
    if not frozen:
        loss = whole(labels, **batch)["loss"]
    else:
        head = SharedHead(whole.head.norm, whole.head.linear, 1.0)
        own = torch.nn.Identity()
        own.passes = lambda states, encoded, features, count: [states]  # type: ignore[assignment]
        own.norm = torch.nn.Identity()
        module = frozen_exit(own, head, 2, 5, known).train()
        monkeypatch.setattr(head.linear, "forward", None)  # the whole head is not read
        best = torch.tensor(meant, dtype=torch.float32).topk(len(tokens) + 1)
        nats, top = torch.tensor(deep_nats, dtype=torch.float32), torch.tensor(deep.argmax(-1))
        loss = module(normed[None], labels, best.indices, best.values, top, nats)["loss"]
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)
    loss.backward()
    assert known.other.weight.grad is not None
    assert (known.other.weight.grad != 0).all()


def test_class_of_other_tokens_starts_near_the_sum_of_their_logits() -> None:
    torch.manual_seed(0)
    head = SharedHead(torch.nn.Identity(), torch.nn.Linear(8, 12, bias=False), 0.5)
    states, known = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)), KnownTokens(TOKENS, 8)
    begin_other(known, head, iter([states]))
    with torch.no_grad():
        wanted = known.folded(head.read(states))[:, -1]
        found = known.logits(states * 0.5, head.weight[known.vocabulary])[:, -1]
    assert float((found - wanted).square().mean()) < 0.1 * float(wanted.var())


def test_gradients_are_enabled_after_a_partial_pass_over_examples(
    checkpoint: Directory, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freeexport.training.exit_start._TAIL_POSITIONS", 1)
    opened = open_checkpoint(str(checkpoint(T5)))
    options = run_options(words)
    description = described(opened, options)
    training, _, _ = examples(opened, description, options)
    known = KnownTokens(range(40), description.hidden_size)
    whole = ShallowDeep(reference_model(opened), description, 2, known=known)
    states = observed(whole, training, Collator(0), bf16=True)
    begin_other(known, whole.head, (whole.exit_normed(hidden) for hidden in states))
    assert len(list(states)) == 2  # it was left before its end
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_vocabulary_has_special_tokens_then_the_most_frequent(checkpoint: Directory, words: Path) -> None:
    opened = open_checkpoint(str(checkpoint(LLAMA)))
    options = run_options(words, exit_vocab=9)
    description = described(opened, options)
    training, _, _ = examples(opened, description, options)
    tokens, facts = chosen_tokens(opened, description, options, training)
    ids = np.concatenate([one.target for one in training])
    assert {0, 1, 2} < set(tokens)
    assert set(tokens) - {0, 1, 2} == set(np.unique(ids)) - {2}  # a to f
    assert (facts.size, facts.covered, facts.text_tokens, facts.trained) == (9, 1.0, len(ids), True)
    fewer, facts = chosen_tokens(opened, description, replace(options, exit_vocab=5), training)
    left = np.bincount(ids)[list(fewer)]
    assert facts.covered == pytest.approx(left.sum() / len(ids))
    assert min(left[3:]) >= max(np.bincount(ids)[[token for token in np.unique(ids) if token not in fewer]])
    for size in (3, 288):
        with pytest.raises(OptionError, match=f"--exit-vocab is {size}; .* choose 4 to 287"):
            chosen_tokens(opened, description, replace(options, exit_vocab=size), training)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (T5, {}),
        (LLAMA, {"loss": "kd-dyn"}),
        (LLAMA, {"tune": "lora", "exit_head_layers": 2, "rank": 4}),
        (LLAMA, {"tune": "exit", "exit_head_layers": 2}),
        (T5, {"exit_head_layers": 2}),
        (T5, {"tune": "lora", "exit_head_layers": 1, "rank": 4}),
        (T5, {"tune": "exit", "exit_head_layers": 2}),
    ],
    ids=lambda value: getattr(value, "name", None) or "-".join(map(str, value.values())),
)
def test_trained_exit_vocabulary_is_written_measured_and_converted(
    case: Case, options: dict[str, Any], run: Runs, words: Path, tmp_path: Path
) -> None:
    out, trained = run(case, exit_vocab=12, steps=12, evaluate_every=12, learning_rate=1e-2, **options)
    opened = open_checkpoint(str(out))
    assert opened.exit is not None
    assert opened.exit.vocabulary is not None
    assert opened.exit.vocabulary.size == 12
    for name, value in evaluated(out, run_options(words, **options)).items():
        assert trained.metrics[f"eval_{name}"] == pytest.approx(value, rel=0.02, abs=0.02), name
    losses = logged(out, "eval_shallow_loss")
    assert losses[-1] < losses[0]
    assert len(opened.sha256) == 64  # its parameters belong to these weights
    convert(str(out), tmp_path / "bundle", ConvertOptions(capacity=64, verify="none", measure=False))
    report = verify(Bundle.open(tmp_path / "bundle"), str(out), extent=QUICK)
    assert report["passed"], report
    assert "exit confidence" in [check["tensor"] for check in report["checks"]]


def test_exit_vocabulary_is_unchanged_by_further_training(run: Runs, words: Path, tmp_path: Path) -> None:
    out, _ = run(T5, exit_vocab=12, steps=12, evaluate_every=12, learning_rate=1e-2)
    measured = evaluated(out, run_options(words))
    still = run_options(words, exit_vocab=12, steps=1, evaluate_every=1, learning_rate=1e-12)
    again = train(str(out), tmp_path / "again", still)
    assert again.before["eval_shallow_loss"] == pytest.approx(measured["shallow_loss"], rel=1e-3)
    for change in ({"exit_vocab": None}, {"exit_vocab": 13}):
        with pytest.raises(CheckpointError, match="the same --exit-layer, --exit-head-layers, --exit-input and"):
            train(str(out), tmp_path / "other", replace(still, **change))


@pytest.mark.parametrize("bf16", [False, True])
def test_teacher_predicts_like_the_head_of_the_model(bf16: bool) -> None:
    torch.manual_seed(0)
    linear, bias = torch.nn.Linear(32, 50, bias=False), torch.linspace(-1, 1, 50)
    head = SharedHead(torch.nn.LayerNorm(32), linear, 0.5, None, bias, softcap=2.0).requires_grad_(False)
    states, before = torch.randn(7, 32), torch.get_float32_matmul_precision()
    found = _log_chances(head, states, torch.empty(9, 50), bf16)
    assert torch.allclose(found, head(states).log_softmax(-1), atol=0.03 if bf16 else 1e-5)
    assert torch.get_float32_matmul_precision() == before
