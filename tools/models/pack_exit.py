"""Pack the exit of a trained checkpoint into one file, for `freeexport convert --exit`.

    python -m tools.models.pack_exit CHECKPOINT NAME --model SmolLM2-135M-Instruct \\
        --licence Apache-2.0 --data "..." --recipe "..." --results "..." --samples prompts.jsonl
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.checkpoints.examples import read_examples, recording_of
from freeexport.checkpoints.packed_exit import SUFFIX, SampleAnswer, pack
from freeexport.checkpoints.ready_made import READY_MADE
from freeexport.checkpoints.special_tokens import speech_of
from freeexport.conversion.own_outputs import own_outputs
from freeexport.verification.exit_agreement import agreement_of, samples_of
from graphs.families import describe
from runtime.speech.audio import read_audio
from tools.data.splits import run_tool

MAX_SOUNDS = 6  # recordings of a speech model's samples
SPOKEN = 200  # tokens of a transcript


def spoken_samples_of(
    model: str, checkpoint: Checkpoint, data: Path
) -> tuple[tuple[SampleAnswer, ...], tuple[np.ndarray, ...]]:
    """Return a speech model's transcripts, and the recordings of the first lines of a JSONL file.

    The transcripts are those of the model in 8 bits, of at most SPOKEN tokens.
    """
    speech = speech_of(checkpoint, describe(checkpoint.config, checkpoint))
    assert speech is not None
    positions = checkpoint.config["max_source_positions"]
    start = checkpoint.generation_config.get("decoder_start_token_id") or 0
    sounds = [
        recording_of(request, speech, positions, data)
        for request in read_examples(data, MAX_SOUNDS)
    ]
    longest = min(SPOKEN, checkpoint.config["max_target_positions"] // 2)
    with TemporaryDirectory() as directory:
        outputs = dict(own_outputs(model, checkpoint, sounds, longest, Path(directory)))
    samples = tuple(
        SampleAnswer((start, *speech.prefix(sound.language)), tuple(outputs[number].tolist()))
        for number, sound in enumerate(sounds)
    )
    return samples, tuple(read_audio(sound.path) for sound in sounds)


@click.command()
@click.argument("checkpoint")
@click.argument("name")
@click.option("--model", required=True, help="Common name of the model that the exit is for.")
@click.option("--licence", required=True, help="SPDX licence of the exit, such as Apache-2.0.")
@click.option("--data", required=True, help="Training data and its licence.")
@click.option("--recipe", required=True, help="Training commands and their duration.")
@click.option("--results", required=True, help="Measured results, and the page that explains them.")
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    help=(
        "JSONL file with prompts of the task: 'input', or 'audio' for speech. The first are packed "
        "with the model's answers. Without them, the exit fits no other weights."
    ),
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="File to write.  [default: NAME.safetensors in freeexport/exits]",
)
def command(
    checkpoint: str,
    name: str,
    model: str,
    licence: str,
    data: str,
    recipe: str,
    results: str,
    samples: Path | None,
    out: Path | None,
) -> None:
    """Pack the exit of CHECKPOINT, which `freeexport train` wrote, as NAME."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise click.UsageError(
            f"{name!r} is not a valid name; use lowercase letters, digits and hyphens"
        )
    out = out or READY_MADE / f"{name}{SUFFIX}"
    trained = open_checkpoint(checkpoint)
    answers: tuple[SampleAnswer, ...] = ()
    sounds: tuple[np.ndarray, ...] = ()
    if samples is not None and describe(trained.config, trained).spectrogram is not None:
        answers, sounds = spoken_samples_of(checkpoint, trained, samples)
    elif samples is not None:
        answers = samples_of(trained, samples)
    packed = pack(
        checkpoint,
        out,
        name,
        model,
        licence,
        data,
        recipe,
        results,
        samples=answers,
        agreement=agreement_of(trained, answers, sounds).value if answers else None,
        sounds=sounds,
    )
    size = f"{out.stat().st_size / 1e6:.2f} MB"
    click.echo(f"{out}: {size}, for {packed.model} (sha256 {packed.weights_sha256[:12]}...)")


if __name__ == "__main__":
    run_tool(command)
