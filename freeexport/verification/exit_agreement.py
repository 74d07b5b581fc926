"""Agreement of an exit with its model, and the opening of a model with a ready-made exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.checkpoints.eagle import apply_eagle_head, read_eagle_head
from freeexport.checkpoints.examples import (
    DataError,
    prompts_of,
    read_examples,
    text_format,
)
from freeexport.checkpoints.packed_exit import MAX_SAMPLES, SampleAnswer, read_packed
from freeexport.checkpoints.ready_made import apply_exit, does_not_fit, find_exit
from freeexport.checkpoints.weight_files import CheckpointError
from freeexport.costs.intervals import Share, share
from freeexport.system.progress import progress
from freeexport.verification.batches import Batch, pad
from graphs.exit_head import fused_layers
from graphs.families import describe
from runtime.bundle.manifest import ConfidenceMeasure
from runtime.speech.audio import log_mel, window
from runtime.speech.windows import FRAMES_A_POSITION

if TYPE_CHECKING:
    import torch

    from freeexport.training.layer_modules import Encoded
    from freeexport.verification.reference import ExitHead

# Greedy tokens of an answer, and the longest prompt, in tokens.
ANSWER = 64
PROMPT = 256
# Share of the agreement with its own base that an exit must reach with other weights. Of 0.64 with
# its own, on prompts that the model wrote, smollm2-chat kept 0.90 with a fine-tune of the model and
# 0.87 to 0.90 with weights rounded to 4 bits without offsets. With 3 bits, which leave
# 37 % of the model's own tokens equal, it kept 0.48.
MIN_SHARE = 0.8


def open_with_exit(model: str, name: str | None) -> Checkpoint:
    """Open a checkpoint, with ready-made exit `name` applied if it is not None.

    An exit fits the weights that it was trained on. With other weights of the same family and
    sizes, its agreement is measured and printed. An EAGLE-3 head fits a model of its sizes.
    """
    if name is None:
        return open_checkpoint(model)
    path = find_exit(name)
    if path.is_dir():
        head = read_eagle_head(path)
        return apply_eagle_head(open_checkpoint(model), head)
    packed = read_packed(path)
    base = open_checkpoint(model)
    applied = apply_exit(base, packed)
    about = packed.about
    assert applied.ready_made is not None
    if base.weights_sha256 == about.weights_sha256:
        return applied
    others = (
        f"it was trained on other weights, of {about.model} (sha256 "
        f"{about.weights_sha256[:12]}..., those of {base.name} have {base.weights_sha256[:12]}...)"
    )
    if about.agreement is None or not about.samples:
        reason = f"{others}, and its file has no samples to measure its agreement on"
        raise CheckpointError(does_not_fit(about, base, reason))
    found = agreement_of(applied, about.samples, packed.sounds)
    measured = (
        f"with these it predicts {found.value:.1%} of {found.count} greedy tokens of "
        f"{len(about.samples)} samples, with its own {about.agreement:.1%}"
    )
    if found.value < MIN_SHARE * about.agreement:
        reason = f"{others}; {measured}, of which {MIN_SHARE:.0%} is required"
        raise CheckpointError(does_not_fit(about, base, reason))
    click.echo(f"note: exit {about.name} fits: {others}; {measured}", err=True)
    return replace(applied, ready_made=replace(applied.ready_made, agreement=found.value))


def agreement_of(
    checkpoint: Checkpoint, samples: Sequence[SampleAnswer], sounds: Sequence[np.ndarray] = ()
) -> Share:
    """Return the share of the model's best tokens that its exit predicts, in the answers given.

    Measured with transformers in float32. The exit reads the model's true states, and predicts
    tokens of its vocabulary.

    Args:
        checkpoint: The model, with the exit.
        samples: The answers.
        sounds: For a speech model, the recording of each sample, float32 [n] at 16 kHz.
    """
    from freeexport.checkpoints.transformers_model import reference_model
    from freeexport.verification.reference import States

    assert checkpoint.exit is not None
    model = reference_model(checkpoint)
    head = exit_head(checkpoint, model)
    hits = list[int]()
    counts = list[int]()
    with progress("agreement of the exit", len(samples)) as advance:
        for number, sample in enumerate(samples):
            sound = sounds[number] if sounds else None
            batch, first = _forced(checkpoint, sample, sound)
            states = States.of(model, checkpoint.exit.exit_layer, batch, head)
            exits, full = (one[first:].argmax(-1) for one in (states.shallow, states.deep))
            hits.append(int((exits == full).sum()))
            counts.append(len(full))
            advance()
    found = share(hits, counts)
    assert found is not None  # every sample has an answer
    return found


def samples_of(checkpoint: Checkpoint, data: Path) -> tuple[SampleAnswer, ...]:
    """Return the model's greedy answers to the first prompts of a JSONL file.

    An answer has at most ANSWER tokens. Prompts of more than PROMPT tokens are skipped.
    """
    from freeexport.checkpoints.transformers_model import greedy_ids, reference_model

    description = describe(checkpoint.config, checkpoint)
    form = text_format(checkpoint, description, PROMPT + ANSWER)
    found = prompts_of(read_examples(data, 2 * MAX_SAMPLES), form, data)
    prompts = [np.asarray(ids) for ids in found if len(ids) <= PROMPT][:MAX_SAMPLES]
    if not prompts:
        raise DataError(f"{data} has no prompt of at most {PROMPT} tokens; give shorter ones")
    answers = greedy_ids(reference_model(checkpoint), checkpoint, prompts, ANSWER)
    return tuple(
        SampleAnswer(tuple(prompt.tolist()), tuple(answer.tolist()))
        for prompt, answer in zip(prompts, answers, strict=True)
    )


def _forced(
    checkpoint: Checkpoint, sample: SampleAnswer, sound: np.ndarray | None
) -> tuple[Batch, int]:
    """Return the batch that predicts the answer of a sample, and its first row that does."""
    prompt = list(sample.prompt)
    before = list(sample.answer[:-1])
    if sound is not None:
        positions = checkpoint.config["max_source_positions"]
        features = log_mel(sound, checkpoint.config["num_mel_bins"])
        prompts = window(features, 0, FRAMES_A_POSITION * positions)
        return Batch(
            *pad([prompt + before]), prompts=prompts, prompt_lengths=np.array([positions], np.int32)
        ), len(prompt) - 1
    if not checkpoint.config.get("is_encoder_decoder"):
        return Batch(*pad([prompt + before])), len(prompt) - 1
    start = checkpoint.generation_config.get("decoder_start_token_id") or 0
    return Batch(*pad([[start, *before]]), *pad([prompt])), 0


def exit_head(
    checkpoint: Checkpoint, model: Any, measure: ConfidenceMeasure = "softmax"
) -> ExitHead | None:
    """Return the reference of an exit with own parameters. None if it uses the model's head."""
    if checkpoint.exit is None or not checkpoint.exit.has_parameters:
        return None
    import torch

    from freeexport.training.exit_modules import joined_feature, trained_exit
    from freeexport.training.shallow_deep import exits_of, shared_head

    if checkpoint.eagle is not None:
        from freeexport.verification.eagle_reference import eagle_reference

        return eagle_reference(checkpoint, measure)
    description = describe(checkpoint.config, checkpoint)
    own, known = trained_exit(checkpoint, description)
    exit_layer = checkpoint.exit.exit_layer
    head = shared_head(model, description).eval()

    @torch.no_grad()
    def read(
        states: torch.Tensor, encoded: Encoded | None, layers: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if own is None:
            normed = head.normed(states)
        else:
            earlier = fused_layers(own.reads, exit_layer, len(layers) - 1)
            features = joined_feature(layers[-1], [layers[number] for number in earlier])
            reads_feature = own.reads != "state"
            normed = own.norm(own(states, encoded, features if reads_feature else None))
        logits = head.read(normed)
        if known is None:
            return logits, None
        # Uses the model's own linear layer, whose precision is reduced to that of the bundle.
        tokens = known.vocabulary
        classes = torch.cat([logits[..., tokens], known.other(normed * head.scale)], dim=-1)
        _, confidence = exits_of(classes.flatten(0, 1), tokens, measure)
        unknown = torch.full_like(logits, torch.finfo(torch.float32).min)
        return unknown.index_copy(-1, tokens, logits[..., tokens]), confidence.reshape(
            *states.shape[:2], 1
        )

    return read
