"""Trainable module for a Hugging Face model with two exits that share a head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from freeexport.training import losses
from freeexport.training.exit_modules import MEASURED, Exit, ExitLayers, KnownTokens, joined_feature
from freeexport.training.layer_modules import Encoded, capped
from freeexport.training.training_options import BuiltInLoss, LayerLoss
from graphs.description import Description
from graphs.exit_head import fused_layers
from graphs.layers import head_bias
from graphs.weights import View

if TYPE_CHECKING:
    from runtime.bundle.manifest import ConfidenceMeasure, ExitInput

Outputs = dict[str, torch.Tensor]
# Columns of the measures of a row. `loss` is the cross-entropy of both exits weighted by depth, or
# the deep exit's alone for loss "deep-ce".
MEASURES = (
    "loss",
    "shallow_loss",
    "deep_loss",
    "shallow_accuracy",
    "deep_accuracy",
    "agreement",
    "confidence",
)
# Layer numbers for the output of the exit's own layers and of the encoder.
EXIT = -1
ENCODER = -2
IGNORED = -100  # label of a position that predicts nothing


@contextmanager
def matmul_precision(bf16: bool) -> Iterator[None]:
    """Context manager: with `bf16`, float32 products use bfloat16 factors and float32 results.

    This applies to the heads. With results in bfloat16, the two best logits are often equal.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if bf16 else precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


class SharedHead(nn.Module):
    """Compute logits = scale * dropout(norm(hidden)) W^T + bias with the model's own modules.

    Logits are soft-capped by `softcap`, if given. The bias is [V].
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        norm: nn.Module,
        linear: nn.Module,
        scale: float,
        dropout: nn.Module | None = None,
        bias: torch.Tensor | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.softcap = softcap
        self.register_buffer("bias", bias, persistent=False)
        self.norm = norm
        self.linear = linear
        self.scale = scale
        self.dropout = dropout if dropout is not None else nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states [N, d] to logits [N, V]."""
        return self.read(self.normed(hidden))

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states [N, d] to inputs of the linear layer [N, d].

        Distillation of hidden states compares these.
        """
        states: torch.Tensor = self.dropout(self.norm(hidden))
        return states

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight [V, d] of the linear layer."""
        return next(self.linear.parameters())

    def read(self, normed: torch.Tensor) -> torch.Tensor:
        """Compute logits [N, V] from the output [N, d] of `normed`."""
        logits: torch.Tensor = self.linear((normed * self.scale).to(self.weight.dtype))
        return capped(logits if self.bias is None else logits + self.bias, self.softcap)

    def rows(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weights [n, d] and biases [n] of `tokens` [n]."""
        return self.weight[tokens], None if self.bias is None else self.bias[tokens]


class ShallowDeep(nn.Module):
    """Both exits of a full model, whose own parameters are trained.

    A call with a batch returns `loss`, summed over the rows whose label is not -100. In evaluation
    mode it returns the `measures` of these rows instead.
    """

    # Attributes that transformers' Trainer reads.
    accepts_loss_kwargs = True
    _keys_to_ignore_on_save: tuple[str, ...] | None = None

    def __init__(
        self,
        model: Any,
        description: Description,
        exit_layer: int,
        loss: BuiltInLoss | LayerLoss = "logit-kd",
        alpha: float = 0.5,
        also: tuple[int, ...] = (),
        own: Exit | None = None,
        known: KnownTokens | None = None,
    ) -> None:
        """Wrap `model`.

        Args:
            exit_layer: Number of layers before the exit.
            loss: Name of the loss, or a loss of the caller.
            alpha: Weight of the distillation.
            also: Layers, or ENCODER, that `hidden_states` returns in addition to those of
                the loss.
            own: The exit's own parameters. `hidden_states` returns their outputs under EXIT.
            known: Tokens of the exit's vocabulary. None: all tokens.
        """
        super().__init__()
        self.model = model
        self.exit_layer = exit_layer
        self.layers = len(description.decoder.layers)
        self.loss = loss
        self.alpha = alpha
        self.seq2seq = description.encoder is not None
        self.head = shared_head(model, description)
        self.own = own
        self.known = known
        reads: ExitInput = "state" if own is None else own.reads
        # Layers whose states are part of the exit's feature.
        self.fused = fused_layers(reads, exit_layer, self.layers)
        trained = losses.kept_layers(loss, exit_layer, self.layers)
        self.kept = tuple(sorted({*trained, *self.fused, *also}))
        self._recording: dict[int, torch.Tensor] | None = None
        stack, name = layer_list(model)
        if hasattr(stack, "layerdrop"):
            stack.layerdrop = 0.0  # M2M100 would skip layers whose states are needed
        layers = getattr(stack, name)
        if 0 in self.kept:  # embeddings, including their scale, positions and norm
            layers[0].register_forward_pre_hook(self._recorder(0))
        for number, layer in enumerate(layers, 1):
            if number in self.kept:
                layer.register_forward_hook(self._recorder(number))

    @property
    def device(self) -> torch.device:
        """Return the device of the model's parameters."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def _recorder(self, number: int) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any = None) -> None:
            output = inputs if output is None else output
            # Gradient checkpointing runs a layer again in the backward pass, when nothing is
            # recorded.
            if self._recording is not None:
                self._recording[number] = output[0] if isinstance(output, tuple) else output

        return record

    def hidden_states(self, labels: torch.Tensor, **batch: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return the outputs of the layers in `kept`, before the final norm, by layer number.

        Each is [N, d] for the rows whose label is not -100. ENCODER has the encoder's states at the
        valid positions of the prompts.
        """
        rows = (labels.reshape(-1) != IGNORED).nonzero().squeeze(1)
        self._recording = {}
        try:
            encoded = self._run(**batch)
            recorded = self._recording
        finally:
            self._recording = None
        if self.own is not None:
            states = recorded[self.exit_layer]
            features = None
            if self.own.reads != "state":
                earlier = [recorded[number] for number in self.fused]
                features = joined_feature(self.head.normed(recorded[self.layers]), earlier)
            if features is not None and isinstance(self.own, ExitLayers):
                recorded[EXIT] = self.own.passes(states, encoded, features, MEASURED)[-1]
            else:
                recorded[EXIT] = self.own(states, encoded, features)
        found = {
            n: one.reshape(-1, one.shape[-1]).index_select(0, rows) for n, one in recorded.items()
        }
        if encoded is not None and ENCODER in self.kept:
            found[ENCODER] = encoded.states[encoded.mask]
        return found

    def exit_normed(self, hidden: dict[int, torch.Tensor]) -> torch.Tensor:
        """Return inputs [N, d] of the exit's head, from the result of `hidden_states`."""
        if self.own is None:
            return self.head.normed(hidden[self.exit_layer])
        normed: torch.Tensor = self.own.norm(hidden[EXIT])
        return normed

    def read_exit(self, normed: torch.Tensor) -> torch.Tensor:
        """Compute the exit's logits from the output of `exit_normed`.

        Their shape is [N, V], or [N, n + 1] for the classes of `known`.
        """
        if self.known is None:
            return self.head.read(normed)
        rows = self.head.rows(self.known.vocabulary)
        return self.known.logits(normed * self.head.scale, *rows, self.head.softcap)

    def _run(
        self,
        attention_mask: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
    ) -> Encoded | None:
        if not self.seq2seq:
            self.model.get_decoder()(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            )
            return None
        encoder = self.model.get_encoder()
        decoder = self.model.get_decoder()
        if input_features is not None:  # a full window, without padding
            encoded = encoder(input_features)
            decoder(input_ids=decoder_input_ids, encoder_hidden_states=encoded[0], use_cache=False)
        else:
            encoded = encoder(input_ids=input_ids, attention_mask=attention_mask)
            decoder(
                input_ids=decoder_input_ids,
                encoder_hidden_states=encoded[0],
                encoder_attention_mask=attention_mask,
                use_cache=False,
            )
        return Encoded(encoded[0], attention_mask > 0)

    def forward(self, labels: torch.Tensor, **batch: torch.Tensor) -> Outputs:
        hidden = self.hidden_states(labels, **batch)
        targets = labels[labels != IGNORED]
        if not isinstance(self.loss, str) and self.training:
            return {"loss": self.loss.total(self, hidden, targets)}
        if self.loss == "deep-ce" and self.training:
            return {"loss": losses.cross_entropy(self.head(hidden[self.layers]), targets).sum()}
        states = {number: self.head.normed(hidden[number]) for number in self.kept}
        # Distillation must compare the same dropout sample that the head reads.
        shallow = self.read_exit(
            states[self.exit_layer] if self.own is None else self.exit_normed(hidden)
        )
        deep = self.head.read(states[self.layers])
        known = self.known
        by_layer = {
            self.exit_layer: losses.cross_entropy(
                shallow, targets if known is None else known.classes(targets)
            ),
            self.layers: losses.cross_entropy(deep, targets),
        }
        if not self.training:
            tokens = None if known is None else known.vocabulary
            deep_loss = by_layer[self.layers] if self.loss == "deep-ce" else None
            exits = exits_of(shallow, tokens)
            return measures(by_layer, targets, exits, deep=deep.argmax(-1), loss=deep_loss)
        loss = losses.by_depth(by_layer).sum()
        if self.loss == "logit-kd":
            meant = deep if known is None else known.folded(deep.detach().float())
            loss = loss + self.alpha * losses.logit_distillation(meant, shallow)
        if self.loss == "kd-dyn":
            teachers = losses.teacher_layers(self.exit_layer, self.layers)
            pairs = losses.dynamic_pairs(states, self.exit_layer, teachers)
            loss = loss + self.alpha * losses.hidden_distillation(states, pairs)
        return {"loss": loss}


def exits_of(
    logits: torch.Tensor, known: torch.Tensor | None = None, measure: ConfidenceMeasure = "softmax"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best token [N] and its confidence [N] for logits [N, V], as engines do.

    See graphs/layers.py. For logits [N, n + 1] of the classes of `known` tokens [n], return the
    best known token. Its confidence is 0 if the class of all other tokens scores higher.
    """
    chances = logits.float().log_softmax(-1)
    best = chances.topk(2, dim=-1)
    if measure == "entropy":
        # Clamped, so that 0 ln 0 is 0.
        entropy = -(chances.exp() * chances.clamp_min(-1e4)).sum(-1)
        confidence = 1 - entropy / math.log(logits.shape[-1])
    else:
        first, second = best.values.exp().unbind(-1)
        confidence = first if measure == "max-prob" else first - second
    token = best.indices[:, 0]
    confidence = confidence.clamp(0, 1)
    if known is None:
        return token, confidence
    other = token == len(known)
    return known[torch.where(other, best.indices[:, 1], token)], confidence.masked_fill(other, 0.0)


def measures(
    by_layer: dict[int, torch.Tensor],
    targets: torch.Tensor,
    shallow: tuple[torch.Tensor, torch.Tensor],
    deep: torch.Tensor,
    loss: torch.Tensor | None = None,
) -> Outputs:
    """Return `measures`: float32 [N, len(MEASURES)].

    `by_layer` are cross-entropies [N] of both exits, and `shallow` is the result of `exits_of`.
    Runs are compared by `loss` [N]. Default: the cross-entropies weighted by depth.
    """
    best, confidence = shallow
    hits = (best == targets, deep == targets, best == deep)
    columns = (
        losses.by_depth(by_layer) if loss is None else loss,
        *by_layer.values(),
        *hits,
        confidence,
    )
    return {"measures": torch.stack([column.float() for column in columns], dim=1)}


def shared_head(model: Any, description: Description) -> SharedHead:
    """Return the final norm and head as the model applies them."""
    head = description.decoder.head
    norm = (
        nn.Identity()
        if head.norm is None
        else _module(model, View.of(head.norm.weight).tensor.removesuffix(".weight"))
    )
    # T5 has a dropout after the norm. In other decoders, an attribute of this name is a number used
    # in their layers.
    dropout = getattr(model.get_decoder(), "dropout", None)
    linear = model.get_output_embeddings()
    state = model.state_dict()
    added = head_bias(head, description.vocab_size, lambda name: state[name].float().cpu().numpy())
    bias = torch.from_numpy(added) if added.any() else None
    dropout = dropout if isinstance(dropout, nn.Module) else None
    return SharedHead(norm, linear, head.scale, dropout=dropout, bias=bias, softcap=head.softcap)


def _module(model: Any, name: str) -> Any:
    """Find a module by name.

    The first GPT-2 checkpoints name modules as in the model without a head.
    """
    return (
        model if name.partition(".")[0] in dict(model.named_children()) else model.base_model
    ).get_submodule(name)


def layer_list(model: Any) -> tuple[Any, str]:
    """Return the module that contains the decoder layers, and the name of its attribute."""
    decoder = model.get_decoder()
    return decoder, next(name for name in ("block", "layers", "h") if hasattr(decoder, name))
