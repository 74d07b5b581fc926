"""Torch modules for an exit: its layers as a whole, its vocabulary, and its files.

An exit has transformer layers, built from a description, with a linear map before them and a norm
after them. With an exit vocabulary, one class stands for all other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from freeexport.checkpoints.exit_file import EXIT_WEIGHTS
from freeexport.training.layer_modules import (
    Encoded,
    ExitLayer,
    KeyValue,
    Read,
    capped,
    norm_module,
    parameter,
)
from graphs.description import Description, Layer
from graphs.exit_head import EXIT as PREFIX
from graphs.exit_head import OTHER, OTHER_BIAS, UNIT_EPSILON, with_exit
from runtime.bundle.manifest import FEATURE_STATES, ExitInput

if TYPE_CHECKING:
    from pathlib import Path

    from freeexport.checkpoints.checkpoint import Checkpoint

# Number of passes after a sync pass for which an exit with a deep feature is trained. The first
# pass reads the feature. Each later one reads the exit's own output at the token before. The exit
# is evaluated at pass MEASURED.
PASSES = 4
MEASURED = 2


class Exit(nn.Module):
    """Base class of an exit's own parameters, named as in graphs.exit_head without "exit.".

    `norm(forward(states, encoded))` is the input of the head. `states` [..., d] are the states
    after the exit layer. `encoded` is None for a decoder-only model.

    Attributes:
        norm: The exit's final norm.
        reads: Input of the exit. Unless it is "state", `forward` also needs `features` [..., f], of
            `joined_feature`.
    """

    norm: nn.Module
    reads: ExitInput = "state"


def joined_feature(
    normed: torch.Tensor, earlier: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """Return the feature of each position, float32 [..., f].

    It has the `earlier` states after `fused_layers`, scaled to a root mean square of 1, and then
    the final normed states of the deep decoder [..., d].
    """
    scaled = [F.rms_norm(one.float(), one.shape[-1:], eps=UNIT_EPSILON) for one in earlier or ()]
    return torch.cat([*scaled, normed.float()], dim=-1)


class JoinedInputs(Exit):
    """Concatenate each state with the feature of the previous position, as [B, n, d + f].

    The feature before the first position is zero.
    """

    def __init__(self, reads: ExitInput = "feature") -> None:
        super().__init__()
        self.reads = reads

    def forward(
        self,
        states: torch.Tensor,
        encoded: Encoded | None = None,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert features is not None
        return torch.cat([states, F.pad(features, (0, 0, 1, 0))[:, :-1].to(states.dtype)], dim=-1)


class ExitLayers(Exit):
    """An exit with its own linear map, transformer layers and norm.

    Args:
        layers: Descriptions of the layers.
        read: Returns a layer's weight by name.
        weight: Map applied before the layers: [d, d], or [d, d + f] after `JoinedInputs`.
        norm: The exit's final norm.
    """

    def __init__(
        self, layers: Sequence[Layer], read: Read, weight: np.ndarray, norm: nn.Module
    ) -> None:
        super().__init__()
        self.map = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.map.weight = parameter(weight)
        self.layers = nn.ModuleList(ExitLayer(layer, read) for layer in layers)
        self.norm = norm
        self._join = JoinedInputs()

    @property
    def reads(self) -> ExitInput:  # type: ignore[override]
        states = self.map.in_features // self.map.out_features - 1
        return next(name for name, count in FEATURE_STATES.items() if count == states)

    def fuse(self) -> None:
        """Let an exit that reads a feature also read the earlier states of a fused one.

        Their columns of the map are zero, so predictions do not change.
        """
        state, feature = self.map.weight.detach().chunk(2, dim=1)
        weight = torch.cat([state, *[torch.zeros_like(state)] * 2, feature], dim=1)
        self.map = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.map.weight = nn.Parameter(weight)

    def forward(
        self,
        states: torch.Tensor,
        encoded: Encoded | None = None,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map states [B, n, d], padded on the right, to float32 [B, n, d]."""
        return self.passes(states, encoded, features, 1)[0]

    def passes(
        self,
        states: torch.Tensor,
        encoded: Encoded | None,
        features: torch.Tensor | None,
        count: int,
    ) -> list[torch.Tensor]:
        """Return the outputs of the first `count` passes after a sync pass, at every position.

        The first pass reads the deep decoder's `features`. Each later pass reads the output of the
        pass before instead. At earlier positions it attends to the keys of earlier passes: the
        position just before has those of the previous pass, and so on back to the first.
        """
        dtype = self.map.weight.dtype
        found = list[torch.Tensor]()
        encoded = encoded and encoded._replace(states=encoded.states.to(dtype))
        before: list[list[KeyValue]] = [[] for _ in self.layers]
        for _ in range(count):
            x = states if features is None else self._join(states, features=features)
            x = self.map(x.to(dtype)).float()
            for layer, passed in zip(self.layers, before, strict=True):
                x = layer(x, encoded, passed)
            found.append(x)
            features = self.norm(x)
            if self.reads == "fused":
                features = joined_feature(features, [features] * 2)
        return found


class KnownTokens(nn.Module):
    """Head of an exit with a vocabulary.

    Class i is token `vocabulary[i]`, int64 [n], ascending. Class n stands for all other tokens,
    which never exit. The rows of known tokens are those of the model's head. Only `other` is an own
    parameter.
    """

    vocabulary: torch.Tensor

    def __init__(self, tokens: Sequence[int] | np.ndarray, width: int) -> None:
        super().__init__()
        self.register_buffer("vocabulary", torch.tensor(np.asarray(tokens, np.int64)))
        self.other = nn.Linear(width, 1)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def logits(
        self,
        normed: torch.Tensor,
        rows: torch.Tensor,
        bias: torch.Tensor | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Compute the logits of all classes, [N, n + 1], for head inputs [N, d].

        `rows` [n, d] and `bias` [n] are those of the known tokens in the model's head. The last
        class is not capped.
        """
        # Computed separately, since the rows may be frozen. Gradients for all of them would cost as
        # much as the product.
        read = normed.to(rows.dtype)
        logits = F.linear(read, rows, None if bias is None else bias.to(rows.dtype))
        other = F.linear(read, self.other.weight.to(rows.dtype), self.other.bias.to(rows.dtype))
        return torch.cat([capped(logits, softcap), other], dim=-1)

    def classes(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the classes of token ids."""
        place = torch.searchsorted(self.vocabulary, tokens).clamp(max=len(self) - 1)
        return torch.where(self.vocabulary[place] == tokens, place, len(self))

    def folded(self, logits: torch.Tensor) -> torch.Tensor:
        """Reduce logits of all tokens [N, V] to logits of the classes [N, n + 1].

        The probabilities of the other tokens are added up.
        """
        tail = logits.index_fill(-1, self.vocabulary, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([logits[:, self.vocabulary], tail], dim=-1)

    def folded_chances(self, chances: torch.Tensor) -> torch.Tensor:
        """Reduce log probabilities of all tokens [N, V] to those of the classes [N, n + 1].

        Avoids a pass over the vocabulary: the last class gets the remaining probability, at least
        1e-6.
        """
        known = chances[:, self.vocabulary]
        rest = (1 - known.double().exp().sum(-1, keepdim=True)).clamp_min(1e-6)
        return torch.cat([known, rest.log().to(known.dtype)], dim=-1)


def trained_exit(
    checkpoint: Checkpoint, description: Description
) -> tuple[ExitLayers | None, KnownTokens | None]:
    """Load a checkpoint's exit parameters.

    Returns its layers, None if it has none, and its vocabulary, None if it predicts all tokens.
    """
    decoder = with_exit(description, checkpoint).decoder
    own: ExitLayers | None = None
    known: KnownTokens | None = None
    head = decoder.exit_head or decoder.head
    if head.tokens:
        known = KnownTokens(head.tokens, description.hidden_size).eval()
        known.other.weight, known.other.bias = (
            parameter(checkpoint.read(name)) for name in (OTHER, OTHER_BIAS)
        )
    if decoder.exit_map is not None:
        weight = checkpoint.read(decoder.exit_map.weight)
        norm = norm_module(head.norm, checkpoint.read)
        own = ExitLayers(decoder.exit_layers, checkpoint.read, weight, norm).eval()
    return own, known


def write_exit(own: ExitLayers | None, known: KnownTokens | None, directory: Path) -> None:
    """Write the parameters to exit.safetensors, if there are any."""
    tensors = {}
    for module in filter(None, (own, known)):
        for name, value in module.state_dict().items():
            dtype = torch.float32 if value.is_floating_point() else torch.int32
            tensors[f"{PREFIX}{name}"] = value.detach().to("cpu", dtype).contiguous()
    if tensors:
        save_file(tensors, directory / EXIT_WEIGHTS)
