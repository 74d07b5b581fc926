"""Choose the exit that `freeexport fit` trains, by the bytes that decoding reads.

Exit rates are not known before training. The rates reached in docs/results are assumed instead, for
hard, usual and easy tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.checkpoints.exit_file import Tune
from freeexport.costs.bytes import step_bytes
from graphs.description import Description
from runtime.bundle.costs import MAX_PENDING
from runtime.bundle.manifest import ExitInput

# Assumed exit rate after a fraction x of the layers: 1 - exp(-depth * x). From docs/results: a hard
# task (summaries), a usual one, and an easy one (records as JSON).
DEPTHS = {"hard": 0.5, "usual": 3.5, "easy": 6.0}
# Assumed exit rates of exits that read the deep decoder's feature (chat, phrases to phonemes,
# records as JSON). They do not rise with depth, since the model's own weights are trained
# beforehand.
FEATURE_RATES = {"hard": 0.2, "usual": 0.7, "easy": 0.85}
OWN_LAYERS = (1, 2)  # number of the exit's own layers
COVERED = 0.9  # minimum share of target tokens in an exit vocabulary


@dataclass(frozen=True)
class PlannedExit:
    """An exit to train.

    Attributes:
        layer: Number of layers before the exit.
        own: Number of its own layers.
        vocabulary: Number of tokens that it can predict. None: all.
        covered: Share of the targets' tokens in the vocabulary.
        break_even: Exit rate above which it is faster than the full model. None: no rate.
        rates: Assumed exit rates, by the names of DEPTHS.
        speeds: Speed of a token relative to the full model, by the same names.
        input: Input of its own layers. Unless it is "state", the model is trained first, without
            the exit.
        exists: The checkpoint already has this exit. Training continues with it.
    """

    layer: int
    own: int
    vocabulary: int | None
    covered: float
    break_even: float | None
    rates: dict[str, float]
    speeds: dict[str, float]
    input: ExitInput = "state"
    exists: bool = False

    @property
    def trainings(self) -> tuple[str, ...]:
        """Return the trainings that produce the exit, in order.

        "joint" trains all weights, with the exit or before it. "exit" trains the exit alone. Own
        layers that read the feature do not change the model, so the model is trained first, unless
        the exit exists already. An exit without own parameters is trained with the model.
        """
        if not self.exists:
            return ("joint", "exit")
        if self.input != "state":
            return ("exit",)
        return ("joint", "exit") if self.own else ("joint",)

    def training(self, name: str) -> dict[str, Any]:
        """Return options of `train` for one of the trainings."""
        tune: Tune = "exit" if name == "exit" else "full"
        if self.input != "state" and tune == "full":
            return {"tune": tune, "exit_layer": max(1, self.layer), "loss": "deep-ce"}
        given: dict[str, Any] = {
            "tune": tune,
            "exit_layer": self.layer,
            "loss": "logit-kd",
            "exit_head_layers": self.own,
            "exit_input": self.input,
        }
        return given if self.vocabulary is None else given | {"exit_vocab": self.vocabulary}


def best_exit(
    checkpoint: Checkpoint, description: Description, examples: Sequence[Example]
) -> PlannedExit:
    """Return the checkpoint's own exit, or the fastest one.

    The fastest is chosen on usual and easy tasks together, by the bytes read.
    """
    given = checkpoint.exit
    layers = len(description.decoder.layers)
    costs = step_bytes(description, checkpoint)
    vocabularies = list(_vocabularies(examples, description.vocab_size))
    found = []
    places: list[tuple[ExitInput, int, int]] = [
        ("state", layer, own)
        for layer, own in product(range(1, layers), OWN_LAYERS)
        if layer + own <= layers
    ]
    # Places that were measured: on T5, and on SmolLM2 and Qwen2.5.
    places.append(("feature", 1 if description.encoder is None else 0, 1))
    exists = given is not None and given.trained
    if given is not None and exists:  # training continues with it
        places = [(given.exit_input, given.exit_layer, given.exit_layers)]
        known = given.vocabulary
        vocabularies = [(None, 1.0) if known is None else (known.size, known.covered)]
    for (reads, layer, own), (size, covered) in product(places, vocabularies):
        share = 1.0 if size is None else (size + 1) / description.vocab_size
        passed = (layer + own) / layers
        at = costs.at(layer, layers, own, share=share, reads=reads)
        by_depth = {name: 1 - math.exp(-deep * passed) for name, deep in DEPTHS.items()}
        rates = {
            name: covered * rate
            for name, rate in (by_depth if reads == "state" else FEATURE_RATES).items()
        }
        speeds = {name: at.speedup(rate, MAX_PENDING) for name, rate in rates.items()}
        even = at.break_even(MAX_PENDING)
        found.append(
            PlannedExit(
                layer,
                own,
                size,
                covered=covered,
                break_even=even,
                rates=rates,
                speeds=speeds,
                input=reads,
                exists=exists,
            )
        )
    return max(found, key=lambda one: one.speeds["usual"] * one.speeds["easy"])


def _vocabularies(examples: Sequence[Example], size: int) -> Iterator[tuple[int | None, float]]:
    """Yield sizes of exit vocabularies and the share of target tokens that each covers.

    None means all tokens. Other sizes cover at least COVERED. Coverage is counted on every
    eighth example. Tokens are chosen on the others.
    """
    yield None, 1.0
    held_out = [one.target for one in examples[::8]]
    others = [one.target for place, one in enumerate(examples) if place % 8] or held_out
    chosen, counted = (
        np.bincount(np.concatenate(part), minlength=size) for part in (others, held_out)
    )
    covered = np.cumsum(counted[np.argsort(-chosen, kind="stable")]) / counted.sum()
    for known in (1 << power for power in range(10, (size - 1).bit_length())):
        if known <= size // 2 and covered[known - 1] >= COVERED:
            yield known, float(covered[known - 1])
