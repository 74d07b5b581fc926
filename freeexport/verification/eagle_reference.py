"""Reference of an EAGLE-3 head in torch, for the comparison of a bundle with its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.training.layer_modules import ExitLayer, linear_module, norm_module
from freeexport.training.shallow_deep import exits_of
from graphs.description import Linear
from runtime.bundle.manifest import ConfidenceMeasure
from runtime.text.sampler import UNKNOWN

if TYPE_CHECKING:
    from freeexport.training.layer_modules import Encoded
    from freeexport.verification.reference import ExitHead


def eagle_reference(checkpoint: Checkpoint, measure: ConfidenceMeasure) -> ExitHead:
    """Return the head of a checkpoint with an EAGLE-3 head.

    It reads the true features of all positions. At the first position, which it does not read, the
    logits of its tokens and the confidence are 0.
    """
    decoder = checkpoint.described().decoder
    fusion = decoder.exit_fusion
    head = decoder.exit_head
    assert fusion is not None
    assert head is not None
    fused = linear_module(fusion.linear, checkpoint.read).eval()
    layer = ExitLayer(decoder.exit_layers[0], checkpoint.read).eval()
    norm = norm_module(head.norm, checkpoint.read).eval()
    rows = linear_module(Linear(head.weight), checkpoint.read).eval()
    vocabulary = checkpoint.shape(decoder.head.weight)[0]
    tokens = torch.tensor(head.tokens or range(vocabulary))

    @torch.no_grad()
    def read(
        states: torch.Tensor, encoded: Encoded | None, layers: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        features = fused(torch.cat([layers[number] for number in fusion.layers], dim=-1))
        last = layer(features[:, :-1], None, [], states[:, 1:])
        scores = rows(norm(last))
        _, confidence = exits_of(scores.flatten(0, 1), None, measure)
        unknown = scores.new_full((*states.shape[:2], vocabulary), UNKNOWN)
        logits = unknown.index_copy(-1, tokens, F.pad(scores, (0, 0, 1, 0)))
        return logits, F.pad(confidence.reshape(len(scores), -1), (1, 0))[..., None]

    return read
