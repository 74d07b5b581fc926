"""`train --exit-input feature`: passes against one token at a time, and the exits that training writes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, Case
from training_case import LLAMA, T5, Runs, logged, run_options

from freeexport.checkpoints.checkpoint import CheckpointError, open_checkpoint
from freeexport.checkpoints.packed_exit import pack
from freeexport.conversion.own_outputs import own_outputs
from freeexport.training.batches import described
from freeexport.training.exit_modules import ExitLayers, trained_exit
from freeexport.training.layer_modules import Encoded, norm_module
from freeexport.training.train import train
from graphs.exit_head import EXIT_MAP
from graphs.families import describe
from runtime.errors import OptionError

Directory = Callable[[Case], Path]


@pytest.mark.parametrize(
    ("name", "count"), [("llama-tied", 1), ("mistral-window", 1), ("t5-relu-tied", 1), ("llama-tied", 3)]
)
def test_training_pass_equals_decoding_token_by_token(checkpoint: Directory, name: str, count: int) -> None:
    """The output for a position in pass k is that of reading features up to k positions before, and then its own
    output of each position."""
    opened = open_checkpoint(str(checkpoint(BY_NAME[name])))
    description = describe(opened.config, opened)
    decoder, width, length, passes = description.decoder, description.hidden_size, 9, 4
    generator = torch.Generator().manual_seed(0)
    linear = torch.randn(width, (1 + count) * width, generator=generator).numpy() / width**0.5
    own = ExitLayers(decoder.layers[-2:], opened.read, linear, norm_module(decoder.head.norm, opened.read))
    states, prompt = torch.randn(2, 1, length, width, generator=generator)
    features = torch.randn(1, length, count * width, generator=generator)
    encoded = Encoded(prompt, torch.ones(1, length, dtype=torch.bool)) if description.encoder else None
    with torch.no_grad():
        found = own.passes(states, encoded, features, passes)
        torch.testing.assert_close(found[0], own(states, encoded, features))
        for number in range(passes):
            for place in range(number, length):
                read = features.clone()
                for drafted in range(place - number, place):
                    draft = own.norm(own(states, encoded, read)[:, drafted])
                    unit = draft / (draft.square().mean(-1, keepdim=True) + 1e-5).sqrt()
                    read[:, drafted] = torch.cat([*[unit] * (count - 1), draft], dim=-1)
                torch.testing.assert_close(
                    found[number][:, place], own(states, encoded, read)[:, place], rtol=1e-4, atol=1e-4
                )


@pytest.mark.parametrize(("case", "exit_layer", "exit_vocab"), [(LLAMA, 0, None), (LLAMA, 2, 40), (T5, 1, 40)])
def test_feature_exit_learns_and_is_trained_further(
    run: Runs, words: Path, case: Case, exit_layer: int, exit_vocab: int | None
) -> None:
    chosen: dict[str, Any] = {"tune": "exit", "exit_head_layers": 1, "exit_input": "feature", "exit_layer": exit_layer}
    made = run(case, **chosen, exit_vocab=exit_vocab, steps=16, evaluate_every=8, learning_rate=3e-3)
    assert logged(made.out, "eval_shallow_loss")[-1] < logged(made.out, "eval_shallow_loss")[0]
    opened = open_checkpoint(str(made.out))
    assert opened.exit is not None
    assert (opened.exit.exit_layer, opened.exit.exit_layers, opened.exit.exit_input) == (exit_layer, 1, "feature")
    description = describe(opened.config, opened)
    own, known = trained_exit(opened, description)
    assert isinstance(own, ExitLayers)
    assert own.reads == "feature"
    assert (known is None) == (exit_vocab is None)
    options = run_options(words, **chosen, exit_vocab=exit_vocab, steps=1, evaluate_every=1)
    again = train(str(made.out), made.out.parent / f"again-{exit_layer}", options)
    before, best = again.before["eval_shallow_loss"], made.trained.metrics["eval_shallow_loss"]
    assert before == pytest.approx(best, rel=1e-3)
    other = replace(options, exit_input="state", exit_layer=max(1, exit_layer))
    with pytest.raises(CheckpointError, match="--exit-input"):
        train(str(made.out), made.out.parent / "other", other)


def test_fused_exit_starts_with_the_predictions_of_a_feature_exit(run: Runs, words: Path, tmp_path: Path) -> None:
    """With zeros for the two earlier states, whose columns then learn, as does an exit that begins as fused."""
    chosen: dict[str, Any] = {"tune": "exit", "exit_head_layers": 1, "exit_input": "feature", "exit_layer": 1}
    first = run(LLAMA, **chosen, steps=12, evaluate_every=12, learning_rate=3e-3)
    options = run_options(words, **{**chosen, "exit_input": "fused"}, steps=12, evaluate_every=12)
    options = replace(options, learning_rate=1e-3)
    fused = train(str(first.out), tmp_path / "fused", options)
    for name in ("eval_shallow_loss", "eval_agreement"):
        assert fused.before[name] == pytest.approx(first.trained.metrics[name], rel=1e-4)
    assert fused.metrics["eval_shallow_loss"] < fused.before["eval_shallow_loss"]
    opened = open_checkpoint(str(tmp_path / "fused"))
    assert opened.exit is not None
    assert opened.exit.exit_input == "fused"
    width = opened.shape(EXIT_MAP)[0]
    assert opened.shape(EXIT_MAP) == (width, 4 * width)
    assert np.abs(opened.read(EXIT_MAP)[:, width : 3 * width]).max() > 0
    anew = run(LLAMA, **{**chosen, "exit_input": "fused"}, steps=12, evaluate_every=12, learning_rate=3e-3)
    assert anew.trained.metrics["eval_shallow_loss"] < anew.trained.before["eval_shallow_loss"]
    with pytest.raises(CheckpointError, match="--exit-input"):  # its map has columns that a feature cannot fill
        train(str(anew.out), tmp_path / "narrower", replace(options, exit_input="feature"))


def test_training_can_start_from_an_exit_of_other_weights(
    run: Runs, checkpoint: Directory, words: Path, tmp_path: Path
) -> None:
    """Train an exit, then all weights on their own, and begin with the exit on what became of them."""
    chosen: dict[str, Any] = {"tune": "exit", "exit_head_layers": 1, "exit_input": "feature", "exit_layer": 1}
    first = run(T5, **chosen, exit_vocab=40, steps=4, evaluate_every=4, learning_rate=3e-3).out
    changed, made = str(tmp_path / "changed"), tmp_path / "made"
    train(str(checkpoint(T5)), Path(changed), run_options(words, exit_layer=2, loss="deep-ce", steps=2))
    own, options = partial(own_outputs, changed), run_options(words, **chosen, exit_vocab=40, steps=1, evaluate_every=1)
    options = replace(options, learning_rate=1e-12, self_distill=tmp_path / "own", max_new_tokens=8)
    begun = train(changed, made, replace(options, exit_from=str(first)), own)
    opened = (open_checkpoint(str(path)) for path in (first, made))
    (before, _), (after, known) = (trained_exit(one, describe(one.config, one)) for one in opened)
    assert before is not None
    assert after is not None
    torch.testing.assert_close(after.state_dict(), before.state_dict())
    assert known is not None
    lines = (tmp_path / "own" / "outputs.jsonl").read_text().splitlines()
    frequent = Counter(token for line in lines for token in json.loads(line)["target_ids"]).most_common(10)
    assert {token for token, _ in frequent} <= set(known.vocabulary.tolist())
    assert len(open_checkpoint(str(made)).sha256) == 64  # of the weights beside it now
    packed, ready = tmp_path / "packed.safetensors", replace(options, exit_from=str(tmp_path / "packed.safetensors"))
    pack(str(first), packed, "packed", "tiny T5", "MIT", "words", "short", "none")
    unpacked = train(changed, tmp_path / "unpacked", ready, own)
    assert unpacked.before["eval_shallow_loss"] == pytest.approx(begun.before["eval_shallow_loss"], rel=0.05)
    refused = [
        (changed, replace(options, exit_from="nothing"), "there is no exit nothing"),
        (
            changed,
            replace(options, exit_from=str(first), exit_vocab=None),
            "--exit-input feature --exit-vocab 40; give these",
        ),
        (changed, replace(options, exit_from=changed), f"{changed} has no exit with weights of its own"),
        (str(first), replace(options, exit_from=str(made)), "leave --exit-from out"),
        (str(checkpoint(LLAMA)), replace(options, exit_from=str(first)), r"exit.safetensors: .* is .*, not"),
    ]
    for model, given, reason in refused:
        with pytest.raises(CheckpointError, match=reason):
            train(model, tmp_path / "other", given, own)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"exit_input": "fused", "tune": "full"}, "--exit-input fused is for --tune exit"),
        ({"exit_head_layers": 0}, "--tune exit trains layers of the exit's own"),
        ({"tune": "lora"}, "--exit-input feature is for --tune exit"),
        ({"exit_input": "guess"}, "--exit-input 'guess' is unknown; choose state, feature, fused"),
    ],
)
def test_contradictory_options_are_refused(words: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        run_options(words, **{"tune": "exit", "exit_head_layers": 1, "exit_input": "feature", **changes})


def test_out_of_range_exit_layer_is_refused(checkpoint: Directory, words: Path) -> None:
    options = run_options(words, tune="exit", exit_head_layers=1, exit_input="feature", exit_layer=99)
    with pytest.raises(OptionError, match="0 to "):
        described(open_checkpoint(str(checkpoint(LLAMA))), options)


def test_cached_records_contain_the_features_of_every_position(
    checkpoint: Directory, words: Path, tmp_path: Path
) -> None:
    """A batch of cached records holds what the model gives, the prompt's features too."""
    from freeexport.checkpoints.transformers_model import reference_model
    from freeexport.training.batches import Collator, examples
    from freeexport.training.frozen import cached_teacher, collate_teacher
    from freeexport.training.shallow_deep import ShallowDeep

    options = run_options(words, tune="exit", exit_head_layers=1, exit_input="fused", exit_layer=0)
    opened = open_checkpoint(str(checkpoint(LLAMA)))
    description = described(opened, options)
    _, validation, _ = examples(opened, description, options)
    deep = len(description.decoder.layers)
    thirds = deep // 3, 2 * deep // 3
    whole, collate = ShallowDeep(reference_model(opened), description, 0, "ce", also=thirds), Collator(None)
    records = cached_teacher(tmp_path / "v.npy", whole, validation, collate, options, None)
    batch, ids = collate_teacher(records), collate(validation)
    with torch.no_grad():
        out = whole.model(ids["input_ids"], attention_mask=ids["attention_mask"], output_hidden_states=True)
    kept = ids["attention_mask"] > 0
    first, *earlier, last = (out["hidden_states"][number][kept] for number in (0, *thirds, -1))
    parts = [state / (state.square().mean(-1, keepdim=True) + 1e-5).sqrt() for state in earlier]
    for name, states in (("states", first), ("features", torch.cat([*parts, last], dim=-1))):
        wanted = states.numpy()
        np.testing.assert_allclose(batch[name][kept].numpy(), wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())
